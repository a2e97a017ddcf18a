"""`rlhf align`: train a policy on the scores of judges.

Guided rollouts, unguided training: `rollout.guidance` is the guidance of the pictures that are scored, and
`train_guidance` (1 by default) that of the field in the loss. See `rlhf.loop` for the iteration itself.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rewards import images
from rlhf import checkpoint, page
from rlhf.alignment import AlignmentConfig, LossConfig
from rlhf.cluster.base import Cluster, ClusterConfig, Recipe
from rlhf.cluster.local import LocalCluster
from rlhf.errors import ConfigError, Interrupted
from rlhf.evaluation import Evaluation, Measured, Protocol, evaluate, gains
from rlhf.learner import LearnerConfig
from rlhf.loop import align
from rlhf.metrics import MetricsLog
from rlhf.policies.qwen_image21 import PolicyConfig
from rlhf.prompts import PromptSet, batch_of, load_prompts
from rlhf.rollout import Request, seeds_of
from rlhf.run import Run
from rlhf.sampling import Sampler
from rlhf.types import GroupRef, Prompt, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Held-out prompts, measured before, every `every` iterations (0 = never) and after."""

    prompts: PromptSet = field(default_factory=lambda: PromptSet(source="scenes/objects/2@align-heldout", count=64))
    per_prompt: int = 4
    every: int = 15
    steps: int = 20
    guidance: float | None = None  # None: that of the rollouts
    settings: tuple[str, ...] = ("guided", "w1")
    seed: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """A checkpoint every `every` iterations; the newest `keep_last` and best `keep_best` stay."""

    every: int = 10
    keep_last: int = 2
    keep_best: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One alignment run. `weights`: category -> judge -> weight, "*" for every other category."""

    name: str = "align"
    runs: str = "runs"
    seed: int = 0
    iterations: int = 40
    prompts_per_iteration: int = 12
    group_size: int = 8
    prompts: PromptSet = field(default_factory=PromptSet)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: Sampler = field(default_factory=lambda: Sampler(guidance=3.0))
    train_guidance: float = 1.0
    reference_guidance: float = 1.0
    loss: LossConfig = field(default_factory=LossConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    judges: tuple[str, ...] = ("oracle/fidelity",)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    judge_retries: int = 1
    advantage_clip: float = 5.0
    max_failed_share: float = 0.2
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Refuse what cannot be trained, and say what to write instead."""
        if self.group_size < 2:
            raise ConfigError(f"group_size: expected at least 2 (a group of one has no advantage), got {self.group_size}")
        if self.train_guidance not in (1.0, self.rollout.guidance):
            raise ConfigError(
                f"train_guidance: expected 1 (hybrid) or rollout.guidance ({self.rollout.guidance}), got"
                f" {self.train_guidance}: the old log-prob must belong to the field that is trained"
            )
        if self.reference_guidance != 1.0:
            raise ConfigError("reference_guidance: only 1 is supported; above it the KL would distil guidance")
        self._check_loss()
        if not self.judges:
            raise ConfigError("judges: expected at least one, such as oracle/fidelity or my_rewards.py:brightness")

    def _check_loss(self) -> None:
        loss, kernel = self.loss.loss, self.rollout.kernel
        if kernel not in loss.kernels:
            raise ConfigError(
                f"loss.name {loss.name} is defined for kernel {' or '.join(loss.kernels)}, got rollout.kernel={kernel}:"
                f" write rollout.kernel={loss.kernels[0]}"
            )
        start, stop = self.rollout.window
        if "trajectory" in loss.requires and stop <= start:
            raise ConfigError(
                f"loss.name {loss.name} needs stored stochastic steps, got rollout.window={list(self.rollout.window)}:"
                " write for example rollout.window=[0,4]"
            )
        if loss.form is not None and stop > self.rollout.steps - 1:
            raise ConfigError(
                f"rollout.window: expected to stop before the last of {self.rollout.steps} steps, got {stop}:"
                " its noise is too small to train on"
            )

    def judge_weights(self) -> dict[str, dict[str, float]]:
        """`weights`, or equal weights of all judges."""
        return self.weights or {"*": {name: 1.0 for name in self.judges}}

    def recipe(self) -> Recipe:
        """What the cluster's workers are built from."""
        return Recipe(
            policy=self.policy,
            alignment=AlignmentConfig(
                seed=self.seed,
                train_guidance=self.train_guidance,
                reference_guidance=self.reference_guidance,
                loss=self.loss,
                learner=self.learner,
            ),
            judges=self.judges,
            judge_retries=self.judge_retries,
            cluster=self.cluster,
        )

    def protocol(self) -> Protocol:
        """How held-out pictures are made."""
        e = self.evaluation
        sampler = replace(
            self.rollout,
            steps=e.steps,
            kernel="ode",
            window=(0, 0),
            guidance=self.rollout.guidance if e.guidance is None else e.guidance,
        )
        settings = tuple(s for s in e.settings if s != "w1" or sampler.guidance > 1)
        return Protocol(sampler=sampler, per_prompt=e.per_prompt, settings=settings, seed=e.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The iterations of a configuration; see `rlhf.loop.Plan`."""

    config: Config
    prompts: Sequence[Prompt]
    iterations: int
    weights: Mapping[str, Mapping[str, float]]
    required: Sequence[str]
    advantage_clip: float
    max_failed_share: float

    @staticmethod
    def of(config: Config, prompts: Sequence[Prompt]) -> Plan:
        return Plan(
            config=config,
            prompts=prompts,
            iterations=config.iterations,
            weights=config.judge_weights(),
            required=config.required,
            advantage_clip=config.advantage_clip,
            max_failed_share=config.max_failed_share,
        )

    def request(self, iteration: int) -> Request:
        """The groups of an iteration, a function of (seed, iteration) alone."""
        c = self.config
        chosen = batch_of(self.prompts, c.prompts_per_iteration, iteration, c.seed)
        return Request(
            iteration=iteration,
            prompts=chosen,
            seeds=seeds_of(c.seed, iteration, len(chosen), c.group_size),
            sampler=c.rollout,
            store=c.loss.loss.form,
            train_guidance=c.train_guidance,
        )


class Recorder:
    """Rows, pictures, held-out figures and checkpoints of a run; stops it cleanly on SIGTERM."""

    def __init__(self, run: Run, config: Config, cluster: Cluster, held_out: Sequence[Prompt]) -> None:
        self.run, self.config, self.cluster, self.held_out = run, config, cluster, held_out
        self.log = MetricsLog(run.root)
        self.console = Console(stderr=True)
        self.latest: Evaluation | None = None
        self.stopping = False

    def measure(self, slot: str, name: str) -> Evaluation:
        """Evaluate a slot and keep its guided pictures as samples/<name>.png."""
        version = self.cluster.publish(slot)
        result = evaluate(self.cluster, self.held_out, version, self.config.protocol())
        pictures = self.cluster.pixels(result.shown)
        count, per = pictures.shape[:2]
        grid = images.contact_sheet(list(pictures.reshape(-1, *pictures.shape[2:])), columns=2 * per)
        grid.save(self.run.samples / f"{name}.png")
        texts = [p.text for p in self.held_out[:count]]
        self.run.write_json("samples/prompts.json", {"prompts": texts, "per_prompt": per})
        self.cluster.release(result.shown)
        self.latest = result
        return result

    def observe(self, iteration: int, refs: list[GroupRef], row: dict[str, float], version: Version) -> Version:
        """See `rlhf.loop.Observer`. Returns the version that the next rollouts use."""
        c = self.config
        row |= {"samples": sum(len(r.seeds) for r in refs), "policy_version": version.step}
        row |= {"nfe": self.forwards(), "reward_calls": row["samples"] * len(c.judges)}
        last = iteration == c.iterations
        if last or (c.evaluation.every and iteration % c.evaluation.every == 0):
            row |= self.measure("train", f"step_{iteration:06d}").row()
            version = self.cluster.publish("behaviour")
        self.log.log({"step": iteration, **row})
        self.console.print(progress_line(iteration, c.iterations, row), highlight=False)
        if last or self.stopping or iteration % c.checkpoints.every == 0:
            metric = next((v for k, v in row.items() if k.endswith("/strict")), row.get("reward/total"))
            keep = c.checkpoints
            self.cluster.save(self.run.checkpoints, iteration, keep.keep_last, keep.keep_best, metric)
        if self.stopping and not last:
            raise Interrupted(f"stopped after iteration {iteration}: continue with --resume {self.run.root}")
        return version

    def forwards(self) -> int:
        """Rows through the transformer for one iteration's pictures."""
        c = self.config
        per = c.rollout.steps * (2 if c.rollout.guidance > 1 else 1)
        return c.prompts_per_iteration * c.group_size * per

    def stop(self, *_: object) -> None:
        self.stopping = True


def progress_line(iteration: int, total: int, row: Mapping[str, float]) -> str:
    """One line for the terminal."""
    parts = [f"{iteration:4d}/{total}", f"reward {row.get('reward/total', float('nan')):.3f}"]
    parts += [f"live {row['advantage/live']:.2f}", f"loss {row['loss']:+.4f}", f"{row['seconds/total']:.1f} s"]
    held = [f"{k.removeprefix('heldout/')} {v:.3f}" for k, v in row.items() if k.startswith("heldout/")]
    return "  ".join(parts + held)


def make_cluster(recipe: Recipe) -> Cluster:
    """The cluster a recipe names."""
    if recipe.cluster.kind == "local":
        return LocalCluster(recipe)
    from rlhf.cluster.ray import RayCluster

    return RayCluster(recipe)


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Align, evaluate before and after, write result.json and report.html; returns the result."""
    began = time.monotonic()
    prompts, held_out = load_prompts(config.prompts), load_prompts(config.evaluation.prompts)
    plan = Plan.of(config, prompts)
    plan.request(1)
    home = Run.open(resume) if resume else Run.create(config.runs, config.name, config, "align")
    cluster = make_cluster(config.recipe())
    recorder = Recorder(home, config, cluster, held_out)
    previous = signal.signal(signal.SIGTERM, recorder.stop)
    try:
        done = restore(home, cluster)
        before = load_evaluation(home) or save_evaluation(home, recorder.measure("reference", "before"))
        align(cluster, plan, recorder, done)
        after = recorder.latest if done < config.iterations else recorder.measure("train", "after")
        assert after is not None
        last = home.samples / f"step_{config.iterations:06d}.png"
        if last.is_file():
            (home.samples / "after.png").write_bytes(last.read_bytes())
        cluster.export("train", home.root / "export")
    finally:
        signal.signal(signal.SIGTERM, previous)
        recorder.log.close()
        cluster.close()
    earlier = sum(r.get("seconds/total") or 0.0 for r in home.rows()[:done])
    result = home.write_result(earlier + time.monotonic() - began, gains(before, after))
    page.write(home)
    return result


def restore(home: Run, cluster: Cluster) -> int:
    """Load the newest complete checkpoint; the iteration to continue after. Later rows are superseded."""
    newest = checkpoint.latest(home.root)
    done = cluster.load(newest) if newest else 0
    home.supersede(done)
    return done


def save_evaluation(home: Run, evaluation: Evaluation) -> Evaluation:
    """Keep the values of the first evaluation, so that a resumed run compares with the same pictures."""
    table = {n: {"values": m.values.tolist(), "clusters": m.clusters.tolist()} for n, m in evaluation.figures.items()}
    home.write_json("evaluations/before.json", {"values": table})
    return evaluation


def load_evaluation(home: Run) -> Evaluation | None:
    """The first evaluation of a run, or None."""
    stored = home.read_json("evaluations/before.json")
    if stored is None:
        return None
    figures = {
        n: Measured(values=np.array(m["values"]), clusters=np.array(m["clusters"])) for n, m in stored["values"].items()
    }
    return Evaluation(figures=figures, shown=())


def plan(config: Config) -> str:
    """The arithmetic of an iteration, for --dry-run."""
    samples = config.prompts_per_iteration * config.group_size
    branches = 2 if config.rollout.guidance > 1 else 1
    trained = config.rollout.window[1] - config.rollout.window[0] if config.loss.loss.form else 1
    per_update = samples * trained
    old = per_update if config.loss.loss.form is None else 0
    return "\n".join(
        [
            f"per iteration: {config.prompts_per_iteration} prompts x {config.group_size} samples = {samples} pictures",
            f"  rollout: {config.rollout.steps} steps x {branches} branch(es) = {samples * config.rollout.steps * branches} forwards",
            f"  training: {config.loss.updates_per_rollout} updates x {per_update} transitions"
            f" = {config.loss.updates_per_rollout * per_update} forward+backward, {config.loss.updates_per_rollout * old} forwards",
            f"  judges: {len(config.judges)} x {samples} = {len(config.judges) * samples} calls",
            f"total: {config.iterations} iterations, {config.iterations * samples} pictures",
            f"memory: {memory(config)}",
        ]
    )


def memory(config: Config) -> str:
    """Weights per worker, from the sizes of the files of the base."""
    from rlhf.assets import resolve

    folder = Path(resolve(config.policy.model))
    if not folder.is_dir():
        return "unknown before the base is downloaded"
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2**20
    width = 4 if config.policy.dtype == "float32" else 2
    copies = config.cluster.rollout_workers + 1
    return json.dumps(size * width / 2)[:6] + f" MiB of weights in each of {copies} processes (activations apart)"
