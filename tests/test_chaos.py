"""The programs that hurt and watch a run: what they see, compare and write."""

import json
import os
import signal
import subprocess
import time
from unittest.mock import Mock

import pytest
import torch

from benchmarks import chaos, memory, processes
from rlhf import checkpoint

GOT = {"exits": [1, 0], "extra_seconds": 12.3, "weights_equal": True, "rows_equal": True}


def test_the_page_shows_the_results_that_are_kept():
    results = json.loads(chaos.RESULTS.read_text())
    assert set(results) == set(chaos.FAULTS)
    assert f"<!-- table -->\n{chaos.table(results)}\n<!-- end -->" in chaos.PAGE.read_text()
    survived = [n for n, got in results.items() if got["weights_equal"] and got["rows_equal"]]
    assert set(chaos.FAULTS) - set(survived) == {"judge-always-hangs"}


def test_a_table_is_put_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter\n")
    got = {**GOT, "fault": "a fault", "expected": "what is expected"}
    for rows_equal, words in ((True, "equal, bit for bit"), (False, "**differ**")):
        results = {"driver": {**got, "rows_equal": rows_equal}}
        chaos.write(results, tmp_path / "out.json", page)
        text = page.read_text()
        assert f"| a fault | what is expected | 1, then 0 | 12 | {words} |" in text
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text


def test_one_bit_is_seen(tmp_path):
    weights = torch.arange(5.0)
    for name, tensor in (("a", weights), ("b", weights), ("c", weights.nextafter(weights + 1))):
        state = checkpoint.State(tensors={"slots/train": {"w": tensor}})
        checkpoint.save(tmp_path / name / "checkpoints", chaos.ITERATIONS, state)
    assert chaos.same_weights(tmp_path / "a", tmp_path / "b") is True
    assert chaos.same_weights(tmp_path / "a", tmp_path / "c") is False
    assert chaos.same_weights(tmp_path / "nowhere", tmp_path / "c") is None


def test_growth_is_that_after_the_beginning():
    flat = memory.growth([*range(50), *[50.0] * 150], 50)
    assert flat["growth"] == pytest.approx(0, abs=1e-9) and flat["n"] == 150
    grown = memory.growth([100 + 0.1 * i for i in range(200)], 50)
    assert grown["growth"] == pytest.approx(14.9) and grown["last"] > grown["first"] + 12
    assert grown["settling"] == pytest.approx(5.7)


def test_a_run_that_cannot_be_watched_is_not_left_behind(monkeypatch):
    started, popen = [], subprocess.Popen

    def sleeping(*_, **__):
        started.append(popen(["/bin/sleep", "5"]))
        return started[-1]

    def broken(*_):
        raise TimeoutError

    monkeypatch.setattr(memory, "random_pipeline", Mock)
    monkeypatch.setattr(memory, "watch", broken)
    monkeypatch.setattr(memory.subprocess, "Popen", sleeping)
    with pytest.raises(TimeoutError):
        memory.measure(8, 2, ())
    assert started[0].poll() == -signal.SIGKILL


def test_actors_are_found_by_their_titles_below_a_process():
    title = "ray::RolloutActor.rollout"
    process = subprocess.Popen([title, "30"], executable="/bin/sleep")
    try:
        end = time.monotonic() + 10
        while not processes.actors(os.getpid())["rollout"] and time.monotonic() < end:
            time.sleep(0.01)  # between fork and exec it has our title
        assert process.pid in processes.actors(os.getpid())["rollout"]
        assert process.pid in processes.actors(os.getpid(), "rollout")["rollout"]
        assert process.pid not in processes.actors(os.getpid(), "start")["rollout"]
        assert processes.actors(process.pid) == {"rollout": [], "reward": [], "learner": []}
        assert 0 < processes.anonymous_mib(process.pid) < 10
    finally:
        process.kill()
        process.wait()
    with pytest.raises(TimeoutError):
        processes.wait_for(lambda: False, lambda: True, 0.02)
    assert processes.wait_for(lambda: False, lambda: False, 5) is False
