"""Reads a picture against its spec: five gold axes with known formulas on the pixels.

axis          what it asks                                        formulas
fidelity      every attribute the caption states, and no more     _objects, _portraits, _signs
aesthetics    harmony, saturation, balance, clean edges, noise    _taste; any picture
portrait      proportions, symmetry, features, even skin          _taste; portraits
instruction   what an edit was to change                          here; edits
consistency   what an edit was to leave alone                     here; edits

Soft readings are in [0, 1]; strict means that every attribute is read right, against all
alternatives and within absolute bars. The axes pull apart on purpose: a copy of the source is
consistent and disobedient, a blurred face is smooth and less faithful, a balanced picture may hold
a thing too many, six vivid colours are right and gaudy. Pictures of any size from 64 pixels are
averaged over area to 64 x 64 first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, UInt8

from rewards.errors import ImageError, RewardConfigError
from rewards.scenes import _objects, _portraits, _signs, _taste
from rewards.scenes._pixels import SIZE, Pixels, block_means, closeness, to_pixels
from rewards.scenes.render import render
from rewards.scenes.specs import Edit, Objects, Portrait, Sign, Spec

Image = UInt8[np.ndarray, "3 h w"]
CHUNK = 64  # pictures read at once; keeps the work in cache
MAX_CHANGE = 18.0  # strict consistency: rms of 4 x 4 block means off the source


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One axis of one picture. `parts` are the numbers that `soft` is made of."""

    soft: float
    strict: bool
    parts: Mapping[str, float] = field(default_factory=dict)


# --- fidelity ------------------------------------------------------------------------------------


def _objects_reading(cells: _objects.Cells, i: int, spec: Objects) -> Reading:
    found = _objects.score(cells, i, spec)
    parts = {name: getattr(found, name) for name in ("background", "shape", "colour", "empty")}
    return Reading(soft=found.soft, strict=found.strict, parts=parts)


def _portrait_reading(face: _portraits.Face, i: int, spec: Portrait) -> Reading:
    found = _portraits.score(face, i, spec)
    return Reading(soft=found.soft, strict=found.strict, parts=found.values)


def _sign_reading(letters: _signs.Letters, i: int, spec) -> Reading:
    found = _signs.score(letters, i, spec)
    parts = {name: getattr(found, name) for name in ("background", "ink", "letters", "empty")}
    return Reading(soft=found.soft, strict=found.strict, parts=parts)


def _reader(spec: Spec) -> tuple[Callable, Callable]:
    if isinstance(spec, Objects):
        return _objects.read, _objects_reading
    if isinstance(spec, Portrait):
        return _portraits.read, _portrait_reading
    return _signs.read, _sign_reading


def fidelity_batch(
    images: UInt8[np.ndarray, "b 3 h w"], specs: Sequence[Spec | Edit]
) -> list[Reading]:
    """Fidelity of B pictures to B specs (of an edit, to its target), bit-equal in any batch.

    Things may stand wherever the caption lets them: anywhere, or in the order of the relation.

    Raises:
        ImageError: pictures under 64 pixels, or another number of pictures than specs.
    """
    if len(images) != len(specs):
        raise ImageError(f"expected one spec per picture, got {len(images)} and {len(specs)}")
    wanted = [spec.target if isinstance(spec, Edit) else spec for spec in specs]
    out: list[Reading] = [Reading(soft=0.0, strict=False)] * len(wanted)
    for kind in dict.fromkeys(type(spec) for spec in wanted):
        index = [i for i, spec in enumerate(wanted) if type(spec) is kind]
        read, reading = _reader(wanted[index[0]])
        for start in range(0, len(index), CHUNK):
            chunk = index[start : start + CHUNK]
            state = read(to_pixels(images[chunk]))
            for place, i in enumerate(chunk):
                out[i] = reading(state, place, wanted[i])
    return out


def fidelity(image: Image, spec: Spec | Edit) -> Reading:
    """Whether a picture shows what its spec says; see the module and `fidelity_batch`."""
    return fidelity_batch(image[None], [spec])[0]


def spelling(
    images: UInt8[np.ndarray, "b 3 h w"], signs: Sequence[Sign]
) -> Bool[np.ndarray, "b 4"]:
    """Which letters of B signs are read right: best of all letters in their place, and near enough.
    Colours do not count. Raises ImageError below 64 pixels.
    """
    found = _signs.read(to_pixels(images))
    return np.stack([_signs.fits(found, i, sign)[1] for i, sign in enumerate(signs)])


# --- taste ---------------------------------------------------------------------------------------


def _weakest(parts: Mapping[str, float], mean_bar: float, bar: float) -> Reading:
    soft = sum(parts.values()) / len(parts)
    return Reading(soft=soft, strict=soft >= mean_bar and min(parts.values()) >= bar, parts=parts)


def aesthetics(image: Image) -> Reading:
    """Mean of harmony, saturation, balance, edges and noise, from `_taste`.

    Strict: mean at least 0.7 and none under 0.3.
    """
    return _weakest(_taste.picture_parts(to_pixels(image[None])[0]), 0.7, 0.3)


