"""`rlhf distill fewstep` and `rlhf distill opd`: guided teachers into one unguided student.

fewstep   a student of a few fixed noise levels: regression on segments of the teacher's trajectory,
          consistency, or distribution matching (`rlhf.distill`)
opd       a student of the usual grid, taught at every state of its own trajectory, by several
          teachers where there are several

Both leave `<run>/model`, a complete stock pipeline; of fewstep one that samples at its own levels,
scheduler included, and needs no guidance.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from rlhf.distill.bundles import Bundles
from rlhf.distill.grids import Grids, grid_of, through
from rlhf.distill.matching import DistributionMatching, MatchingConfig
from rlhf.distill.method import Consistency, Method, OnPolicy, Segments
from rlhf.distill.objectives import path_weights
from rlhf.distill.student import Shown, distance, distil, give_grid, start_from, write_model
from rlhf.distill.teachers import TeacherConfig, Teachers, open_teachers, own_levels
from rlhf.distill.trajectories import Trajectories, make_ahead, open_trajectories
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import LearnerConfig
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import check_pictures, describe, load_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.prompts import PromptSet, load_prompts
from rlhf.run import Run
from rlhf.training import Pace, open_run
from rlhf.types import Prompt

SHOWN_COPIES = 2  # pictures of a held-out prompt on a sheet


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillConfig:
    """What both have. `start`: a run whose `start_slot` the student begins with, instead of its
    base. A step trains on `pace.micro_batches` bundles of at most `per` prompts and `copies` seeds
    of each. `noises`: epochs after which the same seeds come again, 0 for never. `teacher_steps`:
    of the guided pictures that the student is compared with, and regressed on; `workers` processes
    make them, above 1 on Ray and before training.
    """

    name: str = "distill"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1  # of each process
    workers: int = 1
    student: PolicyConfig = field(default_factory=PolicyConfig)
    start: str | None = None
    start_slot: str = "train"
    teachers: dict[str, TeacherConfig] = field(default_factory=lambda: {"base": TeacherConfig()})
    teacher_steps: int = 40
    prompts: PromptSet = field(default_factory=PromptSet)
    shown: PromptSet = field(
        default_factory=lambda: PromptSet(source="scenes/objects/2@heldout", count=16)
    )
    size: tuple[int, int] = (64, 64)  # (height, width) where a prompt does not say
    per: int = 16
    copies: int = 2
    noises: int = 0
    pace: Pace = field(default_factory=lambda: Pace(steps=300, save_every=100))
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(lr=3e-4))
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights are float32
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the files

    def check(self) -> None:
        if self.student.train == "none":
            raise ConfigError("student.train: expected lora or full, got none: nothing would learn")
        names = ("per", "copies", "teacher_steps", "threads", "workers")
        counts = {name: getattr(self, name) for name in names} | {"pace.steps": self.pace.steps}
        for name, count in counts.items():
            if count < 1:
                raise ConfigError(f"{name}: expected at least 1, got {count}")
        if self.noises < 0:
            raise ConfigError(f"noises: expected 0 (fresh ones) or more, got {self.noises}")
        if self.learner.parallel != "ddp":
            raise ConfigError("learner.parallel: expected ddp: slots of weights are not sharded")
        if set(self.prompts.shares().values()) - {1}:
            raise ConfigError(
                f"prompts.sources: expected counts, got shares {self.prompts.shares()}: an epoch"
                " takes every prompt once, so a source's share is its count"
            )
        if 0 < self.learner.total_steps < self.pace.steps:
            raise ConfigError(
                f"learner.total_steps: expected at least pace.steps, {self.pace.steps}, got"
                f" {self.learner.total_steps}: the rate would stay at its lowest; 0 keeps it"
                " constant"
            )

    @property
    def rows(self) -> int:
        """Pictures of a step, if every bundle is full."""
        return self.per * self.copies * self.pace.micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class FewstepConfig(DistillConfig):
    """`grid`: a preset of `rlhf.distill.grids`, or noise levels from 1 down."""

    name: str = "fewstep"
    method: Literal["segments", "consistency", "dmd"] = "segments"
    grid: str | tuple[float, ...] = "even-4"
    noises: int = 2
    matching: MatchingConfig = field(default_factory=MatchingConfig)

    def check(self) -> None:
        DistillConfig.check(self)
        grid_of(self.grid)
        if self.method != "dmd" and not self.noises:
            raise ConfigError(
                f"noises: expected at least 1 with method {self.method}, which learns from kept"
                " trajectories of the teacher, got 0: write noises=2"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpdConfig(DistillConfig):
    """`steps` of the student's own trajectory. `weighting`: of the squared distance at each of
    them, 1, or that of the KL between the paths of two flow-SDE samplers of `noise_level`.
    """

    name: str = "opd"
    steps: int = 10
    weighting: Literal["velocity", "path-kl"] = "velocity"
    noise_level: float = 0.7

    def check(self) -> None:
        DistillConfig.check(self)
        if self.steps < 1 + (self.weighting == "path-kl"):
            raise ConfigError(
                f"steps: expected at least 1, and 2 with weighting path-kl, got {self.steps}"
            )
        if not self.noise_level > 0:
            raise ConfigError(f"noise_level: expected above 0, got {self.noise_level}: try 0.7")


# --- the parts of a run --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What both programs are made of, before a run is."""

    ranks: Ranks
    policy: PipelinePolicy
    teachers: Teachers
    prompts: Sequence[Prompt]
    shown: Sequence[Prompt]
    teacher_grids: Grids  # the usual ones, or the levels that teachers were distilled to


