"""Stages of pictures: shapes, shares, and that a batch depends on its step alone."""

import numpy as np
import pytest
import torch

from pipelines.data.curriculum import Curriculum, Folder, Stage, Stream, shape, squares
from rewards import images
from rewards.errors import ImageError
from rlhf.errors import ConfigError

TWO = (Stage(size=64, share=3.0, text=0.0), Stage(size=96, share=1.0, text=1.0, batch=2))


def stream(curriculum=None, **changes):
    known = dict(n=12, batch=4, steps=8, seed=5, multiple=16)
    return Stream(curriculum or Curriculum(stages=TWO), **(known | changes))


def test_stages_take_their_share_of_the_steps():
    assert [Curriculum(stages=TWO).at(step, 8) for step in range(1, 11)] == [0] * 6 + [1] * 4


@pytest.mark.parametrize(
    "size, aspect, multiple, expected",
    [(64, 1.0, 16, (64, 64)), (64, 4 / 3, 16, (48, 80)), (256, 9 / 16, 32, (352, 192))],
)
def test_shapes_keep_the_area_in_whole_multiples(size, aspect, multiple, expected):
    assert shape(size, aspect, multiple) == expected


def test_batches_follow_the_stage_and_depend_on_the_step_alone():
    ahead, again = stream(), stream()
    first = [ahead(step) for step in (1, 2, 7)]
    assert [tuple(x.shape) for x in first] == [(4, 4, 64, 64)] * 2 + [(2, 4, 96, 96)]
    assert torch.equal(again(7), first[2]) and torch.equal(again(1), first[0])
    assert not torch.equal(first[0], first[1])
    assert all(float(x[:, 3].min()) == 1 and x.abs().max() <= 1 for x in first)


def test_aspects_are_mixed_over_batches():
    curriculum = Curriculum(stages=TWO[:1], aspects=(1.0, 4 / 3, 3 / 4))
    found = {tuple(stream(curriculum)(step).shape[2:]) for step in range(1, 12)}
    assert found == {(64, 64), (48, 80), (80, 48)}


def colour_folder(root, name, value, n=4, size=(40, 100)):
    (root / name).mkdir()
    for i in range(n):
        images.save_png(root / name / f"{i}.png", np.full((3, *size), value, np.uint8))
    return str(root / name)


def test_the_text_share_comes_from_the_text_rich_folder(tmp_path):
    folders = dict(
        general=colour_folder(tmp_path, "general", 0), text=colour_folder(tmp_path, "text", 255)
    )
    curriculum = Curriculum(stages=(Stage(size=512, text=0.25),), **folders)
    curriculum.check()
    rows = torch.cat([stream(curriculum, batch=16)(step)[:, 0, 0, 0] for step in range(1, 9)])
    assert 0.15 < float((rows > 0).float().mean()) < 0.35
    assert squares(curriculum, 4, 64, 0, "train")[:, 0, 0, 0].tolist() == [0, 0, 0, 255]


def test_a_folder_holds_some_files_out_and_covers_the_window(tmp_path):
    path = colour_folder(tmp_path, "all", 7, n=52)
    train, held = Folder(path), Folder(path, held=True)
    assert len(train) == 50 and len(held) == 2 and not set(train.paths) & set(held.paths)
    for size in ((64, 64), (16, 128), (128, 16)):
        window = train.window(3, size, (0.99, 0.99))
        assert window.shape == (3, *size) and (window == 7).all()
    with pytest.raises(ImageError, match="at least 2 pictures"):
        Folder(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"aspects": ()}, "aspects"),
        ({"stages": (Stage(size=64, text=1.5),)}, "text from 0"),
        ({"stages": (Stage(size=256),), "aspects": (2.0,)}, "name folders"),
        ({"general": "pictures"}, "expected stages"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Curriculum(**changes).check()
