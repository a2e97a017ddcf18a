"""`rlhf curate`: keep the prompts whose pictures differ in reward.

The policy that is not trained yet makes a group of pictures of every prompt, the judges score them,
and a prompt is kept where the composite reward of its group (weighted by category, as in training)
spans more than `threshold`. See `rlhf.curation`.

<run>/groups/NNNNNN.json   scores of some prompts; what is there is not sampled again
      kept.jsonl           the kept prompts, for `prompts.source` of `rlhf align`
      kept/<category>.jsonl   the same by category, for `prompts.sources`
      dropped.jsonl        the others, with columns `why` and `reward_range`
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rich.console import Console

from rewards.types import Scores
from rlhf import curation
from rlhf.batch import check_failures, joined
from rlhf.cluster import make_cluster
from rlhf.cluster.base import Cluster, ClusterConfig, Recipe
from rlhf.config import to_dict
from rlhf.curation import WHYS, Verdict
from rlhf.errors import ConfigError, Interrupted
from rlhf.files import atomic_write_text
from rlhf.policies.config import PolicyConfig
from rlhf.prompts import PromptSet, load_prompts
from rlhf.rollout import Request, seeds_of
from rlhf.run import Run
from rlhf.sampling import Sampler
from rlhf.types import Prompt, Version
from rlhf.weighing import check_judges, or_equal, read_weights

CURATION = 2**31 + 2  # the "iteration" that keys its seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`threshold` is in units of the composite reward, the weighted sum of the judges' scores.

    `weights`, `weights_from` and `required` are those of the run to come. `at_once` groups are
    sampled between two writes.
    """

    name: str = "curated"
    runs: str = "runs"
    seed: int = 3000
    prompts: PromptSet = field(default_factory=PromptSet)
    group_size: int = 8
    threshold: float = 0.0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: Sampler = field(default_factory=lambda: Sampler(guidance=3.0))
    judges: tuple[str, ...] = ("oracle/fidelity",)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    weights_from: str | None = None
    required: tuple[str, ...] = ()
    judge_retries: int = 1
    max_failed_share: float = 0.2
    at_once: int = 16
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"group_size: expected at least 2 (one picture has no range), got {self.group_size}"
            )
        if not self.threshold >= 0:
            raise ConfigError(
                f"threshold: expected 0 or more, got {self.threshold}: a range is never below 0"
            )
        if self.at_once < 1 or not 0 <= self.max_failed_share <= 1:
            raise ConfigError(
                "expected at_once >= 1 and max_failed_share from 0 to 1, got"
                f" {self.at_once} and {self.max_failed_share}"
            )
        if not self.judges:
            raise ConfigError("judges: expected at least one, such as oracle/fidelity")
        if self.weights and self.weights_from:
            raise ConfigError("write weights or weights_from: two answers to one question")
        self.rollout.check()
        self.cluster.check_untrained()


