"""What is fitted after training, on the dev split: the map from raw values to ratings, and the
temperature that makes a preference of two values.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from rewards.types import Calibration

KNOTS = 12


def monotone(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> np.ndarray:
    """The nearest rising sequence in weighted least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([float(value), float(weight), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            v, w, n = blocks.pop()
            u, x, m = blocks[-1]
            blocks[-1] = [(u * x + v * w) / (x + w), x + w, m + n]
    return np.concatenate([np.full(int(n), v) for v, _, n in blocks])


def fit_calibration(
    raw: Float[np.ndarray, " n"], rating: Float[np.ndarray, " n"], knots: int = KNOTS
) -> Calibration:
    """A rising piecewise linear map from raw values to the mean rating, both in [0, 1].

    Mean ratings of equally many rows each, made monotone, with a slope of at least 1% everywhere so
    that no two pictures become equal. Fewer than four rows a knot, or raw values without spread,
    leave the identity.
    """
    count = min(knots, len(raw) // 4)
    if count < 2 or np.ptp(raw) < 1e-6:
        return Calibration()
    order = np.argsort(raw, kind="stable")
    parts = np.array_split(order, count)
    x = np.array([raw[p].mean() for p in parts])
    y = monotone(
        np.array([rating[p].mean() for p in parts]), np.array([float(len(p)) for p in parts])
    )
    keep = np.concatenate([[True], np.diff(x) > 1e-6])
    x, y = x[keep], y[keep]
    if len(x) < 2:
        return Calibration()
    x = np.concatenate([[min(0.0, x[0] - 1e-3)], x, [max(1.0, x[-1] + 1e-3)]])
    ends = (
        y[0] - (y[1] - y[0]) / (x[2] - x[1]) * (x[1] - x[0]),
        y[-1] + (y[-1] - y[-2]) / (x[-2] - x[-3]) * (x[-1] - x[-2]),
    )
    y = np.clip(np.concatenate([[ends[0]], y, [ends[1]]]), 0.0, 1.0)
    y = 0.99 * y + 0.01 * (x - x[0]) / (x[-1] - x[0])
    return Calibration(raw=tuple(x.tolist()), value=tuple(y.tolist()))
