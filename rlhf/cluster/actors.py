"""Ray actors: the plain workers of `base`, each in a process of its own with its own threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray


class _Actor:
    """Sets the process up before any model is loaded."""

    def __init__(self, threads: int) -> None:
        from rewards.compat import ensure_torchvision

        ensure_torchvision()
        import torch

        torch.set_num_threads(threads)

    def ping(self) -> int:
        return os.getpid()


@ray.remote
class RolloutActor(_Actor):
    """`RolloutWorker` of `rlhf.rollout`."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe.cluster.rollout_threads)
        from rlhf.cluster.base import make_rollout_worker

        self.worker = make_rollout_worker(recipe)

    def bind(self, handover: Any) -> Any:
        return self.worker.bind(handover)

    def rollout(self, ref: Any, request: Any) -> Any:
        return self.worker.rollout(ref, request)


@ray.remote
class RewardActor(_Actor):
    """`RewardWorker` of `rlhf.cluster.base`."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(1)
        from rlhf.cluster.base import RewardWorker

        self.worker = RewardWorker(recipe.judges, recipe.judge_retries)

    def cards(self) -> Any:
        return self.worker.cards()

    def score(self, rollouts: Any) -> Any:
        return self.worker.score(rollouts)


@ray.remote
class LearnerActor(_Actor):
    """`AlignmentLearner` of `rlhf.alignment`."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe.cluster.learner_threads)
        from rlhf.cluster.base import make_learner

        self.learner = make_learner(recipe)

    def publish(self, slot: str) -> tuple[Any, Any]:
        handover = self.learner.publish(slot)
        return handover.version, handover

    def update(self, advantages: Any, *rollouts: Any) -> Any:
        return self.learner.update(rollouts, advantages)

    def save(self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None) -> None:
        self.learner.save(folder, step, keep_last, keep_best, metric)

    def load(self, path: Path) -> int:
        return self.learner.load(path)

    def export(self, slot: str, folder: Path) -> None:
        self.learner.policy.export(str(folder), self.learner.policy.slots.tensors(slot))
