"""A side task that teaches an image tower to see: it predicts the long form that annotators of the
scenes world fill in about a picture (`rewards.scenes.aspects`), off all of its patches.

A rating is one number about a picture, and a fresh tower learns little from it for a long time; a
form is dozens. At scale towers come trained, and this is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rewards.backbones.towers import Towers
from rewards.scenes import candidates, world
from rewards.scenes.aspects import COUNT, aspects
from rlhf.errors import ConfigError

SHARES: Mapping[str, float] = {
    "objects/1": 0.12,
    "objects/2": 0.36,
    "objects/3": 0.12,
    "portraits": 0.2,
    "text": 0.2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Aspects:
    """For the first `steps`, forms about `batch` pictures a step are all that is learnt; after that
    about `after`. `noise` is the sd of the annotators' values.
    """

    batch: int = 0
    steps: int = 0
    after: int = 0
    noise: float = 0.05
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    def check(self) -> None:
        if min(self.batch, self.steps, self.after) < 0 or bool(self.steps) != bool(self.batch):
            raise ConfigError(
                f"aspects: expected a batch and steps above 0, or neither, got {self.batch} and"
                f" {self.steps}"
            )


class AspectsObjective(nn.Module):
    """Mean squared error over the values that were asked, by one linear map of all patches."""

    def __init__(self, towers: Towers, config: Aspects) -> None:
        super().__init__()
        self.config = config
        width, patches = towers.sizes.image_width, towers.sizes.patches
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Flatten(1), nn.Linear(width * patches, COUNT)
        )
        self._towers = [towers]  # in a list: its parameters are not this module's

    def forward(self, step: int, seed: int) -> Tensor:
        count = self.config.batch if step <= self.config.steps else self.config.after
        if not count:
            return torch.zeros(())
        pictures, categories = self._draw(step, seed, count)
        values, asked = aspects(np.stack(pictures), categories)
        rng = np.random.default_rng([seed, 59, step])
        noisy = values + rng.normal(0, self.config.noise, values.shape).astype(np.float32)
        there = torch.from_numpy(asked).float()
        found = self.read(self._towers[0].image_tokens(pictures)).float()
        return ((found - torch.from_numpy(noisy)).square() * there).sum() / there.sum()

    def _draw(self, step: int, seed: int, count: int) -> tuple[list[np.ndarray], list[str]]:
        rng = np.random.default_rng([seed, 53, step])
        names, shares = list(self.config.shares), np.array(list(self.config.shares.values()))
        pictures, categories = [], []
        for i, k in enumerate(rng.choice(len(names), size=count, p=shares / shares.sum())):
            category, _, level = names[k].partition("/")
            number = 30_000_000 + step * 1000 + i
            spec = world.draw(category, number, split="train", level=int(level or 1))  # type: ignore[arg-type]
            pictures.append(candidates.candidates(rng, spec, 1)[0].picture)
            categories.append(category)
        return pictures, categories
