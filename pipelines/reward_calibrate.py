"""`rlhf reward calibrate`: what each judge sees in a frozen policy's own pictures, and the weights
that follow, category by category (`rewards.panel`).

signal    spread of its scores inside the group of one prompt: what an advantage is made of
noise     spread of its scores of one picture under changes that nobody sees, less what these do
          to all pictures of the group
validity  share of pairs inside a group that it orders as the judge in `gold` does

Writes <out>/weights.yaml, which `rlhf align weights_from=<out>/weights.yaml` takes, and
<out>/result.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from rewards import panel
from rewards.judge import Judge, load_judge, run_judge
from rlhf.advantage import Scheme
from rlhf.cluster import make_cluster
from rlhf.cluster.base import Cluster, ClusterConfig, Recipe, samples_of
from rlhf.errors import ConfigError, TooManyFailures
from rlhf.files import atomic_write_text, json_text
from rlhf.monitor import sign
from rlhf.policies.config import PolicyConfig
from rlhf.prompts import PromptSet, load_prompts
from rlhf.rollout import Request, seeds_of
from rlhf.run import report
from rlhf.sampling import Sampler
from rlhf.types import Prompt

CALIBRATION = 2**31 + 1  # the "iteration" that keys its seeds
AT_ONCE = 8  # groups in memory

Readings = Mapping[str, Mapping[str, panel.Reading]]  # category -> judge -> what is known


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """`gold`: judge -> a judge whose order of pictures is taken for the truth. `shares`: judge ->
    how much it should count, 1 by default. `scheme` is that of the run the weights are for.
    """

    prompts: PromptSet = field(default_factory=lambda: PromptSet(count=32))
    group_size: int = 8
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: Sampler = field(default_factory=lambda: Sampler(guidance=3.0))
    judges: tuple[str, ...] = ("oracle/fidelity",)
    gold: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    scheme: Scheme = "mo-grpo"
    rescored: int = 4  # pictures of each group that are scored again, changed; 0 = none
    judge_retries: int = 1
    max_failed_share: float = 0.2
    seed: int = 2000
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    out: str = "runs/calibrate"

    def check(self) -> None:
        if self.group_size < 2 or self.rescored not in (0, *range(2, self.group_size + 1)):
            raise ConfigError(
                "expected group_size >= 2 and rescored 0 or 2 to group_size, got"
                f" group_size={self.group_size} rescored={self.rescored}"
            )
        if not self.judges:
            raise ConfigError("judges: expected at least one, such as oracle/fidelity")
        if self.shares and not min(self.shares.values()) >= 0:
            raise ConfigError(f"shares: expected numbers of 0 and more, got {self.shares}")
        if not self.rollout.kernel == "ode":
            raise ConfigError(
                f"rollout.kernel: expected ode, got {self.rollout.kernel}: nothing is trained here"
            )
        self.rollout.check()
        self.cluster.check_untrained()


def plan_calibrate(config: CalibrateConfig) -> str:
    """The arithmetic, for --dry-run."""
    versions = 1 + len(panel.harmless(np.zeros((1, 3, 8, 8), np.uint8)))
    return "\n".join(
        [
            f"{config.prompts.asked() or 'all'} prompts x {config.group_size} samples,"
            f" {config.rollout.steps} steps each",
            f"each of {len(config.judges)} judges: {config.group_size} calls each prompt, and"
            f" {config.rescored * versions} for its noise; {len(config.gold)} gold judges",
            f"writes {config.out}/weights.yaml",
        ]
    )


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Roll out, score, weigh; returns the result.

    Raises:
        ConfigError: judges of one name, or shares and gold of judges that are not there.
        TooManyFailures: a judge failed for more than `max_failed_share` of the pictures.
    """
    began = time.monotonic()
    prompts = load_prompts(config.prompts)
    judges = _judges(config)
    gold = {name: load_judge(spec) for name, spec in config.gold.items()}
    tallies = {name: _Tally(judge, gold.get(name)) for name, judge in judges.items()}
    recipe = Recipe(policy=config.policy, judges=(), cluster=config.cluster)
    cluster = make_cluster(recipe)
    console = Console(stderr=True)
    try:
        for done, (prompt, pixels) in enumerate(_pictures(cluster, config, prompts), start=1):
            for tally in tallies.values():
                tally.add(prompt, pixels, config)
            if done % AT_ONCE == 0 or done == len(prompts):
                console.print(f"{done:5d}/{len(prompts)} prompts", highlight=False)
    finally:
        cluster.close()
    for tally in tallies.values():
        tally.check(config.max_failed_share)
    categories = sorted({p.category for p in prompts})
    readings = {c: {n: t.reading(c) for n, t in tallies.items()} for c in categories}
    return _write(config, readings, time.monotonic() - began)


def _judges(config: CalibrateConfig) -> dict[str, Judge]:
    loaded = [load_judge(spec) for spec in config.judges]
    judges = {judge.card.name: judge for judge in loaded}
    if len(judges) != len(loaded):
        raise ConfigError(f"judges: expected each once, got {[j.card.name for j in loaded]}")
    if unknown := sorted({*config.gold, *config.shares} - set(judges)):
        raise ConfigError(f"gold and shares: expected judges among {list(judges)}, got {unknown}")
    return judges


