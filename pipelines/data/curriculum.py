"""Pictures for an autoencoder, stage by stage: small to large, square or not, and a share of text.

Batches are a function of (seed, step). A stage draws from a general and a text-rich set, which are
folders of picture files or, without them, the scenes world.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rewards import images
from rewards.scenes.render import LARGEST
from rewards.scenes.world import Split
from rlhf import noise
from rlhf.errors import ConfigError

HELD_EVERY = 50  # of the files of a folder, in the order of their paths
_DRAW = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """`size` is the side, in px, of a square with the area of its pictures; `share` of the steps;
    `text` the probability that a picture comes from the text-rich set; `batch` its pictures per
    step, null for the program's.
    """

    size: int
    share: float = 1.0
    text: float = 0.2
    batch: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """`aspects` are widths over heights, one drawn per batch. `general` and `text` are folders."""

    stages: tuple[Stage, ...] = ()
    aspects: tuple[float, ...] = (1.0,)
    general: str | None = None
    text: str | None = None

    def check(self) -> None:
        if not self.aspects or min(self.aspects) <= 0:
            raise ConfigError(
                f"curriculum.aspects: expected widths over heights above 0, got {self.aspects}:"
                " write [1.0, 0.75, 1.3333]"
            )
        for number, stage in enumerate(self.stages):
            if stage.share <= 0 or not 0 <= stage.text <= 1 or stage.size < 64:
                raise ConfigError(
                    f"curriculum.stages[{number}]: expected size >= 64, share > 0 and text from 0"
                    f" to 1, got size {stage.size}, share {stage.share}, text {stage.text}"
                )
            longest = max(max(shape(stage.size, aspect, 32)) for aspect in self.aspects)
            if longest > LARGEST and not (self.general and (self.text or stage.text == 0)):
                raise ConfigError(
                    f"curriculum.stages[{number}]: scenes are rendered up to {LARGEST} px, got a"
                    f" side of {longest}: name folders with curriculum.general and curriculum.text"
                )
        if (self.general or self.text) and not self.stages:
            raise ConfigError(
                "curriculum: expected stages for its folders, got none: write"
                " curriculum.stages=[{size: 256}]"
            )

    def at(self, step: int, steps: int) -> int:
        """Number of the stage that holds step 1..`steps`; later steps belong to the last."""
        ends = np.cumsum([stage.share for stage in self.stages])
        done = (step - 1) / max(1, steps) * ends[-1]
        return min(int(np.searchsorted(ends, done + 1e-9 * ends[-1])), len(ends) - 1)


def shape(size: int, aspect: float, multiple: int) -> tuple[int, int]:
    """Height and width of about size^2 px whose ratio is about `aspect`, in whole multiples."""
    sides = size / aspect**0.5, size * aspect**0.5
    height, width = (multiple * max(1, round(side / multiple)) for side in sides)
    return height, width


class Scenes:
    """Rendered once, as squares of `side` px, from which windows are cut."""

    def __init__(
        self, weights: Mapping[str, float], n: int, seed: int, side: int, split: Split
    ) -> None:
        self.rows = pictures(mixture(n, seed, split, weights), side)

    def __len__(self) -> int:
        return len(self.rows)

    def window(
        self, index: int, size: tuple[int, int], corner: tuple[float, float]
    ) -> UInt8[np.ndarray, "3 h w"]:
        """The pixels as they are; `corner` in [0, 1)^2 says where the window lies."""
        picture = self.rows[index]
        top, left = (
            int(u * (have - want + 1))
            for u, have, want in zip(corner, picture.shape[1:], size, strict=True)
        )
        return picture[:, top : top + size[0], left : left + size[1]]


class Folder:
    """Every picture file below a folder, but each fiftieth, which is held out.

    Raises:
        ImageError: too few files for both.
    """

    def __init__(self, path: str, held: bool = False) -> None:
        found = enumerate(images.files_below(path, least=2))
        self.paths = [p for i, p in found if (i % HELD_EVERY == 0) == held]

    def __len__(self) -> int:
        return len(self.paths)

    def window(
        self, index: int, size: tuple[int, int], corner: tuple[float, float]
    ) -> UInt8[np.ndarray, "3 h w"]:
        """Scaled to just cover the window; `corner` in [0, 1]^2 says what is cut off."""
        return images.crop_to(images.to_pil(images.load_image(self.paths[index])), size, corner)


Source = Scenes | Folder


class Stream:
    """Batches of a curriculum: `stream(step)`. One stage's pictures are in memory at a time."""

    def __init__(
        self, curriculum: Curriculum, n: int, batch: int, steps: int, seed: int, multiple: int
    ) -> None:
        self.curriculum, self.n, self.batch = curriculum, n, batch
        self.steps, self.seed, self.multiple = steps, seed, multiple
        self._open: tuple[int, tuple[Source, Source]] | None = None

    def __call__(self, step: int) -> Float[Tensor, "b 4 h w"]:
        number = self.curriculum.at(step, self.steps)
        stage = self.curriculum.stages[number]
        if self._open is None or self._open[0] != number:
            self._open = number, self._sources(number)
        rows = noise.generator(self.seed, _DRAW, step)
        aspects = self.curriculum.aspects
        aspect = aspects[int(torch.randint(len(aspects), (1,), generator=rows))]
        size = shape(stage.size, aspect, self.multiple)
        batch = stage.batch or self.batch
        kinds = torch.rand(batch, generator=rows) < stage.text
        where = torch.rand(batch, 3, generator=rows, dtype=torch.float64).tolist()
        found = []
        for text, (which, *corner) in zip(kinds.tolist(), where, strict=True):
            source = self._open[1][text]
            found.append(source.window(int(which * len(source)), size, tuple(corner)))
        return rgba(np.stack(found))

    def _sources(self, number: int) -> tuple[Source, Source]:
        stage, shared = self.curriculum.stages[number], self.curriculum
        sides = [max(shape(stage.size, a, self.multiple)) for a in shared.aspects]
        side = -(-max(sides) // 32) * 32
        n_text = round(self.n * stage.text)
        return _pair(shared, (self.n - n_text, n_text), self.seed + 16 + number, side, "train")


def _pair(
    curriculum: Curriculum, n: tuple[int, int], seed: int, side: int, split: Split
) -> tuple[Source, Source]:
    """General and text-rich pictures."""
    world = {k: v for k, v in PICTURES.items() if k != "text"}, {"text": 1.0}
    general, text = (
        Folder(path, held=split == "heldout")
        if path
        else Scenes(weights, max(1, count), seed, side, split)
        for path, weights, count in zip(
            (curriculum.general, curriculum.text), world, n, strict=True
        )
    )
    return general, text


def squares(
    curriculum: Curriculum, n: int, size: int, seed: int, split: Split
) -> UInt8[np.ndarray, "b 3 h w"]:
    """`n` middle squares (fewer where a folder is short), with the text share of the last stage,
    for statistics and for figures.
    """
    n_text = round(n * curriculum.stages[-1].text)
    sources = _pair(curriculum, (n - n_text, n_text), seed, size, split)
    rows = []
    for source, count in zip(sources, (n - n_text, n_text), strict=True):
        picked = np.random.default_rng([seed, count]).permutation(len(source))[:count]
        rows += [source.window(int(i), (size, size), (0.5, 0.5)) for i in picked]
    return np.stack(rows)
