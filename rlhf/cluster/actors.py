"""Bodies of the Ray actors: the plain workers of `base`, each in a process of its own with its own
threads.

`ray.py` makes actors of these classes; they are kept plain so that they can be checked and tested
like any other.
"""

from __future__ import annotations

import os
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

    def bind(self, handover: Any) -> Any:
        return self.worker.bind(handover)

    def rollout(self, ref: Any, request: Any) -> Any:
        return self.worker.rollout(ref, request)


class RewardActor(_Actor):
    """`RewardWorker` of `rlhf.cluster.base`."""

    def make(self, recipe: Any) -> Any:
        from rlhf.cluster.base import make_reward_worker

        return make_reward_worker(recipe)

    def cards(self) -> Any:
        return self.worker.cards()

    def score(self, rollouts: Any) -> Any:
        return self.worker.score(rollouts)


class LearnerActor(_Actor):
    """`AlignmentLearner` of `rlhf.alignment`."""

    def make(self, recipe: Any) -> Any:
        from rlhf.cluster.base import make_learner

        return make_learner(recipe)

    def publish(self, slot: str) -> tuple[Any, Any]:
        handover = self.worker.publish(slot)
        return handover.version, handover

    def update(self, advantages: Any, *rollouts: Any) -> Any:
        return self.worker.update(rollouts, advantages)

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
