"""Splits that share neither prompts nor pictures, and ratings without their annotators' habits."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from rewards import images
from rewards.errors import DataError
from rewards.training.schema import Judgement

SHARES: Mapping[str, float] = MappingProxyType({"train": 0.8, "dev": 0.1, "test": 0.1})
_SIDE, _STEP = 8, 6  # cells of a thumbnail, and how far those of a copy may be apart


def split_of(group: str, shares: Mapping[str, float] = SHARES, seed: int = 0) -> str:
    """The split of a prompt, by a hash of its group: the same for ever, whatever else is there.

    Groups that differ only in case or in spaces go together. `shares` need not add up to 1.
    """
    digest = hashlib.blake2b(f"{seed}:{_plain(group)}".encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return next(reversed(list(shares)))


def check_disjoint(
    train: Iterable[Judgement], dev: Iterable[Judgement], test: Iterable[Judgement]
) -> None:
    """No group, picture or source picture of one split in another. Splits may be lazy; kept are 192
    bytes per picture.

    Pictures are the same if no cell of their `thumbnail`s differs by more than 6 of 255: that finds
    most copies that were scaled or compressed again, none that were cropped, and tells scenes apart
    that differ in a mouth. Pictures of one flat colour are left out: a blank is nobody's.

    Raises:
        DataError: with up to three examples of each kind.
    """
    splits = {"train": train, "dev": dev, "test": test}
    seen = {name: _look(judgements) for name, judgements in splits.items()}
    groups: list[str] = []
    pictures: list[str] = []
    for one, two in combinations(seen, 2):
        (names, thumbs), (other_names, other_thumbs) = seen[one], seen[two]
        groups += [
            f"{names[key]} of {one} and {other_names[key]} of {two}"
            for key in names
            if key in other_names
        ]
        pictures += [
            f"{a} of {one} and {b} of {two}" for a, b in _same_pictures(thumbs, other_thumbs)
        ]
    shared = [(w, found) for w, found in (("groups", groups), ("pictures", pictures)) if found]
    if shared:
        raise DataError(
            "expected splits that share nothing, got "
            + "; ".join(f"{len(found)} {w} in two: {', '.join(found[:3])}" for w, found in shared)
            + ": split by group with rewards.training.splits.split_of, and keep pictures of one"
            " origin in one group"
        )


def thumbnail(picture: UInt8[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "8 8 3"]:
    """The mean colours of 8x8 cells."""
    return np.asarray(images.to_pil(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX))


def annotator_offsets(
    ratings: Sequence[float], annotators: Sequence[str], groups: Sequence[str], prior: float = 10.0
) -> dict[str, float]:
    """How much higher than others each annotator rates the same prompts, in units of the ratings.

    The b of rating = group's level + b_annotator + rest, by least squares with prior * b^2: one of
    n ratings is shrunk by about n / (n + prior), and who never shares a prompt with others gets 0.
    Nameless ratings ("") have none.

    Raises:
        DataError: columns of unequal length.
    """
    if not len(ratings) == len(annotators) == len(groups):
        raise DataError(
            f"expected as many ratings as annotators and groups, got {len(ratings)},"
            f" {len(annotators)} and {len(groups)}"
        )
    names, who = np.unique(np.asarray(annotators, dtype=str), return_inverse=True)
    _, where = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rating, named = np.asarray(ratings, dtype=float), names != ""
    rated, judged = np.bincount(who), np.bincount(where)
    offset = np.zeros(len(names))
    for _ in range(200):
        level = np.bincount(where, rating - offset[who]) / judged
        last, offset = offset, np.bincount(who, rating - level[where]) / (rated + prior) * named
        if np.abs(offset - last).max(initial=0.0) < 1e-9:
            break
    return {str(n): float(b) for n, b, keep in zip(names, offset, named, strict=True) if keep}


def without_offsets(
    judgements: Iterable[Judgement], offsets: Mapping[str, float]
) -> Iterator[Judgement]:
    """Points with their annotator's offset taken off, cut to their scale; others as they are."""
    for judgement in judgements:
        offset = offsets.get(judgement.annotator, 0.0)
        if judgement.kind == "point" and offset:
            rating = min(max(judgement.ratings[0] - offset, judgement.low), judgement.high)
            judgement = dataclasses.replace(judgement, ratings=(rating,))
        yield judgement


def _plain(group: str) -> str:
    return " ".join(group.lower().split())


def _look(judgements: Iterable[Judgement]) -> tuple[dict[str, str], dict[bytes, str]]:
    """Groups and thumbnails, each with how a reader knows it."""
    groups: dict[str, str] = {}
    thumbs: dict[bytes, str] = {}
    for judgement in judgements:
        what = f"{judgement.group!r:.80}"
        groups.setdefault(_plain(judgement.group), what)
        for picture in (*judgement.images, *judgement.sources):
            thumb = thumbnail(picture)
            if np.ptp(thumb, axis=(0, 1)).max() > _STEP:
                thumbs.setdefault(thumb.tobytes(), what)
    return groups, thumbs


def _same_pictures(one: Mapping[bytes, str], two: Mapping[bytes, str]) -> Iterator[tuple[str, str]]:
    """Pairs within the step of each other: sought where the mean is, which then is as near."""
    if not one or not two:
        return
    cells = np.frombuffer(b"".join(one), np.uint8).reshape(len(one), -1).astype(np.int16)
    means = cells.mean(axis=1)
    order = np.argsort(means)
    cells, means, names = cells[order], means[order], list(one.values())
    for key, what in two.items():
        thumb = np.frombuffer(key, np.uint8).astype(np.int16)
        window = np.searchsorted(means, thumb.mean() + np.array([-1, 1]) * (_STEP + 1e-6))
        far = np.abs(cells[window[0] : window[1]] - thumb).max(axis=1, initial=0)
        if far.size and far.min() <= _STEP:
            yield names[order[window[0] + int(far.argmin())]], what
