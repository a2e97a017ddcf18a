"""Judgements of one axis as what a benchmark needs: pictures, pairs and lists, each picture once.

They come from what `rewards.training.table` reads. Where the truth is known, rows have the columns
`gold` (one number per picture, without noise), `origin` (one word per picture: who made it) and
`target`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rewards.errors import DataError
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable
from rewards.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A judgement and what is known beside it. `gold` and `origin` have one entry per picture, or
    none at all.

    Raises:
        DataError: another number of them.
    """

    judgement: Judgement
    gold: tuple[float, ...] = ()
    origin: tuple[str, ...] = ()
    target: str | None = None

    def __post_init__(self) -> None:
        for name, found in (("gold", self.gold), ("origin", self.origin)):
            if len(found) not in (0, len(self.judgement.images)):
                raise DataError(
                    f"{name}: expected one entry for each of {len(self.judgement.images)} pictures,"
                    f" got {found}: leave the column empty where it is not known"
                )

    def samples(self) -> tuple[Sample, ...]:
        """Its pictures as a judge sees them."""
        return tuple(replace(one, target=self.target) for one in self.judgement.samples())


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """n pictures, each of a prompt once; p comparisons of two of them by index; lists by prompt."""

    samples: tuple[Sample, ...]
    group: Int[np.ndarray, " n"]
    gold: Float[np.ndarray, " n"]  # NaN where it is not known
    origin: tuple[str, ...]  # "" where it is not known
    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    label: Float[np.ndarray, " p"]  # P(first is better) as annotators said
    lists: tuple[tuple[np.ndarray, np.ndarray], ...]  # pictures of one prompt by index, their truth

    @property
    def pair_group(self) -> Int[np.ndarray, " p"]:
        """The group of each pair."""
        return self.group[self.first]

    @property
    def truth(self) -> Float[np.ndarray, " p"]:
        """Of each pair 1, 0 or 0.5, by the gold of both pictures, else by what annotators said."""
        gap = self.gold[self.first] - self.gold[self.second]
        return np.where(np.isnan(gap), np.sign(self.label - 0.5), np.sign(gap)) / 2 + 0.5


def read_judgements(
    source: str | Path, split: str, axis: str | None = None, most: int | None = None
) -> list[Row]:
    """The rows of a split of a `JudgementTable`, all or of one axis. `most` keeps whole groups, in
    the order of a hash of their names, until there are that many rows.

    Raises:
        DataError: see `JudgementTable`; or a gold or origin that does not fit its pictures.
    """
    table = JudgementTable(source, split, axis)
    return [_row(table[i]) for i in _some(table.column("group"), most)]


def _some(groups: Sequence[str], most: int | None) -> list[int]:
    """Which rows are kept."""
    if most is None or len(groups) <= most:
        return list(range(len(groups)))
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(groups):
        rows.setdefault(name, []).append(i)
    kept: list[int] = []
    for name in sorted(rows, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        if len(kept) + len(rows[name]) <= most or not kept:
            kept += rows[name]
    return kept


def _row(judgement: Judgement) -> Row:
    """The judgement apart from what is known beside it; of that, judges see the target alone."""
    known: dict[str, Any] = dict(judgement.columns)
    gold, origin, target = (known.pop(name, None) for name in ("gold", "origin", "target"))
    try:
        values = tuple(float(value) for value in gold or ())
    except (TypeError, ValueError) as error:
        raise DataError(f"gold: expected a list of numbers, got {gold!r}: {error}") from error
    return Row(
        judgement=replace(judgement, columns=known),
        gold=values,
        origin=tuple(origin or ()),
        target=target,
    )


def _key(group: str, sample: Sample) -> bytes:
    total = hashlib.blake2b(repr((group, sample.prompt, sample.target)).encode(), digest_size=16)
    for picture in (sample.image, *sample.sources):
        total.update(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return total.digest()


def bench(rows: Sequence[Row]) -> Bench:
    """Pictures that occur in several judgements of a prompt become one, so that a judge is asked
    once for each.

    Lists are all pictures of a group with a gold; without any, each ranking by itself and the mean
    points of a group.
    """
    place: dict[bytes, int] = {}
    samples: list[Sample] = []
    facts: list[tuple[str, float, str]] = []
    at: list[tuple[int, ...]] = []
    for row in rows:
        name, index = row.judgement.group, []
        for k, sample in enumerate(row.samples()):
            key = _key(name, sample)
            if key not in place:
                place[key] = len(samples)
                samples.append(sample)
                gold = row.gold[k] if row.gold else np.nan
                facts.append((name, gold, row.origin[k] if row.origin else ""))
            index.append(place[key])
        at.append(tuple(index))
    pairs = [
        (index[i], index[j], label)
        for row, index in zip(rows, at, strict=True)
        for i, j, label in row.judgement.pairs()
    ]
    names = {name: number for number, name in enumerate(dict.fromkeys(f[0] for f in facts))}
    group = np.array([names[name] for name, _, _ in facts], dtype=int)
    gold = np.array([gold for _, gold, _ in facts], dtype=np.float64)
    return Bench(
        samples=tuple(samples),
        group=group,
        gold=gold,
        origin=tuple(origin for _, _, origin in facts),
        first=np.array([i for i, _, _ in pairs], dtype=int),
        second=np.array([j for _, j, _ in pairs], dtype=int),
        label=np.array([label for _, _, label in pairs], dtype=np.float64),
        lists=_lists(rows, at, group, gold),
    )


def _lists(
    rows: Sequence[Row], at: Sequence[tuple[int, ...]], group: np.ndarray, gold: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    known = np.flatnonzero(np.isfinite(gold))
    if known.size:
        order = known[np.argsort(group[known], kind="stable")]
        cuts = np.flatnonzero(np.diff(group[order])) + 1
        return tuple((index, gold[index]) for index in np.split(order, cuts) if len(index) > 1)
    found, points = [], {}
    for row, index in zip(rows, at, strict=True):
        if row.judgement.kind == "rank":
            found.append((np.array(index), -np.array(row.judgement.ratings)))
        elif row.judgement.kind == "point":
            own = points.setdefault(int(group[index[0]]), {})
            own.setdefault(index[0], []).append(row.judgement.ratings[0])
    for own in points.values():
        if len(own) > 1:
            found.append((np.array([*own]), np.array([np.mean(seen) for seen in own.values()])))
    return tuple(found)
