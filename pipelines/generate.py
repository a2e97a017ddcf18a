"""`rlhf generate PROMPT`: pictures of a prompt, from an embedded model, a directory or a run.

Writes <out>/NNN.png, one for each seed, and <out>/prompts.json, which says how they were made.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewards import images
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.gallery import usual_sampler
from rlhf.policies.open import Opened, Opening, open_policy
from rlhf.run import report
from rlhf.sampling import Sampler, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`source` is a picture to edit. None: the guidance of the run, 2 for a base; 40 steps, or as
    many as the model was distilled to, unguided; size 64, or that of the run, or of the source.
    """

    prompt: str = "a red circle left of a blue square on white"
    model: str = "scenes"
    checkpoint: int | None = None
    slot: str = "train"
    negative: str = ""
    source: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    guidance: float | None = None
    steps: int | None = None
    size: int | tuple[int, int] | None = None  # pixels, or [height, width]
    out: str = "pictures"
    threads: int = 1
    device: str | None = None
    dtype: str | None = None

    def check(self) -> None:
        """Refuse what cannot be drawn."""
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"seeds: expected numbers from 0, got {list(self.seeds)}: try [0,1]")
        if self.guidance is not None and self.guidance < 1:
            raise ConfigError(f"guidance: expected 1 (unguided) or more, got {self.guidance}")
        if (self.steps is not None and self.steps < 1) or self.threads < 1:
            raise ConfigError(
                f"expected steps and threads >= 1, got steps={self.steps} threads={self.threads}"
            )


def sampler_of(config: Config, opened: Opened, source: tuple[int, int] | None) -> Sampler:
    """How the pictures are made: what is written, else what the run trained with."""
    base = opened.sampler
    default = source or (int(base.get("height", 64)), int(base.get("width", 64)))
    size = config.size if config.size is not None else default
    height, width = (size, size) if isinstance(size, int) else size
    guidance = base.get("guidance") if config.guidance is None else config.guidance
    return usual_sampler(config.model, (height, width), config.steps, guidance)


def run(config: Config) -> dict[str, Any]:
    """Make the pictures. Raises ConfigError, CheckpointError or ImageError."""
    began = time.monotonic()
    if not config.prompt.strip():
        raise ConfigError('expected a prompt: write rlhf generate "a red circle on white"')
    torch.set_num_threads(config.threads)
    source = None if config.source is None else images.load_image(config.source)
    opened = open_policy(
        Opening(
            model=config.model,
            checkpoint=config.checkpoint,
            slot=config.slot,
            device=config.device,
            dtype=config.dtype,
        )
    )
    sampler = sampler_of(config, opened, None if source is None else source.shape[1:])
    got = sample(
        opened.policy,
        sampler,
        config.prompt,
        negative=config.negative,
        sources=() if source is None else (source,),
        seeds=config.seeds,
    )
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i:03d}.png" for i in range(len(config.seeds))]
    for name, picture in zip(names, got.pixels.numpy(), strict=True):
        images.save_png(folder / name, picture)
    made = {
        "prompt": config.prompt,
        "negative": config.negative,
        "source": config.source,
        "model": config.model,
        "slot": opened.slot,
        "step": opened.step,
        "steps": sampler.steps,
        "guidance": sampler.guidance,
        "size": [sampler.height, sampler.width],
        "pictures": [
            {"file": name, "seed": seed} for name, seed in zip(names, config.seeds, strict=True)
        ],
    }
    atomic_write_text(folder / "prompts.json", json_text(made))
    metrics = {"generate/forward_rows": {"value": got.forwards}}
    files = [str(folder / name) for name in names]
    return report("generate", time.monotonic() - began, metrics, files=files, made=made)


def summarise(result: Mapping[str, Any]) -> str:
    """The files."""
    return "\n".join([*result["files"], f"{result['seconds']:.1f} s"])
