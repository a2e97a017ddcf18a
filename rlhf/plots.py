"""Plots of a run: rows of metrics in, figures out. Each returns None when the rows hold nothing for
it.

Drawn on figures of their own, so nothing here touches matplotlib's global state. Absent values
(None) leave gaps; no value is made up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = Mapping[str, Any]
Series = tuple[np.ndarray, np.ndarray]

INK, MUTED, GRID, PAPER = "#0b0b0b", "#52514e", "#e6e5e0", "#fcfcfb"
COLOURS = (
    "#2a78d6",
    "#eb6834",
    "#1baf7a",
    "#eda100",
    "#4a3aa7",
    "#e87ba4",
    "#008300",
    "#e34948",
)
BEFORE, AFTER = "#b9c7d8", COLOURS[0]
DASHES = ("-", "--", ":", "-.")
WIDTH = 9.0  # inches of every figure


def series(rows: Sequence[Row], name: str) -> Series:
    """Steps and values of one metric where it is present; both empty if it never is."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    array = np.array(pairs, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def names(rows: Sequence[Row], pattern: str) -> list[re.Match[str]]:
    """Matches of `pattern` with the metric names that have a value, by first appearance."""
    seen = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [found for name in seen if (found := re.fullmatch(pattern, name))]


def smooth(values: np.ndarray, weight: float = 0.8) -> np.ndarray:
    """Exponential average without the pull of its start: sum w^(t-s) v_s / sum w^(t-s)."""
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        out.append(total / norm)
    return np.array(out)


