"""A policy by the name a user has for it: an embedded model, a checkpoint directory, or a run.

`runs/NAME` of `rlhf align` is its base with one slot of one of its checkpoints in place; of
`rlhf pretrain` and `rlhf distill`, the model it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import checkpoint as checkpoints
from rlhf import config as config_module
from rlhf.errors import ConfigError
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import Description, describe, load_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What to open. `checkpoint`: the iteration, None for the newest; `slot`: whose weights.

    `device` and `dtype` replace those of the run; a model that is no run opens in float32 on cpu.
    """

    model: str = "scenes"
    checkpoint: int | None = None
    slot: str = "train"
    device: str | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A policy whose live weights (its slot `train`) are those that were asked for."""

    policy: PipelinePolicy
    name: str
    slot: str
    run: Run | None = None  # the run it was opened from
    step: int | None = None  # iteration of the weights, None for a base
    sampler: Mapping[str, Any] = field(default_factory=dict)  # `rollout` of the run's config.yaml


def open_policy(opening: Opening) -> Opened:
    """Open a model or run, weights in place.

    Raises:
        ConfigError: no such model, a run without a policy, or a slot or checkpoint of what has
        none. CheckpointError: a run without the complete checkpoint that was asked for.
    """
    root = Path(opening.model)
    if (root / "config.yaml").is_file():
        return _open_run(Run.open(root), opening)
    if opening.checkpoint is not None or opening.slot not in ("train", "reference"):
        raise ConfigError(
            f"model '{opening.model}' is no run and has neither checkpoints nor slots: drop "
            "checkpoint= and slot=, or name a directory runs/<name>"
        )
    config = _placed(PolicyConfig(model=opening.model, train="none"), opening)
    name = root.resolve().name if root.is_dir() else opening.model.replace("/", "--")
    return Opened(policy=load_policy(config), name=name, slot="train")


def describe_opening(opening: Opening) -> Description:
    """The description of what would be opened, no weights read. Raises ConfigError."""
    root = Path(opening.model)
    if not (root / "config.yaml").is_file():
        return describe(opening.model)
    found, _ = _made_with(Run.open(root))
    return describe(found if isinstance(found, str) else found.model)


def _placed(config: PolicyConfig, opening: Opening) -> PolicyConfig:
    return replace(
        config, device=opening.device or config.device, dtype=opening.dtype or config.dtype
    )


def _made_with(run: Run) -> tuple[str | PolicyConfig, Mapping[str, Any]]:
    """The directory of the model that a run wrote, or the policy whose slots it holds; and its
    configuration.
    """
    data = config_module.read_yaml(run.config_path)
    section, model = data.get("policy"), run.root / "model"
    if section is None and (model / "model_index.json").is_file():
        return str(model), data
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"expected a run of align, pretrain or distill, got {run.root}, whose config.yaml names"
            " no policy: name the directory of a model, or a run that made one"
        )
    return config_module.build(PolicyConfig, section), data


def _open_run(run: Run, opening: Opening) -> Opened:
    config, data = _made_with(run)
    if isinstance(config, str):
        opened = open_policy(replace(opening, model=config))
        return replace(opened, name=run.name, run=run)
    policy, step = load_policy(_placed(config, opening)), None
    if opening.slot != "reference":
        path = checkpoints.locate(run.root, opening.checkpoint)
        step = checkpoints.step_of(path)
        tensors = checkpoints.load(path).tensors
        key = f"slots/{opening.slot.replace('/', '.')}"
        if key not in tensors:
            there = [n.removeprefix("slots/") for n in tensors if n.startswith("slots/")]
            raise ConfigError(f"expected one of the slots {there} of {path}, got '{opening.slot}'")
        policy.slots.load("train", tensors[key])
    rollout = data.get("rollout")
    return Opened(
        policy=policy,
        name=run.name,
        slot=opening.slot,
        run=run,
        step=step,
        sampler=rollout if isinstance(rollout, Mapping) else {},
    )
