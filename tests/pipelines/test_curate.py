"""`rlhf curate`: prompts whose pictures judges tell apart are kept, and read back by a run."""

import json
import os
import signal
from dataclasses import replace

import pytest

from pipelines import curate
from pipelines.cli import main
from rlhf import curation
from rlhf.errors import PromptError
from rlhf.prompts import PromptSet, load_prompts
from rlhf.types import Prompt
from tests.pipelines.test_align import fails
from tests.rlhf.tiny import arguments, judge_spec

RED = judge_spec("red_where_wanted")
ROWS = [
    {"prompt": "a red circle", "category": "ab", "negative_prompt": "grey", "wanted": True},
    {"prompt": "a blue circle", "category": "ab", "wanted": False},
    {"prompt": "a square", "category": "c/d", "target": "{}", "wanted": True},
    {"prompt": "two squares", "category": "c/d", "wanted": None},
    {"prompt": "three squares", "category": "c/d", "wanted": False},
]


def command(base, folder, *more):
    (folder / "five.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return [
        *["curate", f"policy.model={base}", f"runs={folder / 'runs'}", "name=tiny"],
        *[f"prompts.source={folder / 'five.jsonl'}", "prompts.count=0", "group_size=3"],
        *["rollout.steps=2", "rollout.guidance=1.0", "cluster.kind=local", "at_once=2"],
        f"judges=[{RED}]",
        *more,
    ]


def texts(path):
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_what_is_kept_and_what_is_dropped_and_why(tiny_base, tmp_path, capsys):
    assert main([*command(tiny_base, tmp_path), "--json"]) == 0
    run = tmp_path / "runs" / "tiny"
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((run / "result.json").read_text())
    assert texts(run / "kept.jsonl") == ["a red circle", "a square"]
    dropped = [json.loads(line) for line in (run / "dropped.jsonl").read_text().splitlines()]
    assert [(d["prompt"], d["why"], d["reward_range"]) for d in dropped] == [
        ("a blue circle", "narrow_low", 0.0),
        ("two squares", "unjudged", None),
        ("three squares", "narrow_low", 0.0),
    ]
    value = {name: (m["value"], m.get("n")) for name, m in result["metrics"].items()}
    assert value["curate/kept"] == (2 / 5, 5) and value["curate/ab/kept"] == (1 / 2, 2)
    assert value["curate/c/d/unjudged"] == (1 / 3, 3) and value["curate/c/d/narrow_high"] == (0, 3)
    low, median, high = result["table"]["c/d"]["range"]
    assert 0 == low or low < median < high
    back = load_prompts(PromptSet(source=str(run / "kept.jsonl"), count=0))
    asked = load_prompts(PromptSet(source=str(tmp_path / "five.jsonl"), count=0))
    assert [replace(p, id="") for p in back] == [replace(asked[i], id="") for i in (0, 2)]
    assert texts(run / "kept" / "c%2Fd.jsonl") == ["a square"]


def test_a_run_trains_on_what_was_kept(tiny_base, tmp_path):
    assert main(command(tiny_base, tmp_path)) == 0
    kept = tmp_path / "runs" / "tiny" / "kept.jsonl"
    argv = arguments(tiny_base, tmp_path, f"prompts.source={kept}", "name=next", "iterations=1")
    assert main(argv) == 0
    row = json.loads((tmp_path / "runs" / "next" / "metrics.jsonl").read_text())
    assert row["advantage/live"] == 1 and row["advantage/flat"] == 0


def test_a_stopped_curation_continues_to_the_same_end(tiny_base, tmp_path, capsys, monkeypatch):
    assert main([*command(tiny_base, tmp_path, "name=whole"), "--json"]) == 0
    score, calls = curate._score, []

    def counted(*given):
        calls.append(given[3])
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*given)

    monkeypatch.setattr(curate, "_score", counted)
    code, text = fails(capsys, command(tiny_base, tmp_path))
    run, whole = (tmp_path / "runs" / name for name in ("tiny", "whole"))
    assert code == 3 and f"--resume {run}" in text and not (run / "kept.jsonl").exists()
    assert main(["curate", "--resume", str(run)]) == 0
    assert calls == [0, 1, 2]
    for name in ("kept.jsonl", "dropped.jsonl", "groups/000001.json", "groups/000002.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    results = [json.loads((r / "result.json").read_text()) for r in (run, whole)]
    assert results[0]["table"] == results[1]["table"]


def test_another_threshold_needs_no_pictures_and_another_seed_is_refused(
    tiny_base, tmp_path, capsys, monkeypatch
):
    assert main(command(tiny_base, tmp_path)) == 0
    run = str(tmp_path / "runs" / "tiny")
    monkeypatch.setattr(curate, "make_cluster", None)
    assert main(["curate", "--resume", run, "threshold=0.9"]) == 0
    assert texts(tmp_path / "runs" / "tiny" / "kept.jsonl") == []
    capsys.readouterr()
    code, text = fails(capsys, ["curate", "--resume", run, "seed=1"])
    assert code == 2 and "start a new run" in text
    code, text = fails(capsys, ["curate", "--resume", run, "weights={'*': {beauty: 1.0}}"])
    assert code == 2 and "expected judges among" in text


def test_the_order_of_parts_does_not_matter_to_what_is_measured(tiny_base, tmp_path):
    assert main(command(tiny_base, tmp_path)) == 0
    assert main(command(tiny_base, tmp_path, "name=one", "at_once=9")) == 0
    files = [(tmp_path / "runs" / name / "kept.jsonl").read_bytes() for name in ("tiny", "one")]
    assert files[0] == files[1]


def test_a_dry_run_prints_the_arithmetic_and_writes_nothing(tiny_base, tmp_path, capsys):
    assert main([*command(tiny_base, tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "all prompts x 3 samples, 6 forwards each prompt" in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change, code, words",
    [
        ("group_size=1", 2, "group_size: expected at least 2"),
        ("threshold=-0.1", 2, "threshold: expected 0 or more"),
        ("cluster={kind: ray, learners: 2}", 2, "nothing is trained here"),
        ("at_once=0", 2, "at_once >= 1"),
        ("judges=[]", 2, "expected at least one"),
        (f"judges=[{RED},{RED}]", 2, "expected each once"),
        (f"weights={{ab: {{{RED}: 1.0}}}}", 2, "['c/d']"),
        ("required=[other]", 2, "expected judges among"),
        ("weights_from=gone.yaml", 2, "gone.yaml"),
        ("rollout.guidance=0.5", 2, "guidance: expected 1"),
        ("prompts.source=gone.jsonl", 2, "there is no such file"),
    ],
)
def test_what_cannot_be_curated_is_refused(change, code, words, tiny_base, tmp_path, capsys):
    got, text = fails(capsys, command(tiny_base, tmp_path, change))
    assert got == code and words in text and not (tmp_path / "runs").exists()


def test_a_judge_that_fails_too_often_ends_it_and_nothing_is_stored(tiny_base, tmp_path, capsys):
    bad = f"judges=[{judge_spec('always_raises')}]"
    code, text = fails(capsys, command(tiny_base, tmp_path, bad))
    assert code == 1 and "at lunch" in text
    assert not list((tmp_path / "runs" / "tiny").glob("groups/*"))


def test_a_column_that_json_cannot_hold_is_named():
    prompt = Prompt(id="s#3", text="x", category="c", columns={"picture": object()})
    with pytest.raises(PromptError, match="s#3: expected a column 'picture' that JSON can hold"):
        curation.row_of(prompt)
