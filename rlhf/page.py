"""The report of a run: one page that says what it did, readable in any browser and without a
network.

Writes <run>/report.html with every picture inside, the plots once more as <run>/report/*.png, and
<run>/evaluations/report.json. Works on a run that is unfinished or damaged in part: a section
without data is left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from rlhf import panel_plots, plots
from rlhf.errors import CheckpointError
from rlhf.files import atomic_write_bytes, atomic_write_text
from rlhf.markup import document, escape, metric_table, picture, table
from rlhf.metrics import Row
from rlhf.panel_plots import Panel
from rlhf.run import Metric, Run


def write(target: Run) -> dict[str, Any]:
    """Write the report of a run and return what is stored about it.

    Raises OSError where the run cannot be written to.
    """
    start = time.perf_counter()
    notes: list[str] = []
    rows = _try(target.rows, notes, [])
    result = _try(lambda: target.read_json("result.json"), notes, None) or {}
    about = _try(target.about, notes, {})
    saved = _save_plots(target, rows, result)
    page = build(target, rows, result, about, saved, notes)
    atomic_write_text(target.root / "report.html", page)
    metrics = {"report/iterations": {"value": len(rows)}, "report/plots": {"value": len(saved)}}
    seconds = time.perf_counter() - start
    files = {"report": str(target.root / "report.html"), "plots": [str(p) for p in saved.values()]}
    return target.write_evaluation("report", "report", seconds, metrics, **files)


def _try(read: Any, notes: list[str], default: Any) -> Any:
    """A part of the run, or `default` and a note on the page if its file is damaged."""
    try:
        return read()
    except CheckpointError as error:
        notes.append(str(error))
        return default


def _save_plots(target: Run, rows: Sequence[Row], result: Mapping[str, Any]) -> dict[str, Path]:
    """PNG files of the plots that have data, by name."""
    metrics, panel = result.get("metrics", {}), Panel.of(rows)
    start = {"step": 0} | {name: m["before"] for name, m in metrics.items() if "before" in m}
    figures: dict[str, Figure | None] = {
        "gains": panel_plots.gains(metrics, panel),
        "rewards": panel_plots.rewards(rows),
        "heldout": panel_plots.heldout([start, *rows] if rows else [], panel),
        "monitor": plots.monitor(rows),
        "training": plots.training(rows),
    }
    saved = {}
    for name, figure in figures.items():
        path = target.root / "report" / f"{name}.png"
        path.unlink(missing_ok=True)  # an older report may have had more to show
        if figure is not None:
            buffer = BytesIO()
            figure.savefig(buffer, format="png", dpi=170)
            atomic_write_bytes(path, buffer.getvalue())
            saved[name] = path
    return saved


def build(
    target: Run,
    rows: Sequence[Row],
    result: Mapping[str, Any],
    about: Mapping[str, Any],
    saved: Mapping[str, Path],
    notes: Sequence[str],
) -> str:
    """The page as text."""
    program = result.get("program") or about.get("program") or "run"
    metrics, panel = result.get("metrics", {}), Panel.of(rows)
    sections = [
        f"<h1>{escape(target.name)}</h1>",
        f'<p class="sub">{escape(_summary(program, rows, result, about))}</p>',
        *(f"<p><b>Not readable:</b> {escape(note)}</p>" for note in notes),
        _tiles(metrics, panel),
        _plot("Before and after", "gains", saved, "Whiskers: 95% bootstrap interval of the gain."),
        _held(metrics, panel),
        _samples(target),
        _judges(target, rows),
        _plot("Reward", "rewards", saved, REWARD),
        _plot("Held-out prompts", "heldout", saved, "Fixed prompts and seeds."),
        _plot("Watching", "monitor", saved, _alarms(rows)),
        _plot("Training", "training", saved, "Over iterations."),
        _folded("All results", metric_table("Results", metrics)),
        *_evaluations(target),
        _machine(rows, result, about),
        _config(target),
    ]
    return document(target.name, sections)


def _plot(heading: str, name: str, saved: Mapping[str, Path], caption: str) -> str:
    if name not in saved:
        return ""
    return f"<h2>{heading}</h2><p>{caption}</p>{picture(saved[name], heading)}"


REWARD = (
    "On the training prompts of each iteration; many values are drawn faintly under their running"
    " average. What watches has no say: a total that rises while a watching judge falls is hacked."
)


def _folded(summary: str, inside: str) -> str:
    return f"<details><summary>{summary}</summary>{inside}</details>" if inside else ""


def _held(metrics: Mapping[str, Metric], panel: Panel) -> str:
    """Gains by measure and category, a table for each setting of the evaluation."""
    tables = panel_plots.held_table(metrics, panel)
    head = "Gain [95% interval over prompts]"
    parts = [f"<h3>{head}, {name}</h3>{table(*body)}" for name, body in tables.items()]
    return "".join(parts)


def _judges(target: Run, rows: Sequence[Row]) -> str:
    """Who judged, with which weight, how often in vain, and which groups were dropped."""
    try:
        config = yaml.safe_load(target.config_path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        config = {}
    head, lines = panel_plots.judges_table(rows, config.get("weights") or {})
    if not lines:
        return ""
    lost = panel_plots.dropped(rows)
    said = f"<p>Groups that taught nothing, by category and reason: {escape(lost)}.</p>"
    names = "<p>Weights by category; – has no say.</p>"
    return f"<h2>Judges</h2>{names}{table(head, lines)}{said if lost else ''}"


def _alarms(rows: Sequence[Row]) -> str:
    steps = [row["step"] for row in rows if row.get("monitor/alarm")]
    if not steps:
        return "What judges and training pictures look like over time. No alarm."
    return (
        f"Red: the {len(steps)} iterations with an alarm, the first {steps[0]}. See rlhf.monitor."
    )


def _summary(program: str, rows: Sequence[Row], result: Mapping[str, Any], about: Any) -> str:
    parts = [f"rlhf {program}"]
    if rows:
        parts.append(f"{len(rows)} iterations")
    total = sum(row.get("samples") or 0 for row in rows)
    if total:
        parts.append(f"{total:,.0f} pictures")
    seconds = result.get("seconds") or sum(row.get("seconds/total") or 0 for row in rows)
    if seconds:
        parts.append(_duration(seconds))
    if not result:
        parts.append("unfinished")
    if about.get("created"):
        parts.append(about["created"])
    return " · ".join(parts)


def _duration(seconds: float | int) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {left} s" if minutes else f"{seconds:.1f} s"


def _tiles(metrics: Mapping[str, Metric], panel: Panel) -> str:
    """The first gains as large figures: strict held-out ones if there are any."""
    pairs = {name: metric for name, metric in metrics.items() if "after" in metric}
    strict = {name: metric for name, metric in pairs.items() if name.endswith("/strict")}
    tiles = []
    for name, metric in list((strict or pairs).items())[:4]:
        interval = ""
        if "low" in metric:
            interval = f" [{metric['low']:+.3f}, {metric['high']:+.3f}]"
        tiles.append(
            f'<div class="tile"><span>{escape(panel_plots.headline(name, panel))}</span>'
            f"<b><i>{metric['before']:.3f} →</i> {metric['after']:.3f}</b>"
            f"<span>{metric['gain']:+.3f}{interval}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _samples(target: Run) -> str:
    """The sheets of the same prompts and seeds before and after, and the prompts in their order."""
    sheets = {name: target.samples / f"{name}.png" for name in ("before", "after")}
    present = {name: path for name, path in sheets.items() if path.is_file()}
    if not present:
        return ""
    cells = "".join(
        f"<div><h3>{name}</h3>{picture(path, f'samples {name}')}</div>"
        for name, path in present.items()
    )
    same = "<p>The same prompts and seeds, in the same order.</p>"
    prompts = "".join(f"<li>{escape(line)}</li>" for line in _prompts(target))
    listed = f"<ol>{prompts}</ol>" if prompts else ""
    return f'<h2>Samples</h2>{same}<div class="pair">{cells}</div>{listed}'


def _prompts(target: Run) -> list[str]:
    """samples/prompts.json as lines: a list of texts or of {"prompt", "seed"}, or {"prompts":
    list}.
    """
    try:
        data = json.loads((target.samples / "prompts.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    entries = data.get("prompts", []) if isinstance(data, dict) else data
    lines = []
    for entry in entries:
        if isinstance(entry, dict):
            text = entry.get("prompt", entry.get("text", ""))
            entry = f"{text} (seed {entry['seed']})" if "seed" in entry else text
        lines.append(str(entry))
    return lines


def _evaluations(target: Run) -> list[str]:
    """A table for each evaluation of the run; damaged ones are named."""
    sections = []
    for path in sorted(target.evaluations.glob("*.json")) if target.evaluations.is_dir() else []:
        notes: list[str] = []
        name = path.relative_to(target.root).as_posix()
        found = _try(lambda name=name: target.read_json(name), notes, {})
        sections += [f"<p><b>Not readable:</b> {escape(note)}</p>" for note in notes]
        if path.stem != "report":
            sections.append(metric_table(f"Evaluation: {path.stem}", found.get("metrics", {})))
    return sections


def _machine(rows: Sequence[Row], result: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Where it ran and what the time went to."""
    facts = {key: value for key, value in about.get("machine", {}).items() if value not in ("", [])}
    lines = [[key, ", ".join(value) if isinstance(value, list) else str(value)]
             for key, value in facts.items()]  # fmt: skip
    if "seconds" in result:
        lines.append(["whole run", _duration(result["seconds"])])
    for part in ("rollout", "reward", "refill", "train", "sync", "total"):
        spent = [row[f"seconds/{part}"] for row in rows if row.get(f"seconds/{part}") is not None]
        if spent:
            each = f"{sum(spent) / len(spent):.2f} s per iteration"
            lines.append([f"seconds/{part}", f"{_duration(sum(spent))}, {each}"])
    return f"<h2>Machine and time</h2>{table(['', ''], lines)}" if lines else ""


def _config(target: Run) -> str:
    if not target.config_path.is_file():
        return ""
    text = target.config_path.read_text(encoding="utf-8", errors="replace")
    again = (
        f"<p>The resolved form; <code>--config {escape(target.config_path)}</code> reads it.</p>"
    )
    shown = f"<details><summary>show</summary><pre>{escape(text)}</pre></details>"
    return f"<h2>Configuration</h2>{again}{shown}"
