import time
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from rewards.errors import ImageError, RewardConfigError
from rewards.scenes import oracle, world
from rewards.scenes.render import render, render_batch
from rewards.scenes.world import Edit, Objects, Portrait, Sign, Thing

LEVELS = [
    ("objects", 1),
    ("objects", 2),
    ("objects", 3),
    ("portraits", 1),
    ("text", 1),
    ("edits", 1),
]
COUNT = 512


def _specs(category, level, count=COUNT):
    return [world.draw(category, seed, level=level) for seed in range(count)]


def _shown(specs):
    return [spec.target if isinstance(spec, Edit) else spec for spec in specs]


def _strict(readings) -> float:
    return float(np.mean([reading.strict for reading in readings]))


def _soft(readings) -> float:
    return float(np.mean([reading.soft for reading in readings]))


def _worn(pictures, seed=0, *, blur=0.0, noise=0.0, tint=0.0):
    rng, x = np.random.default_rng(seed), pictures.astype(np.float32)
    x = gaussian_filter(x, (0, 0, blur, blur)) if blur else x
    x = x + rng.normal(0, 1, (len(x), 3, 1, 1)) * tint + rng.normal(0, 1, x.shape) * noise
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


# --- fidelity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 128, 256])
@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_truth_is_strict_at_every_size(category, level, size):
    specs = _specs(category, level)
    readings = oracle.fidelity_batch(render_batch(_shown(specs), size), specs)
    assert _strict(readings) >= 0.98
    assert _soft(readings) >= 0.95


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_pictures_of_other_specs_are_not(category, level):
    specs = _specs(category, level)
    shown = _shown(specs)
    others = [*shown[1:], shown[0]]
    pairs = [(s, o) for s, o in zip(shown, others, strict=True) if world.terse(s) != world.terse(o)]
    readings = oracle.fidelity_batch(render_batch([o for _, o in pairs]), [s for s, _ in pairs])
    assert len(pairs) > 400 and _strict(readings) <= 0.02
    assert _soft(readings) < 0.5


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_a_reconstruction_stays_strict(category, level):
    specs = _specs(category, level)
    pictures = _worn(render_batch(_shown(specs)), blur=0.8, noise=6, tint=5)
    readings = oracle.fidelity_batch(pictures, specs)
    assert _strict(readings) >= 0.97
    assert _soft(readings) >= 0.88


@pytest.mark.parametrize("how", ["noise", "blur"])
@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_soft_falls_with_every_corruption(category, level, how):
    specs = _specs(category, level, 96)
    pictures = render_batch(_shown(specs))
    steps = (0, 10, 20, 40, 80, 160) if how == "noise" else (0, 0.7, 1.4, 2.8, 5.6, 11)
    soft = [_soft(oracle.fidelity_batch(_worn(pictures, **{how: s}), specs)) for s in steps]
    assert all(low < high for high, low in zip(soft, soft[1:], strict=False)), soft
    assert soft[-1] < 0.65
    last = _worn(pictures, **{how: steps[-1]})
    assert _strict(oracle.fidelity_batch(last, specs)) == 0


def _with(spec: Objects, index: int, **changes) -> Objects:
    things = list(spec.things)
    things[index] = replace(things[index], **changes)
    return replace(spec, things=tuple(things))


def _near_misses(spec):
    """Pictures that differ from the spec in one attribute that its caption states."""
    for other in set(world.BACKGROUNDS) - {spec.background}:
        yield replace(spec, background=other)
    if isinstance(spec, Objects):
        for i, thing in enumerate(spec.things):
            yield from (_with(spec, i, colour=c) for c in set(world.COLOURS) - {thing.colour})
            yield from (_with(spec, i, shape=s) for s in set(world.SHAPES) - {thing.shape})
        for cell in set(range(4)) - {thing.cell for thing in spec.things}:
            extra = Thing(shape="ring", colour="green", cell=cell)
            yield replace(spec, things=(*spec.things, extra), relation=None)
        if len(spec.things) > 1:
            yield replace(spec, things=spec.things[1:], relation=None)
    elif isinstance(spec, Portrait):
        yield from (replace(spec, skin=s) for s in set(world.SKINS) - {spec.skin})
        yield from (replace(spec, hair=h) for h in set(world.HAIRS) - {spec.hair})
        yield from (replace(spec, mouth=m) for m in set(world.MOUTHS) - {spec.mouth})
        yield replace(spec, glasses=not spec.glasses)
        if (spec.hair, spec.background) != ("black", "black"):  # where the style cannot be seen
            yield replace(spec, style="long" if spec.style == "short" else "short")
    else:
        yield from (replace(spec, colour=c) for c in set(world.COLOURS) - {spec.colour})
        for i in range(4):
            for letter in set(world.CONSONANTS + world.VOWELS) - {spec.word[i]}:
                yield replace(spec, word=spec.word[:i] + letter + spec.word[i + 1 :])


