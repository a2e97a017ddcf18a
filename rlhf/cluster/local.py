"""Everything in this process, through the same workers as on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rewards.types import JudgeCard, Scores
from rlhf.cluster.base import (
    Recipe,
    assemble_scores,
    make_learner,
    make_reward_worker,
    make_rollout_worker,
    threads,
)
from rlhf.rollout import Request
from rlhf.types import Advantages, GroupRef, Rollouts, StepReport, Version


class LocalCluster:
    """One rollout worker, one reward worker and the learner, called in turn."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.rewards = make_reward_worker(recipe)
        self.worker = make_rollout_worker(recipe)
        self.learner = make_learner(recipe)
        self._held: dict[str, Rollouts] = {}

    def cards(self) -> tuple[JudgeCard, ...]:
        return self.rewards.cards()

    def publish(self, slot: str) -> Version:
        with threads(self.recipe.cluster.learner_threads):
            handover = self.learner.publish(slot)
        with threads(self.recipe.cluster.rollout_threads):
            self.worker.bind(handover)
        return handover.version

    def begin(self, request: Request, version: Version) -> None:
        """Nobody works meanwhile: the samples are made now, while their weights are in place."""
        self.rollout(request, version)

    def rollout(self, request: Request, version: Version) -> list[GroupRef]:
        refs = request.refs(version)
        with threads(self.recipe.cluster.rollout_threads):
            for ref in refs:
                held = self._held.get(ref.id)
                if held is None or held.ref.version != version:
                    self._held[ref.id] = self.worker.rollout(ref, request)
        return refs

    def score(self, refs: Sequence[GroupRef]) -> Scores:
        groups = [self.rewards.score(self._held[r.id]) for r in refs]
        return assemble_scores(self.rewards.cards(), groups)

    def update(self, refs: Sequence[GroupRef], advantages: Advantages) -> StepReport:
        with threads(self.recipe.cluster.learner_threads):
            return self.learner.update([self._held[r.id] for r in refs], advantages)

    def pixels(self, refs: Sequence[GroupRef]) -> list[np.ndarray]:
        return [self._held[r.id].pixels.numpy() for r in refs]

    def release(self, refs: Sequence[GroupRef]) -> None:
        for ref in refs:
            self._held.pop(ref.id, None)

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None:
        self.learner.save(folder, step, keep_last, keep_best, metric)

    def load(self, path: Path) -> int:
        return self.learner.load(path)

    def export(self, slot: str, folder: Path) -> None:
        self.learner.policy.export(str(folder), self.learner.policy.slots.tensors(slot))

    def close(self) -> None:
        self._held.clear()
