"""The pretraining objective: what the network sees, what it is asked for, how rows are counted."""

import pytest
import torch

from rlhf.flow import Batch, Part, flow_errors, flow_matching, loss_by_level
from rlhf.policies.base import Condition
from rlhf.policies.qwen_image21 import QwenImage21Policy

SIZE = (32, 32)
CONDITION = Condition(
    embeds_PLD=torch.zeros(1, 1, 1), image_slots_L=torch.zeros(1, dtype=torch.bool)
)


class Recorder(QwenImage21Policy):
    """Answers with `answer(x, sigma)` and keeps what it was shown."""

    def __init__(self, answer):
        self.answer = answer

    def prefix(self, condition, slot):
        return None

    def velocity(self, x, sigma, condition, *, size, prefix, slot):
        self.shown = x
        return self.answer(x, sigma)


def part(sigma, seed=0):
    draw = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, len(sigma), 4, 3, generator=draw)
    return Part(latents=latents, noise=noise, sigma=torch.tensor(sigma), condition=CONDITION)


def test_the_network_sees_the_straight_path_and_is_asked_for_its_direction():
    one = part([0.0, 0.25, 1.0])
    policy = Recorder(answer=lambda x, sigma: one.noise - one.latents)
    assert flow_errors(policy, one, SIZE).tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(policy.shown[0], one.latents[0])
    assert torch.equal(policy.shown[2], one.noise[2])
    torch.testing.assert_close(policy.shown[1], 0.75 * one.latents[1] + 0.25 * one.noise[1])
    policy.answer = lambda x, sigma: one.noise - one.latents + 2.0
    assert flow_errors(policy, one, SIZE).tolist() == pytest.approx([4.0] * 3)


def test_following_the_asked_direction_from_noise_ends_at_the_picture():
    one = part([1.0])
    x, steps = one.noise, 4
    for _ in range(steps):
        x = x - (one.noise - one.latents) / steps  # as the sampler does, sigma falling
    torch.testing.assert_close(x, one.latents)


def test_rows_count_alike_whatever_their_layout_and_a_weight_scales():
    parts = (part([0.5]), part([0.5] * 3, seed=1))
    batch = Batch(parts=parts, size=SIZE)
    policy = Recorder(answer=lambda x, sigma: torch.zeros_like(x))
    errors = torch.cat([flow_errors(policy, one, SIZE) for one in parts])
    assert batch.rows == 4
    assert flow_matching(policy, batch).item() == pytest.approx(errors.mean().item())
    assert flow_matching(policy, Batch(parts=parts, size=SIZE, weight=0.0)).item() == 0


def test_the_loss_is_read_apart_by_level_and_an_empty_bin_is_absent():
    one = part([0.1, 0.15, 0.9])
    offset = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    policy = Recorder(answer=lambda x, sigma: one.noise - one.latents + offset)
    found = loss_by_level(policy, [Batch(parts=(one,), size=SIZE)], (0.0, 0.2, 0.8, 1.0))
    assert found == pytest.approx({0.1: 2.5, 0.9: 9.0})
