"""Bodies of the Ray actors: the plain workers of `base`, each in a process of its own with its own
threads.

`ray.py` makes actors of these classes; they are kept plain so that they can be checked and tested
like any other.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


class _Actor:
    """Sets the process up before any model is loaded.

    `start` builds the worker, not the constructor: an error of a constructor reaches the caller as
    a dead actor.
    """

    def __init__(self, threads: int) -> None:
        from rewards.compat import ensure_torchvision

        ensure_torchvision()
        import torch

        torch.set_num_threads(threads)

    def start(self, recipe: Any) -> int:
        """Build the worker of a recipe; the id of the process. Raises what loading raises."""
        self.worker = self.make(recipe)
        return os.getpid()

    def make(self, recipe: Any) -> Any:
        raise NotImplementedError


class RolloutActor(_Actor):
    """`RolloutWorker` of `rlhf.rollout`."""

    def make(self, recipe: Any) -> Any:
        from rlhf.cluster.base import make_rollout_worker

        return make_rollout_worker(recipe)

    def rollout(self, ref: Any, request: Any, handover: list[Any]) -> tuple[None, Any]:
        """A receipt, and one group sampled with the weights of the hand-over, whose handle is in
        the list: Ray would fetch it for every group otherwise, and not only for the first.
        """
        if self.worker.version != ref.version:
            import ray

            self.worker.bind(ray.get(handover[0]))
        return None, self.worker.rollout(ref, request)


class RewardActor(_Actor):
    """`RewardWorker` of `rlhf.cluster.base`."""

    def make(self, recipe: Any) -> Any:
        from rlhf.cluster.base import make_reward_worker

        return make_reward_worker(recipe)

    def cards(self) -> Any:
        return self.worker.cards()

    def score(self, rollouts: Any, names: tuple[str, ...] | None) -> Any:
        return self.worker.score(rollouts, names)


class LearnerActor(_Actor):
    """`AlignmentLearner` of `rlhf.alignment`, one of `world` ranks."""

    def __init__(self, threads: int, rank: int, world: int, seconds: float) -> None:
        super().__init__(threads)
        self.rank, self.world, self.seconds = rank, world, seconds
        self.taken: dict[int, Any] = {}

    def address(self) -> tuple[str, int]:
        """Of this node, with a free port: where the ranks meet."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as listener:
            listener.bind((host, 0))
            return host, listener.getsockname()[1]

    def join(self, host: str, port: int) -> None:
        """Say where the ranks meet, in the words of torchrun; `start` goes there."""
        place = {"RANK": self.rank, "WORLD_SIZE": self.world, "LOCAL_RANK": 0}
        place |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}

    def make(self, recipe: Any) -> Any:
        from rlhf import distributed
        from rlhf.cluster.base import make_learner

        if self.world == 1:
            return make_learner(recipe)
        return make_learner(recipe, distributed.start(recipe.policy.device, self.seconds))

    def publish(self, slot: str) -> tuple[Any, Any]:
        handover = self.worker.publish(slot)
        return handover.version, handover

    def take(self, index: int, rollouts: Any) -> None:
        """Keep a group for the update."""
        self.taken[index] = rollouts

    def update(self, advantages: Any) -> Any:
        """Train on the groups of all ranks; those that another one took are None here."""
        taken, self.taken = self.taken, {}
        return self.worker.update(
            [taken.get(i) for i in range(len(advantages.value_PG))], advantages
        )

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None:
        self.worker.save(folder, step, keep_last, keep_best, metric)

    def load(self, path: Path) -> int:
        return self.worker.load(path)

    def export(self, slot: str, folder: Path) -> None:
        self.worker.policy.export(str(folder), self.worker.policy.slots.tensors(slot))


class AnyActor(_Actor):
    """Whatever a function returns; see `rlhf.cluster.pool`."""

    def make(self, recipe: Any) -> Any:
        return recipe()

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)
