"""One judgement of people, or of a panel that stands for them, about pictures of one prompt.

kind    pictures  ratings                                       says
point   1         one, on the scale `low` to `high`             how good it is
pair    2         one in [0, 1]: P(first is better), tie 0.5    which is better
rank    2..k      one per picture, 1 is best, equal is a tie    the order of all

`axis` names what was asked (aesthetics, fidelity, portrait, instruction, consistency, or a name of
your own), `group` the prompt that judgements and pictures belong to: splits and bootstrap intervals
keep a group together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from rewards.errors import DataError
from rewards.types import Sample

Kind = Literal["point", "pair", "rank"]
Outcome = Literal["first", "second", "tie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """See the module. `confidence` in (0, 1] weighs it: the share of annotators who agree.

    Raises:
        DataError: numbers of pictures and ratings that do not fit the kind, or ratings off scale.
    """

    kind: Kind
    axis: str
    prompt: str
    images: tuple[UInt8[np.ndarray, "3 _ _"], ...]
    ratings: tuple[float, ...]
    category: str = "general"
    sources: tuple[UInt8[np.ndarray, "3 _ _"], ...] = ()
    group: str = ""  # by default the prompt
    annotator: str = ""
    confidence: float = 1.0
    low: float = 1.0  # of the scale of `point`
    high: float = 5.0
    columns: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pictures = {"point": (1, 1), "pair": (2, 2), "rank": (2, 64)}[self.kind]
        if not pictures[0] <= len(self.images) <= pictures[1]:
            raise DataError(
                f"{self.kind}: expected {pictures[0]} to {pictures[1]} pictures, got"
                f" {len(self.images)}: see rewards.training.schema"
            )
        wanted = len(self.images) if self.kind == "rank" else 1
        low, high = {"point": (self.low, self.high), "pair": (0.0, 1.0), "rank": (1.0, 64.0)}[
            self.kind
        ]
        fits = all(math.isfinite(r) and low <= r <= high for r in self.ratings)
        if len(self.ratings) != wanted or not fits:
            raise DataError(
                f"{self.kind}: expected {wanted} ratings from {low:g} to {high:g}, got"
                f" {self.ratings}: leave out what nobody judged"
            )
        if not 0 < self.confidence <= 1:
            raise DataError(f"confidence: expected a share in (0, 1], got {self.confidence}")
        if not self.group:
            object.__setattr__(self, "group", self.prompt)

    def samples(self) -> tuple[Sample, ...]:
        """Its pictures as a judge sees them."""
        return tuple(
            Sample(
                image=image,
                prompt=self.prompt,
                category=self.category,
                sources=self.sources,
                columns=self.columns,
            )
            for image in self.images
        )

    def pairs(self) -> list[tuple[int, int, float]]:
        """Its comparisons as (first, second, P(first is better)); none for a point."""
        if self.kind == "point":
            return []
        if self.kind == "pair":
            return [(0, 1, self.ratings[0])]
        ranks = self.ratings
        return [
            (i, j, 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]))
            for i in range(len(ranks))
            for j in range(i + 1, len(ranks))
        ]
