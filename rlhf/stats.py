"""Means and paired gains with 95% bootstrap intervals.

Percentile bootstrap (Efron 1979). With `clusters`, whole clusters are drawn (samples of one prompt
are not independent), and the statistic of a draw is the mean over the samples drawn. A mean of
identical values has an interval of zero width: read it together with `n`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

AT_ONCE = 10_000_000  # counts in memory: 80 MB
Values = Sequence[float | int] | np.ndarray  # one dimension; True and False count as 1 and 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, the ends of its 95% interval, and the number of values behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_metric(self) -> dict[str, float | int]:
        """The form `result.json` holds."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def bootstrap_mean(
    values: Values,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    seed: int = 0,
    draws: int = 2000,
) -> Estimate:
    """Mean of `values`; `clusters` names the cluster of each. Raises ValueError if empty or not
    finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"expected a list of one or more finite numbers, got shape {array.shape}: {array[:5]}"
        )
    if clusters is not None and len(clusters) != array.size:
        raise ValueError(f"expected a cluster for each of {array.size} values, got {len(clusters)}")
    labels = range(array.size) if clusters is None else clusters
    index = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    member = np.array([index[label] for label in labels])
    sums = np.bincount(member, weights=array)
    counts = np.bincount(member).astype(np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    at_once = max(1, AT_ONCE // len(index))
    for start in range(0, draws, at_once):
        part = means[start : start + at_once]
        even = np.full(len(index), 1 / len(index))
        drawn = generator.multinomial(len(index), even, size=len(part))
        part[:] = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


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
