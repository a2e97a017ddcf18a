"""What a judge is compared with: the same without any training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.images import to_pil
from rewards.judge import Judge
from rewards.types import JudgeCard, Sample, Score

SIDE = 16


class RandomProjection:
    """The sum of a picture's pixels at 16 x 16, each times a fixed random weight. It does not read
    the prompt. A baseline, never a reward.
    """

    def __init__(self, seed: int) -> None:
        weight = np.random.default_rng([41, seed]).normal(size=(SIDE, SIDE, 3))
        self.weight = weight / np.sqrt(weight.size)
        self.card = JudgeCard(
            name="random-projection",
            revision=str(seed),
            preprocessing="area-16",
            low=-1e3,
            high=1e3,
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample."""
        small = [to_pil(s.image).resize((SIDE, SIDE), Image.Resampling.BOX) for s in samples]
        return [
            Score(value=float((np.asarray(one, np.float64) / 255 * self.weight).sum()))
            for one in small
        ]


def untrained(judge: Judge, seed: int = 0) -> Judge:
    """The judge with fresh weights, if it has a method `fresh(seed)`, else a random projection of
    pixels.
    """
    fresh = getattr(judge, "fresh", None)
    return RandomProjection(seed) if fresh is None else fresh(seed)
