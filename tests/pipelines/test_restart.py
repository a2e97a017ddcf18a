"""A run whose learner is lost goes back to its last checkpoint by itself, as often as allowed."""

import json
import os
import signal

import pytest
import torch

from pipelines.cli import main
from rlhf import checkpoint
from rlhf.cluster.local import LocalCluster
from rlhf.errors import LearnerLost
from tests.rlhf.tiny import arguments

FEW = ("checkpoints.every=2", "evaluation.every=0")


@pytest.fixture
def lose(monkeypatch):
    """Lose the learner in the updates of these iterations, one after another."""
    update = LocalCluster.update

    def losing(*iterations, signalled=False):
        left = list(iterations)

        def failing(self, refs, advantages):
            if left and refs[0].iteration == left[0]:
                left.pop(0)
                if signalled:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise LearnerLost("[/a/node] the learner died")
            return update(self, refs, advantages)

        monkeypatch.setattr(LocalCluster, "update", failing)

    return losing


def ended(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    untimed = [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in rows]
    return untimed, checkpoint.load(run)


def test_it_ends_as_a_run_that_lost_none(tiny_base, tmp_path, capsys, lose):
    for name, losses in (("whole", ()), ("losing", (1, 4))):
        lose(*losses)
        assert main([*arguments(tiny_base, tmp_path, *FEW, f"name={name}")]) == 0
    assert capsys.readouterr().err.count("goes on by itself") == 2
    (rows, state), (rows_2, state_2) = (ended(tmp_path / "runs" / n) for n in ("whole", "losing"))
    assert rows == rows_2 and len(rows) == 4 and state.meta == state_2.meta
    for part, tensors in state.tensors.items():
        assert all(torch.equal(tensor, state_2.tensors[part][n]) for n, tensor in tensors.items())


def test_it_stops_when_that_happens_too_often(tiny_base, tmp_path, capsys, lose):
    lose(2, 2)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tiny_base, tmp_path, *FEW, "cluster.restarts=1"))
    assert stopped.value.code == 1 and "the learner died" in capsys.readouterr().err


def test_a_learner_that_ends_with_a_signal_to_all_is_not_replaced(
    tiny_base, tmp_path, capsys, lose
):
    lose(3, signalled=True)
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tiny_base, tmp_path, *FEW))
    said = capsys.readouterr().err
    assert stopped.value.code == 3 and "goes on by itself" not in said and "--resume" in said
    assert main(["align", "--resume", str(tmp_path / "runs" / "tiny")]) == 0
    assert len(ended(tmp_path / "runs" / "tiny")[0]) == 4
