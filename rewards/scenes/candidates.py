"""Pictures that answer a prompt of the world well, badly, or with wear: what judges learn to tell
apart.

`mistake` draws a spec that differs from the asked one in what a model gets wrong; `wear` does to
pixels what models, codecs and over-eager optimisers do. Both are functions of their generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from rewards import probes
from rewards.images import from_pil, to_pil
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.scenes.specs import (
    BACKGROUNDS,
    COLOURS,
    CONSONANTS,
    HAIR_STYLES,
    HAIRS,
    MOUTHS,
    SHAPES,
    SKINS,
    VOWELS,
    Edit,
    Objects,
    Portrait,
    Sign,
    Spec,
    Thing,
)
from rewards.types import Sample

Picture = UInt8[np.ndarray, "3 h w"]
Rng = np.random.Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A picture and where it comes from: "render", "mistake", "worn:<kind>", "canary:<kind>"."""

    picture: Picture
    origin: str


def _other(rng: Rng, values, current: object) -> Any:
    left = [v for v in values if v != current]
    return left[int(rng.integers(len(left)))]


# --- specs ---------------------------------------------------------------------------------------


def _objects(rng: Rng, spec: Objects) -> Objects:
    k = int(rng.integers(len(spec.things)))
    thing, free = spec.things[k], sorted(set(range(4)) - {t.cell for t in spec.things})
    how = int(rng.integers(7))
    if how == 0:
        return replace(spec, background=_other(rng, BACKGROUNDS, spec.background))
    if how == 1 and len(spec.things) > 1:
        return replace(spec, things=spec.things[:k] + spec.things[k + 1 :], relation=None)
    if how == 2 and free:
        cell = free[int(rng.integers(len(free)))]
        new = Thing(shape=_other(rng, SHAPES, ""), colour=_other(rng, COLOURS, ""), cell=cell)
        return replace(spec, things=(*spec.things, new), relation=None)
    if how == 3 and len(spec.things) > 1:  # where they stand
        cells = [t.cell for t in spec.things]
        moved = zip(spec.things, cells[1:] + cells[:1], strict=True)
        return replace(spec, things=tuple(replace(t, cell=c) for t, c in moved))
    if how == 4 and len(spec.things) > 1:  # what belongs to which
        colours = [t.colour for t in spec.things]
        dyed = zip(spec.things, colours[1:] + colours[:1], strict=True)
        return replace(spec, things=tuple(replace(t, colour=c) for t, c in dyed))
    if how == 5:
        new = replace(thing, shape=_other(rng, SHAPES, thing.shape))
    else:
        new = replace(thing, colour=_other(rng, COLOURS, thing.colour))
    return replace(spec, things=tuple(new if i == k else t for i, t in enumerate(spec.things)))


def _portrait(rng: Rng, spec: Portrait) -> Portrait:
    tables = {"skin": SKINS, "hair": HAIRS, "style": HAIR_STYLES, "mouth": MOUTHS}
    tables |= {"glasses": (True, False), "background": BACKGROUNDS}
    name = list(tables)[int(rng.integers(len(tables)))]
    return replace(spec, **{name: _other(rng, tables[name], getattr(spec, name))})


def _sign(rng: Rng, spec: Sign) -> Sign:
    how = int(rng.integers(4))
    if how == 0:
        return replace(spec, colour=_other(rng, COLOURS, spec.colour))
    if how == 1:
        return replace(spec, background=_other(rng, BACKGROUNDS, spec.background))
    letters = list(spec.word)
    for k in rng.choice(4, size=int(rng.integers(1, 4)), replace=False):
        letters[k] = _other(rng, CONSONANTS + VOWELS, letters[k])
    return replace(spec, word="".join(letters))


def mistake(rng: Rng, spec: Spec) -> Spec:
    """The spec with one thing wrong."""
    if isinstance(spec, Objects):
        return _objects(rng, spec)
    return _portrait(rng, spec) if isinstance(spec, Portrait) else _sign(rng, spec)


# --- pixels --------------------------------------------------------------------------------------


def _floats(picture: Picture) -> np.ndarray:
    return picture.astype(np.float32)


def _bytes(values: np.ndarray) -> Picture:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def blur(rng: Rng, picture: Picture) -> Picture:
    return probes.blur(picture, float(rng.uniform(0.4, 2.2)))


def noise(rng: Rng, picture: Picture) -> Picture:
    return _bytes(_floats(picture) + rng.normal(0, rng.uniform(3, 40), picture.shape))


def fade(rng: Rng, picture: Picture) -> Picture:
    """Contrast and brightness."""
    values = _floats(picture)
    return _bytes((values - 128) * rng.uniform(0.4, 1.4) + 128 + rng.uniform(-40, 40))


def dye(rng: Rng, picture: Picture) -> Picture:
    """Saturation from grey to glaring."""
    values = _floats(picture)
    grey = values.mean(0, keepdims=True)
    return _bytes(grey + (values - grey) * rng.choice([rng.uniform(0, 0.8), rng.uniform(1.2, 2.6)]))


def tint(rng: Rng, picture: Picture) -> Picture:
    return _bytes(_floats(picture) + rng.uniform(-45, 45, (3, 1, 1)))


