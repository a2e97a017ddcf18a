from dataclasses import fields, replace

import pytest

from rewards.scenes import world
from rewards.scenes.world import Edit, Objects, Portrait, Sign

CATEGORIES = ("objects", "portraits", "text", "edits")
LEVELS = [("objects", 1), ("objects", 2), ("objects", 3), ("portraits", 1), ("text", 1)]
PINNED_OBJECTS = "a green ring right of a blue triangle on pink"
PINNED_EDIT = "move the orange ring to the top left"


@pytest.mark.parametrize("category", CATEGORIES)
def test_draw_is_a_function_of_its_arguments(category):
    again = [world.draw(category, seed, level=2) for seed in range(40)]
    assert [world.draw(category, seed, level=2) for seed in range(40)] == again
    assert len({world.dump(spec) for spec in again}) > 20
    assert {world.category_of(spec) for spec in again} == {category}


def test_draw_is_pinned():
    assert world.terse(world.draw("objects", 0, level=2)) == PINNED_OBJECTS
    assert world.terse(world.draw("edits", 0)) == PINNED_EDIT


@pytest.mark.parametrize("level", [1, 2, 3])
def test_levels_are_what_they_say(level):
    for seed in range(100):
        spec = world.draw("objects", seed, level=level)
        assert isinstance(spec, Objects) and spec.level == level
        assert len({thing.cell for thing in spec.things}) == len(spec.things)
        assert (spec.relation is not None) == (level == 2)
        assert sum(spec.counts.values()) == len(spec.things)


def test_relation_holds_between_the_cells():
    for seed in range(200):
        spec = world.draw("objects", seed, level=2)
        (row, column), (other_row, other_column) = (divmod(t.cell, 2) for t in spec.things)
        assert {
            "left of": column < other_column,
            "right of": column > other_column,
            "above": row < other_row,
            "below": row > other_row,
        }[spec.relation]


@pytest.mark.parametrize(("category", "level"), [*LEVELS, ("edits", 1)])
def test_splits_are_disjoint_combinations(category, level):
    drawn = {
        split: [world.draw(category, seed, split=split, level=level) for seed in range(150)]
        for split in ("train", "heldout", "align-heldout")
    }
    keys = {split: {spec.key for spec in specs} for split, specs in drawn.items()}
    assert not keys["train"] & (keys["heldout"] | keys["align-heldout"])
    assert not keys["heldout"] & keys["align-heldout"]
    if category == "edits":
        assert {world.split_of(edit.source) for edit in drawn["train"]} == {"train"}
        assert {world.split_of(edit.target) for edit in drawn["heldout"]} == {"heldout"}


def test_split_ignores_where_things_stand_and_how_wide_a_face_is():
    one = world.draw("objects", 5, level=1)
    assert {
        world.split_of(replace(one, things=(replace(one.things[0], cell=c),))) for c in range(4)
    } == {world.split_of(one)}
    face = world.draw("portraits", 5)
    assert world.split_of(replace(face, width=1.04)) == world.split_of(replace(face, width=0.96))


def test_an_empty_split_ends_in_an_error(monkeypatch):
    monkeypatch.setattr(world, "split_of", lambda spec: "train")
    with pytest.raises(ValueError, match="10,000 draws"):
        world.draw("portraits", 0, split="heldout")


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_captions_name_every_attribute(category, level):
    for seed in range(100):
        spec = world.draw(category, seed, level=level)
        for caption in (world.terse(spec), world.rich(spec)):
            assert spec.background in caption
            if isinstance(spec, Objects):
                assert all(thing.name in caption for thing in spec.things)
                assert spec.relation is None or spec.relation in caption
            elif isinstance(spec, Portrait):
                assert f"{spec.skin} skin" in caption and spec.hair in caption
                assert spec.style in caption and spec.mouth in caption
                assert ("glasses" in caption.replace("without glasses", "")) == spec.glasses
            else:
                assert isinstance(spec, Sign)
                assert spec.word in caption and spec.colour in caption


@pytest.mark.parametrize(("category", "level"), [*LEVELS, ("edits", 1)])
def test_terse_captions_are_short(category, level):
    """Words, and letters of a sign one by one, which is more than the embedded tokenizer makes."""
    for seed in range(300):
        words = world.terse(world.draw(category, seed, level=level)).split()
        assert sum(len(word) if word.isupper() else 1 for word in words) <= 24


def test_equal_captions_mean_equal_combinations():
    by_caption = {}
    for seed in range(400):
        spec = world.draw("portraits", seed)
        facts = replace(spec, width=1.0)
        assert by_caption.setdefault(world.terse(spec), facts) == facts


def test_edits_change_only_what_they_say():
    kinds = set()
    for seed in range(400):
        edit = world.draw("edits", seed)
        kinds.add(edit.kind)
        source, target = edit.source, edit.target
        assert type(source) is type(target)
        changed = {
            f.name for f in fields(source) if getattr(source, f.name) != getattr(target, f.name)
        }
        if edit.kind in ("recolour", "move", "add", "remove"):
            assert changed - {"relation"} == {"things"}
            _check_things(edit)
        else:
            assert changed <= {edit.kind}
            value = getattr(target, edit.kind)
            said = {"smiling": "smile", "frowning": "frown"}.get(value, value)
            assert edit.kind == "glasses" or str(said) in edit.instruction
    assert len(kinds) == 8


def _check_things(edit: Edit):
    before, after = set(edit.source.things), set(edit.target.things)
    gone, new = before - after, after - before
    if edit.kind == "add":
        assert not gone and len(new) == 1
    elif edit.kind == "remove":
        assert not new and len(gone) == 1
    else:
        (one,), (other,) = gone, new
        field = "colour" if edit.kind == "recolour" else "cell"
        assert replace(one, **{field: getattr(other, field)}) == other
    assert all(thing.name in edit.instruction for thing in (gone or new))


@pytest.mark.parametrize(("category", "level"), [*LEVELS, ("edits", 1)])
def test_dump_and_parse_are_inverse(category, level):
    for seed in range(60):
        spec = world.draw(category, seed, level=level)
        text = world.dump(spec)
        assert world.parse(text) == spec
        assert "\n" not in text and ": " not in text
        assert world.dump(world.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a red circle", "expected JSON"),
        ("[]", '"is"'),
        ('{"is":"cat"}', '"is"'),
        ('{"is":"sign","word":"LOVE","colour":"red","background":"white"}', "word of four"),
        ('{"is":"sign","word":"LAMA","colour":"teal","background":"white"}', "colour among"),
        ('{"is":"sign","word":"LAMA","background":"white"}', "colour"),
        (
            '{"is":"sign","word":"LAMA","colour":"red","background":"white","size":3}',
            "unknown field",
        ),
        ('{"is":"objects","things":[1],"background":"white"}', "list of objects"),
        ('{"is":"objects","things":[],"background":"white","relation":"above"}', "two things"),
        ('{"is":"edit","source":{},"target":{},"kind":"add","instruction":""}', '"is"'),
    ],
)
def test_parse_says_what_is_wrong(text, said):
    with pytest.raises(ValueError, match=said):
        world.parse(text)
