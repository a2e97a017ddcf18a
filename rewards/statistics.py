"""Statistics of pictures that drift when a reward is hacked: over-saturation, fine grids,
over-exposure, and pictures of one prompt that become one picture. Numbers only, no model.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

SIDE = 256  # frequencies are read in the central square of at most this side
FINE = 0.25  # cycles per pixel from which energy is high-frequency; the highest on an axis is 0.5
COARSE = 0.1  # below it a peak is the picture's layout, not a grid
BRIGHT = 250  # a pixel of which every channel is at least this is over-exposed
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def picture_statistics(pixels: UInt8[np.ndarray, "b 3 h w"]) -> dict[str, Float[np.ndarray, " b"]]:
    """One value per picture, each in [0, 1]; a blank picture has 0 in all but `overexposed`.

    saturation   mean of max - min over the channels (chroma)
    contrast     standard deviation of the luminance, twice
    overexposed  share of pixels that are almost white in every channel
    fine         share of the luminance's energy (mean removed, Hann window) at `FINE` and above
    grid         share of its energy at `COARSE` and above that lies in its strongest frequency
    """
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    luma = np.tensordot(_LUMA, pixels.astype(np.float32), axes=(0, 1)) / 255.0
    fine, grid = _frequencies(_centre(luma))
    return {
        "saturation": (high - low).mean(axis=(1, 2)) / 255.0,
        "contrast": 2.0 * luma.std(axis=(1, 2), dtype=np.float64),
        "overexposed": (low >= BRIGHT).mean(axis=(1, 2)),
        "fine": fine,
        "grid": grid,
    }


def _centre(luma: np.ndarray) -> np.ndarray:
    top, left = (max(0, (n - SIDE) // 2) for n in luma.shape[1:])
    return luma[:, top : top + SIDE, left : left + SIDE]


def _frequencies(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _, height, width = luma.shape
    window = np.outer(np.hanning(height), np.hanning(width)).astype(np.float32)
    centred = luma - (luma * window).sum(axis=(1, 2), keepdims=True) / window.sum()
    power = np.abs(np.fft.rfft2(centred * window)) ** 2
    inner = np.arange(power.shape[2]) % (width / 2) != 0  # columns that stand for their mirror too
    power = power * np.where(inner, 2.0, 1.0)
    power[power < 1e-6] = 0.0  # rounding: a grey level of one pixel in 256^2 has more
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    textured = power * (radius >= COARSE)
    return (
        _share((power * (radius >= FINE)).sum(axis=(1, 2)), power.sum(axis=(1, 2))),
        _share(textured.max(axis=(1, 2)), textured.sum(axis=(1, 2))),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def diversity(pixels: UInt8[np.ndarray, "g 3 h w"]) -> dict[str, float]:
    """How different the pictures of one prompt are: mean distance of two of them, in [0, 1].

    thumbnails  root mean square difference of 8 x 8 thumbnails (192 numbers)
    features    the same of 4 x 4 cells of mean red, green, blue and edge strength (64 numbers)

    NaN for a group of one.
    """
    picture = pixels.astype(np.float32) / 255.0
    luma = np.tensordot(_LUMA, picture, axes=(0, 1))
    edges = np.abs(np.diff(luma, axis=1, append=luma[:, -1:]))
    edges += np.abs(np.diff(luma, axis=2, append=luma[:, :, -1:]))
    cells = np.concatenate([_cells(picture, 4), _cells(edges[:, None] / 2.0, 4)], axis=1)
    parts = {"thumbnails": _cells(picture, 8), "features": cells}
    return {name: apart(part) / part[0].size ** 0.5 for name, part in parts.items()}


def _cells(picture: np.ndarray, n: int) -> np.ndarray:
    """Means of n x n cells: (G, C, n, n). Sides shorter than n are stretched."""
    for axis in (2, 3):
        size = picture.shape[axis]
        if size < n:
            picture = np.repeat(picture, -(-n // size), axis=axis)
            size = picture.shape[axis]
        starts = np.arange(n) * size // n
        counts = np.diff(np.append(starts, size))
        shape = [-1 if a == axis else 1 for a in range(4)]
        picture = np.add.reduceat(picture, starts, axis=axis) / counts.reshape(shape)
    return picture


def apart(features: Float[np.ndarray, "g ..."]) -> float:
    """Mean Euclidean distance of two of G rows of features; NaN for a single one. No two are drawn
    twice, so that its expectation does not depend on G.
    """
    flat = features.reshape(len(features), -1).astype(np.float64)
    if len(flat) < 2:
        return float("nan")
    first, second = np.triu_indices(len(flat), k=1)
    return float(np.sqrt(((flat[first] - flat[second]) ** 2).sum(axis=1)).mean())
