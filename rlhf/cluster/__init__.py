"""Where the work happens: in this process, or on Ray actors. Both speak in handles."""

from __future__ import annotations

from rlhf.cluster.base import Cluster, Recipe


def make_cluster(recipe: Recipe) -> Cluster:
    """The cluster a recipe names; Ray is imported only for its own."""
    if recipe.cluster.kind == "local":
        from rlhf.cluster.local import LocalCluster

        return LocalCluster(recipe)
    from rlhf.cluster.ray import RayCluster

    return RayCluster(recipe)
