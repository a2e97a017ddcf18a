"""Consistency of an edit: what the instruction does not name stays as it was.

    value = gate(instruction) * mean(region, identity)

region: rms d of output - source over the patches that the instruction does not touch, as the region
head reads them off source and instruction alone (what the output changed does not excuse it),

    region = min(1, k(d) / k(floor)),    k(d) = 1 / (1 + (d / 25)^2)

with the autoencoder's own round trip as the floor: no edit is asked to beat it. identity: whose
face it is, where the source has one, by an embedding. Doing nothing follows no instruction, and the
gate leaves it nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rewards.images import letterbox
from rewards.trained import TowersJudge, level
from rewards.training.heads import HeadConfig
from rewards.types import Sample

WIDTH = 25.0  # grey levels at which half of `k` is left


def gate(done: float, low: float = 0.3, high: float = 0.7) -> float:
    """0 up to `low`, 1 from `high`, straight between."""
    return min(1.0, max(0.0, (done - low) / (high - low)))


def closeness(rms: float) -> float:
    """k(d) = 1 / (1 + (d / 25)^2) in (0, 1]."""
    return 1.0 / (1.0 + (rms / WIDTH) ** 2)


def outside_rms(
    source: np.ndarray, output: np.ndarray, touched: Sequence[float] | np.ndarray
) -> float:
    """Root mean square difference, in grey levels, of patches with weights max(0, 1 - 2 `touched`).

    Pictures are uint8 (3, S, S); `touched` holds a probability for each of n x n patches in reading
    order. A patch that is rather touched than not has no weight: the remaining doubt about many of
    them, each quite changed, would outweigh the few that should have stayed. Where everything is
    touched there is nothing to hold on to, and it is 0.
    """
    side = round(len(touched) ** 0.5)
    step = source.shape[-1] // side
    square = (source.astype(np.float64) - output) ** 2
    patches = square.mean(0).reshape(side, step, side, step).mean((1, 3)).reshape(-1)
    weight = np.clip(1.0 - 2.0 * np.asarray(touched, np.float64), 0.0, None)
    total = weight.sum()
    return float(np.sqrt((weight * patches).sum() / total)) if total > 1e-3 else 0.0


class Consistency(TowersJudge):
    """Edits, with the judge of instructions inside. Setting `floor`: rms of the autoencoder's round
    trip, in grey levels.
    """

    AXIS = "consistency"
    HEADS = {
        "instruction": HeadConfig(text=True, source=True),
        "region": HeadConfig(kind="region", text=True, source=True, width=96),
        "identity": HeadConfig(kind="face", text=False, source=True, width=96),
        "face": HeadConfig(text=False, source=True, image=False, levels=2, width=32, depth=1),
    }
    CATEGORIES = ("edit", "edits")
    NEEDS = ("source",)

    def answer(
        self, said: Mapping[str, Tensor], sample: Sample
    ) -> tuple[float, Mapping[str, float]]:
        side = self.model.towers.side
        pictures = letterbox(sample.sources[0], side), letterbox(sample.image, side)
        rms = outside_rms(*pictures, torch.sigmoid(said["region"]).numpy())
        parts = {
            "region": min(1.0, closeness(rms) / closeness(self.settings.get("floor", 0.0))),
            "rms": rms,
        }
        kept = [parts["region"]]
        if level(said["face"]) > 0.5:  # of the source, hence the same for a whole group
            parts["identity"] = level(said["identity"])
            kept.append(parts["identity"])
        parts["gate"] = gate(level(said["instruction"]))
        return parts["gate"] * sum(kept) / len(kept), parts
