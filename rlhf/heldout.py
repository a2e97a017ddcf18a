"""Held-out prompts of the scenes world, and what the oracle says of pictures of them.

Pure functions: prompts out of a split, readings out of pictures, figures out of readings. Shapes:
P prompts, G pictures of each, (P, G, 3, H, W) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from rewards.benchmark.ranking import ranks
from rewards.scenes import oracle, world
from rewards.scenes.render import render
from rewards.scenes.specs import Edit, Spec
from rewards.stats import bootstrap
from rlhf.errors import PromptError
from rlhf.evaluation import EVALUATION
from rlhf.gallery import Wanted
from rlhf.rollout import seeds_of
from rlhf.stats import bootstrap_mean

Metrics = dict[str, dict[str, float | int]]
Pictures = UInt8[np.ndarray, "p g 3 h w"]
EDIT_AXES = ("instruction", "consistency")
PATIENCE = 200  # draws without a new caption after which a split is taken to hold no more
LEAST = 32  # pictures that two axes must both apply to before their correlation is reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts of one kind. `name` is that of its figures: objects, objects/level1, edits, ..."""

    name: str
    specs: tuple[Spec | Edit, ...]
    wanted: tuple[Wanted, ...]

    @property
    def edits(self) -> bool:
        return isinstance(self.specs[0], Edit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """One axis over pictures: soft in [0, 1] and strict; NaN and False where it does not apply."""

    soft_PG: Float[np.ndarray, "p g"]
    strict_PG: Bool[np.ndarray, "p g"]


def specs_of(category: str, level: int, split: str, count: int) -> tuple[Spec | Edit, ...]:
    """Up to `count` specs of a split with different captions, fewer where the split holds fewer.

    Raises:
        PromptError: count below 1.
    """
    if count < 1:
        raise PromptError(f"expected at least one prompt of {category}, got {count}: raise n")
    out: dict[object, Spec | Edit] = {}
    last = 0
    for seed in range(20 * count + PATIENCE):
        spec = world.draw(category, seed, split=split, level=level)  # type: ignore[arg-type]
        key = (spec.source, spec.instruction) if isinstance(spec, Edit) else world.terse(spec)
        if key not in out:
            out[key], last = spec, seed
        if len(out) == count or seed - last > PATIENCE:
            break
    return tuple(out.values())


def make_task(
    name: str, specs: Sequence[Spec | Edit], n: int, size: int, seed: int, per_prompt: int
) -> Task:
    """At least `n` pictures of these specs: `per_prompt` seeds for each, more if they are few."""
    each = max(per_prompt, math.ceil(n / len(specs)))
    seeds = seeds_of(seed, EVALUATION, len(specs), each)
    wanted = [
        Wanted(
            text=world.terse(spec),
            seeds=own,
            sources=(render(spec.source, size),) if isinstance(spec, Edit) else (),
        )
        for spec, own in zip(specs, seeds, strict=True)
    ]
    return Task(name=name, specs=tuple(specs), wanted=tuple(wanted))


# --- readings ------------------------------------------------------------------------------------


def read(axis: str, specs: Sequence[Spec | Edit], pictures: Pictures) -> Readings:
    """One axis of the oracle on the pictures of each spec."""
    flat = pictures.reshape(-1, *pictures.shape[2:])
    wanted = [spec for spec in specs for _ in range(pictures.shape[1])]
    if axis == "fidelity":
        found: Sequence[oracle.Reading | None] = oracle.fidelity_batch(flat, wanted)
    else:
        found = [oracle.measure(axis, *pair) for pair in zip(flat, wanted, strict=True)]
    shape = pictures.shape[:2]
    soft = np.array([math.nan if r is None else r.soft for r in found]).reshape(shape)
    strict = np.array([r is not None and r.strict for r in found]).reshape(shape)
    return Readings(soft_PG=soft, strict_PG=strict)


def both(first: Readings, second: Readings) -> Readings:
    """The lower of two soft readings; strict where both are."""
    return Readings(
        soft_PG=np.minimum(first.soft_PG, second.soft_PG),
        strict_PG=first.strict_PG & second.strict_PG,
    )


def verdicts(specs: Sequence[Spec | Edit], pictures: Pictures) -> dict[str, Readings]:
    """What decides: "" for the whole, and for edits also each of its two axes by name.

    An edit is right when the instruction was followed and the rest was left alone; of any other
    prompt fidelity decides.
    """
    if not isinstance(specs[0], Edit):
        return {"": read("fidelity", specs, pictures)}
    parts = {axis: read(axis, specs, pictures) for axis in EDIT_AXES}
    return {"": both(*parts.values()), **parts}


# --- figures -------------------------------------------------------------------------------------


def estimate(values_PG: np.ndarray) -> dict[str, float | int]:
    """Mean with its 95% interval, drawn over prompts."""
    count, each = values_PG.shape
    clusters = np.repeat(np.arange(count), each).tolist()
    return bootstrap_mean(values_PG.reshape(-1), clusters=clusters).as_metric()


def figures(task: Task, pictures: Pictures, suffix: str = "") -> Metrics:
    """`heldout/<name>/strict<suffix>` and `/soft<suffix>`, for edits also per axis."""
    out: Metrics = {}
    for part, readings in verdicts(task.specs, pictures).items():
        name = "/".join(filter(None, ("heldout", task.name, part)))
        out[f"{name}/strict{suffix}"] = estimate(readings.strict_PG)
        out[f"{name}/soft{suffix}"] = estimate(readings.soft_PG)
    return out


def strict_of(task: Task, pictures: Pictures) -> Bool[np.ndarray, "p g"]:
    """Which pictures are strictly right."""
    return verdicts(task.specs, pictures)[""].strict_PG


def flat(parts_PG: Sequence[np.ndarray]) -> np.ndarray:
    """The values of several tasks as one row."""
    return np.concatenate([x.reshape(-1) for x in parts_PG])


def prompts_of(parts_PG: Sequence[np.ndarray]) -> Int[np.ndarray, " n"]:
    """Which prompt each value of `flat` is of, counted over all tasks."""
    counts = [x.shape[1] for x in parts_PG for _ in range(len(x))]
    return np.repeat(np.arange(len(counts)), counts)


def ratio(
    mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]
) -> dict[str, float | int] | None:
    """The mean of one model's values over that of another's on the same prompts and seeds, with
    its 95% interval drawn over prompts; each holds (P, G) values, not negative, of some tasks. None
    where all of the other's are 0.
    """
    a, b = flat(mine), flat(theirs)
    if not b.any():
        return None

    def quotient(index: np.ndarray) -> float:
        below = b[index].mean()
        return float(a[index].mean() / below) if below else math.nan

    return bootstrap(quotient, prompts_of(mine), (0.0, math.inf)).as_metric()


