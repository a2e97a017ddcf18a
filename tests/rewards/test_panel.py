"""Weights of a panel: each part against its formula and against judges made for it."""

import numpy as np
import pytest

from rewards.panel import Reading, accuracy, harmless, noise, panel_weights, signal, verdict
from rewards.scenes import world
from rewards.scenes.render import render


def reading(s=0.2, n=0.01, a=None, groups=8):
    return Reading(groups=groups, signal=s, noise=n, validity=a, pairs=10)


def test_signal_is_the_root_mean_variance_inside_groups():
    groups = [np.array([1.0, 3.0]), np.array([10.0, 10.0, 16.0]), np.array([99.0])]
    assert signal(groups) == pytest.approx(np.sqrt((1 + 8) / 2))  # the spread between them: nothing
    assert signal([np.array([1.0])]) is None and signal([]) is None


def test_noise_is_recovered_and_what_moves_all_alike_is_none():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(200, 4, 1))
    change = rng.normal(size=(200, 1, 4))
    tables = list(true + change + 0.3 * rng.normal(size=(200, 4, 4)))
    assert noise(tables) == pytest.approx(0.3, rel=0.05)
    assert noise(list(true + change)) == pytest.approx(0, abs=1e-9)
    assert noise([np.zeros((1, 4))]) is None and noise([]) is None


def test_harmless_changes_are_hardly_seen():
    pixels = np.stack([render(world.draw("objects", seed, level=2)) for seed in range(4)])
    made = harmless(pixels)
    assert set(made) == {"right", "down", "jpeg"}
    assert np.array_equal(made["right"][..., 1:], pixels[..., :-1])
    assert np.array_equal(made["down"][:, :, 1:], pixels[:, :, :-1])
    apart = np.abs(made["jpeg"].astype(float) - pixels)
    assert 0 < apart.mean() < 2 and made["jpeg"].shape == pixels.shape


def test_accuracy_counts_pairs_inside_groups_with_ties_half():
    labels = [np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0])]
    assert accuracy([np.array([1.0, 2.0, 3.0]), np.array([0.0, 9.0])], labels) == (1.0, 3)
    assert accuracy([np.array([3.0, 2.0, 1.0]), np.array([0.0, 9.0])], labels) == (0.0, 3)
    assert accuracy([np.array([1.0, 1.0, 3.0]), np.array([0.0, 9.0])], labels) == (2.5 / 3, 3)
    hole = [np.array([1.0, np.nan, 3.0]), np.array([np.nan, np.nan])]
    assert accuracy(hole, labels) == (1.0, 1)
    assert accuracy([np.array([1.0])], [np.array([1.0])]) == (None, 0)


def test_weights_are_share_times_validity_and_over_the_spread_for_plain_sums():
    row = {"a": reading(0.1, a=0.9), "b": reading(0.4, a=0.7), "c": reading(0.2)}
    got = panel_weights({"x": row}, {"b": 3.0})["x"]
    want = {"a": 0.8, "b": 3 * 0.4, "c": 1.0}
    assert got == pytest.approx({k: v / 3 for k, v in want.items()})
    plain = panel_weights({"x": row}, {"b": 3.0}, normalised=False)["x"]
    want = {"a": 0.8 / 0.1, "b": 3 * 0.4 / 0.4, "c": 1 / 0.2}
    assert plain == pytest.approx({k: v / 16 for k, v in want.items()})


@pytest.mark.parametrize(
    "bad, words",
    [
        (Reading(), "does not apply"),
        (reading(s=0.0), "tells no pictures apart"),
        (reading(s=0.1, n=0.1), "not above its noise"),
        (reading(a=0.5), "no better than chance"),
        (reading(a=0.2), "no better than chance"),
    ],
)
def test_a_judge_that_says_nothing_has_no_weight_and_a_reason(bad, words):
    assert verdict(bad) == words and verdict(reading()) == ""
    table = panel_weights({"x": {"good": reading(), "bad": bad}, "y": {"bad": bad}})
    assert table == {"x": {"good": 1.0, "bad": 0.0}}  # and nothing is left for y
    assert sum(table["x"].values()) == 1
