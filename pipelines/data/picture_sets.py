"""Sets of pictures that autoencoders are measured on: scenes, photographs, folders, data sets.

A set gives batches of pictures of one size, and others to fit a linear code to. Of scenes those are
of the training split. Any other set is halved, every second picture: what is read on one half is
fitted to the other. What does not decode, or is smaller than a cell, is counted by reason.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from pipelines.data.records import Broken, Encoded
from pipelines.data.scenes import PICTURES, Example, mixture, pictures
from pipelines.data.sources import SourceConfig, open_source
from rewards import images
from rewards.errors import ImageError
from rewards.scenes.render import check_size
from rewards.scenes.specs import Spec
from rlhf.errors import ConfigError, DataError

PHOTOS = (  # of what every wheel of scikit-image holds, the photographs; of a stereo pair one
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
LEAST = 11  # px of a side, which SSIM needs


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """`path`: scenes/SIZE, photos (those in scikit-image), or a folder of picture files. With
    `data`, whatever it names, and `path` is only its name in tables; captions are not looked at.

    Pictures keep their aspect, scaled down to sides of at most `largest` px, or are scaled to cover
    a `square` of `largest` px; then the middle in whole cells of all autoencoders is taken.
    """

    path: str
    n: int | None = None  # at most; None: as many as the program says
    largest: int = 256
    crop: Literal["keep", "square"] = "keep"
    data: SourceConfig | None = None

    def check(self) -> None:
        if not self.path:
            raise ConfigError("sets: expected a path, got '': write scenes/64, photos or a folder")
        if self.largest < LEAST or (self.n is not None and self.n < 2):
            raise ConfigError(
                f"sets: expected n >= 2 and largest >= {LEAST}, got n={self.n} and"
                f" largest={self.largest} for {self.path}"
            )
        if self.is_scenes:
            try:
                check_size(int(self.path.removeprefix("scenes/")))
            except ValueError as error:
                raise ConfigError(f"sets: {self.path}: {error}: write scenes/64") from error

    @property
    def is_scenes(self) -> bool:
        return self.data is None and self.path.startswith("scenes/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Pictures of one size, and of each the half of the set it belongs to and what it shows."""

    pictures: UInt8[np.ndarray, "b 3 h w"]
    halves: np.ndarray  # (b,) 0 or 1
    specs: tuple[Spec, ...] | None = None  # where the truth is known
    kinds: tuple[str, ...] = ()  # objects, portraits, text


@runtime_checkable
class Pictures(Protocol):
    """What `open_set` opens. A linear code for pictures of one half may see only the other."""

    skipped: Counter[str]  # reasons, of the last time through

    def batches(self, rows: int, multiple: int) -> Iterator[Batch]:
        """All pictures, up to `rows` at once, sides in multiples. Always the same."""
        ...

    def fitting(self, rows: int, multiple: int, most: int) -> Iterator[Batch]:
        """Pictures to fit to, at most `most` of each half."""
        ...


def open_set(config: PictureSet, n: int, seed: int) -> Pictures:
    """Look at a set without decoding it; `n` holds where the set has none of its own.

    Raises:
        ConfigError: photographs without scikit-image. DataError: no set, or one of less than two.
    """
    n = config.n or n
    if config.is_scenes:
        return Scenes(int(config.path.removeprefix("scenes/")), n, seed)
    if config.data is not None:
        columns = replace(config.data.columns, caption=None)
        return Files(Records(replace(config.data, columns=columns)), config, n)
    paths = photos() if config.path == "photos" else _files(config.path)
    if len(paths) < 2:
        raise DataError(f"expected at least two pictures below '{config.path}', got {len(paths)}")
    order = np.random.default_rng([seed, len(paths)]).permutation(len(paths))
    return Files([paths[i] for i in order], config, n)


def photos() -> list[Path]:
    """The photographs in the wheel of scikit-image. Raises ConfigError if it is not there."""
    found = importlib.util.find_spec("skimage")
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            "sets: photos are those that scikit-image ships, which is not installed: run"
            " pip install scikit-image, or name a folder of pictures"
        )
    folder = Path(next(iter(found.submodule_search_locations))) / "data"
    return [folder / name for name in PHOTOS if (folder / name).is_file()]


