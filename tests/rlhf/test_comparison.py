"""A student beside its teacher: figures of made-up pictures and scores whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from rewards import images
from rewards.judge import FunctionJudge
from rewards.types import Score, failed, not_applicable
from rlhf import comparison, heldout
from rlhf.comparison import Eyes, Said, Seen
from rlhf.errors import ConfigError
from rlhf.models.vision import Vision
from tests.rlhf.judges import brightness
from tests.rlhf.tiny import judge_spec


def task(category="text", prompts=3, each=2):
    specs = heldout.specs_of(category, 1, "heldout", prompts)
    return heldout.make_task(category, specs, prompts * each, 64, seed=1, per_prompt=each)


def flat_pictures(levels_PG):
    """Grey pictures of these levels, uint8 (P, G, 3, 64, 64)."""
    levels = np.array(levels_PG, dtype=np.uint8)
    return np.broadcast_to(levels[..., None, None, None], (*levels.shape, 3, 64, 64)).copy()


def eyes(*judges):
    """An encoder whose features are the mean colour in [0, 1], and judges."""
    plain = Vision(blocks=lambda x: [x], multiple=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    return Eyes(vision=plain, device="cpu", judges={j.card.name: j for j in judges}, rows=5)


def said(values_PG):
    """Scores of a judge; None where it does not apply, "x" where it broke down."""
    rows = [[_score(v) for v in row] for row in values_PG]
    return Said.of([s for row in rows for s in row], (len(rows), len(rows[0])))


def _score(value):
    if value is None:
        return not_applicable("no")
    return failed("broken") if value == "x" else Score(value=value)


def seen(strict_PG, apart_P=None, **judged):
    strict = np.array(strict_PG, dtype=bool)
    apart = np.ones(len(strict)) if apart_P is None else np.array(apart_P, dtype=float)
    return Seen(strict_PG=strict, apart_P=apart, said={k: said(v) for k, v in judged.items()})


def test_a_teacher_beside_itself_has_ratio_one():
    right = [np.array([[True, False], [True, True]]), np.array([[False, True]])]
    assert heldout.ratio(right, right) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    half = [np.array([[True, False], [False, False]]), np.array([[False, True]])]
    found = heldout.ratio(half, right)
    assert found is not None and found["value"] == 0.5 and found["low"] < 0.5 < found["high"]
    assert heldout.ratio(right, [np.zeros_like(r) for r in right]) is None


def test_values_know_their_prompts_over_tasks_of_unequal_groups():
    parts = [np.zeros((2, 3)), np.zeros((1, 2))]
    assert heldout.prompts_of(parts).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_picture_with_the_higher_score_wins_and_a_tie_is_half():
    mine = [said([[0.9, 0.8], [0.5, 0.5]])]
    theirs = [said([[0.1, 0.2], [0.5, 0.5 + 5e-7]])]
    found = comparison.preference("p", mine, theirs, "")["p"]
    assert found["value"] == 0.75 and found["n"] == 4
    assert comparison.preference("p", theirs, mine, "/x")["p/x"]["value"] == 0.25


def test_pairs_that_a_judge_does_not_answer_are_left_out_and_counted():
    mine = [said([[0.9, None], ["x", "x"]]), said([[0.3, 0.3]])]
    theirs = [said([[0.1, 0.2], [None, 0.5]]), said([[None, 0.1]])]
    found = comparison.preference("p", mine, theirs, "/baseline")
    assert found["p/baseline"]["value"] == 1.0 and found["p/baseline"]["n"] == 2
    assert found["p/na/baseline"] == {"value": 2, "n": 6}
    assert found["p/failed/baseline"] == {"value": 2, "n": 6}
    nothing = comparison.preference("p", [said([[None]])], [said([[0.5]])], "")
    assert nothing == {"p/na": {"value": 1, "n": 1}}


def test_the_interval_is_over_prompts_not_pictures():
    mine = [said([[1.0] * 50, [0.0] * 50])]
    theirs = [said([[0.5] * 50] * 2)]
    found = comparison.preference("p", mine, theirs, "")["p"]
    assert (found["low"], found["value"], found["high"]) == (0.0, 0.5, 1.0)


def test_a_judge_whose_lower_scores_are_better_prefers_these():
    dark = FunctionJudge(brightness, "dark")
    dark.card = replace(dark.card, better="lower")
    judges = eyes(dark, FunctionJudge(brightness, "bright"))
    kind = task(prompts=1)
    mine, theirs = (judges.see(kind, flat_pictures([levels])) for levels in ([9, 9], [90, 90]))
    found = comparison.beside("s", [mine], [theirs])
    assert found["s/preference/dark"]["value"] == 1.0
    assert found["s/preference/bright"]["value"] == 0.0


def test_distance_is_that_of_two_pictures_of_one_prompt():
    looks, kind = eyes(), task()
    mine = looks.see(kind, flat_pictures([[0, 51], [102, 102], [0, 255]]))
    assert mine.apart_P == pytest.approx(np.array([0.2, 0.0, 1.0]) * 3**0.5, rel=1e-5)
    theirs = looks.see(kind, flat_pictures([[0, 102], [0, 204], [0, 255]]))
    found = comparison.figures("s", {"student": [mine], "teacher": [theirs]})
    assert found["s/diversity_ratio"]["value"] == pytest.approx(1.2 / 2.2, rel=1e-5)
    assert found["s/diversity_ratio"]["low"] < 0.5 < 0.6 < found["s/diversity_ratio"]["high"]
    assert found["s/diversity"]["value"] == pytest.approx(0.4 * 3**0.5, rel=1e-5)
    assert found["s/diversity/teacher"]["value"] > found["s/diversity"]["value"]
    assert found["s/diversity_ratio"]["n"] == found["s/diversity"]["n"] == 3


def test_one_picture_of_a_prompt_has_no_diversity():
    one = eyes().see(task(prompts=2, each=1), flat_pictures([[0], [255]]))
    two = seen([[1, 1]], [0.5])
    alone = comparison.figures("s", {"student": [one], "teacher": [one]})
    assert not any("diversity" in name for name in alone)
    both = comparison.figures("s", {"student": [one, two], "teacher": [one, two]})
    assert both["s/diversity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    assert both["s/diversity"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}


def test_the_baseline_is_read_as_the_student_is():
    sides = {
        "student": [seen([[1, 1], [1, 0]], [0.5, 0.5], j=[[0.6, 0.6], [0.6, 0.6]])],
        "teacher": [seen([[1, 1], [1, 1]], [1.0, 1.0], j=[[0.5, 0.5], [0.5, 0.7]])],
        "baseline": [seen([[0, 1], [0, 0]], [2.0, 2.0], j=[[0.1, 0.6], [None, 0.1]])],
    }
    found = comparison.figures("s", sides)
    assert found["s/strict_ratio"]["value"] == 0.75
    assert found["s/strict_ratio/baseline"]["value"] == 0.25
    assert found["s/diversity_ratio"]["value"] == 0.5
    assert found["s/diversity_ratio/baseline"]["value"] == 2.0
    assert found["s/preference/j"]["value"] == 0.75
    assert found["s/preference/j/baseline"]["value"] == pytest.approx(1 / 3)
    assert found["s/preference/j/na/baseline"] == {"value": 1, "n": 4}
    gain = found["s/strict_gain"]
    assert (gain["before"], gain["after"], gain["gain"]) == (0.25, 0.75, 0.5)
    without = comparison.figures("s", {k: v for k, v in sides.items() if k != "baseline"})
    assert not any("baseline" in name or "gain" in name for name in without)


@pytest.mark.parametrize("category", ["text", "edits"])
def test_a_sheet_has_a_line_for_each_side(category, tmp_path):
    kind = task(category, prompts=10, each=4)
    level = {"student": 100, "teacher": 50, "baseline": 150}
    made = {k: flat_pictures([[v] * 4] * 10) for k, v in level.items()}
    comparison.sheet(kind, made, tmp_path / "a.png")
    found = images.load_image(tmp_path / "a.png")
    lines = 3 + (category == "edits")
    assert found.shape == (3, 3 * lines * 66 + 2, 16 * 66 + 2)  # 10 prompts: bands of 4, 4 and 2
    first = [int(found[0, 30 + 66 * k, 30]) for k in range(lines)]
    assert first[-3:] == [50, 100, 150]
    if category == "edits":
        source = kind.wanted[0].sources[0]
        assert (found[:, 2:66, 2:66] == source).all()
        assert (found[:, 2:66, 68:132] == source).all()


def test_two_judges_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="name each once"):
        Eyes.of("scenes", [judge_spec("named"), judge_spec("named")])
