"""The two axes that know no spec: how a picture looks, and how a face looks.

aesthetics    what is measured                                           in [0, 1]
harmony       share o of chroma outside the best hue template: a sector  1 - min(1, c / 28) o
              of 90 degrees or two opposite ones of 50; c mean chroma
saturation    by how much d the mean of max - min over channels, each    clip(1 - d / 0.3)
              pixel weighted by its own, is outside 0.25..0.60
balance       centroid of |x - border colour| off the centre by d        clip(1 - d)
              half widths
edges         steepest step of a pixel as a share q of the range, over   clip((q - 0.15) / 0.4)
              8 x 8 blocks weighted by range
noise         s = median |difference of Laplacians| / (6 x 0.6745)       1 / (1 + (s / 6)^2)

portrait      what is measured                                           in [0, 1]
proportions   offset o of the centroids of eyes and mouth off the        1 / (1 + (o / 0.1)^2)
              standard face
symmetry      rms r of left - right over the face                        1 / (1 + (r / 25)^2)
features      each eye and the mouth stand out of the skin by rms r,     mean of clip(r / 30) and
              and stray marks on bare skin by s                          1 / (1 + (s / 30)^2)
evenness      spread s of colour over bare skin                          1 / (1 + (s / 12)^2)

Sources: hue templates after Cohen-Or et al., Color Harmonization, 2006; noise after Immerkaer, Fast
Noise Variance Estimation, 1996, with the median for the mean.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rewards.scenes._pixels import SIZE, block_means, closeness
from rewards.scenes._portraits import regions

_AXIS = ((np.arange(SIZE) + 0.5) * (2 / SIZE) - 1).astype(np.float32)
_X, _Y = _AXIS[None, :], _AXIS[:, None]


def _harmony(pixels: np.ndarray) -> float:
    red, green, blue = pixels / 255
    chroma = pixels.max(0) / 255 - pixels.min(0) / 255
    angle = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
    bins = np.floor(angle / (2 * np.pi) * 36).astype(int) % 36
    mass = np.bincount(bins.ravel(), weights=chroma.ravel(), minlength=36)
    total = mass.sum()
    if total < 1e-6:
        return 1.0
    ring = np.concatenate([mass, mass])
    one = max(ring[k : k + 9].sum() for k in range(36))
    two = max(ring[k : k + 5].sum() + ring[k + 18 : k + 23].sum() for k in range(18))
    outside = 1 - max(one, two) / total
    return float(1 - min(1.0, 255 * total / pixels[0].size / 28) * outside)


def _saturation(pixels: np.ndarray) -> float:
    chroma = (pixels.max(0) - pixels.min(0)) / 255
    mean = float(np.square(chroma).sum() / max(chroma.sum(), 1e-6))
    return float(np.clip(1 - max(0.25 - mean, mean - 0.60, 0) / 0.30, 0, 1))


def _balance(pixels: np.ndarray) -> float:
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], 1)
    weight = np.abs(pixels - np.median(border, 1)[:, None, None]).sum(0)
    total = weight.sum()
    if total < 1:
        return 0.0
    x, y = float((weight * _X).sum() / total), float((weight * _Y).sum() / total)
    return float(np.clip(1 - np.hypot(x, y), 0, 1))


def _edges(pixels: np.ndarray) -> float:
    grey = pixels.mean(0)
    blocks = grey.reshape(8, 8, 8, 8).swapaxes(1, 2)
    span = blocks.max((-2, -1)) - blocks.min((-2, -1))
    across = np.abs(np.diff(blocks, axis=-1)).max((-2, -1))
    down = np.abs(np.diff(blocks, axis=-2)).max((-2, -1))
    if span.sum() < 1:
        return 0.0
    steepest = float(np.maximum(across, down).sum() / span.sum())
    return float(np.clip((steepest - 0.15) / 0.4, 0, 1))


def _noise(pixels: np.ndarray) -> float:
    second = pixels[:, 2:] - 2 * pixels[:, 1:-1] + pixels[:, :-2]
    both = second[:, :, 2:] - 2 * second[:, :, 1:-1] + second[:, :, :-2]
    return float(closeness(np.median(np.abs(both)) / (6 * 0.6745), 6.0))


def picture_parts(pixels: np.ndarray) -> dict[str, float]:
    """The five numbers of aesthetics of one picture (3, 64, 64) in 0..255."""
    return {
        "harmony": _harmony(pixels),
        "saturation": _saturation(pixels),
        "balance": _balance(pixels),
        "edges": _edges(pixels),
        "noise": _noise(pixels),
    }


@lru_cache(maxsize=1)
def _face_windows() -> dict[str, np.ndarray]:
    tall = (_Y > -0.22) & (_Y < 0.18)
    return {
        "left": tall & (_X > -0.46) & (_X < -0.02),
        "right": tall & (_X < 0.46) & (_X > 0.02),
        "mouth": (np.abs(_X) < 0.32) & (_Y > 0.36) & (_Y < 0.70),
        "face": (np.square(_X / 0.5) + np.square((_Y - 0.1) / 0.65)) < 1,
    }


_PLACES = {"left": (-0.25, -0.02), "right": (0.25, -0.02), "mouth": (0.0, 0.53)}


def face_parts(pixels: np.ndarray) -> dict[str, float]:
    """The four numbers of portrait of one picture (3, 64, 64) in 0..255."""
    windows, bare = _face_windows(), regions()["skin"]
    skin = np.median(pixels[:, bare], axis=1)
    energy = np.square(pixels - skin[:, None, None]).mean(0)
    offset, shown = 0.0, []
    for name, (x, y) in _PLACES.items():
        inside = energy * windows[name]
        total = max(float(inside.sum()), 1.0)
        dx = float((inside * _X).sum()) / total - x
        offset += dx**2 + (float((inside * _Y).sum()) / total - y) ** 2
        shown.append(min(1.0, float(np.sqrt(total / windows[name].sum())) / 30))
    stray = float(np.sqrt(energy[bare].mean()))
    blocks = block_means(pixels - pixels[:, :, ::-1], 2)
    face = block_means(windows["face"].astype(np.float32), 2)
    uneven = float(np.sqrt((np.square(blocks).mean(0) * face).sum() / face.sum()))
    spread = float(np.sqrt(pixels[:, bare].var(1).mean()))
    return {
        "proportions": float(closeness(np.sqrt(offset), 0.1)),
        "symmetry": float(closeness(uneven, 25.0)),
        "features": (sum(shown) + float(closeness(stray, 30.0))) / 4,
        "evenness": float(closeness(spread, 12.0)),
    }
