import math

import numpy as np
import pytest

from rewards.errors import JudgeError, RewardConfigError
from rewards.judge import FunctionJudge, Judge, load_judge, run_judge
from rewards.scenes import world
from rewards.scenes.judge import OracleJudge
from rewards.scenes.oracle import AXES
from rewards.scenes.render import render
from rewards.types import Calibration, JudgeCard, Sample, Score, Scores, failed, not_applicable


def brightness(images, prompts, sources):
    return (images.mean((1, 2, 3)) / 255).tolist()


class Stub:
    """Does to each sample what its prompt says, after breaking down `breaks` times."""

    def __init__(self, breaks: int = 0, **card):
        self.card = JudgeCard(name="stub", revision="1", preprocessing="none", **card)
        self.breaks, self.calls = breaks, []

    def score(self, samples):
        self.calls.append(len(samples))
        if self.breaks > 0:
            self.breaks -= 1
            raise ConnectionError("try again")
        if any(sample.prompt == "raise" for sample in samples):
            raise ValueError("bad sample")
        if any(sample.prompt == "short" for sample in samples):
            return []
        return [Score(value=math.nan if s.prompt == "nan" else float(s.prompt)) for s in samples]


def _samples(count: int = 9) -> list[Sample]:
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        category = ("objects", "portraits", "text", "edits")[i % 4]
        spec = world.draw(category, i)
        picture = render(spec.target if isinstance(spec, world.Edit) else spec, (64, 96)[i % 2])
        noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
        target = world.dump(spec)
        out.append(Sample(image=noisy, prompt=world.terse(spec), category=category, target=target))
    return out


JUDGES = [FunctionJudge(brightness, "brightness"), *(OracleJudge(axis) for axis in AXES)]


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.card.name)
def test_judge_contract(judge):
    samples = _samples()
    assert isinstance(judge, Judge)
    whole = run_judge(judge, samples)
    assert any(score.state == "ok" for score in whole)
    assert not any(score.state == "failed" for score in whole)
    for sample, score in zip(samples, whole, strict=True):
        if score.value is not None:
            assert judge.card.low <= score.value <= judge.card.high
        assert judge.card.covers(sample.category) or score.state == "na"
    assert run_judge(judge, samples) == whole  # deterministic, to the bit
    assert run_judge(judge, samples[::-1])[::-1] == whole  # order-free
    for size in (1, 2, 4):  # batch-size-independent, to the bit
        parts = [run_judge(judge, samples[i : i + size]) for i in range(0, len(samples), size)]
        assert [score for part in parts for score in part] == whole


def _ask(*prompts: str) -> list[Sample]:
    image = np.zeros((3, 64, 64), np.uint8)
    return [Sample(image=image, prompt=prompt, category="objects") for prompt in prompts]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("raise", "bad sample"), ("nan", "finite"), ("short", "expected 1 scores")],
)
def test_only_the_sample_at_fault_fails(fault, reason):
    scores = run_judge(Stub(), _ask("1", fault, "3"))
    assert [score.state for score in scores] == ["ok", "failed", "ok"]
    assert [score.value for score in scores] == [1.0, None, 3.0]
    assert reason in scores[1].reason


def test_retries_are_bounded_and_come_before_single_samples():
    judge = Stub(breaks=1)
    assert [score.value for score in run_judge(judge, _ask("1", "2"), retries=1)] == [1.0, 2.0]
    assert judge.calls == [2, 2]
    judge = Stub(breaks=100)
    scores = run_judge(judge, _ask("1", "2"), retries=2)
    assert judge.calls == [2, 2, 2, 1, 1]
    assert all(s.state == "failed" and "try again" in s.reason for s in scores)


def test_what_a_judge_is_not_made_for_is_na_and_never_asked():
    judge = Stub(categories=("edits",))
    assert [s.state for s in run_judge(judge, _ask("1", "raise"))] == ["na", "na"]
    judge = Stub(needs=("source",))
    assert [s.state for s in run_judge(judge, _ask("1"))] == ["na"]
    assert judge.calls == [] and run_judge(judge, []) == []


def test_function_values_and_their_states():
    def mixed(images, prompts, sources):
        return [None, 1, np.float32(0.5), math.nan, math.inf, "good", np.ma.masked]

    scores = run_judge(FunctionJudge(mixed, "mixed"), _ask(*"abcdefg"))
    assert [s.state for s in scores] == ["na", "ok", "ok", *["failed"] * 4]
    assert [s.value for s in scores] == [None, 1.0, 0.5, *[None] * 4]
    steps = Calibration(raw=(0.0, 1.0), value=(0.0, 1.0))
    assert [steps(v) for v in (-math.inf, math.inf)] == [-math.inf, math.inf]
    assert math.isnan(steps(math.nan)) and steps(2.0) == 1.0


