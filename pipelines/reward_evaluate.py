"""`rlhf reward evaluate`: how good judges are on judgements that they were not trained on.

For each judge, on the rows of its axis: agreement on pairs, order within a prompt, calibration,
steadiness, canaries and biases (`rewards.benchmark.measure`), beside the same judge without
training. What is tuned is tuned on the dev split. docs/reward_benchmark.md says what each figure
means.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console

from rewards.benchmark.measure import CANARY_BAR, Findings, Metric, Settings, measure
from rewards.benchmark.rows import Bench, bench, read_judgements
from rewards.errors import DataError
from rewards.judge import Judge, load_judge
from rlhf import judge_plots, markup
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_bytes, atomic_write_text, json_text
from rlhf.run import machine, report

COLUMNS = {
    "pairwise_accuracy": "pairwise",
    "untrained/pairwise_accuracy": "untrained",
    "annotator_accuracy": "annotators",
    "same_policy_accuracy": "same policy",
    "spearman": "spearman",
    "ece": "ece",
    "failed": "failed",
    "na": "na",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """`judges`: names as `rewards.judge.load_judge` takes them. `data`: judgements as `rlhf reward
    train` takes them, with splits dev and test.

    A judge is measured on the axis of its own last name ("oracle/fidelity": fidelity), or on the
    one that `axes` gives it. `margin` says which differences of gold are clear: one standard
    deviation of the annotators' noise.
    """

    judges: tuple[str, ...] = ()
    data: str = ""
    axes: dict[str, str] = field(default_factory=dict)  # judge as written -> axis
    margin: float = 0.1
    margins: dict[str, float] = field(default_factory=dict)  # of an axis, in place of `margin`
    most: int | None = None  # rows of an axis and split, in whole prompts
    probes: int = 64  # prompts whose clean picture is turned into canaries
    steady: int = 64  # pictures and pairs asked again in another order
    batch: int = 64  # pictures that a judge gets at once
    seed: int = 0
    out: str = "evaluations/rewards"  # folder

    def check(self) -> None:
        least = min(self.probes, self.steady, self.batch, 1 if self.most is None else self.most)
        if least < 1 or self.margin < 0:
            raise ConfigError(
                f"expected most, probes, steady and batch >= 1 and margin >= 0, got {self.most},"
                f" {self.probes}, {self.steady}, {self.batch} and {self.margin}"
            )
        if len(set(self.judges)) < len(self.judges):
            raise ConfigError(f"judges: expected each once, got {list(self.judges)}")
        unknown = sorted(set(self.axes) - set(self.judges))
        if unknown:
            raise ConfigError(
                f"axes: expected judges among {list(self.judges)}, got {unknown}: write them as in"
                " judges"
            )

    def settings(self, axis: str) -> Settings:
        """What the benchmark needs of it, for an axis."""
        return Settings(
            margin=self.margins.get(axis, self.margin),
            probes=self.probes,
            steady=self.steady,
            batch=self.batch,
            seed=self.seed,
        )


def axis_of(config: EvaluateConfig, spec: str) -> str:
    """The axis that a judge is measured on."""
    short = spec.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return config.axes.get(spec, short)


def load(config: EvaluateConfig) -> dict[str, Judge]:
    """The judges by the name on their card. Raises ConfigError, RewardConfigError."""
    if not config.judges or not config.data:
        raise ConfigError(
            "expected judges and data: write judges='[oracle/fidelity]' data=FOLDER, the folder of"
            " dev-*.parquet and test-*.parquet, or a .jsonl file"
        )
    judges: dict[str, Judge] = {}
    for spec in config.judges:
        judge = load_judge(spec)
        if judge.card.name in judges:
            raise ConfigError(f"judges: two are called {judge.card.name!r}: leave one out")
        judges[judge.card.name] = judge
    return judges


def split(config: EvaluateConfig, name: str, axis: str) -> Bench:
    """The rows of a split and axis. Raises DataError."""
    try:
        return bench(read_judgements(config.data, name, axis, config.most))
    except DataError as error:
        raise DataError(f"{error}. (axes='{{JUDGE: AXIS}}' says whose rows are whose)") from error


# --- the page -------------------------------------------------------------------------------------


def canary_rates(
    metrics: Mapping[str, Metric], stem: str = ""
) -> tuple[dict[str, Metric], dict[str, Metric]]:
    """Of each canary all wins, and the unearned ones where the gold is known."""
    wins: dict[str, Metric] = {}
    unearned: dict[str, Metric] = {}
    for key, metric in metrics.items():
        if key.startswith(f"{stem}canary/"):
            name, _, kind = key.removeprefix(f"{stem}canary/").partition("/")
            (unearned if kind else wins)[name] = metric
    return wins, unearned


def draw(name: str, found: Findings, folder: Path) -> dict[str, Path]:
    """PNG files of the figures that have data, by heading."""
    figures = {
        "Reliability": judge_plots.reliability(found.bins),
        "Score against gold": judge_plots.against_gold(found.gold, found.score),
        "Canaries": judge_plots.canaries(*canary_rates(found.metrics), CANARY_BAR),
    }
    saved = {}
    for heading, figure in figures.items():
        if figure is not None:
            stem = f"{name}-{heading}".lower().translate(str.maketrans("/: ", "---"))
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            saved[heading] = folder / f"{stem}.png"
            atomic_write_bytes(saved[heading], buffer.getvalue())
    return saved


def section(name: str, about: Mapping[str, Any], found: Findings, saved: Mapping[str, Path]) -> str:
    """What the page says of one judge."""
    facts = f"Axis {about['axis']}: {about['test']}; tuned on {about['dev']}."
    parts = [f"<h2>{markup.escape(name)}</h2><p>{markup.escape(facts)}</p>"]
    for label in ("flags", "reasons"):
        counts = about[label]
        if counts:
            rows = [[text, f"{count:,}"] for text, count in counts.items()]
            parts.append(markup.table([label, "pictures"], rows))
    for heading, path in saved.items():
        parts.append(f"<h3>{heading}</h3>{markup.picture(path, heading)}")
    return "".join(parts) + markup.metric_table("Figures", found.metrics)


def _counts(one: Bench) -> str:
    prompts = len(set(one.group.tolist()))
    return f"{len(one.first):,} pairs of {len(one.samples):,} pictures of {prompts:,} prompts"


# --- the program ----------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, write the figures, the page and the result, return the result.

    Raises:
        ConfigError, RewardConfigError, DataError: a judge, the data or its axis is not there.
    """
    began, console = time.monotonic(), Console(stderr=True)
    judges, folder = load(config), Path(config.out)
    axes = {name: axis_of(config, spec) for name, spec in zip(judges, config.judges, strict=True)}
    data = {a: {s: split(config, s, a) for s in ("dev", "test")} for a in set(axes.values())}
    metrics: dict[str, Any] = {}
    about: dict[str, Any] = {}
    sections = []
    for name, judge in judges.items():
        sides = data[axes[name]]
        found = measure(judge, sides["dev"], sides["test"], config.settings(axes[name]), axes[name])
        metrics |= {f"judge/{name}/{key}": value for key, value in found.metrics.items()}
        about[name] = {
            "axis": axes[name],
            "revision": judge.card.revision,
            "dev": _counts(sides["dev"]),
            "test": _counts(sides["test"]),
            "flags": dict(found.flags),
            "reasons": dict(found.reasons.most_common(5)),
        }
        sections.append(section(name, about[name], found, draw(name, found, folder / "figures")))
        console.print(f"{name}: {about[name]['test']}", highlight=False)
    page = folder / "report.html"
    result = report(
        "reward evaluate",
        time.monotonic() - began,
        metrics,
        judges=about,
        data=config.data,
        margin=config.margin,
        margins=config.margins,
        canary_bar=CANARY_BAR,
        page=str(page),
        machine=machine(),
    )
    head = "<h1>Judges</h1>" + f'<p class="sub">{markup.escape(config.data)}</p>'
    rows = _rows(result)
    atomic_write_text(page, markup.document("Judges", [head, markup.table(*rows), *sections]))
    atomic_write_text(folder / "result.json", json_text(result))
    return result


