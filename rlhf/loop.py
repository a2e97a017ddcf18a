"""The alignment loop: prompts -> rollouts -> scores -> advantages -> new weights, once per
iteration.

What each line needs is done by the verb it names; metrics come back from the verbs and go to one
sink.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from rewards.types import Scores
from rlhf.advantage import Scheme, group_advantages
from rlhf.cluster.base import Cluster
from rlhf.errors import TooManyFailures
from rlhf.monitor import figures
from rlhf.rollout import Request
from rlhf.types import GroupRef, Version


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
        check_failures(scores, plan.max_failed_share)
        categories = [p.category for p in request.prompts]
        advantages, judged = group_advantages(
            scores,
            plan.weights,
            categories,
            plan.required,
            plan.advantage_clip,
            plan.scheme,
            plan.watch,
        )
        with clock("train"):
            report = cluster.update(refs, advantages)
        with clock("sync"):
            version = cluster.publish("behaviour")
        row |= {**judged.metrics, **figures(scores), **report.metrics}
        row["seconds/total"] = time.monotonic() - began
        version = observer.observe(iteration, refs, row, version)
        cluster.release(refs)


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
