"""`rlhf reward evaluate`: which figures come out, what is beside them, and what is refused."""

import json
import re

import pytest

from pipelines import reward_evaluate
from pipelines.cli import config_program, main
from pipelines.reward_evaluate import EvaluateConfig, evaluate, plan_evaluate, summarise_evaluate
from rewards.errors import DataError
from rlhf.config import load
from rlhf.errors import ConfigError
from tests.rewards.judgements import records, write

MINE = """
import numpy as np

def red(images, prompts, sources):
    return [None if image.std((1, 2)).max() == 0 else float(image[0].mean()) for image in images]

def breaks(images, prompts, sources):
    raise RuntimeError("no weights")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judgements")
    for split, start, count in (("dev", 0, 12), ("test", 100, 16)):
        rows = records("fidelity", count, start) + records("aesthetics", count, start)
        rows += records("fidelity", 4, start, category="text")
        write(folder, split, rows)
    (folder / "mine.py").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    mine = f"{data}/mine.py:red"
    judges = ("oracle/fidelity", "oracle/aesthetics", mine)
    config = EvaluateConfig(
        judges=judges, data=str(data), axes={mine: "fidelity"}, probes=8, steady=8, out=str(out)
    )
    config.check()
    return evaluate(config), out, config


def test_the_result_holds_every_figure_under_its_stable_name(found):
    result, out, config = found
    assert json.loads((out / "result.json").read_text()) == result
    assert result["program"] == "reward evaluate"
    metrics = result["metrics"]
    names = list(result["judges"])
    assert names[:2] == ["oracle/fidelity", "oracle/aesthetics"] and len(names) == 3
    for name in names:
        for figure in ("pairwise_accuracy", "annotator_accuracy", "ece", "brier", "nll",
                       "spearman", "kendall", "best_of_n/regret", "swap_consistency", "canary/grid",
                       "tie_calibrated_accuracy", "untrained/pairwise_accuracy"):  # fmt: skip
            one = metrics[f"judge/{name}/{figure}"]
            assert set(one) == {"value", "low", "high", "n"}, figure
            assert one["low"] <= one["value"] <= one["high"] and one["n"] > 0
    for name in names[:2]:
        assert metrics[f"judge/{name}/pairwise_accuracy"]["value"] == 1.0
        assert 0.6 < metrics[f"judge/{name}/annotator_accuracy"]["value"] < 1.0
        assert metrics[f"judge/{name}/failed"]["value"] == 0.0
        assert metrics[f"judge/{name}/drift"]["value"] == 0.0
    assert metrics[f"judge/{names[2]}/na"] == {"value": 0.25, "n": 80}  # the blank pictures
    assert metrics["judge/oracle/fidelity/pairwise_accuracy"]["n"] == 20 * 6
    assert metrics["judge/oracle/aesthetics/pairwise_accuracy"]["n"] <= 16 * 6


def test_the_page_holds_its_figures(found):
    result, out, config = found
    page = (out / "report.html").read_text()
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,', page)
    assert pictures == ["Reliability", "Score against gold", "Canaries"] * 3
    assert "src=" in page and "http" not in page.replace("http-equiv", "")
    assert len(list((out / "figures").glob("*.png"))) == 9
    for name in result["judges"]:
        assert name in page


def test_the_table_has_a_row_for_each_judge(found):
    result, out, config = found
    text = summarise_evaluate(result)
    lines = text.splitlines()
    assert "untrained" in lines[0] and "worst canary" in lines[0]
    assert lines[1].startswith("oracle/fidelity ") and "1.000" in lines[1]
    assert str(out / "report.html") in text
    plan = plan_evaluate(config)
    assert "on fidelity: 120 pairs of 80 pictures of 20 prompts" in plan


def test_a_judge_that_breaks_is_reported_and_not_scored(data, tmp_path):
    spec = f"{data}/mine.py:breaks"
    config = EvaluateConfig(
        judges=(spec,), data=str(data), axes={spec: "aesthetics"}, most=12, out=str(tmp_path)
    )
    result = evaluate(config)
    (name,) = result["judges"]
    assert result["metrics"][f"judge/{name}/failed"]["value"] == 1.0
    assert f"judge/{name}/pairwise_accuracy" not in result["metrics"]
    assert result["judges"][name]["reasons"] == {"RuntimeError: no weights": 8}
    assert "no weights" in (tmp_path / "report.html").read_text()
    assert " -" in summarise_evaluate(result)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judges": ()}, "expected judges and data"),
        ({"data": ""}, "expected judges and data"),
        ({"judges": ("oracle/fidelity",) * 2}, "each once"),
        ({"judges": ("oracle/portrait",)}, "rows of axis 'portrait'.*axes="),
        ({"axes": {"oracle/portrait": "fidelity"}}, "axes: expected judges among"),
        ({"probes": 0}, "probes"),
        ({"most": 0}, "most"),
        ({"margin": -0.1}, "margin"),
    ],
)
def test_what_cannot_be_measured_is_refused(data, tmp_path, changes, message):
    given = {"judges": ("oracle/fidelity",), "data": str(data), "out": str(tmp_path), **changes}
    config = EvaluateConfig(**given)
    with pytest.raises((ConfigError, DataError), match=message):
        config.check()
        evaluate(config)


def test_it_runs_from_the_command_line(data, tmp_path, capsys):
    program = config_program("reward/evaluate")
    assert program is not None and program.module == "reward_evaluate"
    config = load(program.attribute("Config"), "evaluate", [], "reward")
    assert [reward_evaluate.axis_of(config, spec) for spec in config.judges][1] == "fidelity"
    words = ["reward", "evaluate", "judges=[oracle/fidelity]", f"data={data}", "most=12"]
    assert main([*words, "probes=4", "steady=4", f"out={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == str(data)
