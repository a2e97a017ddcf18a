"""Invariant 3: a run that is killed and resumed ends where an unkilled one does, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf import checkpoint
from tests.rlhf.tiny import arguments

ROOT = Path(__file__).parents[2]
WAIT = 900.0  # seconds; a starved machine is no failure


def start(argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    text, _ = process.communicate(timeout=WAIT)
    assert process.returncode == code, text
    return text


def wait_for(path, process, lines=0):
    """Until the file is there and holds so many lines."""
    end = time.monotonic() + WAIT
    while not (path.is_file() and path.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)


def rows(run, folder=""):
    lines = (run / folder / "metrics.jsonl").read_text().splitlines()
    timed = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in timed]


def assert_same_run(run, reference):
    assert rows(run) == rows(reference) and len(rows(run)) == 4
    mine, theirs = (checkpoint.load(r / "checkpoints" / "step_000004") for r in (run, reference))
    assert mine.meta == theirs.meta and mine.tensors.keys() == theirs.tensors.keys()
    assert {"slots/train", "slots/behaviour", "slots/reference", "optimiser"} <= set(mine.tensors)
    for part, tensors in mine.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs.tensors[part][name]), f"{part}/{name}"
    results = [json.loads((r / "result.json").read_text())["metrics"] for r in (run, reference)]
    assert results[0] == results[1]
    for name in ("before", "after", "step_000002"):
        pictures = [(r / "samples" / f"{name}.png").read_bytes() for r in (run, reference)]
        assert pictures[0] == pictures[1]


@pytest.fixture(scope="module")
def unkilled(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled")
    finish(start(arguments(tiny_base, folder)))
    return folder / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_run_ends_as_an_unkilled_one(tiny_base, tmp_path, unkilled, seed):
    process = start(arguments(tiny_base, tmp_path))
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "checkpoints" / "step_000002" / "complete.json", process)
    time.sleep(random.Random(seed).uniform(0.0, 0.5))
    process.kill()
    process.communicate()
    finish(start(["align", "--resume", str(run)]))
    assert_same_run(run, unkilled)


@pytest.mark.slow
def test_work_past_the_checkpoint_is_moved_and_done_again(tiny_base, tmp_path, unkilled):
    """Killed between the row of iteration 4 and its checkpoint."""
    process = start(arguments(tiny_base, tmp_path, "checkpoints.every=3"))
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "metrics.jsonl", process, lines=4)
    process.kill()
    process.communicate()
    for path in (run / "checkpoints").glob("step_000004"):  # lost the race: take it back
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    finish(start(["align", "--resume", str(run)]))
    moved = run / "superseded" / "001"
    assert (moved / "samples" / "step_000004.png").is_file()
    assert [row["step"] for row in rows(run, "superseded/001")] == [4]
    assert_same_run(run, unkilled)


@pytest.mark.slow
def test_sigterm_checkpoints_and_says_how_to_continue(tiny_base, tmp_path, unkilled):
    process = start(arguments(tiny_base, tmp_path, "checkpoints.every=4"))
    run = tmp_path / "runs" / "tiny"
    wait_for(run / "evaluations" / "before.json", process)
    process.send_signal(signal.SIGTERM)
    text = finish(process, code=3)
    assert f"--resume {run}" in " ".join(text.split())
    assert 1 <= checkpoint.step_of(checkpoint.latest(run)) < 4
    assert not (run / "result.json").exists()
    finish(start(["align", "--resume", str(run)]))
    assert_same_run(run, unkilled)
    finish(start(["align", "--resume", str(run)]))  # a finished run only writes its result again
    assert_same_run(run, unkilled)
