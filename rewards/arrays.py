"""The one rule for scores that are not there, for training and for benchmarks alike.

A score that is `na` or `failed` is NaN and masked: it enters no mean, no accuracy and no advantage,
and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from rewards.types import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreArrays:
    """Scores of n samples side by side."""

    value: Float[np.ndarray, " n"]  # float64, NaN where not ok
    ok: Bool[np.ndarray, " n"]
    na: Bool[np.ndarray, " n"]

    @property
    def failed(self) -> Bool[np.ndarray, " n"]:
        """Neither ok nor na."""
        return ~self.ok & ~self.na


def to_arrays(scores: Sequence[Score]) -> ScoreArrays:
    """Scores as arrays; see the module."""
    return ScoreArrays(
        value=np.array([np.nan if s.value is None else s.value for s in scores], dtype=np.float64),
        ok=np.array([s.state == "ok" for s in scores], dtype=bool),
        na=np.array([s.state == "na" for s in scores], dtype=bool),
    )
