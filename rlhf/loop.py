"""The alignment loop: prompts -> rollouts -> scores -> advantages -> new weights, once per
iteration.

What each line needs is done by the verb it names; metrics come back from the verbs and go to one
sink.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rlhf.batch import Terms, judged, refilled
from rlhf.cluster.base import Cluster
from rlhf.rollout import Request
from rlhf.types import GroupRef, Version


@runtime_checkable
class Plan(Terms, Protocol):
    """What an iteration is made of; a program's configuration provides it."""

    @property
    def iterations(self) -> int: ...

    def request(self, iteration: int) -> Request: ...


@runtime_checkable
class Observer(Protocol):
    """Where an iteration's outcome goes: rows, pictures, held-out figures, checkpoints."""

    def observe(
        self, iteration: int, refs: list[GroupRef], row: dict[str, float], version: Version
    ) -> Version: ...


@dataclass
class Clock:
    """Seconds by phase."""

    row: dict[str, float]

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.row[f"seconds/{phase}"] = time.monotonic() - began


def align(cluster: Cluster, plan: Plan, observer: Observer, done: int = 0) -> None:
    """Run the iterations after `done`.

    Raises:
        TooManyFailures: judges failed for more than `plan.max_failed_share` of the samples.
    """
    version = cluster.publish("behaviour")
    for iteration in range(done + 1, plan.iterations + 1):
        row: dict[str, float] = {}
        clock, began = Clock(row), time.monotonic()
        request = plan.request(iteration)
        with clock("rollout"):
            refs = cluster.rollout(request, version)
        with clock("reward"):
            scores = cluster.score(refs)
        batch = judged(plan, request, refs, scores)
        if plan.refill:
            with clock("refill"):
                batch = refilled(cluster, plan, batch, version)
        refs = batch.refs
        with clock("train"):
            report = cluster.update(refs, batch.advantages)
        with clock("sync"):
            version = cluster.publish("behaviour")
        row |= {**batch.metrics, **report.metrics}
        row["seconds/total"] = time.monotonic() - began
        version = observer.observe(iteration, refs, row, version)
        cluster.release(refs)
