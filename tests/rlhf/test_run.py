import json
from dataclasses import dataclass

import pytest

from rlhf import config
from rlhf.errors import CheckpointError, ConfigError
from rlhf.files import atomic_directory, atomic_write_text, sweep
from rlhf.metrics import MetricsLog, read_rows
from rlhf.run import Run


@dataclass(frozen=True, slots=True)
class Tiny:
    lr: float = 1e-4


def create(tmp_path) -> Run:
    return Run.create(tmp_path, "toy", Tiny(), "align")


def test_a_run_holds_its_resolved_config_and_its_machine(tmp_path):
    run = create(tmp_path)
    assert config.load(Tiny, run.config_path) == Tiny()
    assert run.about()["program"] == "align" and run.about()["machine"]["cores"] >= 1
    assert Run.open(run.root) == run and run.rows() == []
    assert run.samples.is_dir() and run.checkpoints.is_dir() and run.evaluations.is_dir()


def test_a_run_is_never_overwritten(tmp_path):
    run = create(tmp_path)
    with pytest.raises(ConfigError, match=f"--resume {run.root}"):
        create(tmp_path)
    with pytest.raises(ConfigError, match="expected a run name"):
        Run.create(tmp_path, "../x", Tiny(), "align")
    with pytest.raises(ConfigError, match="expected a run directory"):
        Run.open(tmp_path)


def test_supersede_moves_what_is_past_the_step_and_only_that(tmp_path):
    run = create(tmp_path)
    with MetricsLog(run.root, tensorboard=False) as log:
        for step in range(1, 6):
            log.log({"step": step, "loss": step / 2})
    for name in ("before.png", "step_000002.png", "step_000004.png", "step_000004_x.png"):
        (run.samples / name).write_bytes(b"x")
    (run.checkpoints / "step_000004").mkdir()
    moved = run.supersede(3)
    assert moved == run.root / "superseded" / "001"
    assert [r["step"] for r in run.rows()] == [1, 2, 3]
    assert [r["step"] for r in read_rows(moved / "metrics.jsonl")] == [4, 5]
    assert sorted(p.name for p in run.samples.iterdir()) == ["before.png", "step_000002.png"]
    assert sorted(p.name for p in (moved / "samples").iterdir()) == [
        "step_000004.png",
        "step_000004_x.png",
    ]
    assert (moved / "checkpoints" / "step_000004").is_dir() and not list(run.checkpoints.iterdir())
    assert run.supersede(3) is None and len(list((run.root / "superseded").iterdir())) == 1
    with MetricsLog(run.root, tensorboard=False) as log:
        log.log({"step": 4, "loss": 9.0})
    assert run.supersede(3) == run.root / "superseded" / "002"


def test_results_have_one_form(tmp_path):
    run = create(tmp_path)
    gain = {"before": 0.5, "after": 0.75, "gain": 0.25, "low": 0.1, "high": 0.4, "n": 64}
    run.write_result(1.23456, {"heldout/objects/strict": gain, "loss": {"value": 1.0}}, note="x")
    stored = json.loads((run.root / "result.json").read_text())
    assert stored == {
        "program": "align",
        "seconds": 1.235,
        "metrics": {"heldout/objects/strict": gain, "loss": {"value": 1.0}},
        "note": "x",
    }
    run.write_evaluation("held-out", "evaluate", 2.0, {"a": {"value": 1}})
    assert json.loads((run.evaluations / "held-out.json").read_text())["program"] == "evaluate"


@pytest.mark.parametrize(
    "metric", [{"val": 1}, {"before": 1, "after": 2}, {}, {"value": 1, "x": 2}]
)
def test_a_malformed_metric_is_named(tmp_path, metric):
    with pytest.raises(ValueError, match="metric 'm' expects"):
        create(tmp_path).write_result(1.0, {"m": metric})


def test_nan_in_a_result_is_refused(tmp_path):
    run = create(tmp_path)
    with pytest.raises(ValueError):
        run.write_result(1.0, {"m": {"value": float("nan")}})
    assert not (run.root / "result.json").exists()


def test_damaged_json_is_named(tmp_path):
    run = create(tmp_path)
    assert run.read_json("result.json") is None
    (run.root / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match="result.json"):
        run.read_json("result.json")


def test_atomic_writes_leave_the_old_content_when_they_fail(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_atomic_directory_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "d") as part:
        (part / "x").write_text("1")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with atomic_directory(tmp_path / "d") as part:
        (part / "x").write_text("1")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "x").read_text() == "1"
    (tmp_path / ".e.tmp-1").mkdir()
    assert sweep(tmp_path) == 1 and [p.name for p in tmp_path.iterdir()] == ["d"]
