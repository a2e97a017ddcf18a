"""The alignment loop: prompts -> rollouts -> scores -> advantages -> new weights, once per
iteration. `align` does one after the other; `align_overlapped` samples while it trains.

What each line needs is done by the verb it names; metrics come back from the verbs and go to one
sink.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

    @property
    def staleness(self) -> int: ...

    def request(self, iteration: int) -> Request: ...


@runtime_checkable
class Observer(Protocol):
    """Where an iteration's outcome goes: rows, pictures, held-out figures, checkpoints."""

    def observe(
        self, iteration: int, refs: list[GroupRef], row: dict[str, float], version: Version
    ) -> Version: ...


@dataclass
class Clock:
    """Seconds by phase, and in all."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[f"seconds/{phase}"] = time.monotonic() - began

    def row(self) -> dict[str, float]:
        return {**self.seconds, "seconds/total": time.monotonic() - self.began}


def align(cluster: Cluster, plan: Plan, observer: Observer, done: int = 0) -> None:
    """Run the iterations after `done`.

    Raises:
        TooManyFailures: judges failed for more than `plan.max_failed_share` of the samples.
    """
    version = cluster.publish("behaviour")
    for iteration in range(done + 1, plan.iterations + 1):
        clock, request = Clock(), plan.request(iteration)
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
        row = {**batch.metrics, **report.metrics, **clock.row()}
        version = observer.observe(iteration, refs, row, version)
        cluster.release(refs)


def align_overlapped(cluster: Cluster, plan: Plan, observer: Observer, done: int = 0) -> None:
    """`align`, with the samples of the next iterations made while one trains.

    Iteration i trains on samples of the weights after update i - 1 - `plan.staleness` (the first
    ones on those before any update): always exactly those, however long anything takes, so that
    runs repeat and resume bit for bit like synchronous ones.
    """
    ahead: deque[tuple[Request, Version]] = deque()

    def begin(iteration: int, version: Version) -> None:
        if iteration <= plan.iterations:
            ahead.append((plan.request(iteration), version))
            cluster.begin(*ahead[-1])

    for iteration in range(done + 1, done + 1 + plan.staleness):  # what was under way at `done`
        age = max(iteration - 1 - plan.staleness, 0)
        begin(iteration, cluster.publish("behaviour" if age == done else f"behaviour/{age}"))
    version = cluster.publish("behaviour")
    for iteration in range(done + 1, plan.iterations + 1):
        clock = Clock()
        begin(iteration + plan.staleness, version)
        request, sampled_by = ahead.popleft()
        with clock("rollout"):  # what is left of it
            refs = cluster.rollout(request, sampled_by)
        with clock("reward"):
            scores = cluster.score(refs)
        batch = judged(plan, request, refs, scores)
        with clock("train"):
            report = cluster.update(refs, batch.advantages)
        with clock("sync"):
            version = cluster.publish("behaviour")
        row = {**batch.metrics, **report.metrics, **clock.row()}
        row["rollout/staleness"] = iteration - 1 - sampled_by.step
        version = observer.observe(iteration, refs, row, version)
        cluster.release(refs)
