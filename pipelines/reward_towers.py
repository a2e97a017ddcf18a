"""`rlhf reward towers`: small image and text towers for judges of the scenes world.

The image tower learns to fill in the annotators' long form about a picture
(`pipelines.data.aspects`); the text tower is fresh, with a vocabulary of the world's prompts, and
learns from judgements (`rlhf reward train` with trained=locked). At scale towers come trained.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.data.aspects import AspectsObjective
from rewards.backbones.towers import CONFIG, Shape, new_towers, open_towers, save_towers
from rewards.scenes import world
from rewards.scenes.aspects import SIZES
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.files import atomic_directory
from rlhf.learner import Learner, LearnerConfig
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run
from rlhf.training import train as train_loop

HELD = 10**6  # the step whose pictures figures are read on
FRESH = "fresh"


@dataclass(frozen=True, slots=True, kw_only=True)
class TowersConfig:
    """`batch`: pictures a step. `prompts`: how many of each category give the vocabulary."""

    name: str = "towers"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1
    shape: Shape = field(default_factory=Shape)
    prompts: int = 1500
    batch: int = 96
    held: int = 500
    pace: Pace = field(default_factory=lambda: Pace(steps=2000, save_every=500))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(
            lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=40, total_steps=2000
        )
    )

    def check(self) -> None:
        if min(self.prompts, self.batch, self.held) < 2:
            raise ConfigError(
                "prompts, batch and held: expected at least 2, got"
                f" {self.prompts}, {self.batch} and {self.held}"
            )


def texts(count: int) -> list[str]:
    """Prompts of the world, `count` of each category."""
    kinds = ("objects", "portraits", "text", "edits")
    return sorted({world.terse(world.draw(c, i)) for c in kinds for i in range(count)})


def towers(config: TowersConfig, resume: Path | None = None) -> dict[str, Any]:
    """Train and write `<run>/towers`; the run's result. Ranks but the first return {}."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with session("cpu") as ranks:
        return _train(config, open_run(config, "reward towers", resume, ranks), ranks)


def _train(config: TowersConfig, home: Run, ranks: Ranks) -> dict[str, Any]:
    began, fresh = time.monotonic(), home.root / FRESH
    if not (fresh / CONFIG).is_file():
        ranks.on_first(lambda: new_towers(config.shape, texts(config.prompts), fresh))
    made = open_towers(str(fresh))
    objective = AspectsObjective(made, config.seed)
    learned = {n: p for n, p in made.named_parameters() if n.startswith("clip.visual.")}
    made.train()

    def preview(step: int, average: Average | None) -> dict[str, float]:
        made.eval()
        found = explained(objective, config.held)
        made.train()
        return found

    def loss_of(batch: tuple[int, int]) -> tuple[Tensor, Mapping[str, float]]:
        loss = objective(*batch)
        return loss, {"loss/aspects": float(loss.detach())}

    average = train_loop(
        home,
        Learner(learned, config.learner, ranks),
        lambda step: (step, config.batch),
        loss_of,
        config.pace,
        preview=preview,
        split=_split,
    )
    if not ranks.is_first:
        return {}
    if average is not None:
        average.copy_to(learned)
    made.eval()
    figures = {name: {"value": v} for name, v in explained(objective, config.held).items()}
    folder = home.root / "towers"
    if folder.is_dir():
        shutil.rmtree(folder)
    with atomic_directory(folder) as part:
        save_towers(made, part)
    return home.write_result(time.monotonic() - began, figures)


def _split(batch: tuple[int, int], parts: int) -> list[tuple[int, int]]:
    """A step's pictures in parts, each drawn as a step of its own."""
    step, count = batch
    return [(step * parts + i, count // parts) for i in range(parts)]


@torch.no_grad()
def explained(objective: AspectsObjective, count: int) -> dict[str, float]:
    """`held/<kind>/r2`: share of the variance of a kind's values that is explained."""
    pictures, values, asked = objective.forms(HELD, count, "heldout")
    truth, there = objective.standard(values), torch.from_numpy(asked)
    error = (objective.predict(pictures) - truth).square()
    out, start = {}, 0
    for kind, size in SIZES.items():
        here, start = slice(start, start + size), start + size
        mask, known = there[:, here], truth[:, here]
        mean = (known * mask).sum(0) / mask.sum(0).clamp_min(1)
        spread = ((known - mean).square() * mask).sum()
        out[f"held/{kind}/r2"] = float(1 - (error[:, here] * mask).sum() / spread)
    return out


def plan_towers(config: TowersConfig) -> str:
    """What is trained on how much."""
    seen = config.batch * config.pace.steps
    return f"towers of {config.shape.trunk or 'a vision transformer'} on {seen} drawn pictures"
