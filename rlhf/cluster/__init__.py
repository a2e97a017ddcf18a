"""Where the work happens: in this process, or on Ray actors. Both speak in handles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.cluster.base import Cluster, ClusterConfig, Recipe


def make_cluster(recipe: Recipe) -> Cluster:
    """The cluster a recipe names; Ray is imported only for its own."""
    if recipe.cluster.kind == "local":
        from rlhf.cluster.local import LocalCluster

        return LocalCluster(recipe)
    from rlhf.cluster.ray import RayCluster

    return RayCluster(recipe)


@contextmanager
def room_for(*configs: ClusterConfig) -> Iterator[None]:
    """Inside, one Ray has room for clusters of these configurations at the same time. A cluster
    alone does not need it.
    """
    asked = [c for c in configs if c.kind == "ray"]
    if not asked:
        yield
        return
    from rlhf.cluster.placement import cpus_of
    from rlhf.cluster.ray import connect, shutdown

    started = connect(asked[0].address, sum(map(cpus_of, asked)))
    try:
        yield
    finally:
        if started:
            shutdown()
