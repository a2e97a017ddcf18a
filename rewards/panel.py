"""Weights of a panel of judges, by category, from what a frozen policy's pictures say of them:

    w_ck = share_k * max(0, 2 a_ck - 1) / s_ck,    sum_k w_ck = 1                     (ours)

s_ck is the spread of judge k's scores inside a prompt's group, a_ck its accuracy on labelled pairs
(1 where nobody labelled any). Dividing by s_ck is for plain weighted sums of scores alone: schemes
that normalise each judge in its group have done it. A judge that does not apply to a category, that
tells no pictures apart there, or whose spread is not above its noise has weight 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from rewards import images

JPEG = 95


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of one judge in one category; None where there was nothing to measure."""

    groups: int = 0  # in which it scored two pictures or more
    signal: float | None = None
    noise: float | None = None
    repeat: float | None = None  # largest difference of scoring the same picture twice
    validity: float | None = None
    pairs: int = 0  # behind the validity


def signal(groups: Sequence[Float[np.ndarray, " _"]]) -> float | None:
    """Root mean (population) variance inside groups of two scores or more."""
    variances = [group.var() for group in groups if len(group) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else None


def harmless(pixels: UInt8[np.ndarray, "b 3 h w"]) -> dict[str, UInt8[np.ndarray, "b 3 h w"]]:
    """Changes that nobody sees: one pixel to the right, one pixel down (edges repeated), and JPEG
    at quality 95 with full colour resolution.
    """
    return {
        "right": np.concatenate([pixels[..., :1], pixels[..., :-1]], axis=-1),
        "down": np.concatenate([pixels[..., :1, :], pixels[..., :-1, :]], axis=-2),
        "jpeg": np.stack([_jpeg(picture) for picture in pixels]),
    }


def _jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = BytesIO()
    images.to_pil(picture).save(buffer, format="JPEG", quality=JPEG, subsampling=0)
    return images.from_pil(Image.open(buffer))


def noise(groups: Sequence[Float[np.ndarray, "_ v"]]) -> float | None:
    """Spread of a score under harmless changes, where it matters: inside a group.

    Rows are pictures of one prompt, the first column the picture as it is, the others its versions.
    What a change does to all pictures of the group alike is taken out, as an advantage does: the
    root of the two-way residual variance, sum of squares over (pictures - 1) (versions - 1). None
    without two pictures and two versions.
    """
    squares, freedom = 0.0, 0
    for table in groups:
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        squares += float((rest**2).sum())
        freedom += max(len(table) - 1, 0) * (table.shape[1] - 1)
    return float(np.sqrt(squares / freedom)) if freedom else None


def accuracy(
    scores: Sequence[Float[np.ndarray, " _"]], labels: Sequence[Float[np.ndarray, " _"]]
) -> tuple[float | None, int]:
    """Share of pairs inside a group that are ordered as their labels are, and the number of pairs.

    Pairs with equal labels do not count, equal scores are half right, NaN takes no part.
    """
    right, pairs = 0.0, 0
    for own, label in zip(scores, labels, strict=True):
        known = np.isfinite(own) & np.isfinite(label)
        first, second = np.triu_indices(int(known.sum()), k=1)
        truth = np.sign(label[known][first] - label[known][second])
        said = np.sign(own[known][first] - own[known][second])[truth != 0]
        right += float(((1 + said * truth[truth != 0]) / 2).sum())
        pairs += len(said)
    return (right / pairs if pairs else None), pairs


def verdict(reading: Reading) -> str:
    """Why a judge gets no weight in a category; "" if it gets one."""
    if not reading.groups or reading.signal is None:
        return "does not apply"
    if reading.signal <= 0:
        return "tells no pictures apart"
    if reading.noise is not None and reading.signal <= reading.noise:
        return "not above its noise"
    if reading.validity is not None and reading.validity <= 0.5:
        return "no better than chance"
    return ""


def panel_weights(
    readings: Mapping[str, Mapping[str, Reading]],
    shares: Mapping[str, float] | None = None,
    normalised: bool = True,
) -> dict[str, dict[str, float]]:
    """Category -> judge -> weight; see the module. Categories without any weight are left out.

    `readings` maps category -> judge -> what is known, `shares` judge -> how much it should count
    (1 by default). `normalised`: the scheme divides each judge by its own spread.
    """
    out: dict[str, dict[str, float]] = {}
    for category, row in readings.items():
        raw = {}
        for judge, reading in row.items():
            valid = 1.0 if reading.validity is None else 2 * reading.validity - 1
            scale = 1.0 if normalised or not reading.signal else reading.signal
            share = (shares or {}).get(judge, 1.0)
            raw[judge] = 0.0 if verdict(reading) else share * max(0.0, valid) / scale
        total = sum(raw.values())
        if total > 0:
            out[category] = {judge: value / total for judge, value in raw.items()}
    return out
