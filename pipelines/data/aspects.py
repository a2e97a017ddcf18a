"""What teaches a fresh image tower to see: its pooled features become the long form that annotators
of the scenes world fill in about a picture (`rewards.scenes.aspects`), value by value.

A rating is one number about a picture, and a fresh tower learns little from it for a long time; a
form is dozens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from rewards.backbones.towers import Towers
from rewards.scenes import candidates, world
from rewards.scenes.aspects import COUNT, SIZES, aspects
from rlhf.errors import ConfigError

SHARES: Mapping[str, float] = {
    "objects/1": 0.12,
    "objects/2": 0.36,
    "objects/3": 0.12,
    "portraits": 0.2,
    "text": 0.2,
}
SAMPLE = 2000  # pictures off which the spread of each value is read


class AspectsObjective:
    """Mean squared error of the pooled features, in standard deviations of each value; those of
    taste, which are few, count `taste` times. `noise`: sd of what annotators write.

    Features that mean one thing each are what heads learn fastest from: any other basis of the same
    ones costs them steps.
    """

    def __init__(
        self, towers: Towers, seed: int, *, noise: float = 0.05, taste: float = 4.0
    ) -> None:
        self.seed, self.noise = seed, noise
        if towers.sizes.pooled_width != COUNT:
            raise ConfigError(
                f"shape.embed: expected {COUNT}, one for each value of a form, got"
                f" {towers.sizes.pooled_width}"
            )
        self.towers = towers
        _, values, asked = self.forms(0, SAMPLE, "train")
        known = np.ma.masked_array(values, ~asked)
        self.mean = torch.from_numpy(known.mean(0).filled(0.0)).float()
        self.sd = torch.from_numpy(known.std(0).filled(1.0)).float().clamp_min(2 * noise)
        self.weight = torch.ones(COUNT)
        self.weight[-SIZES["taste"] :] = taste

    def forms(
        self, step: int, count: int, split: world.Split
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Pictures of a step, what the oracle measures in them, and which of it was asked."""
        rng = np.random.default_rng([self.seed, 53, step])
        names, shares = list(SHARES), np.array(list(SHARES.values()))
        pictures, categories = [], []
        for i, k in enumerate(rng.choice(len(names), size=count, p=shares / shares.sum())):
            category, _, level = names[k].partition("/")
            number = 30_000_000 + step * 10_000 + i
            spec = world.draw(category, number, split=split, level=int(level or 1))  # type: ignore[arg-type]
            pictures.append(candidates.candidates(rng, spec, 1)[0].picture)
            categories.append(category)
        return pictures, *aspects(np.stack(pictures), categories)

    def predict(self, pictures: list[np.ndarray]) -> Tensor:
        """Forms (B, COUNT) in standard deviations off the mean."""
        return self.towers.see(pictures)[1].float()

    def standard(self, values: np.ndarray) -> Tensor:
        """Values of forms in standard deviations off the mean."""
        return (torch.from_numpy(values).float() - self.mean) / self.sd

    def __call__(self, step: int, count: int) -> Tensor:
        """Of `count` pictures drawn for a step."""
        pictures, values, asked = self.forms(step, count, "train")
        rng = np.random.default_rng([self.seed, 59, step])
        values = values + rng.normal(0, self.noise, values.shape)
        weight = torch.from_numpy(asked).float() * self.weight
        error = (self.predict(pictures) - self.standard(values)).square()
        return (error * weight).sum() / weight.sum()