def grid(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, `height` inches each, styled."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * lines), layout="constrained", facecolor=PAPER)
    axes = [figure.add_subplot(lines, columns, i + 1) for i in range(count)]
    for ax in axes:
        ax.set_facecolor(PAPER)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRID)
        ax.tick_params(colors=MUTED, labelsize=8, length=0)
        ax.grid(axis="y", color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        ax.margins(x=0.02)
    return figure, axes


def title(ax: Axes, text: str) -> None:
    """A left-aligned panel title."""
    ax.set_title(text, loc="left", fontsize=9.5, color=INK)


def legend(ax: Axes) -> None:
    """A frameless legend, if there is more than one thing to tell apart."""
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(frameon=False, fontsize=7.5, labelcolor=MUTED, handlelength=2.8)


def line(ax: Axes, data: Series, colour: str, label: str = "", dash: str = "-") -> None:
    """One curve: every value when they are few, else the values faintly under their average."""
    steps, values = data
    if len(steps) <= 25:
        ax.plot(steps, values, dash, color=colour, lw=1.8, marker="o", ms=3, label=label)
        return
    ax.plot(steps, values, dash, color=colour, lw=0.8, alpha=0.3)
    ax.plot(steps, smooth(values), dash, color=colour, lw=2, label=label)


def gains(metrics: Mapping[str, Mapping[str, float | int]]) -> Figure | None:
    """Bars before and after for each metric that has both; the whisker: the gain's 95% interval."""
    pairs = {name: metric for name, metric in metrics.items() if "after" in metric}
    if not pairs:
        return None
    figure, (ax,) = grid(1, 1, 0.7 + 0.55 * len(pairs))
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_xticks([])
    for position, metric in enumerate(pairs.values()):
        before, after = metric["before"], metric["after"]
        ax.barh(position - 0.19, before, 0.34, color=BEFORE, label="before" * (position == 0))
        ax.barh(position + 0.19, after, 0.34, color=AFTER, label="after" * (position == 0))
        end = after
        if "low" in metric:
            low, high = before + metric["low"], before + metric["high"]
            ax.plot([low, high], [position + 0.19] * 2, color=INK, lw=1.2, marker="|", ms=6)
            end = max(after, high)
        _note(ax, f"{before:.3g}", max(before, 0), position - 0.19)
        _note(ax, f"{after:.3g}  ({metric['gain']:+.3g})", max(end, 0), position + 0.19)
    ax.set_yticks(range(len(pairs)), list(pairs), fontsize=8.5, color=INK)
    ax.axvline(0, color=MUTED, lw=0.8)
    ax.margins(x=0.15)
    ax.invert_yaxis()
    ax.legend(
        frameon=False,
        fontsize=8,
        labelcolor=MUTED,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    return figure


def _note(ax: Axes, text: str, x: float | int, y: float) -> None:
    """A figure beside the end of a bar."""
    ax.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
    )


def rewards(rows: Sequence[Row]) -> Figure | None:
    """reward/total, then each judge's mean with one standard deviation of its scores around it."""
    judges = [found.group(1) for found in names(rows, r"reward/(.+)/mean")]
    total = series(rows, "reward/total")
    panels = (["total"] if len(total[0]) else []) + judges
    if not panels:
        return None
    figure, axes = grid(len(panels), 2 if len(panels) in (2, 4) else 3, 2.3)
    for position, (ax, name) in enumerate(zip(axes, panels, strict=True)):
        if position == 0 and len(total[0]):
            line(ax, total, INK)
            title(ax, "reward/total")
            continue
        colour = COLOURS[judges.index(name) % len(COLOURS)]
        line(ax, series(rows, f"reward/{name}/mean"), colour)
        both = [r for r in rows if r.get(f"reward/{name}/std") is not None]
        steps, mean = series(both, f"reward/{name}/mean")
        std = series(
            [r for r in both if r.get(f"reward/{name}/mean") is not None], f"reward/{name}/std"
        )
        ax.fill_between(steps, mean - std[1], mean + std[1], color=colour, alpha=0.12, lw=0)
        title(ax, f"{name}: mean, ± std")
    return figure


def heldout(rows: Sequence[Row]) -> Figure | None:
    """Held-out figures: a panel per measure, a colour per category, a dash per setting."""
    found = names(rows, r"heldout/(.+)/(strict|soft)((?:/\w+)?)")
    if not found:
        return None
    measures = list(dict.fromkeys(f.group(2) for f in found))
    categories = list(dict.fromkeys(f.group(1) for f in found))
    settings = sorted({f.group(3) for f in found})
    figure, axes = grid(len(measures), 2, 2.9)
    for ax, measure in zip(axes, measures, strict=True):
        for match in (f for f in found if f.group(2) == measure):
            colour = COLOURS[categories.index(match.group(1)) % len(COLOURS)]
            dash = DASHES[settings.index(match.group(3)) % len(DASHES)]
            label = match.group(1) + match.group(3).replace("/", " ")
            line(ax, series(rows, match.group(0)), colour, label, dash)
        title(ax, f"held-out {measure}")
        ax.set_xlabel("step", fontsize=8, color=MUTED)
        legend(ax)
    return figure


def monitor(rows: Sequence[Row]) -> Figure | None:
    """What the watching judges say, each judge's share of the advantage, and the monitor's figures;
    iterations with an alarm are marked.
    """
    watch = {f"{m.group(1)} (watches)": [m.group(0)] for m in names(rows, r"watch/(.+)/mean")}
    shares = [m.group(0) for m in names(rows, r"advantage/share/.+")]
    panels = watch | ({"share of the advantage": shares} if len(shares) > 1 else {})
    for match in names(rows, r"monitor/([^/]+)(/.+)?"):
        if match.group(1) != "alarm":
            panels.setdefault(match.group(1), []).append(match.group(0))
    if not panels:
        return None
    figure, axes = grid(len(panels), 3, 2.2)
    steps, alarms = series(rows, "monitor/alarm")
    for ax, (text, present) in zip(axes, panels.items(), strict=True):
        for position, name in enumerate(present):
            label = name.split("/", 2)[-1]
            line(ax, series(rows, name), COLOURS[position % len(COLOURS)], label)
        for step in steps[alarms > 0]:
            ax.axvline(step, color=COLOURS[-1], lw=0.8, alpha=0.35)
        title(ax, text)
        legend(ax)
    return figure


PANELS: Mapping[str, tuple[str, ...]] = {
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
    "KL to the reference (velocity)": ("kl/velocity",),
    "clipped share": ("clip/low", "clip/high"),
    "max |ratio - 1| before update 1": ("ratio/first_max_dev",),
    "live share of samples": ("advantage/live",),
}
SECONDS = ("rollout", "reward", "train", "sync")


def training(rows: Sequence[Row]) -> Figure | None:
    """Panels on the health of the updates and where the seconds went."""
    wanted = {t: [n for n in ns if len(series(rows, n)[0])] for t, ns in PANELS.items()}
    wanted = {text: present for text, present in wanted.items() if present}
    ratio, spent = len(series(rows, "ratio/mean")[0]) > 0, _seconds(rows)
    count = len(wanted) + ratio + bool(spent)
    if not count:
        return None
    figure, axes = grid(count, 3, 2.2)
    for ax, (text, present) in zip(axes, wanted.items(), strict=False):
        for name, colour in zip(present, COLOURS, strict=False):
            line(ax, series(rows, name), colour, name)
        title(ax, text)
        legend(ax)
        if text.endswith(("share", "share of samples")):
            ax.set_ylim(bottom=0)
    if ratio:
        _ratio(axes[len(wanted)], rows)
    if spent:
        _stack(axes[-1], rows, spent)
    return figure


def _ratio(ax: Axes, rows: Sequence[Row]) -> None:
    both = [r for r in rows if None not in (r.get("ratio/mean"), r.get("ratio/std"))]
    (steps, mean), (_, std) = series(both, "ratio/mean"), series(both, "ratio/std")
    line(ax, series(rows, "ratio/mean"), COLOURS[0])
    ax.fill_between(steps, mean - std, mean + std, color=COLOURS[0], alpha=0.15, lw=0)
    ax.ticklabel_format(axis="y", useOffset=False)
    title(ax, "ratio: mean, ± std")


def _seconds(rows: Sequence[Row]) -> list[str]:
    return [part for part in SECONDS if len(series(rows, f"seconds/{part}")[0])]


def _stack(ax: Axes, rows: Sequence[Row], parts: list[str]) -> None:
    """Stacked seconds of the rows that have every part."""
    full = [r for r in rows if all(r.get(f"seconds/{part}") is not None for part in parts)]
    steps, _ = series(full, f"seconds/{parts[0]}")
    layers = [series(full, f"seconds/{part}")[1] for part in parts]
    colours = [COLOURS[SECONDS.index(part)] for part in parts]
    ax.stackplot(steps, *layers, labels=parts, colors=colours, edgecolor=PAPER, linewidth=0.6)
    title(ax, "seconds per iteration")
    ax.legend(frameon=False, fontsize=7.5, labelcolor=MUTED, ncols=2, loc="upper left")
    ax.set_ylim(top=1.45 * float(np.sum(layers, axis=0).max()))
