"""Paired gains with 95% bootstrap intervals; the bootstrap itself is in `rewards.stats`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from rewards.stats import Estimate, Values, bootstrap_mean

__all__ = ["Estimate", "Values", "bootstrap_gain", "bootstrap_mean", "gain_metric"]


def bootstrap_gain(
    before: Values,
    after: Values,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Estimate:
    """Mean of `after - before`, paired by position (same prompt, same seed). Raises ValueError."""
    if len(before) != len(after):
        raise ValueError(f"expected paired values, got {len(before)} before and {len(after)} after")
    gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_mean(gains, clusters, seed, draws)


def gain_metric(before: float | int, after: float | int, gain: Estimate) -> dict[str, float | int]:
    """The before/after form of a metric in `result.json`; `low` and `high` bound the gain."""
    interval = {"low": gain.low, "high": gain.high, "n": gain.n}
    return {"before": before, "after": after, "gain": gain.value, **interval}
