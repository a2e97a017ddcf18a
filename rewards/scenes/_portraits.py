"""Reads pictures of `Portrait`: identity (skin, hair, style), mouth, glasses and background.

All 24 layouts (style, mouth, glasses, three widths) are drawn once; regions are where they agree,
and a is where a region's mean colour lies on a line from one colour (0) to another (1).

reading                  what is measured                                soft
skin, hair, background   RGB distance d of their region to the declared  1 / (1 + (d / 45)^2)
style                    beside the neck, a from background to hair      long a, short 1 - a
mouth                    a from skin to lips where only a smile, and     declared a - other a
                         where only a frown, has lips
glasses                  a from skin to frame on the rims                worn a, bare 1 - a
drawing                  rms r off the declared portrait, best width     1 / (1 + (r / 40)^2)

soft = the mean of the seven. Where hair and background have nearly one colour the style cannot be
seen, and counts as right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from rewards.scenes._pixels import (
    SIZE,
    Pixels,
    along,
    block_means,
    closeness,
    distances,
    region_means,
    shrink,
    table,
)
from rewards.scenes.render import FACE, portrait_colours, portrait_layers
from rewards.scenes.specs import BACKGROUNDS, HAIR_STYLES, HAIRS, MOUTHS, SKINS, Portrait

WIDTHS = (0.96, 1.0, 1.04)
MAX_COLOUR = 45.0  # strict: RGB distance
MAX_BLOCKS = 40.0  # strict: rms of 4 x 4 block means off the declared portrait
MIN_RIMS = 0.4  # strict: from where on rims are worn; thin lines fade with any blur
MIN_MARGIN = 0.35  # strict: how much more the declared mouth must show than the other
# Hair and background closer than this hide the style, which then is not asked for.
SAME_COLOUR = 20.0
_LIPS, _FRAME = (np.array(FACE[part], np.float32) for part in ("mouth", "frame"))


@lru_cache(maxsize=1)
def layouts() -> np.ndarray:
    """Blending weights (2 styles, 2 mouths, 2 glasses, 3 widths, 7, 64, 64)."""
    every = [
        [
            [[portrait_layers(s, m, g, w, SIZE) for w in WIDTHS] for g in (False, True)]
            for m in MOUTHS
        ]
        for s in HAIR_STYLES
    ]
    return np.array(every, np.float32)


@lru_cache(maxsize=1)
def regions() -> dict[str, np.ndarray]:
    """Boolean masks (64, 64) of what always shows one thing, by name."""
    w = layouts()

    def always(weights: np.ndarray, bar: float = 0.99) -> np.ndarray:
        return np.all(weights >= bar, axis=tuple(range(weights.ndim - 2)))

    short, long = w[0], w[1]
    smile, frown = w[:, 0], w[:, 1]
    return {
        "background": shrink(always(w[..., 0, :, :])),
        "hair": shrink(always(w[..., 1, :, :])),
        "skin": shrink(always(w[..., 2, :, :])),
        "side": shrink(always(long[..., 1, :, :]) & always(short[..., 0, :, :])),
        "smile": always(smile[..., 5, :, :], 0.7) & always(frown[..., 2, :, :], 0.7),
        "frown": always(frown[..., 5, :, :], 0.7) & always(smile[..., 2, :, :], 0.7),
        "rims": always(w[:, :, 1, :, 6], 0.7) & always(w[:, :, 0, :, 2], 0.9),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """What is read in B pictures: mean colours (B, 3) of the regions and the pixels themselves."""

    colour: dict[str, np.ndarray]
    pixels: np.ndarray  # (B, 3, 64, 64)


def read(pixels: Pixels) -> Face:
    """All that `score` needs to know of B pictures."""
    named = regions()
    means = region_means(pixels, np.stack(list(named.values())))
    return Face(colour={name: means[:, k] for k, name in enumerate(named)}, pixels=pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One picture against one portrait: soft numbers in [0, 1] and strict answers, by attribute."""

    values: dict[str, float]
    ok: dict[str, bool]

    @property
    def soft(self) -> float:
        return sum(self.values.values()) / len(self.values)

    @property
    def strict(self) -> bool:
        return all(self.ok.values())


@lru_cache(maxsize=512)
def _drawn(spec: Portrait) -> np.ndarray:
    """The portrait at its three widths, float32 (3, 3, 64, 64)."""
    s, m = HAIR_STYLES.index(spec.style), MOUTHS.index(spec.mouth)
    layers = layouts()[s, m, int(spec.glasses)]
    drawn = np.matmul(portrait_colours(spec).T, layers.reshape(len(WIDTHS), 7, -1))
    return drawn.reshape(len(WIDTHS), 3, SIZE, SIZE)


def score(face: Face, i: int, spec: Portrait) -> Found:
    """Picture `i` of `face` against a portrait of any width."""
    seen = {name: mean[i] for name, mean in face.colour.items()}
    values: dict[str, float] = {}
    ok: dict[str, bool] = {}
    for name, palette in (("skin", SKINS), ("hair", HAIRS), ("background", BACKGROUNDS)):
        distance = distances(seen[name], table(palette))
        declared = list(palette).index(getattr(spec, name))
        values[name] = float(closeness(distance[declared], 45.0))
        ok[name] = bool(distance.argmin() == declared and distance[declared] <= MAX_COLOUR)

    hidden = np.subtract(HAIRS[spec.hair], BACKGROUNDS[spec.background])
    if np.sqrt(np.square(hidden).sum()) < SAME_COLOUR:
        values["style"], ok["style"] = 1.0, True
    else:
        share = float(np.clip(along(seen["side"], seen["background"], seen["hair"]), 0, 1))
        values["style"] = share if spec.style == "long" else 1 - share
        ok["style"] = values["style"] > 0.5

    curve = {"smiling": float(along(seen["smile"], seen["skin"], _LIPS))}
    curve["frowning"] = float(along(seen["frown"], seen["skin"], _LIPS))
    margin = 2 * curve[spec.mouth] - sum(curve.values())
    values["mouth"], ok["mouth"] = float(np.clip(margin, 0, 1)), margin >= MIN_MARGIN

    worn = float(np.clip(along(seen["rims"], seen["skin"], _FRAME), 0, 1))
    values["glasses"] = worn if spec.glasses else 1 - worn
    ok["glasses"] = (worn > MIN_RIMS) == spec.glasses

    rest = face.pixels[i] - _drawn(replace(spec, width=1.0))
    energy = np.square(rest).reshape(len(WIDTHS), -1).mean(1)
    best = int(energy.argmin())
    rms = float(np.sqrt(energy[best]))
    blocks = np.sqrt(np.square(block_means(rest[best])).sum(0).mean())
    values["drawing"], ok["drawing"] = float(closeness(rms, 40.0)), bool(blocks <= MAX_BLOCKS)
    return Found(values=values, ok=ok)
