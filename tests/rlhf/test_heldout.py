"""Figures of pictures whose truth is known: the rendered specs themselves, and wrong ones."""

import numpy as np
import pytest

from rewards.scenes import world
from rewards.scenes.render import render, render_batch
from rewards.scenes.specs import Edit
from rlhf import heldout
from rlhf.errors import PromptError

KINDS = ("objects", "portraits", "text", "edits")


def task(category, n=24, level=2, name=None):
    specs = heldout.specs_of(category, level, "heldout", n // 2)
    return heldout.make_task(name or category, specs, n, 64, seed=1, per_prompt=2)


def truth(of, which="target"):
    """Rendered pictures of a task, (P, G, 3, H, W)."""
    specs = [getattr(s, which) if isinstance(s, Edit) else s for s in of.specs]
    one = render_batch(specs, 64)
    return np.repeat(one[:, None], len(of.wanted[0].seeds), axis=1)


@pytest.mark.parametrize("category", KINDS)
def test_prompts_are_of_their_split_and_differ(category):
    of = task(category)
    assert all(world.split_of(s) == "heldout" for s in of.specs)
    assert len({(w.text, *(s.tobytes() for s in w.sources)) for w in of.wanted}) == len(of.specs)
    seeds = [seed for w in of.wanted for seed in w.seeds]
    assert len(set(seeds)) == len(seeds) >= 24
    assert all(len(w.sources) == (category == "edits") for w in of.wanted)


def test_few_prompts_get_more_seeds():
    of = heldout.make_task(
        "objects/level1", heldout.specs_of("objects", 1, "heldout", 64), 256, 64, 1, 4
    )
    assert len(of.specs) < 64
    assert sum(len(w.seeds) for w in of.wanted) >= 256
    with pytest.raises(PromptError, match="raise n"):
        heldout.specs_of("objects", 2, "heldout", 0)


@pytest.mark.parametrize("category", KINDS)
def test_rendered_truth_is_strict_and_other_prompts_pictures_are_not(category):
    of = task(category)
    found = heldout.figures(of, truth(of), "/w1")
    assert found[f"heldout/{category}/strict/w1"]["value"] == 1.0
    assert found[f"heldout/{category}/soft/w1"]["value"] > 0.9
    assert found[f"heldout/{category}/strict/w1"]["n"] == sum(len(w.seeds) for w in of.wanted)
    assert heldout.chance(of, truth(of))[f"chance/{category}/strict"]["value"] < 0.1


def test_a_copy_of_the_source_is_consistent_and_no_edit():
    of = task("edits")
    found = heldout.figures(of, truth(of, "source"))
    assert found["heldout/edits/consistency/strict"]["value"] == 1.0
    assert found["heldout/edits/instruction/strict"]["value"] == 0.0
    assert found["heldout/edits/strict"]["value"] == 0.0
    assert found["heldout/edits/soft"]["value"] <= found["heldout/edits/instruction/soft"]["value"]


def test_spearman_is_that_of_scipy_with_ties():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0)
    a = draw.integers(0, 6, 60).astype(float)
    b = a + draw.integers(0, 6, 60)
    got = heldout.spearman(a, b)
    assert got == pytest.approx(spearmanr(a, b).statistic)
    assert heldout.spearman(a, np.ones(60)) is None


def test_axes_are_correlated_where_both_apply():
    kinds = [task("objects", 40), task("edits", 40)]
    noisy = []
    for of in kinds:
        pictures = truth(of).astype(int)
        draw = np.random.default_rng(3)
        level = draw.integers(0, 90, (*pictures.shape[:2], 1, 1, 1))
        noise = draw.integers(-1, 2, pictures.shape) * level
        noisy.append((of, np.clip(pictures + noise, 0, 255).astype(np.uint8)))
    found = heldout.axes(noisy)
    assert found["axes/fidelity~aesthetics"]["n"] == 80
    assert found["axes/instruction~consistency"]["n"] == 40
    pairs = [m["value"] for n, m in found.items() if "~" in n]
    assert found["axes/max_rank_correlation"]["value"] == max(map(abs, pairs))


def test_reconstruction_counts_what_stays_right():
    specs = [world.draw("objects", i, split="heldout") for i in range(12)]
    before = render_batch(specs, 64)
    after = before.copy()
    after[:3] = render(specs[-1], 64)
    found = heldout.reconstruction("objects", specs, before, after)
    assert found["recon/objects/strict"]["value"] == pytest.approx(0.75)
    assert found["recon/objects/strict_ratio"]["value"] == pytest.approx(0.75)
    blank = np.zeros_like(before)
    found = heldout.reconstruction("objects", specs, blank, blank)
    assert "recon/objects/strict_ratio" not in found
