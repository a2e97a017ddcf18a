"""Agreement on pairs. `gap` is score(first) - score(second), `truth` is 1, 0 or 0.5 (a tie), or a
share of annotators in between. C agree, D disagree, T_m only the judge ties, T_h only the truth
ties, T_b both.

strict           C / (C + D + T_m)
half credit      (C + T_m / 2) / (C + D + T_m)
tie-calibrated   (C + T_b) / all, where the judge ties if |gap| <= eps          arXiv:2305.14324
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

Gap = Float[np.ndarray, " p"]
Truth = Float[np.ndarray, " p"]  # in [0, 1]


def agreement(gap: Gap, truth: Truth, tie: float = 0.0) -> Float[np.ndarray, " p"]:
    """1 where the judge agrees, 0 where it does not, `tie` where only the judge ties, NaN where the
    truth is a tie or the gap is NaN. Its mean is the strict accuracy, with `tie` 0.5 half credit.
    """
    right = np.where(gap == 0, tie, (np.sign(gap) == np.sign(truth - 0.5)).astype(float))
    return np.where((truth == 0.5) | np.isnan(gap), np.nan, right)


def tied_agreement(gap: Gap, truth: Truth, eps: float) -> Float[np.ndarray, " p"]:
    """1 where judge and truth say the same of a pair, one of three things, else 0; NaN where the
    gap is. Its mean is the tie-calibrated accuracy.
    """
    said = np.where(np.abs(gap) <= eps, 0.0, np.sign(gap))
    same = (said == np.sign(truth - 0.5)).astype(float)
    return np.where(np.isnan(gap), np.nan, same)


def tie_threshold(gap: Gap, truth: Truth) -> float:
    """The eps >= 0 with the best `tied_agreement`, the smallest of several. For dev pairs: chosen
    on the pairs it is used on, it flatters.

    O(p log p): pairs by rising |gap|; those up to a place are ties, those after it count by sign.

    Raises:
        ValueError: no pair with a gap.
    """
    kept = ~np.isnan(gap)
    if not kept.any():
        raise ValueError("expected one pair or more with a score on both sides, got none")
    order = np.argsort(np.abs(gap[kept]), kind="stable")
    size, side = np.abs(gap[kept])[order], np.sign(truth[kept][order] - 0.5)
    tied = np.concatenate([[0], np.cumsum(side == 0)])
    right = (np.sign(gap[kept][order]) == side) & (side != 0)
    agreed = tied + right.sum() - np.concatenate([[0], np.cumsum(right)])
    whole = np.concatenate([[size[0] > 0], size[1:] > size[:-1], [True]])  # equal ones together
    best = int(np.argmax(np.where(whole, agreed, -1)))
    return float(size[best - 1]) if best else 0.0


def apart(gold_gap: Float[np.ndarray, " p"], margin: float) -> Bool[np.ndarray, " p"]:
    """Pairs whose gold differs by `margin` or more; where it is not known, not."""
    return np.abs(gold_gap) >= margin - 1e-12
