"""The batch of one iteration: its groups with their advantages, and what is sampled in the place of
groups that taught nothing.

All groups that were sampled are reported on; what is trained are as many as the iteration began
with. Every draw is a function of (seed, iteration, round), so a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from rewards.types import Scores
from rlhf.advantage import Scheme, group_advantages
from rlhf.cluster.base import Cluster
from rlhf.errors import TooManyFailures
from rlhf.monitor import figures
from rlhf.rollout import Request
from rlhf.types import Advantages, GroupRef, Version


@runtime_checkable
class Terms(Protocol):
    """What advantages depend on, and how often and by what groups are replaced."""

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
    def refill(self) -> int: ...

    def further(
        self, iteration: int, round: int, sampled: Sequence[GroupRef], flat: Sequence[int]
    ) -> tuple[Request, Sequence[int]]:
        """A request for prompts in the place of some of the groups `flat` (places in `sampled`),
        and which of them these are. The request is empty where the prompts have run out.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`sampled` groups, their scores, and the places in `sampled` of those that are trained."""

    sampled: tuple[GroupRef, ...]
    scores: Scores
    trained: tuple[int, ...]
    advantages: Advantages  # of the trained ones, in their order
    metrics: Mapping[str, float]
    forwards: int  # rows through the transformer

    @property
    def refs(self) -> list[GroupRef]:
        """The groups to train on."""
        return [self.sampled[i] for i in self.trained]

    @staticmethod
    def of(
        terms: Terms,
        sampled: Sequence[GroupRef],
        scores: Scores,
        trained: Sequence[int],
        forwards: int,
    ) -> Batch:
        """A batch with its advantages. They are a group's own, but for `gdpo`, which scales by the
        live samples of all that were sampled: those are the live ones of the trained groups.
        """
        categories = [ref.prompt.category for ref in sampled]
        known = terms.weights, categories, terms.required, terms.advantage_clip
        every, said = group_advantages(scores, *known, terms.scheme, terms.watch)
        pictures = sum(len(ref.seeds) for ref in sampled)
        metrics = {"samples": float(pictures), "nfe": float(forwards)}
        keep = list(trained)
        return Batch(
            sampled=tuple(sampled),
            scores=scores,
            trained=tuple(keep),
            advantages=Advantages(value_PG=every.value_PG[keep], live_PG=every.live_PG[keep]),
            metrics=metrics | dict(said.metrics) | figures(scores),
            forwards=forwards,
        )


def judged(terms: Terms, request: Request, refs: Sequence[GroupRef], scores: Scores) -> Batch:
    """The batch of a request that was sampled and scored. Raises TooManyFailures."""
    check_failures(scores, terms.max_failed_share)
    return Batch.of(terms, refs, scores, range(len(refs)), request.forwards)


def refilled(cluster: Cluster, terms: Terms, batch: Batch, version: Version) -> Batch:
    """The batch with groups of further prompts in the place of those without a live sample.

    At most `terms.refill` rounds, each of at most as many groups as are not live. What is replaced
    is released. Raises TooManyFailures.
    """
    iteration = batch.sampled[0].iteration
    for turn in range(1, terms.refill + 1):
        flat = [
            place
            for place, live in zip(batch.trained, batch.advantages.live_PG, strict=True)
            if not live.any()
        ]
        request, replaced = terms.further(iteration, turn, batch.sampled, flat)
        if not replaced:
            break
        refs = cluster.rollout(request, version)
        more = judged(terms, request, refs, cluster.score(refs))
        first = len(batch.sampled)
        into = {place: first + i for i, place in enumerate(replaced)}
        cluster.release([batch.sampled[place] for place in replaced])
        batch = Batch.of(
            terms,
            (*batch.sampled, *more.sampled),
            joined(batch.scores, more.scores),
            [into.get(place, place) for place in batch.trained],
            batch.forwards + more.forwards,
        )
    if terms.refill:
        added = len(batch.sampled) - len(batch.trained)
        batch = replace(batch, metrics={**batch.metrics, "refill/groups": float(added)})
    return batch


def joined(*parts: Scores) -> Scores:
    """The groups of all, one after the other. Raises KeyError for other judges or figures."""
    first = parts[0]
    return Scores(
        judges=first.judges,
        table={name: tuple(g for one in parts for g in one.table[name]) for name in first.table},
        figures={
            name: tuple(v for one in parts for v in one.figures[name]) for name in first.figures
        },
        seconds={name: sum(one.seconds[name] for one in parts) for name in first.seconds},
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
