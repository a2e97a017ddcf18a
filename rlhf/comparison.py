"""A student of few steps beside its teacher, and beside the base that it was made of: pictures of
the same prompts from the same noise.

Of each kind of prompt `fewstep/<steps>/<kind>/...`, of all kinds `fewstep/<steps>/...`:

strict_ratio        share of strictly right pictures, over the teacher's
strict_gain         that share before (the baseline's) and after (the student's), paired
diversity           how far apart pictures of one prompt are: distance of two in a frozen encoder,
                    mean over pairs and prompts (the measure of `rewards.statistics.apart`)
diversity_ratio     over the teacher's; where there is one picture of each prompt, neither
preference/<judge>  share of pairs of one prompt and seed in which the judge scores the student's
                    picture above the teacher's; a tie is half. `/na`, `/failed`: how many pairs are
                    left out of it because the judge does not apply to one, or did not answer
seconds             of a picture, its condition read before, in calls of many
forwards_ratio, seconds_ratio   the teacher's for a picture, over the student's

`<figure>/baseline` says the same of the baseline, `diversity/teacher` and `seconds/teacher` of the
teacher; `heldout/<kind>/strict/teacher` and `/baseline` are shares of their own. 95% intervals are
drawn over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float

from rewards import images
from rewards.judge import Judge, load_judge, run_judge
from rewards.scenes.candidates import answer
from rewards.statistics import apart
from rewards.types import Score
from rlhf import heldout
from rlhf.errors import ConfigError
from rlhf.gallery import Album, Studio
from rlhf.heldout import Metrics, Pictures, Task
from rlhf.models.vision import Vision, load_vision
from rlhf.sampling import Sampler
from rlhf.stats import bootstrap_gain, bootstrap_mean, gain_metric

STUDENT, TEACHER, BASELINE = "student", "teacher", "baseline"
TIE = 1e-6  # scores nearer than this are equal: that much a judge rounds
ACROSS = 16  # pictures in a line of a sheet
BANDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Who paints, and how."""

    studio: Studio | Album
    sampler: Sampler