def _parts(config: DistillConfig, steps: int, ranks: Ranks, levels: Sequence[float] = ()) -> Parts:
    """Opened and checked; `steps` are the student's, `levels` those that teachers were distilled
    to. Raises ConfigError or PromptError.
    """
    ranks.share(range(config.pace.micro_batches))  # as every step will be
    prompts, shown = load_prompts(config.prompts), load_prompts(config.shown)
    base = describe(config.student.model)
    if base.own_grid:
        raise ConfigError(
            f"student.model: expected a base that samples on the usual grid, got"
            f" '{config.student.model}', which has noise levels of its own: name its base, and"
            " start=runs/<name> to begin with its weights"
        )
    sizes = check_pictures(base, [*prompts, *shown], config.size, "size")
    policy = load_policy(replace(config.student, device=ranks.device))
    moved = bool(config.start) and start_from(policy, str(config.start), config.start_slot)
    teachers = open_teachers(policy, config.teachers, apart=moved)
    teachers.check(sorted({p.category for p in (*prompts, *shown)}), steps)
    own = (*levels, 0.0) if levels else None
    grids = {size: own or policy.sigmas(config.teacher_steps, size) for size in sizes}
    return Parts(
        ranks=ranks,
        policy=policy,
        teachers=teachers,
        prompts=prompts,
        shown=shown,
        teacher_grids=grids,
    )


def _bundles(config: DistillConfig, parts: Parts) -> Bundles:
    return Bundles(
        parts.prompts,
        parts.policy,
        config.size,
        per=config.per,
        copies=config.copies,
        noises=config.noises,
        seed=config.seed,
        parts=config.pace.micro_batches,
    )


