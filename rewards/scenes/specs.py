"""The records of the scenes world: three kinds of picture, edits of them, and their JSON form.

Geometry: the unit square is a 2x2 grid of cells. At 64 px a cell is 32 px, two latent tokens of a
16x autoencoder on each side, and a letter of a sign is one token wide.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 240),
    "grey": (150, 152, 156),
    "black": (24, 24, 28),
    "pink": (240, 190, 200),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = ("left of", "right of", "above", "below")
SKINS: dict[str, tuple[int, int, int]] = {
    "pale": (245, 215, 190),
    "tan": (215, 165, 120),
    "brown": (150, 100, 65),
    "dark": (90, 58, 40),
}
HAIRS: dict[str, tuple[int, int, int]] = {
    "black": (35, 30, 30),
    "blond": (230, 195, 90),
    "red": (170, 70, 35),
    "silver": (190, 192, 198),
}
HAIR_STYLES = ("short", "long")
MOUTHS = ("smiling", "frowning")
CONSONANTS, VOWELS = "LMNRSTKP", "AEIO"
NUMBERS = ("one", "two", "three", "four")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object; its cell counts the 2x2 grid row by row."""

    shape: str
    colour: str
    cell: int
    radius: float = 0.8  # share of the cell's half width

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objects:
    """Level 1: one thing. Level 2: two in a relation. Level 3: three or four, counted."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None  # of things[0] to things[1], level 2 only

    @property
    def level(self) -> int:
        return min(len(self.things), 3)

    @property
    def counts(self) -> dict[str, int]:
        """Things by name, in order of first appearance."""
        out: dict[str, int] = {}
        for thing in self.things:
            out[thing.name] = out.get(thing.name, 0) + 1
        return out

    @property
    def key(self) -> str:
        names = "+".join(sorted(t.name for t in self.things))
        return f"objects:{names}/{self.background}" if len(self.things) == 1 else f"objects:{names}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Portrait:
    """A face. Skin, hair and style are its identity; an edit may change mouth and glasses."""

    skin: str
    hair: str
    style: str
    mouth: str
    glasses: bool
    background: str
    width: float = 1.0  # nuisance: face width relative to the standard face

    @property
    def level(self) -> int:
        return 1

    @property
    def key(self) -> str:
        worn = "glasses" if self.glasses else "bare"
        return f"portrait:{self.skin}/{self.hair}/{self.style}/{self.mouth}/{worn}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """A four-letter word, one letter per column."""

    word: str
    colour: str
    background: str

    @property
    def level(self) -> int:
        return 1

    @property
    def key(self) -> str:
        return f"text:{self.word}"


Spec = Objects | Portrait | Sign
EditKind = Literal["recolour", "move", "add", "remove", "background", "word", "mouth", "glasses"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """`target` is `source` after `instruction`; what that does not name is equal."""

    source: Spec
    target: Spec
    kind: EditKind
    instruction: str

    @property
    def key(self) -> str:
        return f"edit:{self.kind}:{self.source.key}>{self.target.key}"


# --- as text -------------------------------------------------------------------------------------

_KINDS: dict[str, type[Objects] | type[Portrait] | type[Sign]] = {
    "objects": Objects,
    "portrait": Portrait,
    "sign": Sign,
}


def dump(spec: Spec | Edit) -> str:
    """A spec or edit as one line of compact JSON with sorted keys; `parse` is its inverse."""
    return json.dumps(_tree(spec), sort_keys=True, separators=(",", ":"))


def _tree(spec: Spec | Edit) -> dict[str, object]:
    if isinstance(spec, Edit):
        sides = {"source": _tree(spec.source), "target": _tree(spec.target)}
        return {"is": "edit", "kind": spec.kind, "instruction": spec.instruction, **sides}
    name = next(name for name, cls in _KINDS.items() if type(spec) is cls)
    return {"is": name, **asdict(spec)}


def parse(text: str) -> Spec | Edit:
    """The spec or edit that `dump` wrote.

    Raises:
        ValueError: the text is not JSON, or its fields or words are not those of the world.
    """
    try:
        tree = json.loads(text)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"expected JSON written by world.dump, got {text!r:.80}: {error}"
        ) from error
    return _grow(tree)


def _grow(tree: object) -> Spec | Edit:
    if not isinstance(tree, dict) or tree.get("is") not in (*_KINDS, "edit"):
        raise ValueError(
            f'expected an object whose "is" is one of {[*_KINDS, "edit"]}, got {tree!r:.80}: '
            "write targets with world.dump"
        )
    values = {key: value for key, value in tree.items() if key != "is"}
    if tree["is"] == "edit":
        return _grow_edit(values)
    if tree["is"] == "objects":
        things = values.get("things")
        if not isinstance(things, list) or not all(isinstance(thing, dict) for thing in things):
            raise ValueError(f'expected a list of objects as "things", got {things!r:.80}')
        values["things"] = tuple(_make(Thing, thing) for thing in things)
    spec = _make(_KINDS[tree["is"]], values)
    _check(spec)
    return spec


def _grow_edit(values: dict[str, object]) -> Edit:
    for side in ("source", "target"):
        grown = _grow(values.get(side))
        if isinstance(grown, Edit):
            raise ValueError(f"expected a picture as the {side} of an edit, got an edit")
        values[side] = grown
    edit = _make(Edit, values)
    _among("edit kind", edit.kind, get_args(EditKind))
    return edit


def _make(cls, values: dict):
    known = {field.name for field in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown field {unknown} of {cls.__name__}: expected {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _among(what: str, value: object, allowed) -> None:
    if value not in tuple(allowed):
        raise ValueError(f"expected {what} among {tuple(allowed)}, got {value!r}")


def _check(spec: Spec) -> None:
    """Raise ValueError for a word that the world does not know."""
    _among("background", spec.background, BACKGROUNDS)
    if isinstance(spec, Objects):
        _among("relation", spec.relation, (None, *RELATIONS))
        if spec.relation is not None and len(spec.things) != 2:
            raise ValueError(f"expected two things beside a relation, got {len(spec.things)}")
        for thing in spec.things:
            _among("shape", thing.shape, SHAPES)
            _among("colour", thing.colour, COLOURS)
            _among("cell", thing.cell, range(4))
        if len({thing.cell for thing in spec.things}) < len(spec.things):
            raise ValueError("expected one thing per cell, got two in one")
    elif isinstance(spec, Portrait):
        _among("skin", spec.skin, SKINS)
        _among("hair", spec.hair, HAIRS)
        _among("style", spec.style, HAIR_STYLES)
        _among("mouth", spec.mouth, MOUTHS)
    else:
        _among("colour", spec.colour, COLOURS)
        if len(spec.word) != 4 or not set(spec.word) <= set(CONSONANTS + VOWELS):
            raise ValueError(f"expected a word of four of {CONSONANTS + VOWELS}, got {spec.word!r}")
