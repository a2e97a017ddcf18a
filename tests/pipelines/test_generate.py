"""`rlhf generate`: pictures depend on model, prompt and seed, and say how they were made."""

import json

import numpy as np
import pytest

from pipelines import generate
from rewards import images
from rlhf.errors import ConfigError
from tests.rlhf.tiny import picture

FEW = dict(prompt="a red circle", steps=2, seeds=(3, 5))


def made(folder):
    return np.stack([images.load_image(p) for p in sorted(folder.glob("*.png"))])


def test_a_picture_for_each_seed_and_how_it_was_made(tiny_base, tmp_path):
    config = generate.Config(model=str(tiny_base), out=str(tmp_path), **FEW)
    result = generate.run(config)
    pictures = made(tmp_path)
    assert pictures.shape == (2, 3, 64, 64) and not np.array_equal(*pictures)
    said = json.loads((tmp_path / "prompts.json").read_text())
    assert said["prompt"] == "a red circle" and said["guidance"] == 2.0
    assert said["pictures"] == [{"file": "000.png", "seed": 3}, {"file": "001.png", "seed": 5}]
    assert result["metrics"]["generate/forward_rows"]["value"] == 2 * 2 * 2
    assert all(name in generate.summarise(result) for name in ("000.png", "001.png"))


def test_a_picture_depends_on_its_seed_alone(tiny_base, tmp_path):
    for name, seeds in (("a", (3, 5)), ("b", (5,))):
        config = dict(FEW, seeds=seeds, model=str(tiny_base), out=str(tmp_path / name))
        generate.run(generate.Config(**config))
    gap = made(tmp_path / "a")[1].astype(int) - made(tmp_path / "b")[0]
    assert np.abs(gap).max() <= 1


def test_a_run_brings_its_weights_guidance_and_size(tiny_run, tmp_path):
    for name, slot in (("new", "train"), ("base", "reference")):
        config = dict(FEW, model=str(tiny_run.root), slot=slot, out=str(tmp_path / name))
        said = generate.run(generate.Config(**config))["made"]
        assert (said["guidance"], said["size"]) == (2.0, [64, 96])
    assert not np.array_equal(made(tmp_path / "new"), made(tmp_path / "base"))


def test_an_edit_starts_from_its_source(tiny_base, tmp_path):
    outs = []
    for seed in (1, 2):
        images.save_png(tmp_path / f"{seed}.png", picture(seed, 64, 96))
        config = dict(FEW, model=str(tiny_base), source=str(tmp_path / f"{seed}.png"))
        generate.run(generate.Config(out=str(tmp_path / f"out{seed}"), **config))
        outs.append(made(tmp_path / f"out{seed}"))
    assert outs[0].shape == (2, 3, 64, 96) and not np.array_equal(*outs)


@pytest.mark.parametrize(
    "changes, message",
    [({"seeds": ()}, "seeds"), ({"guidance": 0.5}, "guidance"), ({"steps": 0}, "steps")],
)
def test_what_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        generate.Config(**changes).check()


def test_a_size_the_model_cannot_make_is_refused(tiny_base, tmp_path):
    config = generate.Config(model=str(tiny_base), out=str(tmp_path), size=70, **FEW)
    with pytest.raises(ConfigError, match="multiples of 32"):
        generate.run(config)
    with pytest.raises(ConfigError, match="expected a prompt"):
        generate.run(generate.Config(prompt=" "))
