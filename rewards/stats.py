"""Means and other statistics with 95% bootstrap intervals.

Percentile bootstrap (Efron 1979). With `clusters`, whole clusters are drawn (samples of one prompt
are not independent), and the statistic of a draw is that of the samples drawn. A mean of identical
values has an interval of zero width: read it together with `n`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

AT_ONCE = 10_000_000  # counts in memory: 80 MB
Values = Sequence[float | int] | np.ndarray  # one dimension; True and False count as 1 and 0
Statistic = Callable[[Int[np.ndarray, " n"]], float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic, the ends of its 95% interval, and the number of values behind it."""

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


def bootstrap(
    statistic: Statistic,
    clusters: Sequence[Hashable] | np.ndarray,
    within: tuple[float | int, float | int] = (-np.inf, np.inf),
    seed: int = 0,
    draws: int = 400,
) -> Estimate:
    """Any statistic of samples given by index; `clusters` names the cluster of each.

    The draws are moved so that their mean is the estimate, and cut to the range `within`: some
    statistics (a calibration error) are larger in a resample, and a plain percentile interval would
    lie beside them. Draws in which the statistic is NaN do not count.

    Raises:
        ValueError: no sample, or a statistic of all samples that is not finite.
    """
    index = {label: position for position, label in enumerate(dict.fromkeys(clusters))}
    member = np.array([index[label] for label in clusters], dtype=int)
    whole = statistic(np.arange(member.size)) if member.size else np.nan
    if not np.isfinite(whole):
        raise ValueError(f"expected a finite statistic of {member.size} samples, got {whole}")
    order = np.argsort(member, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(member))[:-1])
    generator, found = np.random.default_rng(seed), np.empty(draws)
    for i in range(draws):
        drawn = generator.integers(len(members), size=len(members))
        found[i] = statistic(np.concatenate([members[c] for c in drawn]))
    found = found[np.isfinite(found)]
    ends = np.quantile(found, [0.025, 0.975]) + whole - found.mean() if found.size else [whole] * 2
    low, high = np.clip(ends, *within)
    return Estimate(float(whole), float(low), float(high), int(member.size))
