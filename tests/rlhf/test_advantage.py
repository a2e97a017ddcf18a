import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rewards.types import JudgeCard, Score, Scores
from rlhf.advantage import group_advantages, spreads
from rlhf.errors import ConfigError

ONE = {"*": {"a": 1.0}}


def card(name, noise_floor=0.0, low=0.0, high=1.0):
    return JudgeCard(
        name=name,
        revision="1",
        preprocessing="none",
        categories=("*",),
        low=low,
        high=high,
        noise_floor=noise_floor,
    )


def score(value):
    """A number is ok, "na" and "failed" are themselves."""
    if isinstance(value, str):
        return Score(value=None, state=value, reason="as the test wants")
    return Score(value=float(value), state="ok")


def scores(noise_floor=0.0, **tables):
    cards = tuple(card(name, noise_floor) for name in tables)
    table = {
        name: tuple(tuple(score(v) for v in row) for row in rows) for name, rows in tables.items()
    }
    return Scores(judges=cards, table=table)


def run(given, weights=ONE, categories=("objects",), **options):
    return group_advantages(given, weights, categories, **options)


def test_three_samples_by_hand_with_the_population_std():
    """1, 2, 6: mean 3, population variance 14/3 (the unbiased one would be 7)."""
    advantages, report = run(scores(a=[[1, 2, 6]]))
    std = math.sqrt(14 / 3)
    assert_close(advantages.value_PG, torch.tensor([[-2 / std, -1 / std, 3 / std]]))
    assert advantages.live_PG.all() and advantages.value_PG.dtype == torch.float32
    assert report.metrics["reward/a/mean"] == 3 and report.metrics["advantage/live"] == 1
    assert report.metrics["reward/a/std"] == pytest.approx(std)


def test_what_a_judge_did_not_see_is_counted():
    cut = Score(value=1.0, flags=("truncated", "downscaled"))
    table = {"a": ((cut, Score(value=2.0, flags=("truncated",)), Score(value=3.0)),)}
    _, report = run(Scores(judges=(card("a"),), table=table))
    flags = {k: v for k, v in report.metrics.items() if "/flag/" in k}
    assert flags == {"reward/a/flag/truncated": 2 / 3, "reward/a/flag/downscaled": 1 / 3}


def test_noise_floor_joins_the_variance():
    advantages, _ = run(scores(noise_floor=2.0, a=[[1, 2, 6]]))
    std = math.sqrt(14 / 3 + 4)
    assert_close(advantages.value_PG, torch.tensor([[-2 / std, -1 / std, 3 / std]]))


def test_rescaling_one_judge_changes_nothing_without_a_noise_floor():
    weights = {"*": {"a": 0.3, "b": 0.7}}
    a, b = [0.1, 0.5, 0.2, 0.9], [0.4, 0.3, 0.8, 0.1]
    small, _ = run(scores(a=[a], b=[b]), weights)
    large, _ = run(scores(a=[[100 * v for v in a]], b=[b]), weights)
    assert_close(small.value_PG, large.value_PG, rtol=1e-5, atol=1e-6)

    floored, _ = run(scores(noise_floor=0.5, a=[a], b=[b]), weights)
    rescaled, _ = run(scores(noise_floor=0.5, a=[[100 * v for v in a]], b=[b]), weights)
    assert not torch.allclose(floored.value_PG, rescaled.value_PG, atol=1e-2)


@pytest.mark.parametrize("state", ["failed", "na"])
def test_a_group_with_masked_members_equals_the_group_without_them(state):
    with_mask, report = run(scores(a=[[1, state, 2, 6, state]]))
    without, _ = run(scores(a=[[1, 2, 6]]))
    assert torch.equal(with_mask.value_PG[:, [0, 2, 3]], without.value_PG)
    assert with_mask.live_PG.tolist() == [[True, False, True, True, False]]
    assert with_mask.value_PG[0, 1] == 0.0
    assert report.metrics[f"reward/a/{state}"] == pytest.approx(2 / 5)
    assert report.metrics["reward/a/mean"] == 3.0


