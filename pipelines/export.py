"""`rlhf export RUN out=FOLDER`: the weights of a run in the form stock diffusers reads.

LoRA runs become `pytorch_lora_weights.safetensors`; runs that trained all weights become a
transformer directory. Neither needs this package to be loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.assets import resolve
from rlhf.errors import ConfigError
from rlhf.files import atomic_directory
from rlhf.policies.open import Opening, open_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.run import report


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`checkpoint`: the iteration, None for the newest. `out` must not hold anything yet."""

    run: str = ""
    out: str = ""
    slot: str = "train"
    checkpoint: int | None = None


def run(config: Config) -> dict[str, Any]:
    """Write the weights. Raises ConfigError or CheckpointError, and leaves nothing half-written."""
    began = time.monotonic()
    if not (Path(config.run) / "config.yaml").is_file():
        raise ConfigError(
            f"expected the directory of a run, got '{config.run}': write rlhf export runs/<name>"
        )
    if not config.out:
        raise ConfigError(f"expected a folder to write to: add out={Path(config.run).name}-lora")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"expected a new or empty folder, got '{out}': write another out=")
    opened = open_policy(
        Opening(model=config.run, checkpoint=config.checkpoint, slot=config.slot, device="cpu")
    )
    policy = opened.policy
    if policy.config.train == "none":
        raise ConfigError(
            f"the run {config.run} made a base, which diffusers reads as it is: "
            f"use {Path(config.run) / 'model'}"
        )
    if out.is_dir():
        out.rmdir()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as part:
        policy.export(str(part), policy.slots.tensors("train"))
    files = sorted(p for p in out.rglob("*") if p.is_file())
    metrics = {
        "export/megabytes": {"value": sum(p.stat().st_size for p in files) / 2**20},
        "export/tensors": {"value": len(policy.slots.parameters)},
    }
    return report(
        "export",
        time.monotonic() - began,
        metrics,
        out=str(out),
        files=[str(p) for p in files],
        slot=opened.slot,
        step=opened.step,
        load=loading(policy, str(out)),
    )


def loading(policy: PipelinePolicy, out: str) -> str:
    """Three lines of Python that load the export."""
    base, stock = resolve(policy.config.model), policy.PIPELINE.__name__
    if policy.config.train == "lora":
        return (
            f"from diffusers import {stock}\n"
            f'pipeline = {stock}.from_pretrained("{base}")\n'
            f'pipeline.load_lora_weights("{out}")'
        )
    network = type(policy.transformer).__name__
    return (
        f"from diffusers import {stock}, {network}\n"
        f'transformer = {network}.from_pretrained("{out}")\n'
        f'pipeline = {stock}.from_pretrained("{base}", transformer=transformer)'
    )


def summarise(result: Mapping[str, Any]) -> str:
    """The files, and how to load them."""
    size = result["metrics"]["export/megabytes"]["value"]
    return f"{result['out']}  ({size:.2f} MB)\n\n{result['load']}"
