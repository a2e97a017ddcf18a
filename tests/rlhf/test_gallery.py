"""Many prompts in one call make the pictures that a call per prompt makes."""

import numpy as np
import pytest

from rlhf.errors import ConfigError
from rlhf.gallery import Painter, Wanted, assemble
from rlhf.sampling import sample
from tests.rlhf.tiny import make_policy, picture, sampler, shake


@pytest.fixture(scope="module")
def painter(tiny_base):
    policy = make_policy(tiny_base)
    shake(policy)
    return Painter(policy)


def wanted():
    """Two lengths of text, two edits of one layout with different sources, an uneven group."""
    edits = [
        Wanted(text="a blue square", seeds=(7, 8), sources=(picture(s, 64, 64),)) for s in (1, 2)
    ]
    return [
        Wanted(text="a red circle on white", seeds=(1, 2)),
        edits[0],
        Wanted(text="a red circle on black", seeds=(3, 4)),
        Wanted(text="HI", seeds=(5, 6)),
        edits[1],
    ]


def paint(painter, asked, made_by, rows=64):
    batches = painter.batches(asked, made_by, rows)
    return batches, assemble(((b, painter.paint(b)) for b in batches), len(asked))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_of_prompts_makes_the_pictures_of_each_prompt(painter, guidance):
    made_by = sampler(guidance=guidance)
    _, got = paint(painter, wanted(), made_by)
    for one, mine in zip(wanted(), got, strict=True):
        alone = sample(painter.policy, made_by, one.text, sources=one.sources, seeds=one.seeds)
        gap = np.abs(alone.pixels.numpy().astype(int) - mine)
        assert gap.max() <= 1 and gap.mean() < 0.01
    assert len({mine.tobytes() for mine in got.reshape(-1, *got.shape[2:])}) == 10


def test_prompts_of_one_layout_share_a_batch_up_to_the_rows_allowed(painter):
    batches, _ = paint(painter, wanted(), sampler())
    encode = painter.policy.encode
    assert any(len(b.index) > 1 for b in batches)
    for batch in batches:
        assert len({encode(w.text, w.sources).layout for w in batch.wanted}) == 1
    few, got = paint(painter, wanted(), sampler(), rows=2)
    assert [len(b.index) for b in few] == [1] * 5 and got.shape == (5, 2, 3, 64, 64)


def test_stochastic_sampling_is_refused(painter):
    with pytest.raises(ConfigError, match="kernel ode"):
        painter.batches(wanted(), sampler("grpo"))


def test_pictures_that_are_missing_are_noticed(painter):
    batches = painter.batches(wanted(), sampler())
    with pytest.raises(ValueError, match="5 prompts"):
        assemble(((b, painter.paint(b)) for b in batches[:1]), 5)
