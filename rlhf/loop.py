"""The alignment loop: prompts -> rollouts -> scores -> advantages -> new weights, once per
iteration. `align` does one after the other; `align_overlapped` samples while it trains.

What each line needs is done by the verb it names; metrics come back from the verbs and go to one
sink.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from rewards.types import Scores
from rlhf.advantage import AdvantageReport, Scheme, group_advantages
from rlhf.cluster.base import Cluster
from rlhf.errors import TooManyFailures
from rlhf.monitor import figures
from rlhf.rollout import Request
from rlhf.types import Advantages, GroupRef, Version


@runtime_checkable
class Plan(Protocol):
    """What an iteration is made of; a program's configuration provides it."""

    @property
    def iterations(self) -> int: ...

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]: ...

    @property
    def required(self) -> Sequence[str]: ...

    @property
    def advantage_clip(self) -> float: ...

    @property
    def scheme(self) -> Scheme: ...

    @property
    def watch(self) -> Sequence[str]: ...

    @property
    def max_failed_share(self) -> float: ...

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
        advantages, judged = advantages_of(scores, plan, request)
        with clock("train"):
            report = cluster.update(refs, advantages)
        with clock("sync"):
            version = cluster.publish("behaviour")
        row = {**judged.metrics, **figures(scores), **report.metrics, **clock.row()}
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
        advantages, judged = advantages_of(scores, plan, request)
        with clock("train"):
            report = cluster.update(refs, advantages)
        with clock("sync"):
            version = cluster.publish("behaviour")
        row = {**judged.metrics, **figures(scores), **report.metrics, **clock.row()}
        row["rollout/staleness"] = iteration - 1 - sampled_by.step
        version = observer.observe(iteration, refs, row, version)
        cluster.release(refs)


def advantages_of(
    scores: Scores, plan: Plan, request: Request
) -> tuple[Advantages, AdvantageReport]:
    """Advantages of an iteration's samples, as the plan weighs judges. Raises TooManyFailures."""
    check_failures(scores, plan.max_failed_share)
    return group_advantages(
        scores,
        plan.weights,
        [p.category for p in request.prompts],
        plan.required,
        plan.advantage_clip,
        plan.scheme,
        plan.watch,
    )


def check_failures(scores: Scores, limit: float) -> None:
    """Raise TooManyFailures when a judge failed for more than `limit` of the samples it was asked
    about.
    """
    for name, groups in scores.table.items():
        flat = [s for group in groups for s in group if s.state != "na"]
        bad = [s for s in flat if s.state == "failed"]
        if flat and len(bad) / len(flat) > limit:
            raise TooManyFailures(
                f"judge {name} failed for {len(bad)} of {len(flat)} samples (limit {limit:.0%});"
                " the first reason:"
                f" {bad[0].reason}"
            )
