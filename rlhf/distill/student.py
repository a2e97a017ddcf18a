"""A student: its run, what is looked at on the way, and the pipeline it becomes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rewards import images
from rlhf import checkpoint
from rlhf import config as config_module
from rlhf.assets import resolve
from rlhf.distill.bundles import Bundle, Bundles, split_bundles
from rlhf.distill.grids import Grids
from rlhf.distill.method import Method, student_loss
from rlhf.distill.trajectories import Trajectories, student_states
from rlhf.distributed import ALONE, Ranks
from rlhf.errors import ConfigError
from rlhf.files import atomic_directory
from rlhf.flow import mixed_precision
from rlhf.learner import Learner, LearnerConfig
from rlhf.policies.config import PolicyConfig
from rlhf.policies.open import Opening, open_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.run import Run
from rlhf.training import Average, Pace, train

ACROSS = 16  # pictures in a row of a sheet
Ends = Sequence[tuple[Tensor, Tensor]]  # final latents (B, N, C) of teachers and student


def distil(
    run: Run,
    policy: PipelinePolicy,
    method: Method,
    bundles: Bundles,
    shown: Shown,
    pace: Pace,
    learning: LearnerConfig,
    precision: str = "float32",
    ranks: Ranks = ALONE,
) -> None:
    """Train the slot `train`, from the run's last checkpoint on; its average, if there is one, is
    in place on the first rank afterwards. Raises what `rlhf.training.train` raises.
    """
    learner = Learner(policy.slots.parameters, learning, ranks)

    def batch_of(step: int) -> tuple[Bundle, ...]:
        batch = bundles.at(step)
        method.follow(batch)
        return batch

    def objective(batch: Sequence[Bundle]) -> tuple[Tensor, dict[str, float]]:
        (bundle,) = batch
        asked = method.targets(bundle)
        with mixed_precision(policy, precision):
            return student_loss(policy, bundle, asked)

    def preview(step: int, average: Average | None) -> dict[str, float]:
        if average is not None:
            policy.slots.load("ema", average.tensors)
        slot = "train" if average is None else "ema"
        ends = shown.ends(slot)
        shown.sheet(ends).save(run.samples / f"step_{step:06d}.png")
        return {"heldout/distance": distance(ends)}

    average = train(
        run,
        learner,
        batch_of,
        objective,
        pace,
        preview=preview,
        split=split_bundles,
        figures=method.figures,
        companions=method.companions,
    )
    if average is not None and ranks.is_first:
        average.copy_to(policy.slots.parameters)


class Shown:
    """Held-out bundles: the teachers' pictures and the student's of the same noise."""

    def __init__(
        self,
        policy: PipelinePolicy,
        bundles: Bundles,
        grids: Grids,
        teacher: Trajectories,
    ) -> None:
        self.policy, self.grids, self.teacher = policy, dict(grids), teacher
        steps = range(1, bundles.count + 1)
        self.bundles = [bundle for step in steps for bundle in bundles.at(step)]

    def ends(self, slot: str = "train") -> Ends:
        """Of every bundle, the student's sampled now."""
        return [self._ends(bundle, slot) for bundle in self.bundles]

    def _ends(self, bundle: Bundle, slot: str) -> tuple[Tensor, Tensor]:
        states, sigmas = self.teacher.of(bundle), self.grids[bundle.size]
        mine = student_states(self.policy, bundle, sigmas, states[0], len(sigmas) - 1, slot)
        return states[-1], mine[-1]

    def sheet(self, ends: Ends) -> Any:
        """The teachers' pictures of each bundle above the student's; what is edited above both."""
        rows = []
        for bundle, both in zip(self.bundles, ends, strict=True):
            rows += _edited(bundle)
            rows += [list(self.policy.decode(x, bundle.size).numpy()[:ACROSS]) for x in both]
        return images.contact_sheet(rows)


def distance(ends: Ends) -> float:
    """Mean squared distance of the student's final latents from the teachers', over all rows."""
    found = [(a - b).square().flatten(1).mean(1) for a, b in ends]
    return float(torch.cat(found).mean())


def _edited(bundle: Bundle) -> list[list[np.ndarray]]:
    """Rows of the source pictures of a bundle, each above the pictures made of it."""
    pairs = zip(bundle.prompts, bundle.seeds, strict=True)
    columns = [prompt.sources for prompt, seeds in pairs for _ in seeds][:ACROSS]
    return [[images.load_image(path) for path in row] for row in zip(*columns, strict=True)]


def start_from(policy: PipelinePolicy, run: str, slot: str) -> bool:
    """Begin with a slot of the newest checkpoint of a run. Weights laid out as the student's take
    their place; others, such as full ones for a LoRA student, are merged and put under it. True if
    what is frozen is then no longer the student's base.

    Raises:
        ConfigError: no such slot. CheckpointError: no checkpoint, or of another architecture.
    """
    tensors = checkpoint.load(checkpoint.locate(Path(run))).tensors
    if f"slots/{slot}" not in tensors:
        there = [n.removeprefix("slots/") for n in tensors if n.startswith("slots/")]
        raise ConfigError(f"start_slot: expected one of {there} of {run}, got '{slot}'")
    found, mine = tensors[f"slots/{slot}"], policy.slots.parameters
    same = {n: t.shape for n, t in found.items()} == {n: p.shape for n, p in mine.items()}
    if same and (policy.config.train == "full" or not _on_another_base(policy.config, run)):
        policy.slots.load("train", found)
        return False
    opened = open_policy(Opening(model=run, slot=slot, device="cpu")).policy
    policy.begin_with(opened.merged())
    return policy.config.train == "lora"


def _on_another_base(config: PolicyConfig, run: str) -> bool:
    """Whether the LoRA of a run is for other weights than a student's, or scaled otherwise."""
    data = config_module.read_yaml(Run.open(run).config_path)
    pretrained = {"model": data.get("start") or "", "train": data.get("train", "full")}
    section = data.get("policy") or data.get("student") or pretrained
    theirs = config_module.build(PolicyConfig, section)
    if (theirs.model, theirs.train, theirs.lora) != (config.model, config.train, config.lora):
        return True
    return "student" in data and bool(data.get("start")) and _on_another_base(config, data["start"])


def give_grid(pipeline: Any, sigmas: Sequence[float]) -> None:
    """Have a stock pipeline sample at exactly these levels unless it is told otherwise: they become
    its `sample_sigmas`, and its scheduler moves none of them.

    Raises:
        ConfigError: a pipeline that holds no levels of its own.
    """
    if "sample_sigmas" not in pipeline.config:
        raise ConfigError(
            "grid: expected a QwenImage21Pipeline, which can be configured with noise levels, got a"
            f" {type(pipeline).__name__}"
        )
    pipeline.register_to_config(sample_sigmas=list(sigmas[:-1]))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, use_dynamic_shifting=False, shift=1.0, shift_terminal=None
    )


def write_model(
    policy: PipelinePolicy, base: str, folder: Path, sigmas: Sequence[float] | None, dtype: str
) -> None:
    """The student as the complete stock pipeline of its base, LoRA merged into its weights; with
    `sigmas` one that samples there. What an earlier end of the run left in `folder` is replaced.
    """
    pipeline: Any = policy.PIPELINE.from_pretrained(resolve(base), dtype=torch.float32)
    pipeline.transformer.load_state_dict(policy.merged())
    if sigmas is not None:
        give_grid(pipeline, sigmas)
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_directory(folder) as made:
        pipeline.to(dtype=getattr(torch, dtype)).save_pretrained(made)
