import io

import numpy as np
import pytest

from rewards import images
from rewards.errors import DataError
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.training import splits
from rewards.training.schema import Judgement
from rewards.training.splits import (
    annotator_offsets,
    check_disjoint,
    split_of,
    thumbnail,
    without_offsets,
)


def test_a_prompt_stays_in_its_split_for_ever():
    pinned = {0: "dev", 6: "dev", 10: "test"}
    assert all(split_of(f"prompt {i}") == pinned.get(i, "train") for i in range(12))
    assert split_of("A  red Circle ") == split_of("a red circle")
    assert {split_of(f"p{i}", {"train": 1.0}) for i in range(50)} == {"train"}


def test_shares_are_met_and_a_seed_deals_anew():
    names = [f"prompt {i}" for i in range(4000)]
    for seed in (0, 1):
        splits = [split_of(n, {"train": 3.0, "dev": 1.0, "test": 1.0}, seed) for n in names]
        assert splits.count("train") == pytest.approx(2400, abs=120)
        assert splits.count("dev") == pytest.approx(800, abs=100)
    other = [split_of(n, seed=1) for n in names]
    assert sum(a == b for a, b in zip(other, map(split_of, names), strict=True)) < 3200


def scene(seed, split="train"):
    return render(world.draw("objects", seed, split=split, level=2), 64)


def point(group, *pictures, sources=()):
    return Judgement(
        kind="point",
        axis="a",
        prompt=group,
        images=pictures,
        sources=sources,
        ratings=(3.0,),
    )


def test_splits_that_share_nothing_pass():
    train = [point(f"train {i}", scene(i)) for i in range(150)]
    dev = [point(f"dev {i}", scene(i, "heldout")) for i in range(150)]
    test = [point(f"test {i}", scene(i, "align-heldout")) for i in range(150)]
    check_disjoint(iter(train), iter(dev), iter(test))
    check_disjoint(train + train, [], test)  # within a split anything may recur
    flat = np.full((3, 16, 16), 9, np.uint8)
    check_disjoint([point("a", flat)], [point("b", flat + 1)], [])  # nothing to compare


def test_a_group_in_two_splits_is_named():
    with pytest.raises(DataError, match=r"1 groups in two: 'A cat' of train and 'a  cat' of test"):
        check_disjoint([point("A cat", scene(0))], [], [point("a  cat", scene(1))])


def test_a_picture_in_two_splits_is_named_once():
    leak = scene(0)
    dev = [point("b", leak), point("c", leak), point("d", scene(2))]
    with pytest.raises(DataError, match=r"got 1 pictures in two: 'a' of train and 'b' of dev: "):
        check_disjoint([point("a", leak)], dev, [])
    with pytest.raises(DataError, match="1 pictures in two: 'a' of train and 'e' of test"):
        check_disjoint([point("a", leak)], [], [point("e", scene(3), sources=(leak,))])


def jpeg(picture):
    buffer = io.BytesIO()
    images.to_pil(picture).save(buffer, "JPEG", quality=90)
    return images.from_pil(images.decode(buffer.getvalue())[0])


def twice(picture):
    return np.asarray(picture).repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("copy", [jpeg, twice])
def test_a_copy_of_a_picture_is_noticed(copy):
    train = [point(f"a{i}", scene(i)) for i in range(40)]
    test = [point(f"b{i}", copy(scene(i))) for i in range(40)]
    with pytest.raises(DataError, match="pictures in two: 'a0' of train and 'b0' of test") as found:
        check_disjoint(train, [], test)
    count = int(str(found.value).split("got ")[1].split()[0])
    assert count > 36


def test_a_thumbnail_is_the_mean_of_cells():
    picture = np.random.default_rng(0).integers(0, 256, (3, 64, 32), dtype=np.uint8)
    cells = picture.reshape(3, 8, 8, 8, 4).mean((2, 4)).transpose(1, 2, 0)
    np.testing.assert_allclose(thumbnail(picture), cells, atol=1)


def test_pictures_are_sought_only_near_but_all_of_these():
    """Against every pair, on thumbnails that are close by chance."""
    draw = np.random.default_rng(1)
    base = draw.integers(20, 230, (6, 8, 8, 3))

    def near():
        size = draw.choice([3, 5])  # two of 3 are always near, of 5 hardly ever
        change = draw.integers(-size, size + 1, (8, 8, 3))
        return (base[draw.integers(6)] + change).astype(np.uint8)

    a, b = [near() for _ in range(30)], [near() for _ in range(30)]
    wanted = {
        j
        for j, y in enumerate(b)
        if any(np.abs(x.astype(int) - y.astype(int)).max() <= 6 for x in a)
    }
    assert 5 < len(wanted) < 25
    one = {x.tobytes(): f"a{i}" for i, x in enumerate(a)}
    two = {y.tobytes(): f"b{j}" for j, y in enumerate(b)}
    for x, y in splits._same_pictures(one, two):
        i, j = int(x[1:]), int(y[1:])
        assert np.abs(a[i].astype(int) - b[j].astype(int)).max() <= 6
        wanted.remove(j)
    assert not wanted


def ratings(offsets, prompts, seed=0, share=1.0):
    """Every annotator rates a share of the prompts; the prompt's level is anywhere."""
    draw = np.random.default_rng(seed)
    level = draw.normal(0, 2, prompts)
    rows = [
        (level[p] + b + draw.normal(0, 0.3), name, f"p{p}")
        for name, b in offsets.items()
        for p in range(prompts)
        if draw.random() < share
    ]
    return tuple(zip(*rows, strict=True))


def test_offsets_of_annotators_are_found_whoever_rated_the_better_prompts():
    true = {"a": 0.8, "b": -0.5, "c": -0.3}
    found = annotator_offsets(*ratings(true, 300, share=0.5), prior=1.0)
    assert found == pytest.approx(true, abs=0.1)
    assert sum(found.values()) == pytest.approx(0, abs=0.02)


def test_offsets_are_shrunk_and_need_company():
    rating, who, where = ratings({"a": 1.0, "b": -1.0}, 10)
    found = annotator_offsets(rating, who, where, prior=10.0)
    assert 0.35 < found["a"] < 0.65 and found["a"] == pytest.approx(-found["b"], abs=0.05)
    alone = annotator_offsets([5.0, 5.0, 1.0, 1.0], ["a", "a", "b", "b"], ["p", "q", "r", "s"])
    assert alone == pytest.approx({"a": 0, "b": 0})
    assert annotator_offsets([5.0, 1.0], ["", "x"], ["p", "p"], prior=0.0).keys() == {"x"}
    assert annotator_offsets([], [], []) == {}
    with pytest.raises(DataError, match="got 1, 2 and 1"):
        annotator_offsets([1.0], ["a", "b"], ["p"])


def test_offsets_are_taken_off_points_alone():
    def one(kind, rating, name):
        pictures = (scene(0),) if kind == "point" else (scene(0), scene(1))
        return Judgement(
            kind=kind, axis="a", prompt="p", images=pictures, ratings=(rating,), annotator=name
        )

    given = [one("point", 4.0, "a"), one("point", 1.2, "a"), one("pair", 1.0, "a")]
    given += [one("point", 4.0, "b")]
    after = [j.ratings[0] for j in without_offsets(given, {"a": 0.5})]
    assert after == [3.5, 1.0, 1.0, 4.0]