def jpeg(rng: Rng, picture: Picture) -> Picture:
    return probes.jpeg(picture, int(rng.integers(8, 70)))


def coarsen(rng: Rng, picture: Picture) -> Picture:
    image = to_pil(picture)
    small = max(8, int(image.width / rng.choice([2, 3, 4])))
    how = Image.Resampling(int(rng.choice([Image.Resampling.NEAREST, Image.Resampling.BILINEAR])))
    return from_pil(image.resize((small, small), Image.Resampling.BOX).resize(image.size, how))


def warp(rng: Rng, picture: Picture) -> Picture:
    """A smooth displacement of a few pixels: crooked shapes, crooked faces."""
    _, h, w = picture.shape
    coarse = rng.normal(0, 1, (2, 4, 4)).astype(np.float32) * rng.uniform(1.0, 5.0) * w / 64
    field = [
        np.asarray(Image.fromarray(c).resize((w, h), Image.Resampling.BICUBIC)) for c in coarse
    ]
    y, x = np.mgrid[:h, :w]
    rows = np.clip(np.rint(y + field[0]), 0, h - 1).astype(int)
    columns = np.clip(np.rint(x + field[1]), 0, w - 1).astype(int)
    return picture[:, rows, columns]


def spots(rng: Rng, picture: Picture) -> Picture:
    """Stray marks."""
    image = to_pil(picture)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 9))):
        x, y = rng.uniform(0, image.width, 2)
        r = rng.uniform(1, 4) * image.width / 64
        ink = tuple(int(v) for v in rng.integers(0, 256, 3))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return from_pil(image)


def blotch(rng: Rng, picture: Picture) -> Picture:
    """Smooth uneven light and colour, as of a half-finished sample."""
    _, h, w = picture.shape
    coarse = rng.normal(0, rng.uniform(4, 30), (3, 5, 5)).astype(np.float32)
    field = [
        np.asarray(Image.fromarray(c).resize((w, h), Image.Resampling.BICUBIC)) for c in coarse
    ]
    return _bytes(_floats(picture) + np.stack(field))


WEAR: Mapping[str, Callable[[Rng, Picture], Picture]] = {
    "blur": blur,
    "noise": noise,
    "fade": fade,
    "dye": dye,
    "tint": tint,
    "jpeg": jpeg,
    "coarsen": coarsen,
    "warp": warp,
    "spots": spots,
    "blotch": blotch,
}


def wear(rng: Rng, picture: Picture) -> tuple[str, Picture]:
    """One kind of wear, by its name, and the worn picture."""
    name = list(WEAR)[int(rng.integers(len(WEAR)))]
    return name, WEAR[name](rng, picture)


def mix(rng: Rng, one: Picture, other: Picture) -> Picture:
    """Two pictures in one: blended, or with 16 px patches of the other."""
    if rng.random() < 0.4:
        share = rng.uniform(0.08, 0.5)
        return _bytes(_floats(one) * (1 - share) + _floats(other) * share)
    _, h, w = one.shape
    taken = rng.random((h // 16, w // 16)) < rng.uniform(0.06, 0.4)
    mask = np.repeat(np.repeat(taken, 16, 0), 16, 1)
    return np.where(mask, other, one)


# --- candidates ----------------------------------------------------------------------------------


def _drawn(rng: Rng, right: Spec, wrong: Callable[[], Spec], size: int) -> Candidate:
    """One picture for a prompt whose right answer is `right`."""
    draw = rng.random()
    spec = right if draw < 0.45 else wrong()
    if draw > 0.85:
        spec = mistake(rng, spec) if draw < 0.95 else mistake(rng, mistake(rng, spec))
    picture, origin = render(spec, size), "render" if spec is right else "mistake"
    if rng.random() < 0.15:
        picture, origin = mix(rng, picture, render(wrong(), size)), "worn:mix"
    if rng.random() < (0.6 if origin == "render" else 0.35):
        name, picture = wear(rng, picture)
        origin = f"worn:{name}"
        if rng.random() < 0.3:
            picture = wear(rng, picture)[1]
    return Candidate(picture=picture, origin=origin)


def candidates(rng: Rng, spec: Spec | Edit, count: int, size: int = 64) -> list[Candidate]:
    """`count` pictures for one prompt, right and wrong, clean and worn. For an edit, wrong is also
    the source left as it is, and an edit that changes more than it was asked to.
    """
    if not isinstance(spec, Edit):
        plain = spec
        return [_drawn(rng, plain, lambda: mistake(rng, plain), size) for _ in range(count)]
    target, source = spec.target, spec.source

    def wrong() -> Spec:
        draw = rng.random()
        if draw < 0.3:
            return source
        return mistake(rng, source) if draw < 0.55 else mistake(rng, target)

    return [_drawn(rng, target, wrong, size) for _ in range(count)]


def answer(spec: Spec | Edit, picture: Picture) -> Sample:
    """A picture as an answer to a spec; an edit's source is drawn at the picture's size."""
    sources = (render(spec.source, picture.shape[-1]),) if isinstance(spec, Edit) else ()
    return Sample(
        image=picture,
        prompt=world.terse(spec),
        category=world.category_of(spec),
        sources=sources,
        target=world.dump(spec),
    )
