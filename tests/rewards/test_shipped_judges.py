"""The five judges that ship: small, and as good as their table says on pictures drawn here."""

import numpy as np
import pytest

from rewards import probes
from rewards.judge import load_judge, run_judge
from rewards.scenes import annotators, candidates, world
from rewards.scenes.render import render
from rewards.scenes.specs import Edit
from rewards.trained import KINDS, SHIPPED

CATEGORIES = {
    "aesthetics": ("objects", "portraits", "text", "edits"),
    "fidelity": ("objects", "portraits", "text"),
    "portrait": ("portraits",),
    "instruction": ("edits",),
    "consistency": ("edits",),
}


def _samples(axis: str, count: int):
    """Prompts with four candidates each, and gold values (count, 4)."""
    samples, gold = [], []
    for i in range(count):
        category = CATEGORIES[axis][i % len(CATEGORIES[axis])]
        spec = world.draw(category, 77_000 + i, split="heldout", level=2)
        found = candidates.candidates(np.random.default_rng([9, i]), spec, 4)
        samples += [candidates.answer(spec, c.picture) for c in found]
        gold.append([annotators.gold(axis, c.picture, spec) for c in found])
    return samples, np.array(gold)


def test_together_they_are_small():
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12 * 2**20
    assert {p.parent.name for p in SHIPPED.glob("*/card.json")} == set(KINDS)


@pytest.mark.parametrize("axis", KINDS)
def test_pictures_that_clearly_differ_are_ordered_right(axis):
    judge = load_judge(f"scenes/{axis}")
    samples, gold = _samples(axis, 60)
    scores = run_judge(judge, samples)
    assert {s.state for s in scores} == {"ok"}
    value = np.array([s.value for s in scores]).reshape(gold.shape)
    clear = gold[:, :, None] - gold[:, None] >= annotators.AXES[axis].sd
    right = (value[:, :, None] - value[:, None] > 0)[clear]
    assert clear.sum() > 40 and right.mean() >= 0.85
    assert judge.card.calibration.raw and judge.card.temperature > 0 and judge.card.noise_floor > 0


@pytest.mark.parametrize("axis", KINDS)
def test_no_canary_is_liked(axis):
    judge = load_judge(f"scenes/{axis}")
    specs = [
        world.draw(
            CATEGORIES[axis][i % len(CATEGORIES[axis])], 78_000 + i, split="heldout", level=2
        )
        for i in range(72)
    ]
    clean = [candidates.answer(s, render(s.target if isinstance(s, Edit) else s)) for s in specs]
    before = [s.value for s in run_judge(judge, clean)]
    for name, canary in probes.canaries(clean, axis).items():
        made = [canary(sample) for sample in clean]
        kept = [(m, b) for m, b in zip(made, before, strict=True) if m is not None]
        after = [s.value for s in run_judge(judge, [m for m, _ in kept])]
        liked = [a > b for a, (_, b) in zip(after, kept, strict=True)]
        assert not liked or np.mean(liked) <= 0.05, name
