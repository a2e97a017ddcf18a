"""Each loss aligns the toy policy: brightness rises when it should and falls when it is told to.

Rollouts are guided (w = 3) and training is not, except where a test says otherwise. Gains are held
against their standard errors.
"""

import pytest

from tests.rlhf.toy_policy import Alignment, measure, pretrained

ERRORS = 20  # standard errors a gain must exceed
ITERATIONS = 10
LOSSES = {
    "grpo": {"loss": "grpo"},
    "grpo-recentred": {"loss": "grpo-recentred"},
    "grpo cps": {"loss": "grpo-recentred", "kernel": "cps"},
    "grpo dance": {"loss": "grpo-recentred", "kernel": "dance"},
    "guard": {"loss": "guard"},
    "dppo": {"loss": "dppo"},
    "dppo cps": {"loss": "dppo", "kernel": "cps"},
    # a lagged behaviour copy, several updates per rollout
    "nft": {"loss": "nft", "updates": 4, "lag": 0.3},
    "awm": {"loss": "awm", "updates": 4, "clip": None},
}


@pytest.fixture(scope="module")
def base():
    return pretrained()


def gain(before, after):
    """Difference of two measurements in units of its standard error."""
    return (after[0] - before[0]) / (before[1] ** 2 + after[1] ** 2) ** 0.5


@pytest.mark.parametrize("loss", LOSSES)
def test_brightness_rises_guided_and_unguided(base, loss):
    run = Alignment(policy=base, **LOSSES[loss])
    run.iterate(ITERATIONS)
    for guidance in (3.0, 1.0):
        assert gain(measure(base, guidance), measure(run.policy, guidance)) > ERRORS


@pytest.mark.parametrize("loss", LOSSES)
def test_brightness_falls_when_the_advantage_is_turned_round(base, loss):
    run = Alignment(policy=base, sign=-1.0, **LOSSES[loss])
    run.iterate(ITERATIONS)
    for guidance in (3.0, 1.0):
        assert gain(measure(base, guidance), measure(run.policy, guidance)) < -ERRORS


@pytest.mark.parametrize("loss", ["grpo", "grpo-recentred"])
def test_the_first_ratio_of_every_iteration_is_exactly_one_and_later_ones_are_clipped(base, loss):
    run = Alignment(policy=base, loss=loss, updates=3)
    run.iterate(4)
    first = [row for row in run.rows if row["update"] == 0]
    later = [row for row in run.rows if row["update"] > 0]
    assert all(row["ratio/max_dev"] == row["clip/low"] == row["clip/high"] == 0 for row in first)
    assert all(row["ratio/std"] > 0 for row in later)
    assert sum(row["clip/low"] + row["clip/high"] for row in later) > 0


@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_brightness_rises_without_guidance_too(base, loss):
    run = Alignment(policy=base, guidance=1.0, **LOSSES[loss])
    run.iterate(ITERATIONS)
    assert gain(measure(base, 1.0), measure(run.policy, 1.0)) > ERRORS


def test_plain_and_recentred_are_one_run_without_guidance(base):
    plain = Alignment(policy=base, loss="grpo", guidance=1.0)
    recentred = Alignment(policy=base, loss="grpo-recentred", guidance=1.0)
    for run in (plain, recentred):
        run.iterate(3)
    assert plain.rows == recentred.rows
    for mine, theirs in zip(plain.policy.parameters(), recentred.policy.parameters(), strict=True):
        assert mine.equal(theirs)


def test_nft_learns_from_a_behaviour_that_lags(base):
    run = Alignment(policy=base, **LOSSES["nft"])
    run.iterate(3)
    assert any(
        not old.equal(new)
        for old, new in zip(run.behaviour.parameters(), run.policy.parameters(), strict=True)
    )
    assert all(row["nft/drift"] > 0 for row in run.rows[1:])
