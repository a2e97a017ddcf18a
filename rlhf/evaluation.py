"""Held-out measurement through a cluster: fixed prompts, fixed seeds, the weights of a published
slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rewards.types import Score, Scores
from rlhf.cluster.base import Cluster
from rlhf.errors import ConfigError, TooManyFailures
from rlhf.rollout import Request, seeds_of
from rlhf.sampling import Sampler
from rlhf.stats import Estimate, bootstrap_gain, bootstrap_mean
from rlhf.types import GroupRef, Prompt, Version

EVALUATION = 2**31  # the "iteration" that keys evaluation seeds
ORACLE = "oracle/fidelity"
EDITS, EDIT_AXES = "edits", ("oracle/instruction", "oracle/consistency")


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How held-out pictures are made: `per_prompt` seeds for each prompt, and the settings to
    report.

    Settings: `guided` at `sampler.guidance`, `w1` unguided, `steps4` unguided in four steps.
    """

    sampler: Sampler
    per_prompt: int = 4
    settings: tuple[str, ...] = ("guided", "w1")
    seed: int = 1000

    def check(self) -> None:
        unknown = set(self.settings) - {"guided", "w1", "steps4"}
        if unknown:
            raise ConfigError(
                f"evaluation.settings: expected guided, w1 or steps4, got {sorted(unknown)}"
            )

    def samplers(self) -> dict[str, Sampler]:
        """Metric suffix -> sampler."""
        plain = replace(self.sampler, guidance=1.0)
        table = {
            "guided": ("", self.sampler),
            "w1": ("/w1", plain),
            "steps4": ("/steps4", replace(plain, steps=4)),
        }
        return dict(table[name] for name in self.settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One figure's values: one per picture, with the prompt each belongs to."""

    values: np.ndarray
    clusters: np.ndarray

    def estimate(self) -> Estimate:
        return bootstrap_mean(self.values, clusters=self.clusters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Figures by name (`heldout/objects/strict`, `heldout/objects/soft/w1`, ...) and the guided
    pictures' handles.
    """

    figures: Mapping[str, Measured]
    shown: tuple[GroupRef, ...]

    def row(self) -> dict[str, float]:
        return {name: float(m.values.mean()) for name, m in self.figures.items()}


def evaluate(
    cluster: Cluster, prompts: Sequence[Prompt], version: Version, protocol: Protocol, show: int = 8
) -> Evaluation:
    """Sample and score all settings. The handles of the first `show` groups are kept, the others
    released.
    """
    figures: dict[str, Measured] = {}
    shown: tuple[GroupRef, ...] = ()
    for suffix, sampler in protocol.samplers().items():
        request = Request(
            iteration=EVALUATION,
            prompts=tuple(prompts),
            seeds=seeds_of(protocol.seed, EVALUATION, len(prompts), protocol.per_prompt),
            sampler=sampler,
            purpose=f"heldout{suffix}",
        )
        refs = cluster.rollout(request, version)
        scores = cluster.score(refs)
        figures |= _figures(scores, prompts, suffix)
        if not shown:
            shown, refs = tuple(refs[:show]), refs[show:]
        cluster.release(refs)
    return Evaluation(figures=figures, shown=shown)


def _figures(scores: Scores, prompts: Sequence[Prompt], suffix: str) -> dict[str, Measured]:
    """Per category: the value of every judge by its name, but that the oracle's verdict on whole
    pictures is called soft and strict. An edit is right where the instruction was followed and the
    rest left alone: the lower of two readings, of samples that have both.
    """
    out: dict[str, Measured] = {}
    categories = sorted({p.category for p in prompts})
    for category in categories:
        deciding = EDIT_AXES if category == EDITS else (ORACLE,)
        for card in scores.judges:
            if card.name != ORACLE or category == EDITS:
                found = _rows(scores, prompts, category, (card.name,))
                out |= _measured(f"heldout/{category}/{card.name}{suffix}", found, "value")
        found = _rows(scores, prompts, category, deciding)
        out |= _measured(f"heldout/{category}/soft{suffix}", found, "value")
        out |= _measured(f"heldout/{category}/strict{suffix}", found, "strict")
    if not out:
        raise TooManyFailures(
            "evaluation: no judge scored a single picture: look at the judges' reasons"
        )
    return out


Rows = Sequence[tuple[int, Sequence[Score]]]  # prompt, and what each of some judges said


def _rows(scores: Scores, prompts: Sequence[Prompt], category: str, judges: Sequence[str]) -> Rows:
    """The samples of a category that all of `judges` scored; none if one of them is not there."""
    if not set(judges) <= set(scores.table):
        return []
    tables = [scores.table[name] for name in judges]
    return [
        (i, said)
        for i, prompt in enumerate(prompts)
        if prompt.category == category
        for said in zip(*(table[i] for table in tables), strict=True)
        if all(score.state == "ok" for score in said)
    ]


def _measured(name: str, rows: Rows, what: Literal["value", "strict"]) -> dict[str, Measured]:
    if not rows:
        return {}
    pick = (lambda s: s.value) if what == "value" else (lambda s: s.parts["strict"])
    values = [min(pick(score) for score in said) for _, said in rows]
    return {name: Measured(values=np.array(values), clusters=np.array([i for i, _ in rows]))}


def gains(before: Evaluation, after: Evaluation) -> dict[str, dict[str, float | int]]:
    """Before, after and the paired gain with its 95% interval, bootstrapped over prompts."""
    out: dict[str, dict[str, float | int]] = {}
    for name, first in before.figures.items():
        then = after.figures.get(name)
        if then is None or len(then.values) != len(first.values):
            continue
        gain = bootstrap_gain(first.values, then.values, clusters=first.clusters)
        out[name] = {
            "before": float(first.values.mean()),
            "after": float(then.values.mean()),
            "gain": gain.value,
            "low": gain.low,
            "high": gain.high,
            "n": gain.n,
        }
    return out