# --- what is read off pictures -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a judge said of the pictures of a task: higher is better, NaN where it said nothing."""

    value_PG: Float[np.ndarray, "p g"]
    failed_PG: Bool[np.ndarray, "p g"]

    @staticmethod
    def of(scores: Sequence[Score], shape: tuple[int, int], sign: float = 1.0) -> Said:
        """Scores in reading order; `sign` is -1 for a judge whose lower scores are better."""
        values = [np.nan if s.value is None else sign * s.value for s in scores]
        broken = [s.state == "failed" for s in scores]
        return Said(
            value_PG=np.array(values, dtype=float).reshape(shape),
            failed_PG=np.array(broken).reshape(shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One side's pictures of one task: P prompts, G pictures of each."""

    strict_PG: Bool[np.ndarray, "p g"]
    apart_P: Float[np.ndarray, " p"]  # mean distance of two pictures; NaN where G is 1
    said: Mapping[str, Said]  # by judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Eyes:
    """Who looks at pictures beside the oracle: a frozen encoder and judges."""

    vision: Vision
    device: str
    judges: Mapping[str, Judge]
    rows: int = 64  # pictures that the encoder sees at once

    @staticmethod
    def of(features: str, judges: Sequence[str], device: str = "cpu", rows: int = 64) -> Eyes:
        """By name, as `load_vision` and `load_judge` take them.

        Raises:
            ConfigError, RewardConfigError: no such encoder or judge, or two judges of one name.
        """
        found = [load_judge(name) for name in judges]
        named = {judge.card.name: judge for judge in found}
        if len(named) < len(found):
            raise ConfigError(
                "judges: expected judges of different names, got"
                f" {[judge.card.name for judge in found]}: name each once"
            )
        vision = load_vision(features, device)
        return Eyes(vision=vision, device=device, judges=named, rows=rows)

    @torch.no_grad()
    def features(self, pictures: Pictures) -> Float[np.ndarray, "p g d"]:
        """What the encoder makes of each picture: the mean over its last map."""
        flat = torch.from_numpy(pictures.reshape(-1, *pictures.shape[2:]))
        parts = [
            self.vision.pooled(images.to_float(part).to(self.device)).cpu()
            for part in flat.split(self.rows)
        ]
        return torch.cat(parts).numpy().reshape(*pictures.shape[:2], -1)

    def see(self, task: Task, pictures: Pictures) -> Seen:
        """The pictures of a task, read."""
        shape = pictures.shape[0], pictures.shape[1]
        samples = [
            answer(spec, picture)
            for spec, group in zip(task.specs, pictures, strict=True)
            for picture in group
        ]
        return Seen(
            strict_PG=heldout.strict_of(task, pictures),
            apart_P=np.array([apart(group) for group in self.features(pictures)]),
            said={
                name: Said.of(
                    run_judge(judge, samples), shape, 1.0 if judge.card.better == "higher" else -1.0
                )
                for name, judge in self.judges.items()
            },
        )


# --- figures -------------------------------------------------------------------------------------


def preference(name: str, mine: Sequence[Said], theirs: Sequence[Said], suffix: str) -> Metrics:
    """Share of pairs, over some tasks, in which the first side has the better score; and what was
    left out. See the module.
    """
    a, b = (heldout.flat([said.value_PG for said in side]) for side in (mine, theirs))
    broken = [heldout.flat([said.failed_PG for said in side]) for side in (mine, theirs)]
    prompts = heldout.prompts_of([said.value_PG for said in mine])
    known, failed = np.isfinite(a) & np.isfinite(b), broken[0] | broken[1]
    gap = (a - b)[known]
    out: Metrics = {}
    if known.any():
        wins = np.where(np.abs(gap) <= TIE, 0.5, gap > 0)
        out[name + suffix] = bootstrap_mean(wins, prompts[known]).as_metric()
    for reason, left_out in (("na", ~known & ~failed), ("failed", failed)):
        if left_out.any():
            out[f"{name}/{reason}{suffix}"] = {"value": int(left_out.sum()), "n": len(a)}
    return out


def beside(stem: str, mine: Sequence[Seen], theirs: Sequence[Seen], suffix: str = "") -> Metrics:
    """The figures of one side that compare it with another, over some tasks."""
    strict = heldout.ratio([s.strict_PG for s in mine], [s.strict_PG for s in theirs])
    several = [pair for pair in zip(mine, theirs, strict=True) if pair[0].strict_PG.shape[1] > 1]
    wide = [(own.apart_P[:, None], other.apart_P[:, None]) for own, other in several]
    spread = heldout.ratio([own for own, _ in wide], [other for _, other in wide]) if wide else None
    out: Metrics = {}
    for name, found in (("strict_ratio", strict), ("diversity_ratio", spread)):
        out |= {} if found is None else {f"{stem}/{name}{suffix}": found}
    for judge in mine[0].said:
        one, other = ([s.said[judge] for s in side] for side in (mine, theirs))
        out |= preference(f"{stem}/preference/{judge}", one, other, suffix)
    return out


def gain(before: Sequence[Seen], after: Sequence[Seen]) -> dict[str, float | int]:
    """Share of strictly right pictures of two sides, paired by prompt and seed."""
    parts = [s.strict_PG for s in before]
    one, other = heldout.flat(parts), heldout.flat([s.strict_PG for s in after])
    found = bootstrap_gain(one, other, heldout.prompts_of(parts))
    return gain_metric(float(one.mean()), float(other.mean()), found)


def figures(stem: str, seen: Mapping[str, Sequence[Seen]]) -> Metrics:
    """All that is said of some tasks; `seen` holds for each side what it painted for them."""
    out = beside(stem, seen[STUDENT], seen[TEACHER])
    if BASELINE in seen:
        out |= beside(stem, seen[BASELINE], seen[TEACHER], f"/{BASELINE}")
        out[f"{stem}/strict_gain"] = gain(seen[BASELINE], seen[STUDENT])
    for side, parts in seen.items():
        apart_P = np.concatenate([s.apart_P for s in parts])
        apart_P = apart_P[np.isfinite(apart_P)]
        if apart_P.size:
            out[f"{stem}/diversity{_suffix(side)}"] = heldout.estimate(apart_P[:, None])
    return out


def costs(stem: str, sides: Mapping[str, Side], seconds: Mapping[str, float]) -> Metrics:
    """`seconds` are those of a picture, by side."""
    rows = {name: side.sampler.forwards(1) for name, side in sides.items()}
    out: Metrics = {f"{stem}/seconds{_suffix(name)}": {"value": s} for name, s in seconds.items()}
    for what, found in (("forwards", rows), ("seconds", seconds)):
        out[f"{stem}/{what}_ratio"] = {"value": found[TEACHER] / found[STUDENT]}
    return out


def _suffix(side: str) -> str:
    return "" if side == STUDENT else f"/{side}"


# --- painting ------------------------------------------------------------------------------------


def sheet(task: Task, made: Mapping[str, Pictures], path: Path) -> None:
    """The first pictures: a line for the teacher, the student and the baseline, each column of one
    prompt and seed; of edits the source above them.
    """
    each = min(8, next(iter(made.values())).shape[1])
    prompts, rows = ACROSS // each, []
    for start in range(0, min(len(task.wanted), BANDS * prompts), prompts):
        stop = start + prompts
        if task.edits:
            rows.append([w.sources[0] for w in task.wanted[start:stop] for _ in range(each)])
        for name in (TEACHER, STUDENT, BASELINE):
            if name in made:
                rows.append([p for group in made[name][start:stop] for p in group[:each]])
    images.save_png(path, images.contact_sheet(rows))


def compare(tasks: Sequence[Task], sides: Mapping[str, Side], eyes: Eyes, folder: Path) -> Metrics:
    """All figures of the module, and a sheet for each task as `fewstep-<kind>.png`."""
    stem = f"fewstep/{sides[STUDENT].sampler.steps}"
    seen: dict[str, list[Seen]] = {name: [] for name in sides}
    spent, count = dict.fromkeys(sides, 0.0), 0
    out: Metrics = {}
    for task in tasks:
        made: dict[str, Pictures] = {}
        for name, side in sides.items():
            painted = side.studio.paint(task.wanted, side.sampler, f"{task.name} {name}")
            made[name], spent[name] = painted.pixels, spent[name] + painted.seconds
            seen[name].append(eyes.see(task, painted.pixels))
            if name != STUDENT:
                strict = heldout.estimate(seen[name][-1].strict_PG)
                out[f"heldout/{task.name}/strict/{name}"] = strict
        count += made[STUDENT].shape[0] * made[STUDENT].shape[1]
        sheet(task, made, folder / f"fewstep-{task.name.replace('/', '-')}.png")
        out |= figures(f"{stem}/{task.name}", {name: parts[-1:] for name, parts in seen.items()})
    out |= figures(stem, seen)
    return out | costs(stem, sides, {name: s / count for name, s in spent.items()})
