"""A judge's scores, and whether they depend on how it is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from rewards.arrays import to_arrays
from rewards.judge import Judge, run_judge
from rewards.types import Sample, Score

BATCH = 64  # pictures that a judge gets at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """n scores, turned so that higher is better; NaN where the judge gave none."""

    value: Float[np.ndarray, " n"]
    failed: Bool[np.ndarray, " n"]
    na: Bool[np.ndarray, " n"]
    flags: Counter[str]
    reasons: Counter[str]  # of failures


def ask(judge: Judge, samples: Sequence[Sample], batch: int = BATCH) -> Answers:
    """Each picture scored once, `batch` at a time, pixel for pixel as it is."""
    scores: list[Score] = []
    for start in range(0, len(samples), batch):
        scores += run_judge(judge, samples[start : start + batch])
    found = to_arrays(scores)
    return Answers(
        value=found.value if judge.card.better == "higher" else -found.value,
        failed=found.failed,
        na=found.na,
        flags=Counter(flag for score in scores for flag in score.flags),
        reasons=Counter(score.reason for score in scores if score.state == "failed"),
    )


def swap_consistency(
    judge: Judge, pairs: Sequence[tuple[Sample, Sample]], batch: int = BATCH
) -> Float[np.ndarray, " p"]:
    """Of each pair 1 if the judge prefers the same picture when it gets (a, b) and when it gets
    (b, a), else 0; NaN where a score is missing. A judge of single pictures owes 1.
    """
    forth = ask(judge, [one for pair in pairs for one in pair], batch).value.reshape(-1, 2)
    back = ask(judge, [one for pair in pairs for one in pair[::-1]], batch).value.reshape(-1, 2)
    one, other = forth[:, 0] - forth[:, 1], back[:, 1] - back[:, 0]
    same = (np.sign(one) == np.sign(other)).astype(float)
    return np.where(np.isnan(one) | np.isnan(other), np.nan, same)


def drift(judge: Judge, samples: Sequence[Sample], seed: int = 0) -> tuple[float, int]:
    """Largest |difference| of a score between all at once, shuffled, and one at a time, and the
    number of samples that were answered in one way of asking and not in another. A judge owes 0
    and 0.
    """
    count = max(len(samples), 1)
    order = np.random.default_rng(seed).permutation(len(samples))
    whole, alone = ask(judge, samples, count).value, ask(judge, samples, 1).value
    shuffled = ask(judge, [samples[i] for i in order], count).value
    ways = np.stack([whole, shuffled[np.argsort(order)], alone])
    answered = ~np.isnan(ways)
    always = answered.all(axis=0)
    spread = np.ptp(ways[:, always], axis=0)
    return float(spread.max(initial=0.0)), int((answered.any(axis=0) & ~always).sum())


def spread_out(count: int, most: int) -> Int[np.ndarray, " k"]:
    """At most `most` of `count` places, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
