"""Batches of pictures of several resolutions and aspects, each at most a budget of latent tokens.

A resolution R gives one bucket per aspect: the height and width nearest to area R^2, both multiples
of 32. A picture goes to the largest resolution that it fills without being enlarged (the smallest,
if it fills none), there to the nearest aspect, |log(h/w)| apart. A batch is one bucket's, budget //
tokens of a picture large, so every step costs about the same. The resolutions are those of
arXiv:2605.10730; how it mixed them is not published, so this rule is ours.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.errors import ConfigError
from rlhf.policies.qwen_image21 import CELL_PX, tokens_of

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """`resolutions` in pixels of the side of a square; `aspects` are width over height; `budget` is
    the most latent tokens of a batch, of 16x16 px each, and a batch a `multiple` of so many.
    """

    resolutions: tuple[int, ...] = (256,)
    aspects: tuple[float, ...] = (0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0)
    budget: int = 8192
    multiple: int = 1

    def check(self) -> None:
        if not self.resolutions or not self.aspects or min(self.aspects) <= 0:
            raise ConfigError(
                f"buckets: expected resolutions and aspects above 0, got {self.resolutions} and"
                f" {self.aspects}"
            )
        if min(self.resolutions) < CELL_PX:
            raise ConfigError(
                f"buckets.resolutions: expected at least {CELL_PX}, got {min(self.resolutions)}"
            )
        largest = max(tokens_of(size) for rung in self.rungs() for size in rung)
        if self.budget < largest * self.multiple:
            raise ConfigError(
                f"expected a batch with room for {self.multiple} pictures of {largest} latent"
                f" tokens, got {self.budget} tokens: raise the batch, or lower the resolutions or"
                " pace.micro_batches"
            )

    def rungs(self) -> list[list[Size]]:
        """Bucket sizes per resolution, from small to large."""
        return [
            sorted({_size(resolution, aspect) for aspect in self.aspects})
            for resolution in sorted(self.resolutions)
        ]

    def bucket_of(self, size: Size) -> Size:
        """The bucket of a picture of (height, width)."""
        chosen: Size | None = None
        for rung in self.rungs():
            nearest = self.nearest(rung, size)
            if chosen is None or (nearest[0] <= size[0] and nearest[1] <= size[1]):
                chosen = nearest
        assert chosen is not None
        return chosen

    def nearest(self, rung: Sequence[Size], size: Size) -> Size:
        """The bucket of a rung whose aspect is nearest to that of (height, width)."""
        return min(rung, key=lambda b: (abs(_log_aspect(b) - _log_aspect(size)), b))

    def batch_size(self, bucket: Size) -> int:
        """Pictures of a full batch."""
        return self.budget // (tokens_of(bucket) * self.multiple) * self.multiple


def _size(resolution: int, aspect: float) -> Size:
    """Multiples of 32 whose area is nearest resolution^2 and whose aspect is about right."""
    height = max(1, round(resolution / math.sqrt(aspect) / CELL_PX)) * CELL_PX
    width = max(1, round(resolution * math.sqrt(aspect) / CELL_PX)) * CELL_PX
    return height, width


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketBatch:
    """Which examples a step takes, and the size that their pictures are cut to."""

    size: Size
    index: tuple[int, ...]


class Buckets:
    """The batches of all steps, as a function of (seed, step): nothing needs to be stored.

    An epoch takes every example; its order is a permutation keyed by the epoch. Examples of one
    `layout` (a number each, such as the length of the caption) come together. Batches are full: the
    last of a bucket takes its first examples a second time. A bucket with too few for one batch
    gives a smaller one, of the next multiple.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        ladder: Ladder,
        seed: int = 0,
        layouts: Sequence[int] | None = None,
        index: Sequence[int] | None = None,
    ) -> None:
        chosen = range(len(sizes)) if index is None else index
        if not len(chosen):
            raise ConfigError("buckets: expected at least one picture, got none")
        members: dict[Size, list[int]] = defaultdict(list)
        for i in chosen:
            members[ladder.bucket_of(sizes[i])].append(int(i))
        self.ladder, self.seed = ladder, seed
        self.layouts = np.zeros(len(sizes), int) if layouts is None else np.asarray(layouts)
        self.members = {size: np.array(members[size]) for size in sorted(members)}
        self.steps_per_epoch = sum(
            -(-len(index) // ladder.batch_size(size)) for size, index in self.members.items()
        )
        self._epoch: tuple[int, list[BucketBatch]] | None = None

    def batch(self, step: int) -> BucketBatch:
        """The batch of a step, counted from 1. Raises ValueError for an earlier one."""
        if step < 1:
            raise ValueError(f"expected a step from 1, got {step}")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][position]

    def _batches(self, epoch: int) -> list[BucketBatch]:
        out = []
        for size, index in self.members.items():
            order = np.random.default_rng([41, self.seed, epoch, *size]).permutation(index)
            order = order[np.argsort(self.layouts[order], kind="stable")]
            full = self.ladder.batch_size(size)
            if len(order) < full:
                full = -(-len(order) // self.ladder.multiple) * self.ladder.multiple
            order = np.resize(order, -(-len(order) // full) * full)  # repeats from its start
            out += [
                BucketBatch(size=size, index=tuple(map(int, order[i : i + full])))
                for i in range(0, len(order), full)
            ]
        order = np.random.default_rng([42, self.seed, epoch]).permutation(len(out))
        return [out[i] for i in order]
