"""The long form about a picture agrees with the oracle that holds it against a spec."""

import numpy as np

from rewards.scenes import oracle, world
from rewards.scenes.aspects import COUNT, aspects
from rewards.scenes.render import render
from rewards.scenes.specs import BACKGROUNDS, COLOURS, CONSONANTS, SHAPES, VOWELS, Objects, Sign


def test_a_rendered_picture_is_read_as_its_spec():
    specs = [world.draw("objects", i, level=2) for i in range(20)]
    values, asked = aspects(np.stack([render(s) for s in specs]), ["objects"] * 20)
    assert values.shape == asked.shape == (20, COUNT)
    for row, spec in zip(values, specs, strict=True):
        assert isinstance(spec, Objects)
        shapes, colours = row[:20].reshape(4, 5), row[20:60].reshape(4, 10)
        for thing in spec.things:
            assert shapes[thing.cell].argmax() == SHAPES.index(thing.shape)
            assert colours[thing.cell].argmax() == list(COLOURS).index(thing.colour)
        taken = {thing.cell for thing in spec.things}
        assert all((row[60 + cell] < 0.5) == (cell in taken) for cell in range(4))
        assert row[64:68].argmax() == list(BACKGROUNDS).index(spec.background)


def test_letters_faces_and_taste_are_read():
    sign, face = world.draw("text", 3), world.draw("portraits", 3)
    assert isinstance(sign, Sign)
    pictures = np.stack([render(sign), render(face)])
    values, asked = aspects(pictures, ["text", "portraits"])
    letters = values[0, 92:140].reshape(4, 12).argmax(-1)
    assert "".join(sorted(CONSONANTS + VOWELS)[k] for k in letters) == sign.word
    reading = oracle.portrait(pictures[1], face)
    assert reading is not None
    assert np.allclose(values[1, 84:88], list(reading.parts.values()), atol=1e-5)
    for picture, row in zip(pictures, values, strict=True):
        assert np.allclose(row[-5:], list(oracle.aesthetics(picture).parts.values()), atol=1e-5)
    assert asked[0, 88:147].all() and not asked[0, :88].any() and asked[:, -5:].all()
    assert asked[1, 68:88].all() and not asked[1, 88:147].any()
