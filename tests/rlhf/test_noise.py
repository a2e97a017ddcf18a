import numpy as np
import pytest
import torch

from rlhf.noise import generator, initial_noise, step_noise


def draws():
    return [
        initial_noise(5, (4, 3)),
        step_noise(5, 2, (4, 3)),
        torch.rand(3, generator=generator(5)),
    ]


def test_noise_neither_reads_nor_moves_the_global_generators():
    # beartype itself draws from `random`, so that one is not watched here
    before = (torch.get_rng_state().tolist(), str(np.random.get_state()))
    first = draws()
    after = (torch.get_rng_state().tolist(), str(np.random.get_state()))
    assert before == after
    torch.rand(3)
    np.random.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(), strict=True))


def test_a_sample_has_the_same_noise_in_any_batch():
    def batch(seeds):
        return torch.stack([step_noise(seed, 3, (4, 3)) for seed in seeds])

    whole = batch([10, 11, 12, 13])
    assert torch.equal(batch([13, 11]), whole[[3, 1]])
    assert torch.equal(torch.cat([batch([10]), batch([11, 12]), batch([13])]), whole)


def test_no_two_keys_share_a_stream():
    keys = [
        (0,),
        (0, 0),
        (1,),
        (1, 0),
        (0, 1),
        (2**32,),
        (2**32, 7),
        (0, 1 + 7 * 2**32),
        (7, 2**32),
    ]
    streams = [tuple(torch.rand(4, generator=generator(*key)).tolist()) for key in keys]
    streams += [tuple(initial_noise(seed, (4,)).tolist()) for seed in (0, 1, 2**40)]
    streams += [tuple(step_noise(s, i, (4,)).tolist()) for s in (0, 1, 2**40) for i in range(3)]
    assert len(set(streams)) == len(streams)


def test_noise_is_standard_normal_fp32_on_the_cpu():
    z = torch.stack([step_noise(seed, 0, (100,)) for seed in range(2000)])
    assert z.dtype == torch.float32 and z.device.type == "cpu"
    assert abs(z.mean().item()) < 0.012 and abs(z.std().item() - 1) < 0.008  # 5 standard errors
    siblings = torch.corrcoef(z[:20]) - torch.eye(20)
    assert siblings.abs().max() < 0.5


def test_the_stream_is_pinned():
    """Rollouts of a resumed run must repeat those of the run before: this changes never."""
    assert initial_noise(1, (3,)).tolist() == pytest.approx(PINNED_INITIAL, abs=1e-6)
    assert step_noise(1, 2, (3,)).tolist() == pytest.approx(PINNED_STEP, abs=1e-6)


def test_keys_that_cannot_be_named_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        generator()
    with pytest.raises(ValueError, match="non-negative"):
        initial_noise(-1, (3,))


PINNED_INITIAL = [-0.9696098566, -0.5473995805, 0.2863062832]
PINNED_STEP = [-1.5725983381, 0.3006697893, 0.5061684847]
