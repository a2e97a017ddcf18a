"""What a reward model is trained to do: agree with ratings and comparisons, axis by axis.

The loss of an axis is `point` of its ratings plus `pair` of its comparisons; axes are averaged over
those that a batch has. A head that reads regions learns from masks instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.errors import RewardConfigError
from rewards.training import losses
from rewards.training.collate import LabelledBatch, Labels
from rewards.training.families import Family
from rewards.training.losses import expectation

REGION = "region"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardLoss:
    """Which loss on ratings and which on comparisons, and their weights.

    mse: (E - rating)^2 (arXiv:2606.27608). ordinal: cross-entropy of the rating's neighbouring
    levels. bradley-terry, rao-kupper, davidson: of z = a (E_1 - E_2) with a learnt a > 0; the last
    two know ties. thurstone: both pictures' levels as normal scores with the variance that the
    logits give them. `within_weight`: of the squared error of the difference between the ratings
    of two pictures of one prompt, which is what a group's advantages are made of.
    """

    point: Literal["mse", "ordinal"] = "mse"
    pair: Literal["bradley-terry", "rao-kupper", "davidson", "thurstone"] = "bradley-terry"
    point_weight: float = 1.0
    pair_weight: float = 0.5
    within_weight: float = 0.0
    margin: float = 0.0  # of bradley-terry, in logits

    def check(self) -> None:
        weights = (self.point_weight, self.pair_weight, self.within_weight)
        if min(weights) < 0 or not sum(weights):
            raise RewardConfigError(
                f"loss: expected weights >= 0, one of them above, got {weights}"
            )


class Objective(nn.Module):
    """Loss and metrics of a batch, with what the comparisons learn beside the model: a temperature
    and a tie width per axis.
    """

    def __init__(self, axes: Sequence[str], config: RewardLoss) -> None:
        super().__init__()
        self.config = config
        self.scale = nn.ParameterDict({a: nn.Parameter(torch.tensor(1.5)) for a in axes})
        self.tie = nn.ParameterDict({a: nn.Parameter(torch.tensor(-1.0)) for a in axes})

    def forward(self, model: Family, batch: LabelledBatch) -> tuple[Tensor, dict[str, float]]:
        wanted = {axis: found.samples() for axis, found in batch.labels.items()}
        if REGION in model.heads and len(batch.edited):
            wanted[REGION] = batch.edited
        said = model(batch.samples, wanted)
        total, metrics = torch.zeros(()), {}
        for axis, logits in said.items():
            if axis == REGION:
                touched = coarser(batch.touched, logits.shape[-1]).to(logits.device)
                loss = 2 * F.binary_cross_entropy_with_logits(logits.float(), touched)
            else:
                place = torch.full((len(batch.samples),), -1)
                place[wanted[axis]] = torch.arange(len(wanted[axis]))
                loss = self.axis_loss(axis, logits, batch.labels[axis], place)
            metrics[f"loss/{axis}"] = float(loss.detach())
            total = total + loss
        return total / max(1, len(said)), metrics

    def axis_loss(self, axis: str, logits: Tensor, labels: Labels, place: Tensor) -> Tensor:
        """Of one axis; `place` maps samples of the batch to rows of `logits`."""
        labels, place = labels.to(logits.device), place.to(logits.device)
        loss = logits.sum() * 0.0
        if len(labels.point):
            rows, rating = logits[place[labels.point]], 1 + labels.rating * (logits.shape[-1] - 1)
            found = self._point(rows, rating, labels.point_weight)
            loss = loss + self.config.point_weight * found
            found = losses.within_prompts(expectation(rows) - rating, labels.point_prompt)
            loss = loss + self.config.within_weight * found
        if len(labels.first) and self.config.pair_weight:
            first, second = logits[place[labels.first]], logits[place[labels.second]]
            found = self._pair(axis, first, second, labels)
            loss = loss + self.config.pair_weight * found
        return loss

    def _point(self, logits: Tensor, rating: Tensor, weight: Tensor) -> Tensor:
        if self.config.point == "mse":
            return losses.mse_expectation(logits, rating, weight)
        below = rating.floor().clamp(1, logits.shape[-1] - 1)
        share = rating - below
        log_p, index = logits.log_softmax(-1), (below - 1).long().unsqueeze(-1)
        low, high = log_p.gather(-1, index).squeeze(-1), log_p.gather(-1, index + 1).squeeze(-1)
        return -(weight * ((1 - share) * low + share * high)).sum()

    def _pair(self, axis: str, first: Tensor, second: Tensor, labels: Labels) -> Tensor:
        y, w = labels.preference, labels.pair_weight
        a, b = expectation(first), expectation(second)
        scale = losses.positive(self.scale[axis])
        if self.config.pair == "thurstone":
            return losses.thurstone(a, _variance(first), b, _variance(second), y, w)
        if self.config.pair == "rao-kupper":
            return losses.rao_kupper(scale * (a - b), y, losses.positive(self.tie[axis]), w)
        if self.config.pair == "davidson":
            return losses.davidson(scale * a, scale * b, y, self.tie[axis], w)
        return losses.bradley_terry(scale * (a - b), y, w, self.config.margin)


def coarser(mask: Tensor, patches: int) -> Tensor:
    """Masks (B, n x n) on fewer patches: touched where any part of a patch is."""
    fine, side = round(mask.shape[-1] ** 0.5), round(patches**0.5)
    square = mask.view(-1, 1, fine, fine)
    return F.adaptive_max_pool2d(square, side).view(len(mask), -1)


def _variance(logits: Tensor) -> Tensor:
    """Variance of the level under softmax(logits)."""
    levels = torch.arange(1, logits.shape[-1] + 1, dtype=torch.float32, device=logits.device)
    p = logits.float().softmax(-1)
    return p @ levels.square() - (p @ levels).square()