def plan(config: Config) -> str:
    """The arithmetic, for --dry-run."""
    number = config.prompts.asked() or "all"
    forwards = config.rollout.forwards(config.group_size)
    lines = [
        f"{number} prompts x {config.group_size} samples, {forwards} forwards each prompt",
        f"each of {len(config.judges)} judges: {config.group_size} calls each prompt",
        f"kept: range of the composite reward > {config.threshold:g}",
        f"writes {config.runs}/{config.name}/kept.jsonl",
    ]
    return "\n".join(lines)


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Measure what is not measured yet, decide, write; returns the result.

    Raises:
        ConfigError: measurements of other settings, or weights that do not fit the judges.
        TooManyFailures: a judge failed for more than `max_failed_share` of some prompts' pictures.
        Interrupted: SIGTERM came; what was measured is kept.
    """
    began, config = time.monotonic(), read_weights(config)
    prompts = load_prompts(config.prompts)
    rows = [curation.row_of(prompt) for prompt in prompts]  # what cannot be written shows here
    if resume is None:
        Run.vacant(config.runs, config.name)
        home = None
    else:
        home = Run.open(resume)
    parts = [prompts[i : i + config.at_once] for i in range(0, len(prompts), config.at_once)]
    home, scores = _measured(config, home, parts)
    weights = or_equal(config.weights, [card.name for card in scores.judges])
    categories = [prompt.category for prompt in prompts]
    found = curation.verdicts(scores, weights, categories, config.threshold, config.required)
    _write(home.root, rows, found)
    table = curation.counts(categories, found)
    return home.write_result(
        time.monotonic() - began,
        _metrics(table),
        threshold=config.threshold,
        table=table,
        kept=str(home.root / "kept.jsonl"),
    )


# --- measuring ------------------------------------------------------------------------------------


def _measured(
    config: Config, home: Run | None, parts: Sequence[Sequence[Prompt]]
) -> tuple[Run, Scores]:
    """The run and the scores of all parts, sampling those that are not there."""
    known = {i: s for i, part in enumerate(parts) if (s := _read(config, home, i, part))}
    if len(known) == len(parts) and home is not None:
        return home, joined(*(known[i] for i in range(len(parts))))
    cluster = make_cluster(
        Recipe(
            policy=config.policy,
            judges=config.judges,
            judge_retries=config.judge_retries,
            cluster=config.cluster,
        )
    )
    stopped: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    try:
        _check_judges(config, cluster, {p.category for part in parts for p in part})
        home = home or Run.create(config.runs, config.name, config, "curate")
        version = cluster.publish("reference")
        for i, part in enumerate(parts):
            if i in known:
                continue
            known[i] = _score(cluster, config, version, i, part)
            found = {"key": _key(config, part), **curation.stored(known[i])}
            home.write_json(_file(i), found)
            done = len(known)
            Console(stderr=True).print(f"{done:5d}/{len(parts)} parts", highlight=False)
            if stopped and done < len(parts):
                raise Interrupted(
                    f"stopped after {done} of {len(parts)} parts: continue with --resume"
                    f" {home.root}"
                )
    finally:
        signal.signal(signal.SIGTERM, previous)
        cluster.close()
    return home, joined(*(known[i] for i in range(len(parts))))


def _check_judges(config: Config, cluster: Cluster, categories: set[str]) -> None:
    names = [card.name for card in cluster.cards()]
    if len(set(names)) != len(config.judges):
        raise ConfigError(f"judges: expected each once, got {list(config.judges)}")
    check_judges(config.required, or_equal(config.weights, names), names, categories)


def _score(
    cluster: Cluster, config: Config, version: Version, index: int, part: Sequence[Prompt]
) -> Scores:
    first = index * config.at_once
    request = Request(
        iteration=CURATION,
        prompts=tuple(part),
        seeds=seeds_of(config.seed, CURATION, len(part), config.group_size, first),
        sampler=config.rollout,
        purpose="curate",
        first=first,
    )
    refs = cluster.rollout(request, version)
    scores = cluster.score(refs)
    cluster.release(refs)
    check_failures(scores, config.max_failed_share)
    return replace(scores, figures={}, seconds={})  # which files do not hold either


def _file(index: int) -> str:
    return f"groups/{index:06d}.json"


def _read(config: Config, home: Run | None, index: int, part: Sequence[Prompt]) -> Scores | None:
    """The scores of a part that was measured before. Raises ConfigError if other settings did."""
    found = None if home is None else home.read_json(_file(index))
    if found is None:
        return None
    if found["key"] != _key(config, part):
        raise ConfigError(
            f"expected the prompts, policy, rollout, judges and seed that {_file(index)} was"
            " measured with, got others: start a new run (threshold and weights may change)"
        )
    return curation.restored(found)


def _key(config: Config, part: Sequence[Prompt]) -> str:
    """What the scores of a part depend on."""
    settings = (config.policy, config.rollout, config.judges, config.seed, config.group_size)
    said = [[p.text, p.category, p.negative, p.sources, p.size, p.target] for p in part]
    text = json.dumps([to_dict(settings), said], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- what comes out -------------------------------------------------------------------------------


def _write(root: Path, rows: Sequence[dict[str, Any]], found: Sequence[Verdict]) -> None:
    pairs = list(zip(rows, found, strict=True))
    kept = [row for row, v in pairs if v.kept]
    dropped = [row | {"why": v.why, "reward_range": v.range} for row, v in pairs if not v.kept]
    _jsonl(root / "kept.jsonl", kept)
    _jsonl(root / "dropped.jsonl", dropped)
    for category in {row["category"] for row in rows}:
        own = [row for row in kept if row["category"] == category]
        _jsonl(root / "kept" / f"{quote(category, safe='')}.jsonl", own)


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    atomic_write_text(path, "".join(lines))


def _metrics(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    """`curate/<verdict>` and `curate/<category>/<verdict>`: shares of the prompts."""
    prompts = sum(row["prompts"] for row in table.values())
    whole = {why: sum(row[why] for row in table.values()) for why in WHYS}
    out = {f"curate/{why}": {"value": n / prompts, "n": prompts} for why, n in whole.items()}
    for category, row in table.items():
        for why in WHYS:
            share = row[why] / row["prompts"]
            out[f"curate/{category}/{why}"] = {"value": share, "n": row["prompts"]}
    return out


def summarise(result: Mapping[str, Any]) -> str:
    """A line for each category: how many prompts, what became of them, their ranges."""
    width = max(8, *map(len, result["table"]))
    heads = ("prompts", *WHYS)
    head = "".join(f"{h:>13}" for h in heads)
    lines = [f"{'category':<{width}}{head}   range: 10%, median, 90%"]
    for category, row in result["table"].items():
        cells = "".join(f"{row[h]:>13}" for h in heads)
        ranges = ", ".join(f"{q:.3f}" for q in row["range"] or ())
        lines.append(f"{category:<{width}}{cells}   {ranges}".rstrip())
    return "\n".join([*lines, result["kept"]])