def chance(task: Task, pictures: Pictures, shifts: int = 8) -> Metrics:
    """`chance/<name>/strict`: pictures read against the prompts `1..shifts` places on."""
    count = len(task.specs)
    taken = range(1, min(2 if task.edits else shifts, count - 1) + 1)
    if not taken:
        return {}
    rolled = [task.specs[k:] + task.specs[:k] for k in taken]
    strict = [verdicts(specs, pictures)[""].strict_PG for specs in rolled]
    return {f"chance/{task.name}/strict": estimate(np.concatenate(strict, axis=1))}


def spearman(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float | None:
    """Rank correlation (Spearman 1904), None if one of the two does not vary."""
    x, y = ranks(a), ranks(b)
    if x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def axes(tasks: Sequence[tuple[Task, Pictures]]) -> Metrics:
    """Rank correlations of the soft readings of each two axes over all pictures that both apply to.

    `axes/<a>~<b>`, and `axes/max_rank_correlation`, the largest of their absolute values. Pairs
    with fewer than `LEAST` pictures are left out.
    """
    soft = {
        axis: np.concatenate([read(axis, t.specs, p).soft_PG.reshape(-1) for t, p in tasks])
        for axis in oracle.AXES
    }
    out: Metrics = {}
    for a, b in combinations(soft, 2):
        use = np.isfinite(soft[a]) & np.isfinite(soft[b])
        value = spearman(soft[a][use], soft[b][use]) if use.sum() >= LEAST else None
        if value is not None:
            out[f"axes/{a}~{b}"] = {"value": value, "n": int(use.sum())}
    if out:
        worst = max(out.values(), key=lambda m: abs(m["value"]))
        out["axes/max_rank_correlation"] = {"value": abs(worst["value"]), "n": worst["n"]}
    return out


def reconstruction(
    name: str, specs: Sequence[Spec], before: UInt8[np.ndarray, "p 3 h w"], after: np.ndarray
) -> Mapping[str, dict[str, float | int]]:
    """`recon/<name>/strict` after a round trip, and `/strict_ratio`, its share of the originals'.

    The ratio is paired: over the pictures that read right before, how many still do.
    """
    first = read("fidelity", specs, before[:, None]).strict_PG
    then = read("fidelity", specs, after[:, None]).strict_PG
    out = {f"recon/{name}/strict": estimate(then)}
    if first.any():
        kept = then[first][:, None]
        out[f"recon/{name}/strict_ratio"] = estimate(kept)
    return out
