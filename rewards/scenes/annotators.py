"""People who rate pictures of the world: the oracle's reading of an axis, with what people add.

An annotator sees the gold value g of a picture and reports

    point   the nearest of 1..5 to 1 + 4 clip((g + bias + noise - low) / (1 - low))
    rank    the order of g + noise, a tie wherever neighbours are within half a sd

where noise is Gaussian with the axis's own sd and bias is the annotator's habit (sd a third of
that). So labels disagree as people's do, and a judge that repeats one annotator is not perfect.
Several annotators of one picture give the mean of their ratings, and rank by the mean of what they
see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from rewards.consistency import gate
from rewards.scenes import oracle
from rewards.scenes.render import render
from rewards.scenes.specs import Edit, Objects, Portrait, Sign, Spec

ANNOTATORS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What is asked: the sd of an annotator's noise, the gold value that everybody calls 1 of 5,
    and the categories in which it is asked.
    """

    sd: float
    low: float
    categories: tuple[str, ...]


_MADE = ("objects", "portraits", "text")
AXES: dict[str, Axis] = {
    "aesthetics": Axis(sd=0.05, low=0.4, categories=(*_MADE, "edits")),
    "fidelity": Axis(sd=0.10, low=0.0, categories=_MADE),
    "portrait": Axis(sd=0.08, low=0.2, categories=("portraits",)),
    "instruction": Axis(sd=0.12, low=0.0, categories=("edits",)),
    "consistency": Axis(sd=0.12, low=0.0, categories=("edits",)),
    "identity": Axis(sd=0.12, low=0.0, categories=("edits",)),
}


def gold(axis: str, image: UInt8[np.ndarray, "3 h w"], spec: Spec | Edit) -> float | None:
    """The noise-free value in [0, 1], None where the axis is not asked.

    The oracle's soft reading, but for two. consistency: that times `gate(instruction)`, since an
    edit that did nothing has kept nothing worth keeping. identity: of a face, the part of the
    oracle's consistency that says whose it is.
    """
    if axis in ("consistency", "identity"):
        kept, done = oracle.consistency(image, spec), oracle.instruction(image, spec)
        if kept is None or done is None:
            return None
        return kept.parts.get("identity") if axis == "identity" else kept.soft * gate(done.soft)
    reading = oracle.measure(axis, image, spec)
    return None if reading is None else reading.soft


def axes_of(spec: Spec | Edit) -> list[str]:
    """The axes that are asked of pictures for a prompt."""
    kinds = {Objects: "objects", Portrait: "portraits", Sign: "text", Edit: "edits"}
    here = [name for name, axis in AXES.items() if kinds[type(spec)] in axis.categories]
    face = isinstance(spec, Edit) and isinstance(spec.source, Portrait)
    return [name for name in here if name != "identity" or face]


def habit(axis: str, annotator: int) -> float:
    """By how much an annotator sees everything too high."""
    return float(np.random.default_rng([71, annotator, len(axis)]).normal(0, AXES[axis].sd / 3))


def point(
    rng: np.random.Generator, axis: str, value: float, annotators: Sequence[int] | np.ndarray
) -> float:
    """The mean rating in [1, 5] of some annotators."""
    about = AXES[axis]
    bias = np.array([habit(axis, int(a)) for a in annotators])
    seen = value + bias + rng.normal(0, about.sd, len(bias))
    shares = np.clip((seen - about.low) / (1 - about.low), 0, 1)
    return float(np.rint(1 + 4 * shares).mean())


def rank(
    rng: np.random.Generator, axis: str, values: Sequence[float], annotators: int = 1
) -> tuple[float, ...]:
    """Places from 1 (best) in the eyes of some annotators, equal where they see no difference."""
    sd = AXES[axis].sd / annotators**0.5
    seen = np.asarray(values) + rng.normal(0, sd, len(values))
    order = np.argsort(-seen, kind="stable")
    places = np.ones(len(values))
    for previous, here in zip(order, order[1:], strict=False):
        places[here] = places[previous] + (seen[previous] - seen[here] >= sd / 2)
    return tuple(float(p) for p in places)


def touched(edit: Edit, patch: int = 8) -> Float[np.ndarray, " n"]:
    """For each patch of the source at 64 px, in reading order, 1 where the edit changes it."""
    changed = (render(edit.source) != render(edit.target)).any(0)
    side = len(changed) // patch
    return changed.reshape(side, patch, side, patch).any((1, 3)).reshape(-1).astype(np.float32)


def has_face(spec: Spec) -> bool:
    """Whether a picture of the spec shows a person."""
    return isinstance(spec, Portrait)


def ceiling(axis: str, spec: Spec | Edit) -> float:
    """The gold value of the clean picture that the prompt asks for."""
    value = gold(axis, render(spec.target if isinstance(spec, Edit) else spec), spec)
    assert value is not None
    return value
