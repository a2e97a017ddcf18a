"""Invariant 9: three iterations on the random tiny model, pinned, so that nothing drifts."""

import pytest

from rlhf.cluster.local import LocalCluster
from rlhf.loop import align
from tests.rlhf.test_cluster import Plan, Watch
from tests.rlhf.tiny import recipe

# torch 2.13 on x86-64, one thread, float32. A change here is a change of what runs compute.
GOLDEN = {}
COLUMNS = ("reward/total", "loss", "grad_norm")


@pytest.mark.parametrize("loss", ["nft", "grpo", "grpo-recentred"])
def test_three_iterations_are_the_pinned_ones(tiny_base, loss):
    cluster = LocalCluster(recipe(tiny_base, loss))
    watch = Watch(cluster)
    align(cluster, Plan(loss), watch)
    got = [[row[name] for name in COLUMNS] for row in watch.rows]
    print(loss, got)
    for row, want in zip(got, GOLDEN[loss], strict=True):
        assert row == pytest.approx(want, rel=1e-3, abs=1e-9)
