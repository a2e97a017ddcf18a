"""Many prompts in one call make the pictures that a call per prompt makes."""

import numpy as np
import pytest
from rich.console import Console

from rlhf.cluster.pool import Here
from rlhf.errors import ConfigError
from rlhf.gallery import Album, Painter, Studio, Wanted, assemble
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


def test_an_album_paints_once_what_is_the_same_and_nothing_else(painter, tmp_path):
    calls = []

    class Counting(Painter):
        def paint(self, batch):
            calls.append(batch)
            return super().paint(batch)

    hands = Here(lambda: Counting(painter.policy))
    studio = Studio(painter=painter, workers=hands, rows=64, console=Console(quiet=True))
    album = Album(studio=studio, folder=tmp_path, maker="a")
    asked, made_by = wanted(), sampler()
    first = album.paint(asked, made_by, "first")
    count = len(calls)
    again = album.paint(asked, made_by, "again")
    assert count > 0 and len(calls) == count
    assert (again.pixels == first.pixels).all() and again.seconds == first.seconds > 0
    direct = studio.paint(asked, made_by, "direct").pixels
    assert (direct == first.pixels).all()
    files = len(list(tmp_path.iterdir()))
    others = [
        (album, asked[:4], made_by),
        (album, asked, sampler(guidance=2.5)),
        (album, [*asked[:3], Wanted(text="HI", seeds=(5, 9)), asked[4]], made_by),
        (album, [asked[0], asked[4], asked[2], asked[3], asked[1]], made_by),
        (Album(studio=studio, folder=tmp_path, maker="b"), asked, made_by),
    ]
    for number, (one, prompts, how) in enumerate(others, start=1):
        one.paint(prompts, how, "other")
        assert len(list(tmp_path.iterdir())) == files + number
