"""Arithmetic that all readers of the oracle share. Pixels here are float32 in 0..255, at 64 x 64.

Every operation treats each picture by itself (stacked products, no sum over the batch), so a
reading is bit for bit the same in any batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float, UInt8

from rewards.errors import ImageError

SIZE = 64
Pixels = Float[np.ndarray, "b 3 64 64"]


@lru_cache(maxsize=32)
def _area_matrix(pixels: int) -> np.ndarray:
    """(64, pixels) weights of averaging over area; rows sum to 1."""
    edges = np.arange(SIZE + 1) * (pixels / SIZE)
    low = np.maximum(edges[:-1, None], np.arange(pixels)[None, :])
    high = np.minimum(edges[1:, None], np.arange(1, pixels + 1)[None, :])
    return (np.clip(high - low, 0, None) * (SIZE / pixels)).astype(np.float32)


def to_pixels(images: UInt8[np.ndarray, "b 3 h w"]) -> Pixels:
    """Averages over area to 64 x 64. Raises ImageError below 64 pixels."""
    height, width = images.shape[-2:]
    if height < SIZE or width < SIZE:
        raise ImageError(
            f"expected pictures of at least {SIZE} x {SIZE} pixels, got {height} x {width}: "
            "the oracle does not read smaller ones"
        )
    if height == width == SIZE:
        return images.astype(np.float32)
    rows, columns = _area_matrix(height), _area_matrix(width)
    out = [np.matmul(np.matmul(rows, image.astype(np.float32)), columns.T) for image in images]
    return np.stack(out) if out else np.zeros((0, 3, SIZE, SIZE), np.float32)


def closeness(distance, scale: float):
    """1 at distance 0, 1/2 at `scale`, never quite 0: 1 / (1 + (distance / scale)^2)."""
    return 1 / (1 + np.square(distance / scale))


def shrink(mask: np.ndarray) -> np.ndarray:
    """A boolean mask (h, w) without the pixels that touch its outside, sideways, up or down."""
    wide = np.pad(mask, 1, constant_values=False)
    sides = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask & sides


def block_means(pictures: np.ndarray, block: int = 4) -> np.ndarray:
    """Means over block x block squares of (..., h, w): noise averages out, drawing does not."""
    *lead, height, width = pictures.shape
    shape = (*lead, height // block, block, width // block, block)
    return pictures.reshape(shape).mean((-3, -1))


def region_means(pixels: Pixels, regions: np.ndarray) -> np.ndarray:
    """Mean colours (B, R, 3) of boolean or weighted regions (R, 64, 64), none empty."""
    weights = regions.reshape(len(regions), -1).astype(np.float32)
    totals = weights.sum(1, keepdims=True)
    if not (totals > 0).all():
        raise ValueError("expected regions with pixels in them")
    flat = pixels.reshape(len(pixels), 3, -1)
    return np.matmul(flat, (weights / totals).T).transpose(0, 2, 1)


def along(colours: np.ndarray, start: np.ndarray, end: np.ndarray):
    """Where colours (..., 3) lie from `start` (0) to `end` (1); 0 if the two coincide."""
    step = end - start
    length = np.square(step).sum(-1)
    return ((colours - start) * step).sum(-1) / np.maximum(length, 1.0)


def table(colours) -> np.ndarray:
    """The RGB of a palette, float32 (n, 3), in its order."""
    return np.array(list(colours.values()), np.float32)


def distances(colours: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Euclidean RGB distances (..., n) from colours (..., 3) to palette rows (n, 3), in 0..442."""
    return np.sqrt(np.square(colours[..., None, :] - palette).sum(-1))