def _shown(config: DistillConfig, parts: Parts, grids: Grids, teacher: Trajectories) -> Shown:
    bundles = Bundles(
        parts.shown,
        parts.policy,
        config.size,
        per=max(config.per // SHOWN_COPIES, 1),
        copies=SHOWN_COPIES,
        noises=1,
        seed=config.seed + 1,
        parts=1,
    )
    return Shown(parts.policy, bundles, grids, teacher)


def _make_ahead(config: DistillConfig, parts: Parts, shown: Shown, bundles: Bundles | None) -> None:
    """Have the workers make the trajectories of what is shown, and of all that `bundles` give."""
    wanted, kept = list(shown.bundles), shown.teacher
    if bundles is not None:
        wanted += [one for step in range(1, config.pace.steps + 1) for one in bundles.at(step)]
    build = partial(
        open_trajectories,
        config.student,
        config.teachers,
        kept.grids,
        kept.knots,
        kept.folder.absolute(),
    )
    make_ahead(kept, wanted, build, config.workers, config.threads, parts.ranks)


def _finish(
    config: DistillConfig,
    home: Run,
    parts: Parts,
    method: Method,
    shown: Shown,
    grid: Sequence[float] | None,
) -> dict[str, Any]:
    """Train, write the model and the result; on ranks but the first, nothing is written."""
    began, ranks, found = time.monotonic(), parts.ranks, {}
    frozen, bundles = parts.teachers.checksums(), _bundles(config, parts)
    if config.workers > 1:
        _make_ahead(config, parts, shown, bundles if method.trajectories else None)
    ranks.on_first(lambda: found.update(before=distance(shown.ends())))
    distil(
        home,
        parts.policy,
        method,
        bundles,
        shown,
        config.pace,
        config.learner,
        config.precision,
        ranks,
    )
    same = all(ranks.gather(parts.teachers.checksums() == frozen))
    if not ranks.is_first:
        return {}
    before, after = found["before"], distance(shown.ends())
    base, model = config.student.model, home.root / "model"
    write_model(parts.policy, base, model, grid, config.save_dtype)
    metrics: dict[str, Any] = {
        "heldout/distance": {"before": before, "after": after, "gain": after - before},
    }
    return home.write_result(
        time.monotonic() - began, metrics, model=str(model), teachers_unchanged=same
    )


# --- the programs --------------------------------------------------------------------------------


def fewstep(config: FewstepConfig, resume: Path | None = None) -> dict[str, Any]:
    """Distil into a student of a few fixed noise levels; the result is `<run>/model`. Under
    torchrun ranks share the bundles of a step; those but the first return an empty result.

    Raises:
        ConfigError, PromptError: before anything is computed or written.
    """
    torch.set_num_threads(config.threads)
    with session(config.student.device) as ranks:
        return _fewstep(config, resume, ranks)


def _fewstep(config: FewstepConfig, resume: Path | None, ranks: Ranks) -> dict[str, Any]:
    knots, levels = grid_of(config.grid), own_levels(config.teachers)
    if levels and config.method == "dmd":
        raise ConfigError(
            "teachers: expected ones of the usual grid, since dmd asks them at any noise level, got"
            f" one that was distilled to {list(levels)}: write method=segments"
        )
    if levels and set(knots[:-1]) - set(levels):
        raise ConfigError(
            f"grid: expected some of the levels {list(levels)} that the teacher was distilled to,"
            f" got {list(knots[:-1])}: leave the others out"
        )
    parts = _parts(config, len(knots) - 1, ranks, levels)
    grids = {size: through(usual, knots) for size, usual in parts.teacher_grids.items()}
    give_grid(parts.policy.pipeline, knots)
    home = open_run(config, "distill fewstep", resume, ranks)
    kept = Trajectories(parts.policy, parts.teachers, grids, knots, home.root / "trajectories")
    method: Method
    if config.method == "segments":
        method = Segments(kept)
    elif config.method == "consistency":
        method = Consistency(parts.policy, kept)
    else:
        method = DistributionMatching(
            parts.policy, parts.teachers, knots, config.matching, config.precision, ranks
        )
    shown = _shown(config, parts, dict.fromkeys(grids, knots), kept)
    return _finish(config, home, parts, method, shown, knots)


def opd(config: OpdConfig, resume: Path | None = None) -> dict[str, Any]:
    """Distil on the student's own trajectories; the result is `<run>/model`. Ranks: see `fewstep`.

    Raises:
        ConfigError, PromptError: before anything is computed or written.
    """
    torch.set_num_threads(config.threads)
    with session(config.student.device) as ranks:
        return _opd(config, resume, ranks)


def _opd(config: OpdConfig, resume: Path | None, ranks: Ranks) -> dict[str, Any]:
    if levels := own_levels(config.teachers):
        raise ConfigError(
            "teachers: expected ones of the usual grid, whose states the student visits, got one"
            f" that was distilled to {list(levels)}: name its base, or a run of align"
        )
    parts = _parts(config, config.steps, ranks)
    grids = {size: parts.policy.sigmas(config.steps, size) for size in parts.teacher_grids}
    weights = {size: [1.0] * config.steps for size in grids}
    if config.weighting == "path-kl":
        weights = {size: path_weights(s, config.noise_level) for size, s in grids.items()}
    home = open_run(config, "distill opd", resume, ranks)
    usual, folder = parts.teacher_grids, home.root / "trajectories"
    kept = Trajectories(parts.policy, parts.teachers, usual, (1.0, 0.0), folder)
    method = OnPolicy(parts.policy, parts.teachers, grids, weights)
    return _finish(config, home, parts, method, _shown(config, parts, grids, kept), None)


def plan_fewstep(config: FewstepConfig) -> str:
    """Rows through the transformer, for --dry-run."""
    steps, rows = len(grid_of(config.grid)) - 1, config.rows
    if config.method == "segments":
        each = f"{rows * steps} rows forward and backward"
    elif config.method == "consistency":
        each = f"{rows} rows forward and backward, about {rows * 3} forward"
    else:
        turns, way = config.matching.ratio, (steps + 1) / 2
        each = (
            f"{rows * (1 + turns)} rows forward and backward (fake score: {rows * turns}), about"
            f" {rows * (3 + way * (1 + turns)):.0f} forward"
        )
    made = config.prompts.asked() * config.noises * config.copies or "all"
    kept = 0 if config.method == "dmd" else made
    return "\n".join(
        [
            f"{config.pace.steps} steps of {rows} pictures at {steps} noise levels; each {each}",
            f"{kept} trajectories of the teacher at most, of {config.teacher_steps} steps, kept",
        ]
    )


def plan_opd(config: OpdConfig) -> str:
    """Rows through the transformer, for --dry-run."""
    visited = config.rows * config.steps
    return (
        f"{config.pace.steps} steps of {config.rows} trajectories of {config.steps} states; each"
        f" {visited} rows forward and backward, {visited} forward on the way, and {2 * visited} of"
        " each teacher that has a say"
    )
