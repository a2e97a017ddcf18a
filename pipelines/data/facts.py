"""A side task that teaches an image tower to see: it reads the facts of a rendered picture off the
patches, as a flat list of choices (what stands in each cell, whose face, which letters).

A fresh tower learns this in a minute; from ratings alone, or from the words of captions, it would
take an hour to see as much (docs/reward_models.md). At scale towers come trained, and this is off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.data.scenes import mixture
from rewards.backbones.towers import Towers
from rewards.scenes.candidates import wear
from rewards.scenes.render import render
from rewards.scenes.specs import (
    BACKGROUNDS,
    COLOURS,
    CONSONANTS,
    HAIR_STYLES,
    HAIRS,
    MOUTHS,
    SHAPES,
    SKINS,
    VOWELS,
    Objects,
    Portrait,
    Spec,
)
from rlhf.errors import ConfigError

LETTERS = CONSONANTS + VOWELS
ABSENT = -100  # a choice that the picture does not have
CHOICES = (
    *[len(SHAPES) + 1] * 4,
    *[len(COLOURS) + 1] * 4,
    len(BACKGROUNDS),
    *(len(table) for table in (SKINS, HAIRS, HAIR_STYLES, MOUTHS)),
    2,
    *[len(LETTERS)] * 4,
    len(COLOURS),
)


def facts(spec: Spec) -> list[int]:
    """The choices of a spec: shapes and colours of the four cells (the last is none), background,
    skin, hair, style, mouth, glasses, four letters and their colour.
    """
    shapes, colours = [ABSENT] * 4, [ABSENT] * 4
    face, letters = [ABSENT] * 5, [ABSENT] * 5
    if isinstance(spec, Objects):
        shapes, colours = [len(SHAPES)] * 4, [len(COLOURS)] * 4
        for thing in spec.things:
            shapes[thing.cell] = SHAPES.index(thing.shape)
            colours[thing.cell] = list(COLOURS).index(thing.colour)
    elif isinstance(spec, Portrait):
        face = [list(SKINS).index(spec.skin), list(HAIRS).index(spec.hair)]
        face += [HAIR_STYLES.index(spec.style), MOUTHS.index(spec.mouth), int(spec.glasses)]
    else:
        letters = [LETTERS.index(letter) for letter in spec.word]
        letters.append(list(COLOURS).index(spec.colour))
    return [*shapes, *colours, list(BACKGROUNDS).index(spec.background), *face, *letters]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """For the first `steps`, `batch` pictures a step, a share of them worn, are all that is
    learnt.
    """

    batch: int = 0
    steps: int = 0
    worn: float = 0.25

    def check(self) -> None:
        if min(self.batch, self.steps) < 0 or bool(self.steps) != bool(self.batch):
            raise ConfigError(
                f"facts: expected a batch and steps above 0, or neither, got {self.batch} and"
                f" {self.steps}"
            )


class FactsObjective(nn.Module):
    """Mean cross-entropy over the kinds of choices, by one linear map of all patches."""

    def __init__(self, towers: Towers, config: Facts) -> None:
        super().__init__()
        self.config = config
        patches = (towers.side // towers.patch) ** 2
        width = towers.widths[0]
        self.read = nn.Sequential(
            nn.LayerNorm(width), nn.Flatten(1), nn.Linear(width * patches, sum(CHOICES))
        )
        self._towers = [towers]  # in a list: its parameters are not this module's

    def forward(self, step: int, seed: int) -> Tensor:
        found = mixture(self.config.batch, seed * 7919 + 500_000 + step)
        rng = np.random.default_rng([seed, 53, step])
        pictures = [render(e.target) for e in found]
        pictures = [wear(rng, p)[1] if rng.random() < self.config.worn else p for p in pictures]
        wanted = torch.tensor([facts(e.target) for e in found])
        logits = self.read(self._towers[0].image_tokens(pictures)).float()
        losses = []
        for k, rows in enumerate(logits.split(CHOICES, dim=1)):
            there = wanted[:, k] != ABSENT
            if bool(there.any()):
                losses.append(F.cross_entropy(rows[there], wanted[there, k]))
        return torch.stack(losses).mean()
