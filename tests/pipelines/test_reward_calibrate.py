"""`rlhf reward calibrate`: a panel weighed on a tiny policy's pictures, and used by a run."""

import json

import pytest
import yaml

from pipelines.cli import main
from tests.pipelines.test_align import fails
from tests.rlhf.tiny import arguments, judge_spec

BRIGHT, DARK, FLAT = (judge_spec(n) for n in ("brightness", "darkness", "constant"))


def command(base, folder, *more):
    lines = [
        {"prompt": f"a red circle number {i}", "category": "ab"[i % 2], "target": None}
        for i in range(4)
    ]
    (folder / "four.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [
        *["reward", "calibrate", f"policy.model={base}", f"out={folder / 'cal'}"],
        *[f"prompts.source={folder / 'four.jsonl'}", "prompts.count=0", "group_size=3"],
        *["rollout.steps=2", "rollout.guidance=1.0", "rescored=2", "cluster.kind=local"],
        f"judges=[{BRIGHT},{DARK},{FLAT},oracle/fidelity]",
        *more,
    ]


def test_a_panel_is_weighed_and_a_run_takes_the_weights(tiny_base, tmp_path, capsys):
    gold = f"gold={{{DARK}: {BRIGHT}, {BRIGHT}: {BRIGHT}}}"
    assert main([*command(tiny_base, tmp_path, gold), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "cal" / "result.json").read_text())
    for category in "ab":
        found = {k: v["value"] for k, v in result["metrics"].items() if f"/{category}/" in k}
        name = f"calibrate/{category}/"
        assert found[f"{name}{BRIGHT}/validity"] == 1 and found[f"{name}{DARK}/validity"] == 0
        assert found[f"{name}{BRIGHT}/signal"] > found[f"{name}{BRIGHT}/noise"] > 0
        assert found[f"{name}{BRIGHT}/repeat"] == 0
        assert found[f"{name}{BRIGHT}/weight"] == 1
        assert result["unweighted"][category] == {
            BRIGHT: "",
            DARK: "no better than chance",
            FLAT: "tells no pictures apart",
            "oracle/fidelity": "does not apply",
        }
    path = tmp_path / "cal" / "weights.yaml"
    table = yaml.safe_load(path.read_text())
    assert table == result["weights"] and table["a"][BRIGHT] == 1.0
    run = arguments(tiny_base, tmp_path, f"weights_from={path}", "iterations=1")
    run += [f"prompts.source={tmp_path / 'four.jsonl'}"]
    run += [f"judges=[{BRIGHT},{DARK},{FLAT},oracle/fidelity]"]
    assert main(run) == 0
    stored = yaml.safe_load((tmp_path / "runs" / "tiny" / "config.yaml").read_text())
    assert stored["weights"] == table and stored["weights_from"] is None


def test_the_plan_and_the_table_are_readable(tiny_base, tmp_path, capsys):
    assert main([*command(tiny_base, tmp_path), "--dry-run"]) == 0
    assert "weights.yaml" in capsys.readouterr().out and not (tmp_path / "cal").exists()
    assert main(command(tiny_base, tmp_path, "shares={oracle/fidelity: 2.0}")) == 0
    text = capsys.readouterr().out
    assert "does not apply" in text and "validity" in text


@pytest.mark.parametrize(
    "change, code, words",
    [
        ("group_size=1", 2, "group_size >= 2"),
        ("rescored=1", 2, "rescored 0 or 2"),
        ("cluster={kind: ray, learners: 2}", 2, "nothing is trained here"),
        ("judges=[]", 2, "expected at least one"),
        ("gold={beauty: oracle/fidelity}", 2, "expected judges among"),
        ("shares={beauty: 1.0}", 2, "expected judges among"),
        (f"judges=[{BRIGHT},{BRIGHT}]", 2, "expected each once"),
        (f"judges=[{judge_spec('always_raises')}]", 1, "at lunch"),
        ("rollout.kernel=flow-sde", 2, "expected ode"),
    ],
)
def test_what_cannot_be_weighed_is_refused(change, code, words, tiny_base, tmp_path, capsys):
    got, text = fails(capsys, command(tiny_base, tmp_path, change))
    assert got == code and words in text and not (tmp_path / "cal").exists()


def test_weights_come_from_one_place(tiny_base, tmp_path, capsys):
    path = tmp_path / "w.yaml"
    path.write_text("'*': {beauty: much}\n")
    given = f"weights={{'*': {{{BRIGHT}: 1.0}}}}"
    for more, words in (
        ((f"weights_from={path}", given), "write weights or weights_from"),
        ((f"weights_from={path}",), "weights_from.*.beauty"),
        (("weights_from=gone.yaml",), "gone.yaml"),
    ):
        code, text = fails(capsys, arguments(tiny_base, tmp_path, *more))
        assert code == 2 and words in text and not (tmp_path / "runs").exists()
