"""From a spec to pixels: anti-aliased signed-distance shapes, faces and letters.

The same spec renders at any size from 64 to 256 (multiples of 32); the picture is a function of the
spec alone. Shape masks are cached per size, so a batch is mostly blending: see
`benchmarks/scenes.py` for pictures per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from rewards.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    HAIRS,
    SKINS,
    Objects,
    Portrait,
    Sign,
    Spec,
)

FACE = {
    "eye": (30, 30, 40),
    "white": (250, 250, 250),
    "mouth": (165, 45, 55),
    "frame": (20, 20, 70),
}

GLYPHS = {
    "A": (" ### ", "#   #", "#   #", "#####", "#   #", "#   #", "#   #"),
    "E": ("#####", "#    ", "#    ", "#### ", "#    ", "#    ", "#####"),
    "I": ("#####", "  #  ", "  #  ", "  #  ", "  #  ", "  #  ", "#####"),
    "K": ("#   #", "#  # ", "# #  ", "##   ", "# #  ", "#  # ", "#   #"),
    "L": ("#    ", "#    ", "#    ", "#    ", "#    ", "#    ", "#####"),
    "M": ("#   #", "## ##", "# # #", "# # #", "#   #", "#   #", "#   #"),
    "N": ("#   #", "##  #", "##  #", "# # #", "#  ##", "#  ##", "#   #"),
    "O": (" ### ", "#   #", "#   #", "#   #", "#   #", "#   #", " ### "),
    "P": ("#### ", "#   #", "#   #", "#### ", "#    ", "#    ", "#    "),
    "R": ("#### ", "#   #", "#   #", "#### ", "# #  ", "#  # ", "#   #"),
    "S": (" ####", "#    ", "#    ", " ### ", "    #", "    #", "#### "),
    "T": ("#####", "  #  ", "  #  ", "  #  ", "  #  ", "  #  ", "  #  "),
}


SMALLEST, LARGEST = 64, 256  # sides in px


def check_size(size: int) -> None:
    """Raise ValueError unless `size` is a multiple of 32 from 64 to 256."""
    if size % 32 or not SMALLEST <= size <= LARGEST:
        raise ValueError(
            f"expected a size from {SMALLEST} to {LARGEST} that is a multiple of 32, got {size}"
        )


def _grid(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """x (right) and y (down) of pixel centres in [-1, 1]."""
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * (2 / pixels) - 1
    return axis[None, :], axis[:, None]


def _coverage(distance: np.ndarray, pixels: int) -> np.ndarray:
    """Share of each pixel inside the shape, from a signed distance in half widths of the window."""
    return np.clip(0.5 - distance * (pixels / 2), 0, 1).astype(np.float32)


def _box(x, y, half_width: float, half_height: float) -> np.ndarray:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _shape_distance(shape: str, x, y, r: float) -> np.ndarray:
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return _box(x, y, 0.86 * r, 0.86 * r)
    if shape == "triangle":
        return np.maximum(0.894 * np.abs(x) - 0.447 * (y + 0.95 * r), y - 0.85 * r)
    if shape == "cross":
        return np.minimum(_box(x, y, r, 0.34 * r), _box(x, y, 0.34 * r, r))
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.76 * r) - 0.24 * r
    raise ValueError(f"unknown shape {shape!r}")


@lru_cache(maxsize=512)
def shape_mask(shape: str, radius: float, pixels: int) -> np.ndarray:
    """Coverage of one shape in its cell, float32 (pixels, pixels) in [0, 1]."""
    x, y = _grid(pixels)
    return _coverage(_shape_distance(shape, x, y, radius), pixels)


@lru_cache(maxsize=256)
def glyph_mask(letter: str, size: int) -> np.ndarray:
    """Coverage of one letter in its column of a sign: float32 (size/2, size/4), exactly 0 or 1."""
    rows = np.array([[c == "#" for c in row] for row in GLYPHS[letter]], dtype=np.float32)
    v = (np.arange(size // 2) + 0.5) / (size // 2) * 32 - 2  # 28 of 32 units high
    u = (np.arange(size // 4) + 0.5) / (size // 4) * 16  # 15 of 16 units wide
    inside = ((v >= 0) & (v < 28))[:, None] & (u < 15)[None, :]
    picked = rows[np.clip(v / 4, 0, 6).astype(int)][:, np.clip(u / 3, 0, 4).astype(int)]
    return (picked * inside).astype(np.float32)


def _ellipse(x, y, cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    u, v = (x - cx) / rx, (y - cy) / ry
    return (np.hypot(u, v) - 1) * min(rx, ry)


def _mouth_distance(x, y, smiling: bool) -> np.ndarray:
    bend = 0.14 * (1 - (x / 0.28) ** 2)
    curve = 0.46 + bend if smiling else 0.60 - bend
    return np.maximum(np.abs(y - curve) - 0.055, np.abs(x) - 0.28)


@lru_cache(maxsize=512)
def portrait_layers(style: str, mouth: str, glasses: bool, width: float, size: int) -> np.ndarray:
    """Blending weights (7, size, size), summing to 1, of the colours of `portrait_colours`."""
    x, y = _grid(size)
    w = 0.56 * width
    hair = _ellipse(x, y, 0.0, -0.12, w + 0.14, 0.74)
    if style == "long":
        hair = np.minimum(hair, _box(x, y - 0.42, w + 0.12, 0.50))
    else:
        hair = np.maximum(hair, y - 0.10)
    face = np.maximum(_ellipse(x, y, 0.0, 0.10, w, 0.70), -(y + 0.42))
    neck = _box(x, y - 0.88, 0.22, 0.2)
    eyes = np.minimum(
        _ellipse(x, y, -0.25, -0.02, 0.15, 0.11), _ellipse(x, y, 0.25, -0.02, 0.15, 0.11)
    )
    pupils = np.minimum(np.hypot(x + 0.25, y + 0.02) - 0.08, np.hypot(x - 0.25, y + 0.02) - 0.08)
    order = [hair, np.minimum(face, neck), eyes, pupils, _mouth_distance(x, y, mouth == "smiling")]
    if glasses:
        rims = [np.abs(_box(x + s * 0.25, y + 0.02, 0.19, 0.15)) - 0.035 for s in (-1, 1)]
        arms = _box(np.abs(x) - (0.44 + w) / 2, y + 0.04, max((w - 0.44) / 2, 0.01), 0.03)
        order.append(
            np.minimum(
                np.minimum(rims[0], rims[1]), np.minimum(arms, _box(x, y + 0.02, 0.06, 0.03))
            )
        )
    else:
        order.append(np.ones_like(hair))
    weights, left = [], np.ones((size, size), np.float32)
    for distance in reversed(order):
        cover = _coverage(np.broadcast_to(distance, (size, size)), size) * left
        weights.append(cover)
        left = left - cover
    return np.stack([left, *reversed(weights)])


def portrait_colours(spec: Portrait) -> np.ndarray:
    """RGB (7, 3) of background, hair, skin, eye white, pupil, mouth, frame."""
    rows = [BACKGROUNDS[spec.background], HAIRS[spec.hair], SKINS[spec.skin]]
    rows += [FACE[part] for part in ("white", "eye", "mouth", "frame")]
    return np.array(rows, np.float32)


def _render_objects(spec: Objects, size: int) -> np.ndarray:
    back = np.array(BACKGROUNDS[spec.background], np.float32)
    picture = np.empty((3, size, size), np.float32)
    picture[:] = back[:, None, None]
    half = size // 2
    for thing in spec.things:
        row, column = divmod(thing.cell, 2)
        window = picture[:, row * half : (row + 1) * half, column * half : (column + 1) * half]
        mask = shape_mask(thing.shape, thing.radius, half)
        window += mask * (np.array(COLOURS[thing.colour], np.float32) - back)[:, None, None]
    return picture


def _render_sign(spec: Sign, size: int) -> np.ndarray:
    back = np.array(BACKGROUNDS[spec.background], np.float32)
    picture = np.empty((3, size, size), np.float32)
    picture[:] = back[:, None, None]
    ink = (np.array(COLOURS[spec.colour], np.float32) - back)[:, None, None]
    for i, letter in enumerate(spec.word):
        window = picture[:, size // 4 : size // 4 + size // 2, i * size // 4 : (i + 1) * size // 4]
        window += glyph_mask(letter, size) * ink
    return picture


def render(spec: Spec, size: int = 64) -> np.ndarray:
    """The picture of a spec: uint8 RGB (3, size, size).

    Raises:
        ValueError: a size that is not a multiple of 32 from 64 to 256.
    """
    check_size(size)
    if isinstance(spec, Objects):
        picture = _render_objects(spec, size)
    elif isinstance(spec, Portrait):
        layers = portrait_layers(spec.style, spec.mouth, spec.glasses, spec.width, size)
        picture = np.tensordot(portrait_colours(spec), layers, axes=(0, 0))
    else:
        picture = _render_sign(spec, size)
    return (picture + 0.5).astype(np.uint8)


def render_batch(specs: Sequence[Spec], size: int = 64) -> np.ndarray:
    """Pictures of several specs: uint8 RGB (B, 3, size, size)."""
    return np.stack([render(spec, size) for spec in specs])