def test_function_of_wrong_length_fails():
    scores = run_judge(FunctionJudge(lambda images, prompts, sources: [1.0] * 2, "two"), _ask("a"))
    assert scores[0].state == "failed" and "expected 1 values, got 2" in scores[0].reason


def test_function_gets_the_columns_it_names():
    seen = {}

    def named(images, prompts, sources, style, target):
        seen.update(style=style, target=target, shape=images.shape, dtype=images.dtype)
        return [0.0] * len(prompts)

    def every(images, prompts, sources, **columns):
        seen.update(columns=sorted(columns))
        return [0.0] * len(prompts)

    image = np.zeros((3, 8, 8), np.uint8)
    samples = [
        Sample(image=image, prompt="", category="x", columns={"style": "oil", "other": 1}),
        Sample(image=image, prompt="", category="x", target="t"),
    ]
    assert run_judge(FunctionJudge(named, "named"), samples)[1].state == "ok"
    assert seen["style"] == ["oil", None] and seen["target"] == [None, "t"]
    assert seen["shape"] == (2, 3, 8, 8) and seen["dtype"] == np.uint8
    run_judge(FunctionJudge(every, "every"), samples)
    assert seen["columns"] == ["category", "other", "style", "target"]


def test_a_missing_or_broken_target_is_not_a_zero():
    sample = _samples(1)[0]
    bare = Sample(image=sample.image, prompt="", category="objects")
    broken = Sample(image=sample.image, prompt="", category="objects", target="{")
    scores = run_judge(OracleJudge("fidelity"), [bare, broken, sample])
    assert [s.state for s in scores] == ["na", "failed", "ok"]
    assert "JSON" in scores[1].reason and scores[2].parts["strict"] in (0.0, 1.0)


def test_load_judge_by_each_form(tmp_path):
    assert load_judge("oracle/portrait").card.name == "oracle/portrait"
    assert load_judge("oracle/fidelity").card.categories == ("*",)
    (tmp_path / "mine.py").write_text(
        "from rewards.scenes.judge import OracleJudge\n"
        "def bright(images, prompts, sources):\n    return [0.25] * len(prompts)\n"
        "ready = OracleJudge('aesthetics')\nnumber = 3\n"
    )
    judge = load_judge(f"{tmp_path}/mine.py:bright")
    assert [s.value for s in run_judge(judge, _ask("a"))] == [0.25]
    assert load_judge(f"{tmp_path}/mine.py:ready").card.name == "oracle/aesthetics"
    assert load_judge("operator:add").card.name == "operator:add"
    with pytest.raises(RewardConfigError, match="got int"):
        load_judge(f"{tmp_path}/mine.py:number")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("oracle/fidelty", "did you mean 'oracle/fidelity'"),
        ("brightness", "my_package"),
        ("no.such.module:f", "no.such.module"),
        ("absent.py:f", "absent.py"),
        ("rewards.judge:nothing", "nothing"),
    ],
)
def test_load_judge_says_what_to_write(spec, said):
    with pytest.raises(RewardConfigError, match=said):
        load_judge(spec)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"value": math.inf}, {"value": 1.0, "state": "na"}, {"state": "failed", "value": 0.0}],
)
def test_a_score_is_a_number_or_a_reason(wrong):
    with pytest.raises(JudgeError):
        Score(**wrong)
    assert not_applicable("no").state == "na" and failed("no").value is None


def test_scores_are_rectangular_and_named():
    card, one = JudgeCard(name="a", revision="1", preprocessing="none"), Score(value=1.0)
    Scores(judges=(card,), table={"a": ((one, one), (one, one))})
    with pytest.raises(JudgeError, match="P x G"):
        Scores(judges=(card,), table={"a": ((one, one), (one,))})
    with pytest.raises(JudgeError, match="one table per judge"):
        Scores(judges=(card,), table={"b": ((one,),)})
    with pytest.raises(RewardConfigError, match="low < high"):
        JudgeCard(name="a", revision="1", preprocessing="none", low=1.0, high=1.0)


def test_a_class_of_judges_is_a_judge(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rewards.types import JudgeCard, Score\n"
        "class Mine:\n"
        "    def __init__(self):\n"
        "        self.card = JudgeCard(name='mine', revision='1', preprocessing='none')\n"
        "    def score(self, samples):\n"
        "        return [Score(value=0.5) for _ in samples]\n"
    )
    judge = load_judge(f"{tmp_path}/mine.py:Mine")
    assert judge.card.name == "mine" and len(judge.score(_ask("1", "2"))) == 2
