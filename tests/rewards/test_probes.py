"""Corruptions do what they say and nothing at random; canaries apply where they can and bite."""

from dataclasses import replace

import numpy as np
import pytest

from rewards import probes
from rewards.benchmark.asking import ask
from rewards.benchmark.measure import Settings, measure, on_biases, on_canaries
from rewards.benchmark.rows import bench, read_judgements
from rewards.judge import FunctionJudge, load_judge
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.types import Sample
from tests.rewards.judgements import records, write


def _noisy(height: int = 48, width: int = 80) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 230, (3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("size", [(48, 80), (64, 64), (9, 7), (1, 1), (300, 40)])
@pytest.mark.parametrize("name", probes.CORRUPTIONS)
def test_a_corruption_keeps_the_form_and_is_a_function_of_the_picture(name, size):
    picture = _noisy(*size)
    kept = picture.copy()
    once, again = (probes.CORRUPTIONS[name](picture) for _ in range(2))
    assert once.shape == picture.shape and once.dtype == np.uint8
    assert np.array_equal(once, again) and np.array_equal(picture, kept)
    if size == (48, 80):
        assert not np.array_equal(once, picture)


def test_corruptions_do_what_they_are_called():
    picture = render(world.draw("objects", 3), 64)
    assert probes.saturation(probes.oversaturate(picture)) > 1.1 * probes.saturation(picture)
    assert probes.sharpness(probes.sharpen(picture)) > 1.5 * probes.sharpness(picture)
    assert probes.sharpness(probes.blur(picture)) < 0.5 * probes.sharpness(picture)
    assert probes.sharpness(probes.down_up(picture)) < probes.sharpness(picture)
    assert len(np.unique(probes.blank(picture).reshape(3, -1), axis=1).T) == 1
    assert np.abs(probes.blank(picture).mean((1, 2)) - picture.mean((1, 2))).max() <= 0.5
    assert probes.brightness(picture).mean() > picture.mean()
    gap = probes.noise(np.full((3, 64, 64), 128, np.uint8)).astype(float) - 128
    assert gap.std() == pytest.approx(20, rel=0.03) and abs(gap.mean()) < 1
    near = np.abs(probes.jpeg(picture).astype(int) - picture).mean()
    assert 0 < near < np.abs(probes.jpeg(picture, 10).astype(int) - picture).mean()


def test_a_grid_lies_on_every_eighth_row_and_column():
    gap = np.abs(probes.grid(_noisy(32, 32)).astype(int) - _noisy(32, 32))
    on = (np.arange(32)[:, None] % 8 == 0) | (np.arange(32)[None] % 8 == 0)
    assert (gap[:, on] == 48).all() and (gap[:, ~on] == 0).all()


def test_text_is_white_on_black_in_the_middle():
    grey = np.full((3, 64, 128), 128, np.uint8)
    changed = (probes.text_overlay(grey) != grey).any(0)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert columns[-1] - columns[0] + 1 == pytest.approx(0.9 * 128, abs=2)
    assert rows[0] + rows[-1] == pytest.approx(63, abs=2)
    written = probes.text_overlay(grey)[0][changed]
    assert written.min() == 0 and written.max() > 200
    assert not np.array_equal(probes.text_overlay(grey), probes.text_overlay(grey, "bad"))


# --- canaries -------------------------------------------------------------------------------------


def _sample(seed: int = 0, category: str = "objects") -> Sample:
    spec = world.draw(category, seed)
    edit = isinstance(spec, world.Edit)
    return Sample(
        image=render(spec.target if edit else spec, 64),
        prompt=world.terse(spec),
        category=category,
        sources=(render(spec.source, 96),) if edit else (),
        target=world.dump(spec),
    )


def test_canaries_of_an_edit_need_a_source():
    edit, plain = _sample(1, "edits"), _sample()
    for name in ("source_copy", "collage"):
        assert probes.CANARIES[name](plain) is None
        assert probes.CANARIES[name](edit).image.shape == edit.image.shape
    collage = probes.collage(edit).image
    assert not np.array_equal(collage[:, :, :32], collage[:, :, 32:])
    copy = replace(edit, sources=(edit.image,))
    assert probes.source_copy(copy) is None  # it is the picture already


def test_a_canary_that_changes_nothing_does_not_apply():
    plain = replace(_sample(), image=np.full((3, 64, 64), 90, np.uint8))
    assert probes.CANARIES["blank"](plain) is None
    assert probes.CANARIES["oversaturated"](plain) is None
    assert probes.CANARIES["grid"](plain) is not None


def test_a_swapped_prompt_is_anothers_of_the_category():
    samples = [_sample(i) for i in range(3)] + [_sample(9, "text")]
    swapped = probes.swapped_prompt(samples[0], samples)
    assert swapped.prompt == samples[1].prompt and swapped.target == samples[1].target
    assert np.array_equal(swapped.image, samples[0].image)
    assert probes.swapped_prompt(samples[2], samples).prompt == samples[0].prompt
    assert probes.swapped_prompt(samples[3], samples) is None
    assert probes.swapped_prompt(_sample(77), samples).prompt == samples[0].prompt


def test_an_axis_is_not_held_to_what_it_must_like():
    assert "source_copy" not in probes.canaries([], "consistency")
    assert "source_copy" in probes.canaries([], "instruction")
    assert {"swapped_prompt", *probes.CANARIES} == set(probes.canaries([]))


def test_longer_prompts_ask_for_the_same():
    sample = _sample(4)
    longer = probes.longer_prompt(sample)
    assert longer.prompt == world.rich(world.parse(sample.target))
    free = probes.longer_prompt(replace(sample, target=None))
    assert free.prompt.endswith(sample.prompt) and len(free.prompt) > len(sample.prompt)


# --- what judges make of them ---------------------------------------------------------------------


def loves_saturation(images, prompts, sources):
    return [probes.saturation(image) for image in images]


def counts_words(images, prompts, sources):
    return [float(len(prompt.split())) for prompt in prompts]


def same(images, prompts, sources):
    return [0.5] * len(images)


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    rows = records("fidelity", 12, 0)
    return bench(read_judgements(write(tmp_path_factory.mktemp("rows"), "test", rows), "test"))


def _probed(function, test, axis="fidelity"):
    judge = FunctionJudge(function, "mine")
    answers = ask(judge, test.samples)
    return on_canaries(judge, answers, test, Settings(), axis) | on_biases(
        judge, answers, test, Settings()
    )


def test_a_judge_that_loves_saturation_is_caught(test_set):
    found = _probed(loves_saturation, test_set)
    assert found["canary/oversaturated"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 12}
    assert found["bias/saturation"]["value"] == pytest.approx(1.0)
    assert found["bias/longer_prompt/size"]["value"] == 0.0
    assert "canary/source_copy" not in found


def test_a_canary_that_is_truly_better_on_the_axis_is_earned(tmp_path):
    """The oracle of taste prefers a grid on these, so a judge that does is not to blame."""
    rows = records("aesthetics", 12, 0)
    test = bench(read_judgements(write(tmp_path, "test", rows), "test"))
    oracle = load_judge("oracle/aesthetics")
    found = on_canaries(oracle, ask(oracle, test.samples), test, Settings(), "aesthetics")
    assert found["canary/grid"]["value"] > 0.5
    assert found["canary/grid/unearned"]["value"] == 0.0
    lover = _probed(loves_saturation, test, "aesthetics")
    both = lover["canary/oversaturated"]["value"], lover["canary/oversaturated/unearned"]["value"]
    gold = found["canary/oversaturated"]["value"]
    assert both == (1.0, pytest.approx(1 - gold)) and 0 < gold < 1
    free = _probed(loves_saturation, test, "an axis of my own")
    assert free["canary/oversaturated"]["value"] == 1.0
    assert not any(name.endswith("unearned") for name in free)


def test_a_tie_is_no_preference(test_set):
    found = _probed(same, test_set)
    assert {m["value"] for k, m in found.items() if k.startswith("canary/")} == {0.0}
    assert not any(k.startswith("bias/") for k in found)  # no spread to measure in


def test_a_change_is_measured_in_the_judges_own_spread(test_set):
    found = _probed(counts_words, test_set)
    clean = [s for s, o in zip(test_set.samples, test_set.origin, strict=True) if o == "render"]
    words = np.array([len(s.prompt.split()) for s in clean])
    more = np.array([len(probes.longer_prompt(s).prompt.split()) for s in clean])
    want = (more - words).mean() / words.std()
    assert found["bias/longer_prompt/shift"]["value"] == pytest.approx(want)
    assert found["bias/jpeg/size"]["value"] == 0.0


def test_the_oracle_is_deceived_by_no_canary(test_set):
    judge = load_judge("oracle/fidelity")
    metrics = measure(judge, test_set, test_set, Settings(), "fidelity").metrics
    rates = {k: m["value"] for k, m in metrics.items() if k.startswith("canary/")}
    assert len(rates) == 12 and max(rates.values()) == 0.0, rates
    assert metrics["drift"]["value"] == 0.0 and metrics["swap_consistency"]["value"] == 1.0


def test_a_copy_of_the_source_obeys_nothing(tmp_path):
    rows = records("instruction", 12, 0, category="edits")
    test = bench(read_judgements(write(tmp_path, "test", rows), "test"))
    judge = load_judge("oracle/instruction")
    found = on_canaries(judge, ask(judge, test.samples), test, Settings(), "instruction")
    assert found["canary/source_copy"]["value"] == found["canary/collage"]["value"] == 0.0
    copies = [probes.source_copy(s) for s in test.samples[:1]]
    assert ask(judge, copies).value[0] < 0.3
