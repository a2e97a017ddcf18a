"""Prompt sets: what a run is asked to draw.

A set is a JSONL file, any path or hub name `datasets` opens, or
`scenes/<category>[/<level>]@<split>`, prompts of the embedded world with their specs as targets.
Columns: `prompt` (required), `category` ("general" if absent), `negative_prompt`, `source_images`
(list of paths), `height` and `width`, `target`; every other column reaches the judges by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rewards import images
from rewards.scenes import world
from rewards.scenes.render import LARGEST, SMALLEST, render
from rewards.scenes.specs import Edit, Spec, dump
from rlhf.errors import ConfigError, PromptError
from rlhf.types import Prompt

KNOWN = ("prompt", "category", "negative_prompt", "source_images", "height", "width", "target")
CATEGORIES = ("objects", "portraits", "text", "edits")
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One source of a mixed set: its share of every iteration's prompts, how many are taken, and
    `sizes` (height, width) of pictures, which prompts without a size of their own have in turn.
    """

    share: int = 1
    count: int = 0  # 0 = all; a scenes set needs a number
    sizes: Sizes = ()

    def check(self) -> None:
        if self.share < 1 or self.count < 0:
            raise ConfigError(
                "prompts.sources: expected a share of 1 or more and a count of 0 (all) or more, got"
                f" share {self.share} and count {self.count}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Where prompts come from and how many are taken (0 = all; a scenes set needs a number).

    `sizes`: see `Part`. `pictures`: folder in which what scenes edits start from is drawn; workers
    on other machines must see it. `sources` mixes several in the place of `source` and `count`:
    `{scenes/objects/2@train: {share: 4, count: 1024}, scenes/text/1@train: {count: 256}}`.
    """

    source: str = "scenes/objects/2@train"
    count: int = 512
    split: str = "train"  # of a `datasets` path
    sizes: Sizes = ()
    pictures: str = "runs/pictures"
    sources: dict[str, Part] = field(default_factory=dict)

    def check(self) -> None:
        if self.count < 0:
            raise ConfigError(f"prompts.count: expected 0 (all) or more, got {self.count}")

    def asked(self) -> int:
        """How many prompts are asked for, those of all sources together; 0 = all there are."""
        counts = [part.count for part in self.sources.values()] or [self.count]
        return sum(counts) if all(counts) else 0

    def shares(self) -> dict[str, int]:
        """Source -> share of a batch; empty for a set of one source."""
        return {source: part.share for source, part in self.sources.items()}

    def check_batch(self, size: int) -> None:
        """Raise ConfigError where a batch of `size` cannot have the stated shares exactly."""
        total = sum(self.shares().values()) or 1
        if size % total:
            raise ConfigError(
                f"prompts_per_iteration: expected a multiple of {total}, the sum of the shares in"
                f" prompts.sources, got {size}: write {max(size // total, 1) * total}"
            )


def load_prompts(config: PromptSet) -> list[Prompt]:
    """All prompts of a set, in its order, checked; those of several sources evenly interleaved.

    Raises:
        PromptError: nothing there, an empty set, a missing column, or a value of the wrong type
        (with its row).
    """
    if config.sources:
        return _mixed(config)
    prompts = _scenes(config) if config.source.startswith("scenes/") else _rows(config)
    sizes = config.sizes
    return [
        replace(p, size=sizes[i % len(sizes)]) if sizes and p.size is None else p
        for i, p in enumerate(prompts)
    ]


def _rows(config: PromptSet) -> list[Prompt]:
    path = Path(config.source)
    rows = _jsonl(path) if path.suffix == ".jsonl" else _dataset(config)
    prompts = [_prompt(row, i, config.source) for i, row in enumerate(rows)]
    if not prompts:
        raise PromptError(f"{config.source}: expected at least one prompt, got an empty set")
    return prompts[: config.count or None]


def _mixed(config: PromptSet) -> list[Prompt]:
    placed: list[tuple[float, int, Prompt]] = []
    for k, (source, part) in enumerate(config.sources.items()):
        one = replace(config, source=source, count=part.count, sizes=part.sizes, sources={})
        prompts = load_prompts(one)
        placed += [((i + 0.5) / len(prompts), k, p) for i, p in enumerate(prompts)]
    return [prompt for _, _, prompt in sorted(placed, key=lambda entry: entry[:2])]


def _scenes(config: PromptSet) -> list[Prompt]:
    name, _, split = config.source.removeprefix("scenes/").partition("@")
    category, _, level = name.partition("/")
    if (
        category not in CATEGORIES
        or split not in ("train", "heldout", "align-heldout")
        or level not in ("", "1", "2", "3")
    ):
        raise PromptError(
            f"expected scenes/<{'|'.join(CATEGORIES)}>[/1|2|3]@<train|heldout|align-heldout>, got"
            f" '{config.source}'"
        )
    if config.count < 1:
        raise PromptError(
            f"{config.source}: expected count >= 1, got {config.count}: the world has no end"
        )
    out: dict[object, Prompt] = {}
    for seed in range(20 * config.count + 500):
        spec = world.draw(category, seed, split=split, level=int(level or 1))  # type: ignore[arg-type]
        text = world.terse(spec)
        key = (spec.source, text) if isinstance(spec, Edit) else text
        if key not in out:
            out[key] = Prompt(
                id=f"{config.source}#{seed}",
                text=text,
                category=category,
                sources=(_drawn(spec.source, config),) if isinstance(spec, Edit) else (),
                target=dump(spec),
            )
        if len(out) == config.count:
            return list(out.values())
    raise PromptError(
        f"{config.source}: expected {config.count} different prompts, there are {len(out)}: lower"
        " count"
    )


def _drawn(spec: Spec, config: PromptSet) -> str:
    """The path of a picture of the spec, drawn if it is not there: as large as the shortest side of
    `sizes`, where the world can.
    """
    side = min((edge for size in config.sizes for edge in size), default=SMALLEST)
    side = min(max(side, SMALLEST), LARGEST)
    name = hashlib.sha256(f"{dump(spec)} {side}".encode()).hexdigest()[:20]
    path = Path(config.pictures).absolute() / f"{name}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        images.save_png(path, render(spec, side))
    return str(path)


def _jsonl(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise PromptError(f"expected a prompt file, got '{path}': there is no such file")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise PromptError(
                    f"{path}, line {number}: expected a JSON object, got {line[:60]!r} ({error})"
                ) from error
            if not isinstance(row, dict):
                raise PromptError(
                    f"{path}, line {number}: expected a JSON object, got {type(row).__name__}"
                )
            yield row


def _dataset(config: PromptSet) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(config.source, split=config.split)  # type: ignore[return-value]
    except Exception as error:  # the boundary to `datasets`, which raises many types
        raise PromptError(
            "prompts.source: expected a .jsonl file, a path `datasets` can open, or scenes/...,"
            " got"
            f" '{config.source}': {type(error).__name__}: {error}"
        ) from error


def _prompt(row: Mapping[str, Any], index: int, source: str) -> Prompt:
    where = f"{source}, row {index + 1}"
    text = row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise PromptError(
            f"{where}: expected a column 'prompt' with text, got {text!r} (columns: {sorted(row)})"
        )
    for column in ("category", "negative_prompt", "target"):
        if row.get(column) is not None and not isinstance(row[column], str):
            raise PromptError(
                f"{where}: expected text in '{column}', got {type(row[column]).__name__}"
            )
    sources = row.get("source_images") or ()
    if isinstance(sources, str) or not all(isinstance(s, str) for s in sources):
        raise PromptError(f"{where}: expected a list of paths in 'source_images', got {sources!r}")
    for path in sources:
        if not Path(path).is_file():
            raise PromptError(
                f"{where}: expected a source picture at '{path}': there is no such file"
            )
    return Prompt(
        id=f"{source}#{index}",
        text=text,
        category=row.get("category") or "general",
        negative=row.get("negative_prompt") or "",
        sources=tuple(str(Path(path).absolute()) for path in sources),
        size=_size(row, where),
        target=row.get("target"),
        columns={k: v for k, v in row.items() if k not in KNOWN},
    )


def _size(row: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    size = row.get("height"), row.get("width")
    if size == (None, None):
        return None
    if not all(type(side) is int and side > 0 for side in size):
        raise PromptError(
            f"{where}: expected 'height' and 'width' in pixels, both or neither, got {size}"
        )
    return size  # type: ignore[return-value]


def source_sizes(prompts: Sequence[Prompt]) -> dict[tuple[int, int], str]:
    """Size of the pictures that prompts edit -> where the first of that size is."""
    first = {path: p.id for p in prompts[::-1] for path in p.sources}
    return {images.size_of(path): f"source picture of {id}" for path, id in first.items()}


def batch_of(
    prompts: Sequence[Prompt],
    size: int,
    iteration: int,
    seed: int,
    shares: Mapping[str, int] | None = None,
) -> tuple[Prompt, ...]:
    """The prompts of an iteration (counted from 1): epochs are seeded permutations, so nothing is
    stored.

    With `shares` (source -> share, of `PromptSet.shares`) every batch is made of the sources in
    these shares, each with epochs of its own. `size` must be a multiple of their sum.

    Raises:
        PromptError: a batch larger than the set, or than the prompts of one source.
    """
    if not shares:
        return _draw(prompts, size, iteration, (31, seed))
    each = size // sum(shares.values())
    batch: list[Prompt] = []
    for k, (source, share) in enumerate(shares.items()):
        own = [p for p in prompts if p.source == source]
        batch += _draw(own, each * share, iteration, (32, seed, k), f" of {source}")
    return tuple(batch)


def further(
    prompts: Sequence[Prompt], replaced: Sequence[Prompt], used: Collection[str], *key: int
) -> list[Prompt | None]:
    """A prompt of the same source in the place of each; None where all of a source are `used`.

    `used` holds ids. The order is a permutation keyed by `key`: nothing is stored.
    """
    order = np.random.default_rng([33, *key]).permutation(len(prompts))
    left: dict[str, list[Prompt]] = {}
    for i in order[::-1].tolist():
        if prompts[i].id not in used:
            left.setdefault(prompts[i].source, []).append(prompts[i])
    return [left[one.source].pop() if left.get(one.source) else None for one in replaced]


def _draw(
    prompts: Sequence[Prompt], size: int, iteration: int, key: tuple[int, ...], of: str = ""
) -> tuple[Prompt, ...]:
    if size > len(prompts):
        raise PromptError(
            f"expected at least {size} prompts{of} for one iteration, got {len(prompts)}"
        )
    epoch, position = divmod(iteration - 1, len(prompts) // size)
    order = np.random.default_rng([*key, epoch]).permutation(len(prompts))
    return tuple(prompts[i] for i in order[position * size : (position + 1) * size])
