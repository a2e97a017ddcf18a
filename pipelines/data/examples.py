"""What the transformer trains on, by number: scenes, or the records that `rlhf data` wrote.

A set knows the size and the caption of every example without decoding a picture; an `Item` decodes
it at the size its bucket wants. Every fiftieth record is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool

from pipelines.data.buckets import Ladder, Size
from pipelines.data.cache import content
from pipelines.data.records import Broken, Columns, Record, record_of
from pipelines.data.scenes import Example, mixture
from pipelines.data.sources import open_parquet
from pipelines.data.stages import Settings
from rewards import images
from rewards.errors import ImageError
from rewards.images import Picture
from rewards.scenes.render import LARGEST, SMALLEST
from rewards.scenes.world import dump
from rlhf.errors import ConfigError, DataError

HELD_EVERY = 50
SCENE_SIDES = (32, *range(SMALLEST, LARGEST + 1, 32))


@runtime_checkable
class Item(Protocol):
    """One example before its pictures are decoded."""

    @property
    def caption(self) -> str: ...

    def content(self) -> str:
        """Hash of all that the pictures and the caption are a function of."""
        ...

    def pictures(self, size: Size) -> tuple[Picture, tuple[Picture, ...]]:
        """The target, cut to (height, width), and its sources, uint8 RGB (3, H, W).

        Raises:
            ImageError: one of them does not decode.
        """
        ...


@runtime_checkable
class Examples(Protocol):
    """`sizes` are (height, width) of the targets, `edits` True where there are sources."""

    @property
    def sizes(self) -> Sequence[Size]: ...

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def edits(self) -> Bool[np.ndarray, " n"]: ...

    def __getitem__(self, index: int) -> Item: ...


# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SceneItem:
    example: Example

    @property
    def caption(self) -> str:
        return self.example.caption

    def content(self) -> str:
        one = self.example
        source = "" if one.source is None else dump(one.source)
        drawn = one.picture(SMALLEST)  # of another renderer it is another picture
        return content(one.caption, dump(one.target), source, drawn)

    def pictures(self, size: Size) -> tuple[Picture, tuple[Picture, ...]]:
        side = size[0]
        source = self.example.source_picture(max(side, SMALLEST))
        target = _shrunk(self.example.picture(max(side, SMALLEST)), side)
        return target, () if source is None else (_shrunk(source, side),)


def _shrunk(picture: Picture, side: int) -> np.ndarray:
    """uint8 (3, side, side), means of squares of pixels: no scene is rendered below `SMALLEST`."""
    if picture.shape[1] == side:
        return picture
    times = picture.shape[1] // side
    cells = picture.reshape(3, side, times, side, times).astype(np.float32)
    return np.rint(cells.mean((2, 4))).astype(np.uint8)


class SceneExamples:
    """`n` scenes of a stage, each at one of its resolutions."""

    def __init__(self, settings: Settings, n: int, seed: int, held: bool = False) -> None:
        split = "heldout" if held else "train"
        self.rows = mixture(n, seed, split, settings.mixture, settings.captions)
        sides = np.random.default_rng([seed, n, 1]).choice(settings.resolutions, size=n)
        self.sizes = [(int(side), int(side)) for side in sides]
        self.captions = [one.caption for one in self.rows]
        self.edits = np.array([one.source is not None for one in self.rows])

    def __getitem__(self, index: int) -> SceneItem:
        return SceneItem(self.rows[index])


# --- records --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecordItem:
    record: Record
    ladder: Ladder

    @property
    def caption(self) -> str:
        return self.record.caption

    def content(self) -> str:
        cut = f"{self.ladder.aspects}" if self.record.sources else ""  # see `pictures`
        sources = (source.data for source in self.record.sources)
        return content(self.record.caption, self.record.picture.data, cut, *sources)

    def pictures(self, size: Size) -> tuple[Picture, tuple[Picture, ...]]:
        whole = self.record.picture
        sources = [
            images.crop_to(one.pil, size if one.size == whole.size else self._own(one.size, size))
            for one in self.record.sources
        ]
        return images.crop_to(whole.pil, size), tuple(sources)

    def _own(self, source: Size, target: Size) -> Size:
        """The bucket of a source of another shape, on the target's rung."""
        rung = next(r for r in self.ladder.rungs() if target in r)
        return self.ladder.nearest(rung, source)


class RecordExamples:
    """The records below a folder, but each fiftieth; or, `held`, those.

    Raises:
        DataError: no records there, or not written by `rlhf data`.
    """

    def __init__(self, folder: str, ladder: Ladder, held: bool = False) -> None:
        self.ladder = ladder
        self.data: Any = open_parquet(Path(folder))
        missing = {"height", "width", "text", "n_sources"} - set(self.data.column_names)
        if missing:
            raise DataError(
                f"expected the columns of `rlhf data` in {folder}, got none named"
                f" {', '.join(sorted(missing))}: prepare the set with `rlhf data`"
            )
        every = np.arange(len(self.data))
        self.index = every[(every % HELD_EVERY == 0) == held]
        if not len(self.index):
            raise DataError(f"expected at least two records in {folder}, got {len(every)}")
        rows = self.data.select_columns(["height", "width", "text", "n_sources"])[self.index]
        self.sizes = list(zip(rows["height"], rows["width"], strict=True))
        self.captions = rows["text"]
        self.edits = np.array(rows["n_sources"]) > 0

    def __getitem__(self, index: int) -> RecordItem:
        number = int(self.index[index])
        row = record_of(self.data[number], Columns(), str(number), "general")
        if isinstance(row, Broken):
            raise ImageError(f"row {number}: {row.reason}")
        return RecordItem(row, self.ladder)


def open_examples(
    settings: Settings, ladder: Ladder, n: int, seed: int, held: bool = False
) -> Examples:
    """The examples of a stage, `n` of them if they are scenes.

    Raises:
        ConfigError: a share of edits but no edits among them, or only edits.
        DataError: see `RecordExamples`.
    """
    found: Examples = (
        RecordExamples(settings.data, ladder, held)
        if settings.data
        else SceneExamples(settings, n, seed, held)
    )
    edits, share = int(found.edits.sum()), settings.edits
    if not held and ((share > 0 and not edits) or (share < 1 and edits == len(found.edits))):
        raise ConfigError(
            f"edits: expected examples for a share of {share}, got {edits} edits of"
            f" {len(found.edits)} in {settings.data or 'scenes'}: change the share or the data"
        )
    return found
