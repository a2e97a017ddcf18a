"""Statistics of pictures, on pictures made to have them."""

import numpy as np
import pytest

from rewards.scenes import world
from rewards.scenes.render import render
from rewards.statistics import diversity, picture_statistics


def scenes(count=8):
    return np.stack([render(world.draw("objects", seed, level=2)) for seed in range(count)])


def grid(pixels, period, strength=40):
    """A fine grid laid over pictures."""
    height, width = pixels.shape[2:]
    wave = np.cos(2 * np.pi * np.arange(width) / period)[None] * np.ones((height, 1))
    return np.clip(pixels + strength * wave, 0, 255).astype(np.uint8)


def blank(value, count=2, size=64):
    return np.full((count, 3, size, size), value, dtype=np.uint8)


def test_a_grid_is_seen_whatever_lies_under_it():
    plain = picture_statistics(scenes())
    for period in (2.5, 3, 5):
        drawn = picture_statistics(grid(scenes(), period))
        assert (drawn["grid"] > 1.5 * plain["grid"]).all() and drawn["grid"].mean() > 0.25
        if period < 4:
            assert (drawn["fine"] > 2 * plain["fine"]).all()
    assert plain["grid"].mean() < 0.1


def test_a_pure_wave_has_its_energy_in_one_frequency():
    wave = picture_statistics(grid(blank(128), 4))
    assert wave["grid"] == pytest.approx(2 / 3 * 2 / 3, abs=0.02)  # Hann: 4/6 of it on each axis
    assert wave["fine"] == pytest.approx(5 / 6, abs=0.02)  # it lies on the border of `fine`


def test_saturation_rises_with_colour_and_not_with_light():
    pixels = scenes().astype(float)
    grey = pixels.mean(axis=1, keepdims=True)
    more = np.clip(grey + 1.8 * (pixels - grey), 0, 255).astype(np.uint8)
    before, after = picture_statistics(scenes()), picture_statistics(more)
    assert (after["saturation"] >= before["saturation"]).all()
    assert after["saturation"].mean() > 1.15 * before["saturation"].mean()
    assert (picture_statistics(blank(200))["saturation"] == 0).all()
    red = blank(0)
    red[:, 0] = 255
    assert (picture_statistics(red)["saturation"] == 1).all()


def test_overexposure_counts_white_and_not_bright_colours():
    half = blank(0)
    half[:, :, :32] = 255
    half[:, 0, 32:] = 255  # red
    assert (picture_statistics(half)["overexposed"] == 0.5).all()


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_blank_picture_has_nothing(value):
    found = picture_statistics(blank(value))
    for name in ("saturation", "contrast", "fine", "grid"):
        assert found[name] == pytest.approx(0, abs=1e-6), name
    assert (found["overexposed"] == float(value == 255)).all()


def test_a_picture_is_read_by_itself_and_sizes_need_not_be_even():
    pixels = scenes(3)
    together = picture_statistics(pixels)
    for i in range(3):
        alone = picture_statistics(pixels[i : i + 1])
        assert all(alone[n][0] == pytest.approx(together[n][i], rel=1e-5) for n in together)
    odd = np.random.default_rng(0).integers(0, 256, (2, 3, 301, 45)).astype(np.uint8)
    found = picture_statistics(odd)
    assert all(((0 <= v) & (v <= 1)).all() for v in found.values())
    assert found["fine"].mean() > 0.6 and found["grid"].max() < 0.02  # noise


def test_diversity_is_zero_for_one_picture_many_times_and_falls_with_the_spread():
    same = np.repeat(scenes(1), 4, axis=0)
    assert diversity(same) == {"thumbnails": 0.0, "features": 0.0}
    many = scenes(6)
    mixed = (0.5 * many + 0.5 * many.mean(axis=0)).astype(np.uint8)
    wide, narrow = diversity(many), diversity(mixed)
    for name in wide:
        assert narrow[name] == pytest.approx(0.5 * wide[name], rel=0.1)
    assert np.isnan(diversity(scenes(1))["thumbnails"])
    black_white = np.stack([blank(0)[0], blank(255)[0]])
    assert diversity(black_white)["thumbnails"] == pytest.approx(1)


def test_thumbnails_are_means_of_cells_by_hand():
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 16, 24)).astype(np.uint8)
    means = pixels.reshape(2, 3, 8, 2, 8, 3).mean(axis=(3, 5)) / 255
    want = np.sqrt(np.mean((means[0] - means[1]) ** 2))
    assert diversity(pixels)["thumbnails"] == pytest.approx(want, rel=1e-5)
    assert diversity(pixels[:, :, :5, :3])["thumbnails"] > 0