def plan_evaluate(config: EvaluateConfig) -> str:
    """What would be measured on what, for --dry-run."""
    judges, lines = load(config), []
    for (name, judge), spec in zip(judges.items(), config.judges, strict=True):
        axis = axis_of(config, spec)
        one = split(config, "test", axis)
        lines.append(f"{name} ({judge.card.revision}) on {axis}: {_counts(one)}")
    return "\n".join(lines)


def _rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of judges; the worst canary by wins that its gold does not
    explain.
    """
    metrics, lines = result["metrics"], []
    for name in result["judges"]:
        cells = [_cell(metrics.get(f"judge/{name}/{key}")) for key in COLUMNS]
        wins, unearned = canary_rates(metrics, f"judge/{name}/")
        rates = {key: metric["value"] for key, metric in (wins | unearned).items()}
        worst = max(rates, key=lambda key: rates[key]) if any(rates.values()) else ""
        cells.append(f"{rates.get(worst, 0.0):.3f} {worst}".rstrip() if rates else "-")
        lines.append([name, *cells])
    return ["", *COLUMNS.values(), "worst canary"], lines


def summarise_evaluate(result: Mapping[str, Any]) -> str:
    """A row for each judge: figures with half their 95% interval."""
    head, lines = _rows(result)
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *lines)
    ]
    foot = f"page: {result['page']}; {result['seconds']:.0f} seconds"
    return "\n".join([*shown, "", foot])


def _cell(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return "-"
    text = f"{metric['value']:.3f}"
    return f"{text} ±{(metric['high'] - metric['low']) / 2:.3f}" if "low" in metric else text
