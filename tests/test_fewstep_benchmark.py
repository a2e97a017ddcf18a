"""What benchmarks/fewstep.py makes of evaluations: made-up ones, and one of a tiny student."""

import json

import pytest

from benchmarks import fewstep
from pipelines import distill
from rlhf.errors import ConfigError
from rlhf.run import Run
from tests.pipelines.test_distill import few
from tests.rlhf.tiny import judge_spec


def ratio(value, low=0.0, high=2.0):
    return {"value": value, "low": low, "high": high, "n": 8}


def evaluation(value, **settings):
    kinds = ("text/", "objects/level2/", "")
    metrics = {f"fewstep/4/{kind}strict_ratio": ratio(value) for kind in kinds}
    metrics |= {"fewstep/4/text/strict_ratio/baseline": ratio(0.5), "heldout/text": ratio(1.0)}
    return {"settings": {"n": 8, "steps": 4} | settings, "metrics": metrics}


def test_seeds_are_joined_and_one_alone_keeps_its_interval(tmp_path):
    two = fewstep.joined([evaluation(v)["metrics"] for v in (0.8, 1.0)])
    assert two["fewstep/4/text/strict_ratio"] == pytest.approx(
        {"value": 0.9, "low": 0.8, "high": 1.0, "n": 2}
    )
    one = fewstep.joined([evaluation(0.7)["metrics"]])
    assert one["fewstep/4/strict_ratio"] == ratio(0.7) and "heldout/text" not in one
    kinds = fewstep.ratios(two)
    assert list(kinds) == ["text", "objects/level2", "all"]
    assert fewstep.ratios(two, "/baseline").keys() == {"text"}
    fewstep.draw({"a": two, "b": one}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_runs_that_were_measured_otherwise_are_not_compared():
    alike = {"a": {"r0": evaluation(0.8), "r1": evaluation(0.9)}}
    alike["b"] = {"r2": evaluation(0.8, steps=8)}
    assert fewstep.settings_of(alike) == {"n": 8}
    alike["b"]["r3"] = evaluation(0.8, n=16)
    with pytest.raises(ConfigError, match="measured alike.*of r3"):
        fewstep.settings_of(alike)


def test_a_tiny_student_is_measured_once(tiny_base, tmp_path):
    distill.fewstep(few(tiny_base, tmp_path, "grid=even-2", "pace.steps=1"))
    run = tmp_path / "runs" / "tiny"
    base, judge = str(tiny_base), judge_spec("named")
    small = [f"teacher={base}", f"baseline={base}", "teacher_steps=3", "parts=[text]", "n=4"]
    words = [f"arm={run}", "--name", "one", "--out", str(tmp_path), "--set", *small]
    words += [f"judges=[{judge}]"]
    fewstep.main([*words, "per_prompt=2"])
    result = json.loads((tmp_path / "one.json").read_text())
    assert "arm/fewstep/2/text/preference/named" in result["metrics"]
    assert result["settings"]["teacher"] == base and list(result["runs"]["arm"]) == [str(run)]
    before = Run(run).read_json("evaluations/one.json")
    fewstep.main(words)
    assert Run(run).read_json("evaluations/one.json") == before


def test_an_arm_needs_a_run():
    with pytest.raises(ConfigError, match="expected ARM=RUN, got 'runs/a'"):
        fewstep.arms_of(["runs/a"])