def _pictures(
    cluster: Cluster, config: CalibrateConfig, prompts: Sequence[Prompt]
) -> Iterator[tuple[Prompt, np.ndarray]]:
    """Prompt by prompt, the pictures (G, 3, H, W) that the frozen policy makes of it."""
    version = cluster.publish("reference")
    seeds = seeds_of(config.seed, CALIBRATION, len(prompts), config.group_size)
    for first in range(0, len(prompts), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        request = Request(
            iteration=CALIBRATION,
            prompts=tuple(prompts[some]),
            seeds=seeds[some],
            sampler=config.rollout,
            purpose=f"calibrate{first}",
        )
        refs = cluster.rollout(request, version)
        yield from zip(request.prompts, cluster.pixels(refs), strict=True)
        cluster.release(refs)


class _Tally:
    """The scores of one judge, by category."""

    def __init__(self, judge: Judge, gold: Judge | None) -> None:
        self.judge, self.gold = judge, gold
        self.values: dict[str, list[np.ndarray]] = {}  # groups; NaN where there is no score
        self.labels: dict[str, list[np.ndarray]] = {}
        self.again: dict[str, list[np.ndarray]] = {}  # pictures x (as it is, again, changed ...)
        self.asked = 0
        self.failed: list[str] = []

    def add(self, prompt: Prompt, pixels: np.ndarray, config: CalibrateConfig) -> None:
        """Score the pictures of a prompt, and some of them again."""
        values = self._score(self.judge, prompt, pixels, config.judge_retries)
        self.values.setdefault(prompt.category, []).append(values)
        if self.gold is not None:
            labels = self._score(self.gold, prompt, pixels, config.judge_retries)
            self.labels.setdefault(prompt.category, []).append(labels)
        some = pixels[: config.rescored]
        if not len(some) or not np.isfinite(values[: config.rescored]).any():
            return
        versions = (some, *panel.harmless(some).values())
        changed = [self._score(self.judge, prompt, v, config.judge_retries) for v in versions]
        table = np.stack([values[: config.rescored], *changed], axis=1)
        self.again.setdefault(prompt.category, []).append(table)

    def _score(self, judge: Judge, prompt: Prompt, pixels: np.ndarray, retries: int) -> np.ndarray:
        """Values with the good end up; NaN where the judge does not apply or failed."""
        scores = run_judge(judge, samples_of(prompt, pixels), retries)
        self.asked += sum(s.state != "na" for s in scores)
        self.failed += [f"{judge.card.name}: {s.reason}" for s in scores if s.state == "failed"]
        values = [np.nan if s.value is None else s.value for s in scores]
        return sign(judge.card) * np.array(values, dtype=float)

    def check(self, limit: float) -> None:
        """Raise TooManyFailures."""
        if self.asked and len(self.failed) > limit * self.asked:
            raise TooManyFailures(
                f"{len(self.failed)} of {self.asked} scores failed (limit {limit:.0%}); the first"
                f" reason: {self.failed[0]}"
            )

    def reading(self, category: str) -> panel.Reading:
        """What is known of the judge in a category."""
        values = self.values.get(category, [])
        groups = [group[np.isfinite(group)] for group in values]
        tables = [t[np.isfinite(t).all(axis=1)] for t in self.again.get(category, [])]
        tables = [table for table in tables if len(table)]
        twice = [np.abs(table[:, 1] - table[:, 0]).max() for table in tables]
        validity, pairs = None, 0
        if self.gold is not None:
            validity, pairs = panel.accuracy(values, self.labels[category])
        return panel.Reading(
            groups=sum(len(group) > 1 for group in groups),
            signal=panel.signal(groups),
            noise=panel.noise([np.delete(table, 1, axis=1) for table in tables]),
            repeat=float(max(twice)) if twice else None,
            validity=validity,
            pairs=pairs,
        )


def _write(config: CalibrateConfig, readings: Readings, seconds: float) -> dict[str, Any]:
    weights = panel.panel_weights(readings, config.shares, config.scheme != "weighted")
    weights = {c: {j: round(w, 6) for j, w in row.items()} for c, row in weights.items()}
    metrics: dict[str, dict[str, float | int]] = {}
    for category, row in readings.items():
        for judge, reading in row.items():
            name = f"calibrate/{category}/{judge}"
            for part in ("signal", "noise", "repeat", "validity"):
                value = getattr(reading, part)
                if value is not None:
                    metrics[f"{name}/{part}"] = {"value": value}
            metrics[f"{name}/weight"] = {"value": weights.get(category, {}).get(judge, 0.0)}
            if reading.pairs:
                metrics[f"{name}/validity"]["n"] = reading.pairs
    why = {c: {j: panel.verdict(r) for j, r in row.items()} for c, row in readings.items()}
    result = report(
        "reward calibrate", seconds, metrics, weights=weights, unweighted=why, out=config.out
    )
    head = f"# rlhf reward calibrate, for scheme {config.scheme}: category -> judge -> weight\n"
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "weights.yaml", head + yaml.safe_dump(weights, sort_keys=False))
    atomic_write_text(out / "result.json", json_text(result))
    return result


def summarise_calibrate(result: Mapping[str, Any]) -> str:
    """A line for each category and judge."""
    metrics = result["metrics"]
    width = max(len(judge) for row in result["unweighted"].values() for judge in row)
    head = ("signal", "noise", "s/n", "validity", "weight")
    lines = [f"{'category':<12}{'judge':<{width}}" + "".join(f"{h:>10}" for h in head)]
    for category, row in result["unweighted"].items():
        for judge, why in row.items():
            known = {
                part: metrics.get(f"calibrate/{category}/{judge}/{part}", {}).get("value")
                for part in ("signal", "noise", "validity", "weight")
            }
            ratio = known["signal"] / known["noise"] if known["signal"] and known["noise"] else None
            cells = (known["signal"], known["noise"], ratio, known["validity"], known["weight"])
            text = "".join(f"{'' if c is None else f'{c:.4g}':>10}" for c in cells)
            lines.append(f"{category:<12}{judge:<{width}}{text}  {why}".rstrip())
        if category not in result["weights"]:
            lines.append(f"{category}: no judge has a weight, so it is not in weights.yaml")
    return "\n".join([*lines, f"{result['out']}/weights.yaml"])
