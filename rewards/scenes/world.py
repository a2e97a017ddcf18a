"""The scenes world: specs whose ground truth is known, their captions, edits and splits.

A spec says everything about a picture. Three kinds exist (`Objects`, `Portrait`, `Sign`) and an
`Edit` joins two specs by an instruction. What a caption states is the *combination* (`Spec.key`);
where things stand and how wide a face is are nuisances drawn from the seed. Splits are made over
combinations, so a held-out prompt never occurred in training in any layout. The records themselves,
and their JSON form, are in `specs.py`.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from rewards.scenes.specs import (
    BACKGROUNDS,
    COLOURS,
    CONSONANTS,
    HAIR_STYLES,
    HAIRS,
    MOUTHS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SKINS,
    VOWELS,
    Edit,
    EditKind,
    Objects,
    Portrait,
    Sign,
    Spec,
    Thing,
    dump,
    parse,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "CONSONANTS",
    "HAIR_STYLES",
    "HAIRS",
    "MOUTHS",
    "NUMBERS",
    "RELATIONS",
    "SHAPES",
    "SKINS",
    "VOWELS",
    "Edit",
    "EditKind",
    "Objects",
    "Portrait",
    "Sign",
    "Spec",
    "Thing",
    "dump",
    "parse",
    "Category",
    "Split",
    "category_of",
    "draw",
    "rich",
    "split_of",
    "terse",
]

Split = Literal["train", "heldout", "align-heldout"]
Category = Literal["objects", "portraits", "text", "edits"]


def category_of(spec: Spec | Edit) -> Category:
    """The prompt category that weights and figures are kept by."""
    if isinstance(spec, Objects):
        return "objects"
    if isinstance(spec, Portrait):
        return "portraits"
    return "text" if isinstance(spec, Sign) else "edits"


def split_of(spec: Spec | Edit) -> Split:
    """Seven eighths of all combinations are for training; an edit belongs where its target does."""
    if isinstance(spec, Edit):
        return split_of(spec.target)
    bucket = zlib.crc32(spec.key.encode()) % 16
    return "align-heldout" if bucket == 0 else "heldout" if bucket == 1 else "train"


# --- drawing specs --------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values) -> str:
    values = tuple(values)
    return values[int(rng.integers(len(values)))]


def _radius(rng: np.random.Generator) -> float:
    return (0.76, 0.8, 0.84)[int(rng.integers(3))]


def _thing(rng: np.random.Generator, cell: int, name: tuple[str, str] | None = None) -> Thing:
    colour, shape = name or (_pick(rng, COLOURS), _pick(rng, SHAPES))
    return Thing(shape=shape, colour=colour, cell=cell, radius=_radius(rng))


def _related_cells(rng: np.random.Generator, relation: str) -> tuple[int, int]:
    line = int(rng.integers(2))
    if relation in ("left of", "right of"):
        first, second = 2 * line, 2 * line + 1
    else:
        first, second = line, line + 2
    return (first, second) if relation in ("left of", "above") else (second, first)


def _objects(rng: np.random.Generator, level: int) -> Objects:
    background = _pick(rng, BACKGROUNDS)
    if level == 1:
        return Objects(things=(_thing(rng, int(rng.integers(4))),), background=background)
    if level == 2:
        relation = _pick(rng, RELATIONS)
        one, two = (_thing(rng, cell) for cell in _related_cells(rng, relation))
        while one.name == two.name:
            two = _thing(rng, two.cell)
        return Objects(things=(one, two), background=background, relation=relation)
    total, cells = int(rng.integers(3, 5)), rng.permutation(4)
    first = int(rng.integers(1, total + 1))
    names = [(_pick(rng, COLOURS), _pick(rng, SHAPES)) for _ in range(2)]
    while names[0] == names[1]:
        names[1] = (_pick(rng, COLOURS), _pick(rng, SHAPES))
    things = tuple(
        _thing(rng, int(cells[i]), names[0] if i < first else names[1]) for i in range(total)
    )
    return Objects(things=things, background=background)


def _portrait(rng: np.random.Generator) -> Portrait:
    return Portrait(
        skin=_pick(rng, SKINS),
        hair=_pick(rng, HAIRS),
        style=_pick(rng, HAIR_STYLES),
        mouth=_pick(rng, MOUTHS),
        glasses=bool(rng.integers(2)),
        background=_pick(rng, BACKGROUNDS),
        width=(0.96, 1.0, 1.04)[int(rng.integers(3))],
    )


def _word(rng: np.random.Generator) -> str:
    return "".join(_pick(rng, CONSONANTS if i % 2 == 0 else VOWELS) for i in range(4))


def _sign(rng: np.random.Generator) -> Sign:
    return Sign(word=_word(rng), colour=_pick(rng, COLOURS), background=_pick(rng, BACKGROUNDS))


def _cell_word(cell: int) -> str:
    return ("top left", "top right", "bottom left", "bottom right")[cell]


def _other(rng: np.random.Generator, values, current: str) -> str:
    return _pick(rng, [v for v in values if v != current])


def _edit_objects(rng: np.random.Generator, source: Objects, kind: EditKind) -> Edit:
    """One edit of a level 1 or 2 picture; relations are dropped from specs whose things moved."""
    index = int(rng.integers(len(source.things)))
    thing, free = source.things[index], sorted(set(range(4)) - {t.cell for t in source.things})
    if kind == "recolour":
        new = replace(thing, colour=_other(rng, COLOURS, thing.colour))
        text = f"make the {thing.name} {new.colour}"
    elif kind == "move":
        new = replace(thing, cell=int(free[int(rng.integers(len(free)))]))
        text = f"move the {thing.name} to the {_cell_word(new.cell)}"
    elif kind == "remove":
        kept = tuple(t for i, t in enumerate(source.things) if i != index)
        target = replace(source, things=kept, relation=None)
        text = f"remove the {thing.name}"
        return Edit(source=source, target=target, kind=kind, instruction=text)
    else:
        new = _thing(rng, int(free[int(rng.integers(len(free)))]))
        while new.name in source.counts:
            new = _thing(rng, new.cell)
        text = f"add {_article(new.name)} at the {_cell_word(new.cell)}"
        target = replace(source, things=(*source.things, new), relation=None)
        return Edit(source=source, target=target, kind=kind, instruction=text)
    things = tuple(new if i == index else t for i, t in enumerate(source.things))
    relation = source.relation if kind == "recolour" else None
    target = replace(source, things=things, relation=relation)
    return Edit(source=source, target=target, kind=kind, instruction=text)


def _edit(rng: np.random.Generator, asked: EditKind | None) -> Edit:
    kind: EditKind = asked or get_args(EditKind)[int(rng.integers(len(get_args(EditKind))))]
    if kind in ("recolour", "move", "add", "remove"):
        level = 2 if kind == "remove" else int(rng.integers(1, 3))
        source = _objects(rng, level)
        while len({t.name for t in source.things}) < len(source.things):
            source = _objects(rng, level)
        return _edit_objects(rng, source, kind)
    if kind == "background":
        source = (_objects(rng, int(rng.integers(1, 3))), _portrait(rng), _sign(rng))[
            int(rng.integers(3))
        ]
        target = replace(source, background=_other(rng, BACKGROUNDS, source.background))
        text = f"change the background to {target.background}"
    elif kind == "word":
        source = _sign(rng)
        target = replace(source, word=_word(rng))
        text = f"change the word to {target.word}"
    elif kind == "mouth":
        source = _portrait(rng)
        target = replace(source, mouth=_other(rng, MOUTHS, source.mouth))
        text = "make the person " + ("smile" if target.mouth == "smiling" else "frown")
    else:
        source = _portrait(rng)
        target = replace(source, glasses=not source.glasses)
        text = ("add" if target.glasses else "remove") + " the glasses"
    return Edit(source=source, target=target, kind=kind, instruction=text)


def draw(
    category: Category,
    seed: int,
    *,
    split: Split | None = None,
    level: int = 2,
    kind: EditKind | None = None,
) -> Spec | Edit:
    """The spec number `seed` of a category, the same on every machine.

    `level` (1 to 3) applies to objects only, `kind` to edits only (None: any). With a `split`,
    draws are repeated until the combination belongs to it; a training edit also has its source in
    the training split.
    """
    rng = np.random.default_rng([zlib.crc32(category.encode()), level, seed])
    for _ in range(10_000):
        if category == "objects":
            spec: Spec | Edit = _objects(rng, level)
        elif category == "portraits":
            spec = _portrait(rng)
        elif category == "text":
            spec = _sign(rng)
        else:
            spec = _edit(rng, kind)
        if split is None or split_of(spec) == split:
            if split == "train" and isinstance(spec, Edit) and split_of(spec.source) != "train":
                continue
            return spec
    raise ValueError(f"no {category} of level {level} in split {split!r} after 10,000 draws")


# --- captions -------------------------------------------------------------------------------------


def _count(n: int, name: str) -> str:
    return f"{NUMBERS[n - 1]} {name}" + (
        "es" if name.endswith("cross") and n > 1 else "s" if n > 1 else ""
    )


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def terse(spec: Spec | Edit) -> str:
    """The short caption, at most 24 tokens as we tokenize; for an edit, its instruction."""
    if isinstance(spec, Edit):
        return spec.instruction
    if isinstance(spec, Portrait):
        worn = " and glasses" if spec.glasses else ""
        return (
            f"a {spec.mouth} person with {spec.skin} skin and {spec.style} {spec.hair} hair{worn}"
            f" on {spec.background}"
        )
    if isinstance(spec, Sign):
        return f"the word {spec.word} in {spec.colour} on {spec.background}"
    names = [t.name for t in spec.things]
    if spec.relation is not None:
        return f"{_article(names[0])} {spec.relation} {_article(names[1])} on {spec.background}"
    if len(names) == 1:
        return f"{_article(names[0])} on {spec.background}"
    return (
        " and ".join(_count(n, name) for name, n in spec.counts.items()) + f" on {spec.background}"
    )


def rich(spec: Spec | Edit) -> str:
    """The same facts in a full sentence, as a prompt enhancer would write them."""
    if isinstance(spec, Edit):
        return f"{spec.instruction} and keep everything else as it is"
    if isinstance(spec, Portrait):
        worn = "wearing glasses" if spec.glasses else "without glasses"
        return (
            f"a portrait of one {spec.mouth} person {worn}, with {spec.skin} skin and {spec.style}"
            f" {spec.hair} hair, in front of a plain {spec.background} background"
        )
    if isinstance(spec, Sign):
        return (
            f"a sign with the word {spec.word} in large {spec.colour} letters"
            f" on a plain {spec.background} background"
        )
    where = {"left of": "to the left of", "right of": "to the right of"}
    names = [t.name for t in spec.things]
    if spec.relation is not None:
        relation = where.get(spec.relation, spec.relation)
        body = f"{_article(names[0])} {relation} {_article(names[1])}"
    elif len(names) == 1:
        body = f"a single {names[0]}"
    else:
        body = " and ".join(_count(n, name) for name, n in spec.counts.items())
    return f"a clean picture of {body} on a plain {spec.background} background"
