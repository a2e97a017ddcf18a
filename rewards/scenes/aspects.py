"""All that the oracle measures in a picture before it is held against a prompt: how much each cell
looks like each shape and colour, how empty it is, which letters stand where, whose face it is, and
the parts of taste. Soft values in about [0, 1], as in `_objects`, `_portraits`, `_signs`, `_taste`.

An annotator who fills in a long form about a picture gives such values; a tower that learns to
predict them sees what ratings depend on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from rewards.scenes import _objects, _portraits, _signs, _taste
from rewards.scenes._pixels import Pixels, along, closeness, distances, table, to_pixels
from rewards.scenes.render import FACE
from rewards.scenes.specs import BACKGROUNDS, COLOURS, HAIRS, SKINS

SIZES = {"objects": 68, "portraits": 20, "text": 59, "taste": 5}
COUNT = sum(SIZES.values())


def _objects_form(pixels: Pixels) -> np.ndarray:
    found = _objects.read(pixels)
    best = found.shape.argmax(-1)[..., None, None]
    colour = np.take_along_axis(found.colour, best, 2)[:, :, 0]
    parts = [found.shape_soft, closeness(colour, 60.0), closeness(found.clutter, 20.0)]
    parts.append(closeness(found.background, 45.0))
    return np.concatenate([part.reshape(len(pixels), -1) for part in parts], 1)


def _portraits_form(pixels: Pixels) -> np.ndarray:
    seen = _portraits.read(pixels).colour
    lips, frame = (np.array(FACE[part], np.float32) for part in ("mouth", "frame"))
    rows = []
    for k in range(len(pixels)):
        one = {name: mean[k] for name, mean in seen.items()}
        palettes = (("skin", SKINS), ("hair", HAIRS), ("background", BACKGROUNDS))
        row = [closeness(distances(one[name], table(palette)), 45.0) for name, palette in palettes]
        lines = [along(one["side"], one["background"], one["hair"])]
        lines += [along(one[name], one["skin"], lips) for name in ("smile", "frown")]
        lines.append(along(one["rims"], one["skin"], frame))
        row.append(np.clip(np.array(lines, np.float32), -1, 2))
        row.append(np.array(list(_taste.face_parts(pixels[k]).values())))
        rows.append(np.concatenate([part.reshape(-1) for part in row]))
    return np.stack(rows)


def _text_form(pixels: Pixels) -> np.ndarray:
    found = _signs.read(pixels)
    best = found.letter.argmax(-1)[..., None, None]
    ink = np.take_along_axis(found.ink, best, 2)[:, :, 0].mean(1) + found.base
    parts = [
        closeness(found.background, 45.0),
        np.clip(2 * found.letter - 1, 0, 1),
        closeness(distances(ink, table(COLOURS)), 60.0),
        closeness(found.clutter, 20.0),
    ]
    return np.concatenate([part.reshape(len(pixels), -1) for part in parts], 1)


_FORMS = {"objects": _objects_form, "portraits": _portraits_form, "text": _text_form}


def aspects(
    images: UInt8[np.ndarray, "b 3 h w"], categories: Sequence[str]
) -> tuple[Float[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Values of B pictures, and which were asked: those of the picture's category, and of taste.

    Raises ImageError below 64 pixels.
    """
    pixels = to_pixels(images)
    values = np.zeros((len(images), COUNT), np.float32)
    asked = np.zeros((len(images), COUNT), bool)
    start = 0
    for name, size in SIZES.items():
        rows = [i for i, c in enumerate(categories) if name in (c, "taste")]
        if rows and name in _FORMS:
            values[rows, start : start + size] = _FORMS[name](pixels[rows])
        elif rows:
            taste = [list(_taste.picture_parts(one).values()) for one in pixels]
            values[:, start : start + size] = taste
        asked[rows, start : start + size] = True
        start += size
    return values, asked
