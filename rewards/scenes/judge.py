"""The oracle as a judge: reads the picture against the spec in `Sample.target`.

For bringing a loop up, and for evaluation; a run that claims something trains on learned judges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.errors import RewardConfigError
from rewards.scenes.oracle import AXES, Reading, fidelity_batch, measure
from rewards.scenes.specs import Edit, Spec, parse
from rewards.types import JudgeCard, Sample, Score, failed, not_applicable

REVISION = "1"  # raise it with any change of a formula
_CATEGORIES = {
    "portrait": ("portraits", "edits"),
    "instruction": ("edits",),
    "consistency": ("edits",),
}


class OracleJudge:
    """One axis of the oracle, in [0, 1]: `value` is the soft reading, `parts["strict"]` is 0 or 1.

    `na` without a target or where the axis does not apply; `failed` for a target that is no spec.

    Raises:
        RewardConfigError: no such axis.
    """

    def __init__(self, axis: str) -> None:
        if axis not in AXES:
            raise RewardConfigError(f"expected an axis among {list(AXES)}, got {axis!r}")
        self.axis = axis
        self.card = JudgeCard(
            name=f"oracle/{axis}",
            revision=REVISION,
            preprocessing="area-64",
            categories=_CATEGORIES.get(axis, ("*",)),
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample; pictures of one size are read together."""
        out: list[Score] = [not_applicable("no target to read the picture against")] * len(samples)
        todo: dict[tuple[int, ...], list[tuple[int, Spec | Edit]]] = {}
        for i, sample in enumerate(samples):
            if sample.target is None:
                continue
            try:
                todo.setdefault(sample.image.shape, []).append((i, parse(sample.target)))
            except ValueError as error:
                out[i] = failed(f"target: {error}")
        for items in todo.values():
            images = np.stack([samples[i].image for i, _ in items])
            for (i, _), reading in zip(items, self._read(images, items), strict=True):
                out[i] = self._to_score(reading)
        return out

    def _read(self, images: np.ndarray, items: list[tuple[int, Spec | Edit]]):
        specs = [spec for _, spec in items]
        if self.axis == "fidelity":
            return fidelity_batch(images, specs)
        return [measure(self.axis, *pair) for pair in zip(images, specs, strict=True)]

    def _to_score(self, reading: Reading | None) -> Score:
        if reading is None:
            return not_applicable(f"{self.card.name} does not apply to this target")
        parts = {**reading.parts, "strict": float(reading.strict)}
        return Score(value=float(reading.soft), parts=parts)
