"""Whether P(first is better) = sigmoid(gap / T) is the share of pairs in which it is.

`gap` is score(first) - score(second), `label` what annotators said in [0, 1], a tie 0.5. Everything
is read in both orders of a pair.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Gap = Float[np.ndarray, " p"]
Label = Float[np.ndarray, " p"]
BINS = 15
RANGE = 1e4  # T lies within this factor of the typical gap


def probability(gap: Gap, temperature: float) -> Gap:
    """sigmoid(gap / T)."""
    return np.exp(-np.logaddexp(0, -gap / temperature))


def nll(gap: Gap, label: Label, temperature: float) -> Gap:
    """-y log P - (1 - y) log(1 - P) in nats, pair by pair; equal in both orders."""
    z = gap / temperature
    return label * np.logaddexp(0, -z) + (1 - label) * np.logaddexp(0, z)


def brier(gap: Gap, label: Label, temperature: float) -> Gap:
    """(P - y)^2, pair by pair; equal in both orders."""
    return np.square(probability(gap, temperature) - label)


def fit_temperature(gap: Gap, label: Label) -> float:
    """T > 0 of the least mean nll, by bisection of its slope in 1/T (convex, one minimum).

    Bounded: gaps that tell nothing, or the contrary, end in a large T and P near 0.5; gaps that are
    always right in a small one. Raises ValueError for no pair.
    """
    if not len(gap):
        raise ValueError("expected one pair or more, got none")
    typical = float(np.sqrt(np.mean(np.square(gap))))
    if typical == 0:
        return 1.0
    low, high = -np.log(RANGE), np.log(RANGE)  # of log(typical / T)
    for _ in range(80):
        middle = (low + high) / 2
        share = probability(gap, typical / np.exp(middle))
        if float(((share - label) * gap).sum()) < 0:
            low = middle
        else:
            high = middle
    return float(typical / np.exp((low + high) / 2))


def bins(
    gap: Gap, label: Label, temperature: float, count: int = BINS
) -> list[tuple[float, float, int]]:
    """(mean P, mean y, n) of `count` bins of equal mass, by rising P, over both orders.

    Pairs of equal P share the mean of their y, so that a bin border between them adds no error.
    """
    p = np.concatenate([probability(gap, temperature), probability(-gap, temperature)])
    y = np.concatenate([label, 1 - label])
    same, inverse = np.unique(p, return_inverse=True)
    y = (np.bincount(inverse, weights=y) / np.bincount(inverse))[inverse]
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    return [(float(p[part].mean()), float(y[part].mean()), len(part)) for part in parts]


def ece(gap: Gap, label: Label, temperature: float, count: int = BINS) -> float:
    """Expected calibration error: sum over bins of n_b / N |mean y - mean P|. Never negative, so
    its expectation is above 0 for a perfect judge, by about 0.8 sqrt(0.25 / n_b).
    """
    found = bins(gap, label, temperature, count)
    total = sum(n for _, _, n in found)
    return sum(n / total * abs(y - p) for p, y, n in found)
