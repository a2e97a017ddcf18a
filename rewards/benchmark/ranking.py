"""Order within a prompt: rank correlations and what picking the best of N costs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, " n"]


def ranks(values: Values) -> Values:
    """Ranks from 1, equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def correlation(a: Values, b: Values) -> float:
    """Pearson's; NaN where one of them is constant."""
    if not len(a) or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(score: Values, truth: Values) -> float:
    """Spearman's rho with shared ranks; NaN for a constant truth, 0 for a constant score, which
    orders nothing.
    """
    return _or_zero(correlation(ranks(score), ranks(truth)), truth)


def kendall(score: Values, truth: Values) -> float:
    """Kendall's tau-b, O(n^2); NaN for a constant truth, 0 for a constant score."""
    upper = np.triu_indices(len(score), 1)
    a = np.sign(score[:, None] - score[None])[upper]
    b = np.sign(truth[:, None] - truth[None])[upper]
    scale = np.sqrt((a @ a) * (b @ b))
    return _or_zero(float(a @ b / scale) if scale > 0 else float("nan"), truth)


def _or_zero(value: float, truth: Values) -> float:
    return 0.0 if np.isnan(value) and np.ptp(truth) > 0 else value


def best_of(score: Values, truth: Values) -> tuple[float, float]:
    """(best truth - truth of the judge's choice, truth of its choice - mean truth). Of equal best
    scores one is drawn, so the choice is their mean.
    """
    chosen = float(truth[score == score.max()].mean())
    return float(truth.max()) - chosen, chosen - float(truth.mean())
