import itertools
import math

import pytest

from rewards.errors import RewardConfigError
from rewards.rubric import FIDELITY_CRITERIA, RUBRICS, Rubric, capped

NAMES = tuple(FIDELITY_CRITERIA)


def test_a_criterion_that_fails_caps_the_score_the_first_one_lowest():
    assert capped(dict.fromkeys(NAMES, 1.0)) == 1.0
    assert capped(dict.fromkeys(NAMES, 0.0)) == 0.0
    only_failing = [capped(dict.fromkeys(NAMES, 1.0) | {name: 0.0}) for name in NAMES]
    assert only_failing == pytest.approx([0.25, 0.5, 0.7, 0.85])
    assert capped({"presence": 0.5, "attributes": 1.0, "spatial": 1.0, "action": 1.0}) == 0.625


def test_the_mean_counts_below_the_caps():
    assert capped({"presence": 1.0, "attributes": 0.0}) == 0.5
    assert capped({"attributes": 0.5, "spatial": 0.0, "action": 0.0}) == pytest.approx(0.25)


def test_what_does_not_apply_is_left_out_and_is_not_a_zero():
    assert capped({"presence": 1.0}) == 1.0
    assert capped({"presence": 1.0, "action": 0.0}) == pytest.approx(0.8)


def test_better_in_one_criterion_is_never_worse():
    grid = (0.0, 0.3, 0.7, 1.0)
    for values in itertools.product(grid, repeat=4):
        here = dict(zip(NAMES, values, strict=True))
        assert 0.0 <= capped(here) <= 1.0
        for name in NAMES:
            more = here | {name: min(1.0, here[name] + 0.3)}
            assert capped(more) >= capped(here) - 1e-12


@pytest.mark.parametrize(
    "criteria", [{}, {"beauty": 1.0}, {"presence": 1.2}, {"action": -0.1}, {"spatial": math.nan}]
)
def test_what_is_no_criterion_is_refused(criteria):
    with pytest.raises(RewardConfigError, match="presence"):
        capped(criteria)


def test_five_rubrics_name_their_prompt_once_and_edits_see_their_source():
    assert list(RUBRICS) == ["aesthetics", "fidelity", "portrait", "instruction", "consistency"]
    assert [axis for axis, r in RUBRICS.items() if r.sources] == ["instruction", "consistency"]
    for rubric in RUBRICS.values():
        assert all(f"{level}:" in rubric.text for level in range(1, 6))
    for text in ("no prompt", "{prompt} and {prompt}"):
        with pytest.raises(RewardConfigError, match="once"):
            Rubric(axis="x", text=text)
