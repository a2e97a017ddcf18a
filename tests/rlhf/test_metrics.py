import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rlhf.errors import CheckpointError
from rlhf.metrics import MetricsLog, read_rows, write_rows


def test_rows_are_on_disk_when_log_returns(tmp_path):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log({"step": 1, "loss": torch.tensor(0.5), "n": 3})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "n": 3}]
    log.close()
    log.close()


def test_nan_is_absent_not_zero_and_json_stays_strict(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log({"step": 0, "a": float("nan"), "b": float("inf"), "c": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 0,
        "a": None,
        "b": None,
        "c": None,
    }


def test_an_unfinished_line_is_skipped_and_then_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path) == [{"step": 1}]
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log({"step": 2, "loss": 1.0})
    assert read_rows(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_a_damaged_finished_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nxx\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("row", [{"step": 1}, {"step": 0}, {"loss": 2.0}, {"step": 2.0}])
def test_no_iteration_is_counted_twice(tmp_path, row):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log({"step": 1})
        with pytest.raises(ValueError, match="integer step after 1"):
            log.log(row)
    with MetricsLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match="after 1"):
        log.log({"step": 1})


def test_a_row_holds_numbers_only(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(TypeError, match="'loss'"):
            log.log({"step": 1, "loss": [1.0]})
        log.log({"step": 1, "loss": 1.0})


def test_a_full_disk_leaves_no_half_row(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log({"step": 1})
    write = os.write

    def half(handle, data):
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return write(handle, bytes(data)[:5])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        log.log({"step": 2, "loss": 1.0})
    monkeypatch.undo()
    log.log({"step": 2, "loss": 2.0})
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2, "loss": 2.0}]


def test_rows_survive_a_kill(tmp_path):
    code = (
        "import sys, pathlib\nfrom rlhf.metrics import MetricsLog\n"
        "log = MetricsLog(pathlib.Path(sys.argv[1]), tensorboard=False)\n"
        "for step in range(10**6): log.log({'step': step, 'pad': 'x' * 500}); print(step, "
        "flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    seen = [int(process.stdout.readline()) for _ in range(20)][-1]
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].split()
    last = int(rest[-1]) if rest else seen
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps))) and len(steps) >= last


def test_write_rows_replaces(tmp_path):
    write_rows(tmp_path / "m.jsonl", [{"step": 1}, {"step": 2}])
    write_rows(tmp_path / "m.jsonl", [{"step": 1}])
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1}]
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_scalars_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.log({"step": 3, "reward/total": 0.25, "absent": None})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/total")] == [(3, 0.25)]
    assert "absent" not in events.Tags()["scalars"]
