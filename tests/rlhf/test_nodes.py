"""Several nodes, simulated on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf import checkpoint
from rlhf.cluster.base import ClusterConfig
from rlhf.cluster.local import LocalCluster
from rlhf.errors import ClusterError, ConfigError
from tests.rlhf.test_cluster import Plan, outcome
from tests.rlhf.tiny import recipe

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_lost_a_node_ends_as_one_that_did_not(tiny_base, tmp_path):
    """The groups that were ready there are sampled again elsewhere; the rest went on meanwhile."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-m", "tests.rlhf.nodes", str(tiny_base), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "rows.json").read_text())
    assert said["spread"] == [1, 1, 2]  # rollout workers sat on both nodes
    watch, state = outcome(LocalCluster(recipe(tiny_base)), Plan(groups=4), tmp_path / "local")
    assert said["rows"] == watch.rows
    theirs = checkpoint.load(tmp_path / f"step_{len(watch.rows):06d}")
    for part, tensors in state.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs.tensors[part][name]), f"{part}/{name}"


def test_a_ray_that_is_not_there_is_an_error_at_once():
    from rlhf.cluster.ray import _join

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(ClusterError, match=f"cluster.address=127.0.0.1:{port}.*HOST:PORT"):
            _join(f"127.0.0.1:{port}")


def test_seats_of_both_layouts():
    from rlhf.cluster.placement import bundles_of, cpus_of

    shared = ClusterConfig(rollout_workers=2, learners=3, gpus_per_worker=0.5, gpus_per_learner=0.5)
    assert bundles_of(shared) == {"all": [{"CPU": 1, "GPU": 1}] * 2 + [{"CPU": 1, "GPU": 0.5}]}
    apart = ClusterConfig(layout="disaggregated", rollout_threads=3, gpus_per_learner=1.0)
    assert bundles_of(apart) == {
        "rollout": [{"CPU": 3}] * 2,
        "reward": [{"CPU": 1}],
        "learner": [{"CPU": 2, "GPU": 1}],
    }
    assert cpus_of(apart) == 9 and cpus_of(ClusterConfig()) == 2  # the default fits on two cores


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gpus_per_worker": 1.0, "gpus_per_learner": 1.0}, "write 0.5 each"),
        (
            {"learners": 2, "gpus_per_worker": 0.25, "gpus_per_learner": 0.25},
            "no two learners fit on one GPU",
        ),
        ({"judge_seconds": 0.0}, "above 0"),
        ({"restarts": -1}, "restarts of 0 or more"),
    ],
)
def test_layouts_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ClusterConfig(**settings).check()