@pytest.mark.parametrize(("category", "level"), LEVELS[:-1])
def test_one_wrong_attribute_is_never_strict(category, level):
    for spec in _specs(category, level, 24):
        misses = list(_near_misses(spec))
        readings = oracle.fidelity_batch(render_batch(misses), [spec] * len(misses))
        truth = oracle.fidelity(render(spec), spec)
        for miss, reading in zip(misses, readings, strict=True):
            assert not reading.strict, (spec, miss)
            assert reading.soft < truth.soft - 0.01, (spec, miss)


def test_placement_is_free_where_the_caption_is_silent():
    one = world.draw("objects", 3, level=1)
    for cell in range(4):
        assert oracle.fidelity(render(_with(one, 0, cell=cell)), one).strict
    many = world.draw("objects", 3, level=3)
    cells = [2, 0, 3, 1][: len(many.things)]
    moved = [replace(t, cell=c) for t, c in zip(many.things, cells, strict=True)]
    assert oracle.fidelity(render(replace(many, things=tuple(moved))), many).strict


@pytest.mark.parametrize(
    ("relation", "allowed"),
    [
        ("left of", lambda a, b: a % 2 < b % 2),
        ("right of", lambda a, b: a % 2 > b % 2),
        ("above", lambda a, b: a // 2 < b // 2),
        ("below", lambda a, b: a // 2 > b // 2),
    ],
)
def test_a_relation_binds_one_axis_only(relation, allowed):
    spec = Objects(
        things=(
            Thing(shape="cross", colour="red", cell=0),
            Thing(shape="ring", colour="blue", cell=1),
        ),
        background="grey",
        relation=relation,
    )
    for a in range(4):
        for b in set(range(4)) - {a}:
            picture = render(_with(_with(spec, 0, cell=a), 1, cell=b))
            assert oracle.fidelity(picture, spec).strict == allowed(a, b), (a, b)


def test_a_thing_a_pixel_off_is_still_right_and_a_quarter_cell_off_is_not():
    specs = _specs("objects", 2, 64)
    pictures = render_batch(specs)
    assert _strict(oracle.fidelity_batch(np.roll(pictures, 1, 3), specs)) >= 0.97
    assert _strict(oracle.fidelity_batch(np.roll(pictures, 8, 3), specs)) == 0


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_a_blank_picture_is_worth_little_and_never_strict(category, level):
    specs = _specs(category, level, 64)
    for value in (0, 127, 255):
        blank = np.full((64, 3, 64, 64), value, np.uint8)
        readings = oracle.fidelity_batch(blank, specs)
        assert _strict(readings) == 0 and _soft(readings) < 0.6


def test_a_batch_reads_as_its_pictures_do():
    specs = [world.draw(c, seed, level=lv) for seed in range(12) for c, lv in LEVELS]
    pictures = _worn(render_batch(_shown(specs)), noise=25)
    whole = oracle.fidelity_batch(pictures, specs)
    assert [oracle.fidelity(p, s) for p, s in zip(pictures, specs, strict=True)] == whole
    assert oracle.fidelity_batch(pictures[::-1], specs[::-1])[::-1] == whole
    assert oracle.fidelity_batch(pictures[:0], []) == []


def test_what_cannot_be_read_is_refused():
    spec = world.draw("text", 0)
    with pytest.raises(ImageError, match="64 x 64"):
        oracle.fidelity(np.zeros((3, 32, 64), np.uint8), spec)
    with pytest.raises(ImageError, match="one spec per picture"):
        oracle.fidelity_batch(np.zeros((2, 3, 64, 64), np.uint8), [spec])
    with pytest.raises(RewardConfigError, match="axis among"):
        oracle.measure("beauty", np.zeros((3, 64, 64), np.uint8), spec)


@pytest.mark.parametrize(("category", "level"), LEVELS)
def test_a_thousand_readings_a_second(category, level):
    """The bar is 1,000/s on one free core; a quarter of it still catches a lost batch."""
    specs = _specs(category, level, 256)
    pictures = render_batch(_shown(specs))
    oracle.fidelity_batch(pictures, specs)
    start = time.process_time()
    oracle.fidelity_batch(pictures, specs)
    assert 256 / (time.process_time() - start) >= 250


# --- the other axes ------------------------------------------------------------------------------


def test_aesthetics_falls_with_noise_blur_and_imbalance():
    words = render_batch(_specs("text", 1, 48))
    plain = _soft([oracle.aesthetics(p) for p in words])
    for worn in (_worn(words, noise=15), _worn(words, blur=2)):
        assert _soft([oracle.aesthetics(p) for p in worn]) < plain - 0.05
    one = Objects(things=(Thing(shape="circle", colour="green", cell=0),), background="white")
    all_four = replace(one, things=tuple(replace(one.things[0], cell=c) for c in range(4)))
    lone, full = oracle.aesthetics(render(one)), oracle.aesthetics(render(all_four))
    assert full.parts["balance"] > 0.95 > 0.5 > lone.parts["balance"]
    assert full.soft > lone.soft and not oracle.fidelity(render(all_four), one).strict


def test_aesthetics_prefers_related_hues_and_moderate_colour():
    def of(*colours):
        things = tuple(Thing(shape="square", colour=c, cell=i) for i, c in enumerate(colours))
        return oracle.aesthetics(render(Objects(things=things, background="white"))).parts

    assert of("red", "orange", "yellow")["harmony"] > of("red", "green", "blue")["harmony"] + 0.1
    assert of("green")["saturation"] > of("orange")["saturation"] + 0.3


def test_portrait_judges_faces_and_not_whose():
    specs = _specs("portraits", 1, 48)
    faces = render_batch(specs)
    plain = [oracle.portrait(p, s) for p, s in zip(faces, specs, strict=True)]
    assert _strict(plain) >= 0.95
    swapped = [oracle.portrait(p, s) for p, s in zip(faces, specs[::-1], strict=True)]
    assert swapped == plain
    noisy = [oracle.portrait(p, s) for p, s in zip(_worn(faces, noise=20), specs, strict=True)]
    assert _soft(noisy) < _soft(plain) - 0.1
    moved = [oracle.portrait(np.roll(p, 6, 2), s) for p, s in zip(faces, specs, strict=True)]
    assert _soft(moved) < _soft(plain) - 0.2
    objects = render_batch(_specs("objects", 2, 48))
    assert _soft([oracle.portrait(p, specs[0]) for p in objects]) < 0.5


def test_axes_are_none_where_they_do_not_apply():
    picture = render(world.draw("objects", 0))
    for axis in ("portrait", "instruction", "consistency"):
        assert oracle.measure(axis, picture, world.draw("objects", 0)) is None
    assert oracle.measure("portrait", picture, world.draw("text", 0)) is None
    assert oracle.measure("aesthetics", picture, world.draw("text", 0)) is not None


@pytest.mark.parametrize("kind", list(get_args(world.EditKind)))
def test_edits_are_obeyed_by_the_target_and_not_by_a_copy(kind):
    edits = [edit for edit in _specs("edits", 1, 400) if edit.kind == kind]
    assert len(edits) >= 20
    for edit in edits:
        source, target = render(edit.source), render(edit.target)
        done, copied = oracle.instruction(target, edit), oracle.instruction(source, edit)
        assert done.strict and done.soft > 0.85
        assert not copied.strict and copied.soft < 0.85 and copied.soft < done.soft
        for picture in (source, target):
            kept = oracle.consistency(picture, edit)
            assert kept.strict and kept.soft > 0.98


def test_consistency_sees_what_the_edit_should_have_left():
    for edit in _specs("edits", 1, 60):
        other = render(world.draw(world.category_of(edit.target), 999))
        worn = _worn(render(edit.target)[None], blur=0.8, noise=6, tint=3)[0]
        assert not oracle.consistency(other, edit).strict
        assert oracle.consistency(worn, edit).strict
        far, near = oracle.consistency(other, edit), oracle.consistency(worn, edit)
        assert far.parts["region"] < near.parts["region"] - 0.1
        assert far.soft < near.soft - 0.1


def test_another_persons_face_is_not_consistent():
    edit = next(e for e in _specs("edits", 1, 200) if e.kind == "mouth")
    for name, palette in (("skin", world.SKINS), ("hair", world.HAIRS)):
        other = next(value for value in palette if value != getattr(edit.target, name))
        reading = oracle.consistency(render(replace(edit.target, **{name: other})), edit)
        assert not reading.strict and reading.parts["identity"] < 0.8
        assert oracle.instruction(render(replace(edit.target, **{name: other})), edit).strict


def test_a_sign_of_four_equal_letters_reads():
    spec = Sign(word="LOLO", colour="yellow", background="white")
    assert oracle.fidelity(render(spec), spec).strict
    assert not oracle.fidelity(render(spec), replace(spec, word="LOLA")).strict


def test_spelling_is_read_letter_by_letter_and_without_colours():
    signs = [Sign(word="LINE", colour="red", background="white")] * 3
    other = Sign(word="LIRE", colour="blue", background="black")
    shown = render_batch([signs[0], other, signs[0]], 96)
    shown[2, :, :, 72:] = shown[2, :, :1, :1]  # the last letter is painted over
    right = oracle.spelling(shown, signs)
    assert right.tolist() == [[True] * 4, [True, True, False, True], [True, True, True, False]]
