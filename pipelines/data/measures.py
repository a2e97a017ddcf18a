"""What can be measured on one record: pure functions, each with its unit and its source.

None means that the measure does not apply to the record, which then passes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from pipelines.data.records import Record
from rewards import images
from rewards.errors import ImageError

Measure = Callable[[Record], float | None]


def files(record: Record) -> float:
    """1 if the picture and its sources decode, else 0."""
    try:
        record.decode()
    except ImageError:
        return 0.0
    return 1.0


def min_side(record: Record) -> float:
    """Shorter side in pixels."""
    return float(min(record.picture.size))


def aspect(record: Record) -> float:
    """Longer side over shorter side, from 1."""
    return max(record.picture.size) / min(record.picture.size)


def rotation(record: Record) -> float:
    """Degrees clockwise by which the file's EXIF orientation turns it: 0, 90, 180 or 270."""
    return float(record.picture.turned)


def entropy(record: Record) -> float:
    """Shannon entropy of the grey histogram in bits: 0 for one tone, 8 for all tones alike."""
    counts = np.bincount(images.grey(record.picture.pil).ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log2(shares)).sum()))


def sharpness(record: Record) -> float:
    """Variance of the Laplacian of the grey picture (Pech-Pacheco et al. 2000), grey levels
    squared. Near 0 where there is no detail, in the hundreds for a sharp photograph.
    """
    g = _grey(record)
    if min(g.shape) < 3:
        return 0.0
    middle = g[1:-1, 1:-1]
    around = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:]
    return float((around - 4 * middle).var())


def noise(record: Record) -> float:
    """Standard deviation of the noise in grey levels (Immerkaer 1996): the mean response to a mask
    that lines and slopes do not excite. Texture counts as noise.
    """
    g = _grey(record)
    if min(g.shape) < 3:
        return 0.0
    rows = g[:-2] - 2 * g[1:-1] + g[2:]
    response = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.abs(response).mean() * math.sqrt(math.pi / 2) / 6)


def blockiness(record: Record) -> float:
    """Mean grey step over the borders of 8x8 blocks, over the mean step elsewhere: about 1 without
    blocks (after Wang, Sheikh and Bovik 2002). Sees the grid of an uncut, unscaled JPEG only.
    """
    g = _grey(record)
    if min(g.shape) < 17:
        return 1.0
    border, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(g, axis=axis)).mean(axis=1 - axis)
        at_border = np.arange(1, len(steps) + 1) % 8 == 0
        border.append(steps[at_border].mean())
        inside.append(steps[~at_border].mean())
    return float((sum(border) + 1e-3) / (sum(inside) + 1e-3))


def bytes_per_pixel(record: Record) -> float | None:
    """Bytes of the file per pixel, of a JPEG; None of a picture that was stored without loss."""
    data = record.picture.data
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    height, width = record.picture.size
    return len(data) / (height * width)


def _grey(record: Record) -> Float[np.ndarray, "h w"]:
    return images.grey(record.picture.pil).astype(np.float32)


MEASURES: Mapping[str, Measure] = {
    "files": files,
    "min_side": min_side,
    "aspect": aspect,
    "rotation": rotation,
    "entropy": entropy,
    "sharpness": sharpness,
    "noise": noise,
    "blockiness": blockiness,
    "bytes_per_pixel": bytes_per_pixel,
}


# --- keys of duplicates ---------------------------------------------------------------------------


def file_key(record: Record) -> str:
    """Hash of the picture's bytes; of an edit, of its sources and instruction too."""
    total = hashlib.blake2b(record.picture.data, digest_size=12)
    for one in record.sources:
        total.update(hashlib.blake2b(one.data).digest())
    if record.sources:
        total.update(record.caption.encode())
    return total.hexdigest()


def look_key(record: Record) -> int | None:
    """64-bit difference hash of what the picture looks like; None for an edit, whose target is
    meant to look like its source.
    """
    return None if record.sources else dhash(images.grey(record.picture.pil))


def dhash(grey: UInt8[np.ndarray, "h w"]) -> int:
    """Signs of the horizontal steps of the picture at 9x8 pixels (Krawetz 2013). Scaling, mild
    compression and brightness leave most bits; all plain pictures have the same.
    """
    small = Image.fromarray(grey).resize((9, 8), Image.Resampling.BOX)
    pixels = np.asarray(small, dtype=np.int16)
    bits = (pixels[:, 1:] > pixels[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
