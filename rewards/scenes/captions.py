"""Captions with more in them than the facts in a sentence, after the kinds of arXiv:2605.10730.

`terse` and `rich` of `world` are *general*; these are *text*, *knowledge* and *structured*. The
report gives neither schema nor shares, so both are ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from rewards.scenes.specs import Edit, Objects, Portrait, Sign, Spec
from rewards.scenes.world import rich, terse

FACTS: Mapping[str, str] = {
    "circle": "a circle is a round disc",
    "square": "a square has four equal sides",
    "triangle": "a triangle has three corners",
    "cross": "a cross is two bars that meet at right angles",
    "ring": "a ring is a circle with a hole in it",
    "orange": "orange is red mixed with yellow",
    "green": "green is yellow mixed with blue",
    "purple": "purple is red mixed with blue",
    "glasses": "glasses are two lenses in front of the eyes",
    "silver": "silver hair is a light grey",
    "blond": "blond hair is a light yellow",
}


def knowledge(spec: Spec | Edit) -> str:
    """Background facts about what is named, then the terse caption."""
    caption = terse(spec)
    words = caption.split()
    facts = [fact for word, fact in FACTS.items() if word in words]
    return " . ".join([*facts, caption])


def text(spec: Spec | Edit) -> str:
    """A sign letter by letter with its layout; other pictures have no letters: the rich caption."""
    if not isinstance(spec, Sign):
        return rich(spec)
    return (
        f"a sign that reads {spec.word} , spelled {' '.join(spec.word)} from left to right , four"
        f" {spec.colour} letters of equal width in one row on a plain {spec.background} background"
    )


def structured(spec: Spec | Edit) -> str:
    """Entities, their attributes and relations as compact JSON."""
    return json.dumps(_tree(spec), separators=(",", ":"))


def _tree(spec: Spec | Edit) -> dict[str, object]:
    if isinstance(spec, Edit):
        return {"edit": spec.kind, "instruction": spec.instruction}
    ground = {"background": spec.background}
    if isinstance(spec, Objects):
        things = [{"entity": thing.shape, "colour": thing.colour} for thing in spec.things]
        related = [] if spec.relation is None else [[0, spec.relation, 1]]
        return {"entities": things, "relations": related, **ground}
    if isinstance(spec, Portrait):
        face = {"entity": "person", "mouth": spec.mouth, "skin": spec.skin}
        hair = {"hair": f"{spec.style} {spec.hair}", "glasses": spec.glasses}
        return {"entities": [face | hair], **ground}
    return {"entities": [{"entity": "word", "reads": spec.word, "colour": spec.colour}], **ground}


CAPTIONS: Mapping[str, Callable[[Spec | Edit], str]] = {
    "terse": terse,
    "rich": rich,
    "text": text,
    "knowledge": knowledge,
    "structured": structured,
}
