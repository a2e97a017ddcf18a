"""The same verbs on Ray actors.

Groups go to whichever rollout worker is free; a finished group is sent to a reward worker at once,
so judging overlaps with sampling. Results depend on seeds and groups alone, not on who computed
what. Every wait is bounded. Ray's transport is cloudpickle: run it on a cluster you trust.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import exceptions

from rewards.errors import RewardError
from rewards.types import JudgeCard, Scores
from rlhf.cluster.actors import LearnerActor, RewardActor, RolloutActor
from rlhf.cluster.base import Recipe, assemble_scores
from rlhf.errors import ClusterError
from rlhf.rollout import Request
from rlhf.types import Advantages, GroupRef, StepReport, Version


def connect(address: str | None, workers: int) -> bool:
    """Join a running Ray, or start one here with room for our actors. True if it was started."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")  # see docs/threads.md
    env = {"env_vars": {"TOKENIZERS_PARALLELISM": "false", "GOMP_SPINCOUNT": spin}}
    if address:
        ray.init(address=address, runtime_env=env, **quiet)
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 starves threads that share their cores
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, workers),
        include_dashboard=False,
        runtime_env=env,
        **quiet,
    )
    return True


def _remote(body: type, options: dict[str, Any], threads: int) -> Any:
    return ray.remote(body).options(**options).remote(threads)


class RayCluster:
    """Rollout, reward and learner actors. Create it inside or outside a running Ray."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, c = recipe, recipe.cluster
        self._started = connect(c.address, c.rollout_workers + c.reward_workers + 1)
        options = {"num_cpus": 0 if c.gpus_per_worker else 1, "num_gpus": c.gpus_per_worker}
        learner = {"num_cpus": 0, "num_gpus": c.gpus_per_learner}
        self.learner = _remote(LearnerActor, learner, c.learner_threads)
        self.workers = [
            _remote(RolloutActor, options, c.rollout_threads) for _ in range(c.rollout_workers)
        ]
        self.judges = [_remote(RewardActor, {"num_cpus": 0}, 1) for _ in range(c.reward_workers)]
        self._rollouts: dict[str, ray.ObjectRef] = {}
        self._scores: dict[str, ray.ObjectRef] = {}
        try:
            everyone = (self.learner, *self.workers, *self.judges)
            self._wait([a.start.remote(recipe) for a in everyone], "start of the actors")
            self._cards = self._wait([self.judges[0].cards.remote()], "judge cards")[0]
        except BaseException:
            self.close()
            raise
        self._next_judge = cycle(self.judges)

    def _wait(self, refs: Sequence[ray.ObjectRef], what: str) -> list[Any]:
        """Results of remote calls. Errors of this package come back as themselves, those of Ray as
        ClusterError, and any other with its remote traceback."""
        try:
            return ray.get(list(refs), timeout=self.recipe.cluster.timeout_seconds)
        except exceptions.GetTimeoutError as error:
            raise ClusterError(
                f"{what}: nothing came back in {self.recipe.cluster.timeout_seconds:.0f} s: raise"
                " cluster.timeout_seconds, or look at the actors' logs"
            ) from error
        except exceptions.RayTaskError as error:
            cause = error.cause
            while isinstance(cause, exceptions.RayTaskError):
                cause = cause.cause  # that of the task whose result was needed
            if isinstance(cause, exceptions.RayActorError):
                raise ClusterError(
                    f"{what}: an actor died: {cause}; continue with --resume"
                ) from error
            raise (
                cause if isinstance(cause, RewardError) else error.as_instanceof_cause()
            ) from None
        except exceptions.RayActorError as error:
            raise ClusterError(f"{what}: an actor died: {error}; continue with --resume") from error

    def cards(self) -> tuple[JudgeCard, ...]:
        return self._cards

    def publish(self, slot: str) -> Version:
        version, handover = self.learner.publish.options(num_returns=2).remote(slot)
        self._wait([w.bind.remote(handover) for w in self.workers], f"hand-over of {slot}")
        return self._wait([version], f"hand-over of {slot}")[0]

    def rollout(self, request: Request, version: Version) -> list[GroupRef]:
        refs = request.refs(version)
        shared = ray.put(request)
        todo, running = list(reversed(refs)), {}
        idle = list(self.workers)
        while todo or running:
            while todo and idle:
                ref, worker = todo.pop(), idle.pop()
                future = worker.rollout.remote(ref, shared)
                running[future] = (ref, worker)
            done, _ = ray.wait(list(running), timeout=self.recipe.cluster.timeout_seconds)
            if not done:
                raise ClusterError(
                    "rollout: no group finished in time: raise cluster.timeout_seconds"
                )
            ref, worker = running.pop(done[0])
            idle.append(worker)
            self._rollouts[ref.id] = done[0]
            self._scores[ref.id] = next(self._next_judge).score.remote(done[0])
        return refs

    def score(self, refs: Sequence[GroupRef]) -> Scores:
        groups = self._wait([self._scores[r.id] for r in refs], "scores")
        return assemble_scores(self._cards, groups)

    def update(self, refs: Sequence[GroupRef], advantages: Advantages) -> StepReport:
        return self._wait(
            [self.learner.update.remote(advantages, *(self._rollouts[r.id] for r in refs))],
            "update",
        )[0]

    def pixels(self, refs: Sequence[GroupRef]) -> list[np.ndarray]:
        held = self._wait([self._rollouts[r.id] for r in refs], "pictures")
        return [rollouts.pixels.numpy() for rollouts in held]

    def release(self, refs: Sequence[GroupRef]) -> None:
        for ref in refs:
            self._rollouts.pop(ref.id, None)
            self._scores.pop(ref.id, None)

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None:
        self._wait(
            [self.learner.save.remote(folder.absolute(), step, keep_last, keep_best, metric)],
            "checkpoint",
        )

    def load(self, path: Path) -> int:
        return self._wait([self.learner.load.remote(path.absolute())], "resume")[0]

    def export(self, slot: str, folder: Path) -> None:
        self._wait([self.learner.export.remote(slot, folder.absolute())], "export")

    def close(self) -> None:
        """End our actors, and Ray if we started it."""
        self._rollouts.clear()
        self._scores.clear()
        for actor in (*self.workers, *self.judges, self.learner):
            ray.kill(actor)
        if self._started:
            ray.shutdown()
