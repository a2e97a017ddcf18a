"""Judgements of a few prompts as one batch: each picture once, and who said what of which.

Labels are by axis. Ratings of points are brought to the levels 1..L of the axis's head; pairs and
ranks become comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rewards.training.schema import Judgement
from rewards.types import Sample

TOUCHED = "touched"  # free column of edits: for each patch of the source, whether it changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What was said on one axis. Indices are into the batch's samples; weights sum to 1 or are
    empty.
    """

    point: Int[Tensor, " p"]
    rating: Float[Tensor, " p"]  # as a share of the scale, in [0, 1]
    point_weight: Float[Tensor, " p"]
    point_prompt: Int[Tensor, " p"]  # equal for ratings of one prompt's pictures
    first: Int[Tensor, " q"]
    second: Int[Tensor, " q"]
    preference: Float[Tensor, " q"]
    pair_weight: Float[Tensor, " q"]

    def samples(self) -> Int[Tensor, " s"]:
        """The samples that the axis needs, each once, in order."""
        return torch.cat([self.point, self.first, self.second]).unique()

    def to(self, device: torch.device) -> Labels:
        """The same on another device."""
        return Labels(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledBatch:
    """`touched` holds masks of sources, for the samples at `edited`."""

    samples: tuple[Sample, ...]
    labels: Mapping[str, Labels]
    edited: Int[Tensor, " e"]
    touched: Float[Tensor, "e n"]


class _Collector:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.place: dict[object, int] = {}

    def add(self, sample: Sample) -> int:
        sources = tuple(source.tobytes() for source in sample.sources)
        key = (sample.image.tobytes(), sample.image.shape, sample.prompt, sources)
        if key not in self.place:
            self.place[key] = len(self.samples)
            self.samples.append(sample)
        return self.place[key]


def _shares(weights: list[float]) -> Tensor:
    values = torch.tensor(weights, dtype=torch.float32)
    return values / values.sum() if len(weights) else values


def collate(judgements: Sequence[Judgement]) -> LabelledBatch:
    """One batch. The comparisons of a rank share the weight of one pair."""
    collector, rows = _Collector(), {}
    prompts: dict[str, int] = {}
    masks: dict[int, object] = {}
    for judgement in judgements:
        points, pairs = rows.setdefault(judgement.axis, ([], []))
        index = [collector.add(sample) for sample in judgement.samples()]
        if judgement.columns.get(TOUCHED) is not None:
            masks[index[0]] = judgement.columns[TOUCHED]
        weight = judgement.confidence
        if judgement.kind == "point":
            share = (judgement.ratings[0] - judgement.low) / (judgement.high - judgement.low)
            points.append(
                (index[0], share, weight, prompts.setdefault(judgement.group, len(prompts)))
            )
        comparisons = judgement.pairs()
        for i, j, preference in comparisons:
            pairs.append((index[i], index[j], preference, weight / len(comparisons)))
    labels = {}
    for axis, (points, pairs) in rows.items():
        labels[axis] = Labels(
            point=torch.tensor([p[0] for p in points], dtype=torch.long),
            rating=torch.tensor([p[1] for p in points], dtype=torch.float32),
            point_weight=_shares([p[2] for p in points]),
            point_prompt=torch.tensor([p[3] for p in points], dtype=torch.long),
            first=torch.tensor([p[0] for p in pairs], dtype=torch.long),
            second=torch.tensor([p[1] for p in pairs], dtype=torch.long),
            preference=torch.tensor([p[2] for p in pairs], dtype=torch.float32),
            pair_weight=_shares([p[3] for p in pairs]),
        )
    edited = torch.tensor(list(masks), dtype=torch.long)
    touched = np.array(list(masks.values()) or np.zeros((0, 1)), np.float32)
    return LabelledBatch(
        samples=tuple(collector.samples),
        labels=labels,
        edited=edited,
        touched=torch.from_numpy(touched),
    )
