import json

import pytest

from rewards.scenes import world
from rewards.scenes.captions import CAPTIONS, FACTS, knowledge, structured, text

LEVELS = [("objects", 1), ("objects", 2), ("objects", 3), ("portraits", 1), ("text", 1)]


@pytest.mark.parametrize(("category", "level"), [*LEVELS, ("edits", 1)])
def test_knowledge_puts_facts_before_the_terse_caption(category, level):
    said = set()
    for seed in range(60):
        spec = world.draw(category, seed, level=level)
        *facts, caption = knowledge(spec).split(" . ")
        assert caption == world.terse(spec)
        assert all(fact in FACTS.values() for fact in facts)
        said |= set(facts)
    assert said


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_structured_is_json_with_every_attribute(category, level):
    for seed in range(60):
        spec = world.draw(category, seed, level=level)
        tree = json.loads(structured(spec))
        assert tree["background"] == spec.background
        if category == "objects":
            named = [f"{one['colour']} {one['entity']}" for one in tree["entities"]]
            assert named == [thing.name for thing in spec.things]
            assert tree["relations"] == ([[0, spec.relation, 1]] if spec.relation else [])
        elif category == "portraits":
            (face,) = tree["entities"]
            assert face["hair"] == f"{spec.style} {spec.hair}" and face["glasses"] == spec.glasses
        else:
            assert tree["entities"][0]["reads"] == spec.word


def test_text_spells_a_sign_and_leaves_other_pictures_to_the_rich_caption():
    sign, face = world.draw("text", 1), world.draw("portraits", 1)
    assert " ".join(sign.word) in text(sign) and sign.word in text(sign)
    assert text(face) == world.rich(face)


def test_edits_have_every_caption():
    edit = world.draw("edits", 3)
    assert all(edit.instruction in make(edit) for make in CAPTIONS.values())