def _files(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        raise DataError(
            f"sets: expected scenes/SIZE, photos or a folder of pictures, got '{folder}', which"
            " does not exist"
        )
    return images.files_below(folder)


class Scenes:
    """Held-out pictures in the shares that an autoencoder is trained on."""

    def __init__(self, size: int, n: int, seed: int) -> None:
        self.size, self.n, self.seed = size, n, seed
        self.skipped: Counter[str] = Counter()

    def batches(self, rows: int, multiple: int) -> Iterator[Batch]:
        yield from self._drawn(mixture(self.n, self.seed, "heldout", PICTURES), 0, rows, multiple)

    def fitting(self, rows: int, multiple: int, most: int) -> Iterator[Batch]:
        yield from self._drawn(mixture(most, self.seed + 1, "train", PICTURES), 1, rows, multiple)

    def _drawn(
        self, examples: list[Example], half: int, rows: int, multiple: int
    ) -> Iterator[Batch]:
        if self.size % multiple:
            raise ConfigError(
                f"sets: scenes/{self.size} is not in whole cells of {multiple} px: write a multiple"
            )
        for start in range(0, len(examples), rows):
            part = examples[start : start + rows]
            yield Batch(
                pictures=pictures(part, self.size),
                halves=np.full(len(part), half),
                specs=tuple(one.target for one in part),
                kinds=tuple(one.kind.partition("/")[0] for one in part),
            )


class Records:
    """The pictures of a data set, in its order; what is broken as `Broken`."""

    def __init__(self, config: SourceConfig) -> None:
        self.source = open_source(config)

    def __iter__(self) -> Iterator[Encoded | Broken]:
        for unit in range(self.source.units):
            for item in self.source.read(unit):
                yield item if isinstance(item, Broken) else item.picture


class Files:
    """Pictures that have to be decoded and cut, in the order given."""

    def __init__(
        self, items: Iterable[Path | Encoded | Broken], config: PictureSet, n: int
    ) -> None:
        self.items, self.config, self.n = items, config, n
        self.skipped: Counter[str] = Counter()

    def batches(self, rows: int, multiple: int) -> Iterator[Batch]:
        self.skipped = Counter()
        yield from self._grouped(self._whole(multiple), rows)

    def fitting(self, rows: int, multiple: int, most: int) -> Iterator[Batch]:
        self.skipped = Counter()
        yield from self._grouped(islice(self._whole(multiple), 2 * most), rows)

    def _whole(self, multiple: int) -> Iterator[tuple[np.ndarray, int]]:
        """Pictures as they are measured, and their half; at most `n`."""
        kept = 0
        for item in self.items:
            if kept == self.n:
                return
            try:
                picture = self._cut(item, multiple)
            except ImageError as error:
                self.skipped[str(error).partition(",")[0]] += 1
                continue
            yield picture, kept % 2
            kept += 1

    def _cut(self, item: Path | Encoded | Broken, multiple: int) -> np.ndarray:
        if isinstance(item, Broken):
            raise ImageError(item.reason)
        picture = (_read(item) if isinstance(item, Path) else item).pil
        side = self.config.largest // multiple * multiple
        if self.config.crop == "square" and side:
            cut = images.crop_to(picture, (side, side))
        else:
            cut = images.within(picture, self.config.largest, multiple)
        if min(cut.shape[1:]) < LEAST:
            raise ImageError(f"expected a side of at least {LEAST} px")
        return cut

    @staticmethod
    def _grouped(pairs: Iterable[tuple[np.ndarray, int]], rows: int) -> Iterator[Batch]:
        waiting: dict[tuple[int, ...], list[tuple[np.ndarray, int]]] = defaultdict(list)
        for pair in pairs:
            group = waiting[pair[0].shape]
            group.append(pair)
            if len(group) == rows:
                yield _batch(waiting.pop(pair[0].shape))
        for group in waiting.values():
            yield _batch(group)


def _read(path: Path) -> Encoded:
    try:
        return Encoded(path.read_bytes())
    except OSError as error:
        raise ImageError("no picture file") from error


def _batch(group: list[tuple[np.ndarray, int]]) -> Batch:
    shown, halves = zip(*group, strict=True)
    return Batch(pictures=np.stack(shown), halves=np.array(halves))