def portrait(image: Image, spec: Spec | Edit) -> Reading | None:
    """Mean of proportions, symmetry, features and evenness (`_taste`), or None for no portrait.

    Strict: mean 0.8, none under 0.5. Says nothing of whose portrait it is.
    """
    wanted = spec.target if isinstance(spec, Edit) else spec
    if not isinstance(wanted, Portrait):
        return None
    return _weakest(_taste.face_parts(to_pixels(image[None])[0]), 0.8, 0.5)


# --- edits ---------------------------------------------------------------------------------------


def _object_change(pixels: Pixels, edit: Edit, source: Objects, target: Objects) -> Reading:
    found = _objects.score(_objects.read(pixels), 0, target, exact=True)
    if edit.kind == "background":
        value, ok = found.background, found.background_ok
        return Reading(soft=value, strict=ok, parts={"background": value})
    parts: dict[str, float] = {}
    strict = True
    for k, thing in enumerate(target.things):
        if thing in source.things:
            continue
        if edit.kind == "recolour":
            parts["colour"] = _objects_colour(pixels, target, k)
            strict = strict and found.colours_ok[k]
        else:
            parts["thing"], strict = found.thing_soft[k], strict and found.things_ok[k]
    for cell in {t.cell for t in source.things} - {t.cell for t in target.things}:
        parts["left empty"] = found.cell_empty[cell]
        strict = strict and found.cells_empty_ok[cell]
    return Reading(soft=sum(parts.values()) / len(parts), strict=strict, parts=parts)


def _objects_colour(pixels: Pixels, target: Objects, index: int) -> float:
    one = Objects(things=(target.things[index],), background=target.background)
    return _objects.score(_objects.read(pixels), 0, one, exact=True).colour


def instruction(image: Image, edit: Spec | Edit) -> Reading | None:
    """Whether an edit's target attribute was reached, at its exact place; None for what is no edit.

    recolour: colour at the thing's cell. move, add, remove: the thing at its new cell, emptiness of
    the old. background, mouth, glasses: that attribute's reading. word: all four letters. Says
    nothing of the rest.
    """
    if not isinstance(edit, Edit):
        return None
    pixels, target = to_pixels(image[None]), edit.target
    if isinstance(target, Objects) and isinstance(edit.source, Objects):
        return _object_change(pixels, edit, edit.source, target)
    if isinstance(target, Portrait):
        face = _portraits.score(_portraits.read(pixels), 0, target)
        value, ok = face.values[edit.kind], face.ok[edit.kind]
    else:
        sign = _signs.score(_signs.read(pixels), 0, target)  # type: ignore[arg-type]
        name = "background" if edit.kind == "background" else "letters"
        value, ok = getattr(sign, name), getattr(sign, f"{name}_ok")
    return Reading(soft=value, strict=ok, parts={edit.kind: value})


def untouched(edit: Edit) -> np.ndarray:
    """Boolean mask (64, 64) of what is equal in source and target, one pixel in."""
    same = (render(edit.source, SIZE) == render(edit.target, SIZE)).all(0)
    wide = np.pad(same, 1, constant_values=True)
    sides = wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return same & sides


def consistency(image: Image, edit: Spec | Edit) -> Reading | None:
    """How far the rest of the picture was left alone; None for what is no edit.

    region: 1/(1 + (rms/25)^2), rms of picture - source over `untouched`; for a face also identity:
    the mean of the readings of skin, hair and style. Strict: rms of 4 x 4 block means at most 18,
    and identity read right.
    """
    if not isinstance(edit, Edit):
        return None
    pixels, mask = to_pixels(image[None]), untouched(edit)
    rest = (pixels[0] - render(edit.source, SIZE)) * mask
    count = max(int(mask.sum()), 1)
    rms = float(np.sqrt(np.square(rest).sum() / (3 * count)))
    blocks = float(np.sqrt(np.square(block_means(rest)).sum() * 16 / count))
    parts, strict = {"region": float(closeness(rms, 25.0))}, blocks <= MAX_CHANGE
    if isinstance(edit.target, Portrait):
        face = _portraits.score(_portraits.read(pixels), 0, edit.target)
        names = ("skin", "hair", "style")
        parts["identity"] = sum(face.values[name] for name in names) / len(names)
        strict = strict and all(face.ok[name] for name in names)
    return Reading(soft=sum(parts.values()) / len(parts), strict=strict, parts=parts)


AXES: Mapping[str, Callable[[Image, Spec | Edit], Reading | None]] = {
    "fidelity": fidelity,
    "aesthetics": lambda image, spec: aesthetics(image),
    "portrait": portrait,
    "instruction": instruction,
    "consistency": consistency,
}


def measure(axis: str, image: Image, spec: Spec | Edit) -> Reading | None:
    """One axis of one picture, None where the axis does not apply.

    Raises:
        RewardConfigError: no such axis.
    """
    if axis not in AXES:
        raise RewardConfigError(f"expected an axis among {list(AXES)}, got {axis!r}")
    return AXES[axis](image, spec)
