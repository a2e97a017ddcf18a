from collections import Counter

import numpy as np
import pytest

from pipelines.data.buckets import Buckets, Ladder
from rlhf.errors import ConfigError
from rlhf.policies.qwen_image21 import tokens_of

LADDER = Ladder(resolutions=(256, 512), budget=2400)


def sizes(n=300, seed=0):
    rng = np.random.default_rng(seed)
    return [(int(h), int(w)) for h, w in rng.integers(200, 1200, (n, 2))]


def test_bucket_sizes_are_multiples_of_32_near_their_area_and_aspect():
    for resolution, rung in zip((256, 512), LADDER.rungs(), strict=True):
        assert len(rung) == 7 and (resolution, resolution) in rung
        for height, width in rung:
            assert height % 32 == width % 32 == 0
            assert 0.85 < height * width / resolution**2 < 1.15


def test_a_picture_goes_to_the_nearest_aspect_it_fills():
    assert LADDER.bucket_of((600, 600)) == (512, 512)
    assert LADDER.bucket_of((400, 500)) in LADDER.rungs()[0]  # 448x576 would enlarge it
    assert LADDER.bucket_of((448, 600)) == (448, 576)
    assert LADDER.bucket_of((100, 100)) == (256, 256)  # the smallest has to do
    for size in sizes():
        chosen = LADDER.bucket_of(size)
        rung = next(r for r in LADDER.rungs() if chosen in r)
        gaps = {b: abs(np.log(b[1] / b[0] * size[0] / size[1])) for b in rung}
        assert gaps[chosen] == min(gaps.values())


def test_an_epoch_takes_every_example_once_within_the_budget():
    given = sizes()
    buckets = Buckets(given, LADDER, seed=3)
    n = buckets.steps_per_epoch
    epochs = []
    for epoch in range(2):
        batches = [buckets.batch(epoch * n + step) for step in range(1, n + 1)]
        counts = Counter(i for batch in batches for i in batch.index)
        assert counts.keys() == set(range(len(given)))
        for size, members in buckets.members.items():
            full = LADDER.batch_size(size)
            extra = sum(counts[i] - 1 for i in members)  # fills the last batch
            assert extra == (-len(members) % full if len(members) >= full else 0)
            assert max(counts[i] for i in members) <= 2
        for batch in batches:
            assert tokens_of(batch.size) * len(batch.index) <= LADDER.budget
            few = len(buckets.members[batch.size])
            assert len(batch.index) == min(LADDER.batch_size(batch.size), few)
            assert {LADDER.bucket_of(given[i]) for i in batch.index} == {batch.size}
        epochs.append(batches)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone():
    given = sizes()
    one, other = Buckets(given, LADDER, seed=3), Buckets(given, LADDER, seed=3)
    walked = [one.batch(step) for step in range(1, 2 * one.steps_per_epoch + 1)]
    late = [7, 2 * one.steps_per_epoch, 1, one.steps_per_epoch + 1]  # as after a restart
    assert [other.batch(step) for step in late] == [walked[step - 1] for step in late]
    third = Buckets(given, LADDER, seed=4)
    assert [third.batch(step) for step in range(1, 9)] != walked[:8]
    with pytest.raises(ValueError, match="from 1"):
        one.batch(0)


def test_captions_of_one_length_come_together():
    given, lengths = [(256, 256)] * 300, [i % 7 for i in range(300)]
    buckets = Buckets(given, LADDER, 1, lengths)
    batches = [buckets.batch(step) for step in range(1, buckets.steps_per_epoch + 1)]
    mixed = [b for b in batches if len({lengths[i] for i in b.index}) > 1]
    assert len(batches) >= 32 and len(mixed) <= 7  # where two lengths meet, and the last
    pairs = Ladder(resolutions=(256, 512), budget=2400, multiple=2)
    assert [pairs.batch_size(size) for size in ((256, 256), (512, 512))] == [8, 2]
    assert [LADDER.batch_size(size) for size in ((256, 256), (512, 512))] == [9, 2]
    only = Buckets(given, LADDER, 1, lengths, index=[3, 10, 4])
    assert set(only.batch(1).index) == {3, 4, 10}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 100}, "room for 1 pictures of"),
        ({"resolutions": ()}, "resolutions and aspects"),
        ({"aspects": (-1.0,)}, "aspects above 0"),
        ({"resolutions": (16,)}, "at least 32"),
    ],
)
def test_impossible_ladders_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Ladder(**changes).check()
    with pytest.raises(ConfigError, match="at least one picture"):
        Buckets([], LADDER)
