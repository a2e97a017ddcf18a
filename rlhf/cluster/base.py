"""The cluster's four verbs and the plain workers behind them.

    rollout(request, version) -> refs      sample groups with published weights (`begin`: early)
    score(refs) -> Scores                  judge their pictures
    update(refs, advantages) -> report     train on them
    publish(slot) -> version               hand a slot's weights to every rollout worker, proved

Callers hold handles and figures, never pictures, latents or weights; `pixels` is for eyes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from rewards import images
from rewards.judge import Judge, load_judge, run_judge
from rewards.statistics import diversity, picture_statistics
from rewards.types import JudgeCard, Sample, Score, Scores
from rlhf.alignment import AlignmentConfig, AlignmentLearner
from rlhf.distributed import ALONE, Ranks
from rlhf.errors import ConfigError
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.rollout import Request, RolloutWorker
from rlhf.types import Advantages, GroupRef, Prompt, Rollouts, StepReport, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """`ray` places rollout, reward and learner actors; `local` does everything in this process,
    with one of each whatever their numbers are.

    Results do not depend on `rollout_workers`, only on threads per process; on `learners` in the
    last bits. `colocated`: rollout worker i and learner i take turns on the same cores or GPU;
    `disaggregated`: each kind has its own. `address` joins a running Ray. A wait ends after
    `timeout_seconds`, for a judge's answer after `judge_seconds`. A run whose learner died goes
    back to its last checkpoint by itself, `restarts` times.
    """

    kind: Literal["local", "ray"] = "ray"
    layout: Literal["colocated", "disaggregated"] = "colocated"
    rollout_workers: int = 2
    reward_workers: int = 1
    learners: int = 1
    rollout_threads: int = 1
    learner_threads: int = 2
    gpus_per_worker: float = 0.0
    gpus_per_learner: float = 0.0
    timeout_seconds: float = 600.0
    judge_seconds: float = 300.0
    restarts: int = 2
    address: str | None = None

    def check(self) -> None:
        counts = (
            self.rollout_workers,
            self.reward_workers,
            self.learners,
            self.rollout_threads,
            self.learner_threads,
        )
        if min(counts) < 1:
            raise ConfigError(
                "cluster: expected at least one worker of each kind and one thread each"
            )
        if min(self.timeout_seconds, self.judge_seconds) <= 0 or self.restarts < 0:
            raise ConfigError(
                "cluster: expected timeout_seconds and judge_seconds above 0 and restarts of 0 or"
                f" more, got {self.timeout_seconds}, {self.judge_seconds} and {self.restarts}"
            )
        shared = self.gpus_per_worker + self.gpus_per_learner
        if self.layout == "colocated" and shared > 1:
            raise ConfigError(
                "cluster.layout=colocated: expected a worker and a learner to share one GPU, got"
                f" {self.gpus_per_worker} and {self.gpus_per_learner}: write 0.5 each, or"
                " cluster.layout=disaggregated"
            )
        held = shared if self.layout == "colocated" else self.gpus_per_learner
        if self.learners > 1 and self.gpus_per_learner > 0 and held <= 0.5:
            raise ConfigError(
                "cluster.gpus_per_learner: expected that no two learners fit on one GPU, which NCCL"
                f" refuses, got {held:g} of a GPU for each: write more than 0.5"
            )

    def check_untrained(self) -> None:
        """Of a program that only samples and scores. Raises ConfigError."""
        if self.learners > 1:
            raise ConfigError(
                f"cluster.learners: expected 1, nothing is trained here, got {self.learners}: it"
                " is rollout_workers that make this faster"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that the workers are built from."""

    policy: PolicyConfig = field(default_factory=PolicyConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    judges: tuple[str, ...] = ("oracle/fidelity",)
    judge_retries: int = 1
    statistics: bool = False  # of the pictures, beside their scores
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@runtime_checkable
class Cluster(Protocol):
    """See the module docstring."""

    def begin(self, request: Request, version: Version) -> None:
        """Start on a request early, where something is there to work on it meanwhile."""
        ...

    def rollout(self, request: Request, version: Version) -> list[GroupRef]: ...

    def score(self, refs: Sequence[GroupRef]) -> Scores: ...

    def update(self, refs: Sequence[GroupRef], advantages: Advantages) -> StepReport: ...

    def publish(self, slot: str) -> Version: ...

    def cards(self) -> tuple[JudgeCard, ...]:
        """Who judges."""
        ...

    def pixels(self, refs: Sequence[GroupRef]) -> list[np.ndarray]:
        """Pictures of each group, uint8 (G, 3, H, W)."""
        ...

    def release(self, refs: Sequence[GroupRef]) -> None:
        """Forget groups that are no longer needed."""
        ...

    def save(
        self, folder: Path, step: int, keep_last: int, keep_best: int, metric: float | None
    ) -> None: ...

    def load(self, path: Path) -> int: ...

    def export(self, slot: str, folder: Path) -> None: ...

    def close(self) -> None: ...


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch with n threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_rollout_worker(recipe: Recipe) -> RolloutWorker:
    """A rollout worker with its own copy of the policy."""
    return RolloutWorker(load_policy(recipe.policy))


def make_learner(recipe: Recipe, ranks: Ranks = ALONE) -> AlignmentLearner:
    """The learner with the policy it trains, one of several if there are `ranks`."""
    return AlignmentLearner(load_policy(recipe.policy), recipe.alignment, ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Scores of one group by judge, the seconds each took, and, if asked for, the statistics of its
    pictures.
    """

    scores: Mapping[str, tuple[Score, ...]]
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)


def samples_of(prompt: Prompt, pixels: np.ndarray) -> list[Sample]:
    """Pictures (G, 3, H, W) of a prompt as a judge sees them."""
    sources = tuple(images.load_image(p) for p in prompt.sources)
    return [
        Sample(
            image=picture,
            prompt=prompt.text,
            category=prompt.category,
            sources=sources,
            target=prompt.target,
            columns=dict(prompt.columns),
        )
        for picture in pixels
    ]


class RewardWorker:
    """Loads the judges once and scores groups; never raises for what a judge does."""

    def __init__(self, names: Sequence[str], retries: int = 1, statistics: bool = False) -> None:
        self.judges: dict[str, Judge] = {}
        for name in names:
            judge = load_judge(name)
            self.judges[judge.card.name] = judge
        self.retries, self.statistics = retries, statistics

    def cards(self) -> tuple[JudgeCard, ...]:
        return tuple(judge.card for judge in self.judges.values())

    def score(self, rollouts: Rollouts, names: Sequence[str] | None = None) -> Judged:
        """Scores of one group by all judges, or by those of `names`, and its statistics."""
        pixels = rollouts.pixels.numpy()
        samples = samples_of(rollouts.ref.prompt, pixels)
        asked = self.judges if names is None else {n: self.judges[n] for n in names}
        scores, seconds = {}, {}
        for name, judge in asked.items():
            began = time.monotonic()
            scores[name] = tuple(run_judge(judge, samples, self.retries))
            seconds[name] = time.monotonic() - began
        figures = _statistics(pixels) if self.statistics else {}
        return Judged(scores=scores, figures=figures, seconds=seconds)


def _statistics(pixels: np.ndarray) -> dict[str, float]:
    """Means over the pictures of a group, and how far apart these are."""
    means = {name: float(v.mean()) for name, v in picture_statistics(pixels).items()}
    return means | {f"diversity/{name}": v for name, v in diversity(pixels).items()}


def make_reward_worker(recipe: Recipe) -> RewardWorker:
    """A reward worker with its own copy of the judges."""
    return RewardWorker(recipe.judges, recipe.judge_retries, recipe.statistics)


def assemble_scores(cards: tuple[JudgeCard, ...], groups: Sequence[Judged]) -> Scores:
    """The scores of groups, in their order, as one table. NaN for statistics that are not there."""
    names = dict.fromkeys(name for g in groups for name in g.figures)
    return Scores(
        judges=cards,
        table={c.name: tuple(g.scores[c.name] for g in groups) for c in cards},
        figures={name: tuple(g.figures.get(name, nan) for g in groups) for name in names},
        seconds={c.name: sum(g.seconds.get(c.name, 0.0) for g in groups) for c in cards},
    )
