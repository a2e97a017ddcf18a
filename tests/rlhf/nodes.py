"""A run on two simulated nodes, of which one is lost in the second rollout. Started by
test_nodes.py in a process of its own: `python -m tests.rlhf.nodes BASE FOLDER`.
"""

import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster as Nodes

from rlhf.cluster.ray import RayCluster
from rlhf.loop import align
from tests.rlhf.test_cluster import Plan, Watch
from tests.rlhf.tiny import recipe

PLAN = Plan(groups=4)


class Losing(RayCluster):
    """Loses a node when half of the second rollout is there."""

    def rollout(self, asked, version):
        if asked.iteration == 2:
            self.begin(asked, version)
            there = lambda: sum(g.rollouts is not None for g in self._groups.values())  # noqa: E731
            self._drive(lambda: there() >= 2)
            self.nodes.remove_node(self.other, allow_graceful=False)
        return super().rollout(asked, version)


def where(cluster):
    """Nodes of the groups of actors."""
    table = ray.util.placement_group_table().values()
    return [len(set(group["bundles_to_node_id"].values())) for group in table]


def main(base: Path, folder: Path) -> None:
    small = {"object_store_memory": 80_000_000}
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 3, **small})
    other = nodes.add_node(num_cpus=1, **small)
    settings = {"layout": "disaggregated", "rollout_workers": 2, "address": nodes.address}
    cluster = Losing(recipe(base, kind="ray", **settings))
    cluster.nodes, cluster.other = nodes, other
    spread = where(cluster)
    watch = Watch(cluster)
    try:
        align(cluster, PLAN, watch)
        cluster.save(folder, PLAN.iterations, 1, 0, None)
    finally:
        cluster.close()
        ray.shutdown()
        nodes.shutdown()
    (folder / "rows.json").write_text(json.dumps({"rows": watch.rows, "spread": sorted(spread)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
