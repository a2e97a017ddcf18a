"""What benchmarks/{panel,schemes,serving}.py make of runs: made-up rows, real judges."""

import json

import pytest

from benchmarks import panel, schemes, serving
from rewards.types import Score, failed
from rlhf.metrics import write_rows
from rlhf.run import Run
from tests.rewards.towers_tiny import tiny_judge, tiny_towers


def row(step, total, one, other, waited=0.1):
    spent = {"seconds/judge/one": one, "seconds/judge/other": other, "seconds/judge/w": 9.0}
    return {"step": step, "seconds/total": total, "seconds/reward": waited, **spent}


def test_the_share_is_what_those_that_train_worked_of_an_iteration():
    rows = [row(1, 1.0, 9.0, 9.0), row(2, 4.0, 0.3, 0.1), row(3, 4.0, 0.5, 0.3), row(4, 8.0, 9, 9)]
    found = panel.shares(rows, ["one", "other"])
    assert found["panel/share"] == {"value": pytest.approx(0.2), "n": 3}
    assert found["panel/waited_share"]["value"] == pytest.approx(0.025)
    assert found["panel/seconds/one"]["value"] == 0.5 and "panel/seconds/w" not in found


def test_a_panel_is_timed_as_a_worker_asks_it_and_alone_without_help(tmp_path, monkeypatch):
    towers = tiny_towers(tmp_path / "towers")
    judges = {axis: tiny_judge(towers, axis) for axis in ("aesthetics", "fidelity", "consistency")}
    seen, original = [], towers._see
    monkeypatch.setattr(towers, "_see", lambda p: seen.append(len(p)) or original(p))
    groups = [panel.group("objects", 2, seed, 4) for seed in range(3)]
    first = groups[0][0].image
    assert not any((first == sample.image).all() for sample in groups[0][1:])
    towers.forget()
    panel.milliseconds(list(judges.values())[:2], groups)
    assert seen == [4, 4, 4]  # to warm up, then each group once for both
    found = panel.bare(judges, 2, 1)
    assert set(found) >= {"panel/bare/edits/consistency", "panel/bare/text/together"}
    assert "panel/bare/edits/fidelity" not in found
    alone = [found[f"panel/bare/objects/{name}"]["value"] for name in ("aesthetics", "fidelity")]
    assert found["panel/bare/objects/apart"]["value"] == pytest.approx(sum(alone))


def made(root, name, gain, low, high):
    run = Run(root / name)
    run.root.mkdir(parents=True)
    figures = {"reward/fidelity/mean": 0.5, "watch/oracle/fidelity/mean": 0.5}
    write_rows(
        run.root / "metrics.jsonl", [{"step": 1, "advantage/share/fidelity": 0.75} | figures]
    )
    metric = {"before": 0.5, "after": 0.5 + gain, "gain": gain, "low": low, "high": high, "n": 4}
    metrics = {"heldout/text/strict": metric, "heldout/text/strict/w1": metric}
    (run.root / "result.json").write_text(json.dumps({"metrics": metrics}))
    return run


def test_schemes_are_compared_on_guided_gains_and_shares(tmp_path):
    done = {
        "gdpo": [made(tmp_path, "a", 0.1, -0.1, 0.3)],
        "weighted": [made(tmp_path, "b", 0.1, 0.0, 0.0), made(tmp_path, "c", 0.3, 0.0, 0.0)],
    }
    lines = schemes.table(done).splitlines()
    assert lines[0] == "| held-out gain | gdpo | weighted |"
    assert lines[2] == (
        "| text: strictly right (oracle, watches) | +0.100 [-0.100, +0.300]"
        " | +0.200 [+0.100, +0.300] |"
    )
    assert lines[3] == "| share of the advantage: fidelity | 0.75 | 0.75 |" and len(lines) == 4
    schemes.draw(done, tmp_path / "schemes.png")
    assert (tmp_path / "schemes.png").stat().st_size > 5000


def test_an_answer_is_right_lost_or_wrong():
    tally, truth = serving.Tally(), Score(value=0.5)
    for said in (truth, Score(value=0.5 + 1e-6), Score(value=0.5001), failed("late")):
        tally.see(said, truth)
    tally.see(Score(state="na"), truth)
    assert dict(tally.counts) == {"ok": 2, "wrong": 2, "lost": 1}
    assert tally.worst == float("inf")


def test_served_judges_are_asked_what_they_judge(tmp_path):
    towers = tiny_towers(tmp_path / "towers")
    for axis, kinds in (("consistency", {"edits"}), ("portrait", {"portraits"})):
        pool = serving.pool(tiny_judge(towers, axis), 6)
        assert {sample.category for sample in pool} == kinds
        assert {sample.image.shape[1] for sample in pool} == set(serving.SIZES)