def test_a_failed_required_judge_takes_the_sample_out_of_all_judges():
    weights = {"*": {"a": 0.5, "b": 0.5}}
    broken, _ = run(scores(a=[[1, 2, 6, 50]], b=[[3, 1, 2, "failed"]]), weights, required=("b",))
    whole, _ = run(scores(a=[[1, 2, 6]], b=[[3, 1, 2]]), weights)
    assert torch.equal(broken.value_PG[:, :3], whole.value_PG)
    assert broken.live_PG.tolist() == [[True, True, True, False]]

    tolerated, _ = run(scores(a=[[1, 2, 6, 50]], b=[[3, 1, 2, "failed"]]), weights)
    assert tolerated.live_PG.all() and tolerated.value_PG[0, 3] > 0


def test_a_required_judge_that_does_not_apply_takes_nothing_out():
    weights = {"*": {"a": 0.5, "b": 0.5}}
    advantages, _ = run(scores(a=[[1, 2, 6]], b=[["na"] * 3]), weights, required=("b",))
    alone, _ = run(scores(a=[[1, 2, 6]]))
    assert torch.equal(advantages.value_PG, alone.value_PG) and advantages.live_PG.all()


def test_equal_scores_are_not_live_and_counted_by_category_and_height():
    advantages, report = run(
        scores(a=[[0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [1, 2, 6], ["failed", "failed", 1]]),
        categories=("objects", "objects", "sign", "sign"),
    )
    assert advantages.live_PG.tolist() == [[False] * 3, [False] * 3, [True] * 3, [False] * 3]
    assert torch.count_nonzero(advantages.value_PG[[0, 1, 3]]) == 0
    objects, sign = report.by_category["objects"], report.by_category["sign"]
    assert (objects.groups, objects.live, objects.flat_high, objects.flat_low) == (2, 0, 1, 1)
    assert (sign.groups, sign.live, sign.few) == (2, 1, 1)
    assert report.metrics["advantage/live"] == 0.25


def test_equal_scores_that_round_badly_are_still_exactly_zero():
    advantages, _ = run(scores(a=[[0.1] * 7]))
    assert torch.count_nonzero(advantages.value_PG) == 0 and not advantages.live_PG.any()


def test_a_flat_judge_adds_nothing_beside_one_that_tells_samples_apart():
    weights = {"*": {"a": 0.25, "b": 0.75}}
    advantages, _ = run(scores(a=[[1, 2, 6]], b=[[5, 5, 5]]), weights)
    alone, _ = run(scores(a=[[1, 2, 6]]))
    assert_close(advantages.value_PG, 0.25 * alone.value_PG)
    assert advantages.live_PG.all()


def test_weights_are_those_of_the_category_and_renormalised_over_judges_that_apply():
    given = scores(a=[[1, 2, 6], [1, 2, 6], ["na"] * 3], b=[[3, 1, 2], [3, 1, 2], [3, 1, 2]])
    weights = {"sign": {"a": 3.0, "b": 1.0}, "*": {"b": 1.0}}
    advantages, _ = run(given, weights, ("sign", "objects", "sign"))
    only_a, _ = run(scores(a=[[1, 2, 6]]))
    only_b, _ = run(scores(a=[[3, 1, 2]]))
    mixed = 0.75 * only_a.value_PG[0] + 0.25 * only_b.value_PG[0]
    expected = torch.stack([mixed, only_b.value_PG[0], only_b.value_PG[0]])
    assert_close(advantages.value_PG, expected)


def test_a_judge_that_failed_everywhere_keeps_its_weight():
    weights = {"*": {"a": 0.5, "b": 0.5}}
    advantages, _ = run(scores(a=[[1, 2, 6]], b=[["failed"] * 3]), weights)
    alone, _ = run(scores(a=[[1, 2, 6]]))
    assert_close(advantages.value_PG, 0.5 * alone.value_PG)


def test_the_fate_of_every_dropped_group_is_named():
    given = scores(a=[["na"] * 2, ["failed"] * 2, [1, 2]], b=[["na"] * 2, [1, 2], ["failed"] * 2])
    weights = {"*": {"a": 0.5, "b": 0.5}}
    _, report = run(given, weights, ("x", "y", "z"), required=("b",))
    assert report.by_category["x"].unjudged == 1
    assert report.by_category["y"].live == 1
    assert report.by_category["z"].required == 1
    for counts in report.by_category.values():
        parts = (counts.live, counts.flat_high, counts.flat_low)
        assert sum(parts) + counts.few + counts.required + counts.unjudged == counts.groups


def test_values_are_clipped():
    advantages, _ = run(scores(a=[[0, 0, 0, 0, 0, 0, 0, 0, 0, 1]]), clip=2.0)
    assert advantages.value_PG.max() == 2.0 and advantages.value_PG.min() > -1.0


def test_the_total_is_the_weighted_raw_score_of_complete_samples():
    weights = {"*": {"a": 1.0, "b": 3.0}}
    _, report = run(scores(a=[[1, 2, 6]], b=[[3, 1, "failed"]]), weights)
    assert report.metrics["reward/total"] == pytest.approx((0.25 + 2.25 + 0.5 + 0.75) / 2)
    _, nothing = run(scores(a=[["failed"] * 2]))
    assert "reward/total" not in nothing.metrics and "reward/a/mean" not in nothing.metrics


@pytest.mark.parametrize(
    ("weights", "required", "words"),
    [
        ({"sign": {"a": 1.0}}, (), "category 'objects'"),
        ({"*": {"beauty": 1.0}}, (), "'beauty'"),
        (ONE, ("beauty",), "'beauty'"),
        ({"*": {"a": -1.0}}, (), "weights >= 0"),
        ({"*": {"a": 0.0}}, (), "positive sum"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights, required, words):
    with pytest.raises(ConfigError, match=words):
        run(scores(a=[[1, 2, 6]]), weights, required=required)


def test_one_category_per_group():
    with pytest.raises(ValueError, match="one category per group"):
        run(scores(a=[[1, 2, 6]]), categories=("x", "y"))


# --- schemes --------------------------------------------------------------------------------------

SCHEMES = ("mo-grpo", "gdpo", "weighted")
TWO = {"*": {"a": 0.3, "b": 0.7}, "sign": {"a": 0.8, "b": 0.2}}
A = [[0.1, 0.5, 0.2, 0.9], [0.3, 0.8, 0.4, 0.1], [0.6, 0.2, 0.9, 0.5]]
B = [[4.0, 3.0, 8.0, 1.0], [2.0, 6.0, 1.0, 5.0], [3.0, 3.5, 7.0, 2.0]]
CATEGORIES = ("objects", "sign", "objects")


def by_hand(scheme, a, b, categories, floor=0.0):
    """The formulas of the module, sample by sample; lists of equally long groups without holes."""
    rows = []
    for r_a, r_b, category in zip(a, b, categories, strict=True):
        w = TWO.get(category, TWO["*"])
        n = len(r_a)
        if scheme == "weighted":
            r = [w["a"] * x + w["b"] * y for x, y in zip(r_a, r_b, strict=True)]
            m = sum(r) / n
            var = sum((x - m) ** 2 for x in r) / n + (w["a"] ** 2 + w["b"] ** 2) * floor**2
            rows.append([(x - m) / math.sqrt(var) for x in r])
            continue
        row = [0.0] * n
        for weight, r in ((w["a"], r_a), (w["b"], r_b)):
            m = sum(r) / n
            std = math.sqrt(sum((x - m) ** 2 for x in r) / n + floor**2)
            row = [s + weight * (x - m) / std for s, x in zip(row, r, strict=True)]
        rows.append(row)
    if scheme == "gdpo":
        flat = [x for row in rows for x in row]
        m = sum(flat) / len(flat)
        std = math.sqrt(sum((x - m) ** 2 for x in flat) / len(flat))
        rows = [[(x - m) / (std + 1e-4) for x in row] for row in rows]
    return torch.tensor(rows)


@pytest.mark.parametrize("floor", [0.0, 0.4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_its_formula(scheme, floor):
    got, _ = run(scores(floor, a=A, b=B), TWO, CATEGORIES, scheme=scheme)
    assert_close(got.value_PG, by_hand(scheme, A, B, CATEGORIES, floor))
    assert got.live_PG.all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_every_scheme_the_others_are_as_if_the_failed_one_had_not_been(scheme):
    """T3, T14: both judges failed on it, or one that a sum cannot do without."""
    broken_a, broken_b = [r[:3] + ["failed"] for r in A], [r[:3] + ["failed"] for r in B]
    short = by_hand(scheme, [r[:3] for r in A], [r[:3] for r in B], CATEGORIES)
    for a, required in ((broken_a, ()), (A, ("b",))):
        got, _ = run(scores(a=a, b=broken_b), TWO, CATEGORIES, required=required, scheme=scheme)
        assert_close(got.value_PG[:, :3], short)
        assert torch.count_nonzero(got.value_PG[:, 3]) == 0
        assert got.live_PG.tolist() == [[True, True, True, False]] * 3
    half, _ = run(scores(a=A, b=broken_b), TWO, CATEGORIES, scheme=scheme)
    assert half.live_PG[:, 3].any() == (scheme != "weighted")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_in_every_scheme_na_judges_hand_their_weight_on_and_flat_groups_are_dead(scheme):
    na, flat = [["na"] * 4, *A[1:]], [[2.0] * 4, *B[1:]]
    got, report = run(scores(a=na, b=flat), TWO, CATEGORIES, scheme=scheme)
    rest = by_hand(scheme, A[1:], B[1:], CATEGORIES[1:])
    assert_close(got.value_PG[1:], rest)  # the batch's moments are those of what is live
    assert torch.count_nonzero(got.value_PG[0]) == 0 and not got.live_PG[0].any()
    assert report.by_category["objects"].flat_high == 1
    alone, _ = run(scores(a=na, b=B), TWO, CATEGORIES, scheme=scheme)
    mine, _ = run(scores(b=[B[0]]), {"*": {"b": 1.0}}, scheme="mo-grpo")
    if scheme != "gdpo":
        assert_close(alone.value_PG[0], mine.value_PG[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_live_is_exactly_zero(scheme):
    got, _ = run(scores(a=[[1] * 3, ["failed"] * 3]), categories=("x", "y"), scheme=scheme)
    assert torch.count_nonzero(got.value_PG) == 0 and not got.live_PG.any()


def test_only_the_plain_sum_depends_on_the_scale_of_a_judge():
    stretched = [[10 * x - 3 for x in row] for row in A]
    for scheme in SCHEMES:
        before, _ = run(scores(a=A, b=B), TWO, CATEGORIES, scheme=scheme)
        after, _ = run(scores(a=stretched, b=B), TWO, CATEGORIES, scheme=scheme)
        same = torch.allclose(before.value_PG, after.value_PG, atol=1e-5)
        assert same == (scheme != "weighted")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_judge_whose_low_scores_are_good_is_turned_round(scheme):
    given = scores(a=A, b=[[-x for x in row] for row in B])
    turned = replace(given, judges=(given.judges[0], replace(given.judges[1], better="lower")))
    got, report = run(turned, TWO, CATEGORIES, scheme=scheme)
    want, plain = run(scores(a=A, b=B), TWO, CATEGORIES, scheme=scheme)
    assert torch.equal(got.value_PG, want.value_PG)
    assert report.metrics["reward/total"] == plain.metrics["reward/total"]
    assert report.metrics["reward/b/mean"] == -plain.metrics["reward/b/mean"]
    low = replace(scores(a=[[0.1, 0.1]]), judges=(replace(card("a"), better="lower"),))
    assert run(low)[1].by_category["objects"].flat_high == 1


def test_the_share_of_a_judge_is_its_correlation_with_the_whole():
    _, report = run(scores(a=A, b=B), TWO, CATEGORIES)
    whole = by_hand("mo-grpo", A, B, CATEGORIES).flatten().numpy()
    parts = []
    for r, category in zip(A, CATEGORIES, strict=True):
        parts += list(TWO.get(category, TWO["*"])["a"] * (np.array(r) - np.mean(r)) / np.std(r))
    want = abs(np.corrcoef(parts, whole)[0, 1])
    assert report.metrics["advantage/share/a"] == pytest.approx(want, rel=1e-5)
    _, only = run(scores(a=A, b=[["na"] * 4] * 3), TWO, CATEGORIES)
    assert only.metrics["advantage/share/a"] == pytest.approx(1.0)
    assert "advantage/share/b" not in only.metrics


def test_watching_judges_have_no_say_and_figures_of_their_own():
    got, report = run(scores(a=A, b=B), ONE, CATEGORIES, watch=("b",))
    alone, _ = run(scores(a=A), ONE, CATEGORIES)
    assert torch.equal(got.value_PG, alone.value_PG)
    assert report.metrics["watch/b/mean"] == pytest.approx(np.mean(B))
    assert not any(name.startswith("reward/b") for name in report.metrics)
    for weights, required in ((TWO, ()), (ONE, ("b",))):
        with pytest.raises(ConfigError, match="'b'"):
            run(scores(a=A, b=B), weights, CATEGORIES, required=required, watch=("b",))


def test_means_and_dropped_groups_by_category():
    given = scores(a=[[1, 2, 6], [5, 5, 5]], b=[[0, 1, 2], ["na"] * 3])
    kinds = ("objects", "text")
    weights = {"objects": {"a": 1.0, "b": 1.0}, "text": {"a": 1.0}}
    _, report = run(given, weights, kinds, watch=())
    metrics = report.metrics
    assert metrics["reward/a/mean/objects"] == 3 and metrics["reward/a/mean/text"] == 5
    assert metrics["reward/b/mean/objects"] == 1 and "reward/b/mean/text" not in metrics
    assert metrics["reward/total/objects"] == 2 and metrics["reward/total/text"] == 5
    assert metrics["reward/total"] == pytest.approx(3.5)
    dropped = {name for name in metrics if name.startswith("advantage/dropped/")}
    assert dropped == {"advantage/dropped/text/flat_high"}
    assert metrics["advantage/dropped/text/flat_high"] == 1
    _, watched = run(given, {"*": {"a": 1.0}}, kinds, watch=("b",))
    assert watched.metrics["watch/b/mean/objects"] == 1


# --- how far apart --------------------------------------------------------------------------------


def test_the_spread_of_composite_rewards_by_hand():
    """0.75 a - 0.25 b of samples that have both; b says lower is better."""
    given = scores(a=[[0.2, 0.6, "failed"], [0.5, 0.5, 0.5]], b=[[0.4, 0.4, 0.0], [0.5, 0.5, 0.5]])
    cards = (given.judges[0], replace(given.judges[1], better="lower"))
    weights = {"*": {"a": 3.0, "b": 1.0}}
    one, flat = spreads(replace(given, judges=cards), weights, ["x", "x"])
    assert (one.low, one.high) == (pytest.approx(0.05), pytest.approx(0.35))
    assert one.range == pytest.approx(0.3) and one.lost == ""
    assert one.height == pytest.approx(0.2 + 0.25)  # mean, from the worst there is
    assert flat.range == 0.0 and flat.height == pytest.approx(0.5)


def test_a_group_without_two_rewards_has_no_range_but_a_reason():
    given = scores(a=[[0.2, "failed", "failed"]], b=[["na"] * 3])
    assert [s.lost for s in spreads(given, ONE, ["x"])] == ["few"]
    assert [s.lost for s in spreads(given, ONE, ["x"], ["a"])] == ["required"]
    assert [s.lost for s in spreads(given, {"*": {"b": 1.0}}, ["x"])] == ["unjudged"]
    with pytest.raises(ConfigError, match="expected judges among"):
        spreads(given, {"*": {"c": 1.0}}, ["x"])


def test_flat_groups_and_live_samples_are_counted_by_category():
    _, report = run(scores(a=[[0.1, 0.2], [0.5, 0.5], [0.9, 0.9]]), categories=["x", "x", "y"])
    metrics = report.metrics
    assert metrics["advantage/flat"] == pytest.approx(2 / 3)
    assert metrics["advantage/live"] == pytest.approx(1 / 3)
    assert metrics["advantage/live/x"] == 0.5 and metrics["advantage/live/y"] == 0.0
