"""Where actors run: Ray placement groups of the two layouts.

colocated       one group. Seat i holds rollout worker i and learner i, which take turns on its
                cores and share its GPU; judges sit anywhere in the group.
disaggregated   three groups. Rollout workers and judges spread over the nodes, learners keep
                together; each actor has cores and GPUs of its own.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf.cluster.base import ClusterConfig
from rlhf.errors import ClusterError

Kind = Literal["rollout", "reward", "learner"]
Bundles = list[dict[str, float]]
STRATEGY = {"all": "PACK", "rollout": "SPREAD", "reward": "SPREAD", "learner": "PACK"}


def bundles_of(c: ClusterConfig) -> dict[str, Bundles]:
    """Ray bundles by placement group: `all`, or one for each kind."""
    if c.layout == "colocated":
        seats = range(max(c.rollout_workers, c.learners))
        gpus = [
            c.gpus_per_worker * (i < c.rollout_workers) + c.gpus_per_learner * (i < c.learners)
            for i in seats
        ]
        return {"all": [_bundle(c.rollout_threads, gpu) for gpu in gpus]}
    return {
        "rollout": [_bundle(c.rollout_threads, c.gpus_per_worker)] * c.rollout_workers,
        "reward": [_bundle(1, 0.0)] * c.reward_workers,
        "learner": [_bundle(c.learner_threads, c.gpus_per_learner)] * c.learners,
    }


def _bundle(cpus: int, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})


def cpus_of(c: ClusterConfig) -> int:
    """Cores that Ray counts for all actors. A count: a Ray that we start has as many as we ask."""
    return int(sum(bundle["CPU"] for group in bundles_of(c).values() for bundle in group))


class Placement:
    """The placement groups of a cluster, reserved."""

    def __init__(self, config: ClusterConfig) -> None:
        """Reserve them.

        Raises:
            ClusterError: no room within `timeout_seconds`.
        """
        self.config, bundles = config, bundles_of(config)
        self._groups: dict[str, PlacementGroup] = {
            name: placement_group(group, strategy=STRATEGY[name]) for name, group in bundles.items()
        }
        end = time.monotonic() + config.timeout_seconds
        if not all(g.wait(max(end - time.monotonic(), 0.0)) for g in self._groups.values()):
            self.remove()
            raise ClusterError(
                f"cluster.layout={config.layout} needs room for {bundles}, and within"
                f" {config.timeout_seconds:.0f} s there was none: of {ray.cluster_resources()} free"
                f" are {ray.available_resources()}: use fewer or smaller workers, or more nodes"
            )

    def options(self, kind: Kind, number: int) -> dict[str, Any]:
        """Of `actor.options` for actor `number` of a kind."""
        c, shared = self.config, self.config.layout == "colocated"
        cpus: dict[Kind, int] = {"rollout": c.rollout_threads, "reward": 1}
        cpus["learner"] = c.learner_threads
        gpus = {"rollout": c.gpus_per_worker, "reward": 0.0, "learner": c.gpus_per_learner}
        strategy = PlacementGroupSchedulingStrategy(
            self._groups["all" if shared else kind],
            placement_group_bundle_index=-1 if shared and kind == "reward" else number,
        )
        return {
            "num_cpus": 0 if shared and kind != "rollout" else cpus[kind],
            "num_gpus": gpus[kind],
            "scheduling_strategy": strategy,
        }

    def remove(self) -> None:
        """Give the room back, with whatever still runs there."""
        for group in self._groups.values():
            remove_placement_group(group)
