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


def note(ax: Axes, text: str, x: float | int, y: float) -> None:
    """A figure beside the end of a bar."""
    ax.annotate(
        text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
    )


SIGNALS: Mapping[str, str] = {  # of rlhf.monitor and rewards.statistics, in words
    "fine": "energy in fine detail",
    "grid": "energy in one frequency (grids)",
    "overexposed": "over-exposed share of pixels",
    "diversity": "distance within a prompt",
    "beyond": "scores past their calibration",
    "disagreement": "judges disagree (1/3: unrelated)",
    "trend": "trend of the window, sigmas",
    "correlation": "rank correlation with reward",
}


def monitor(rows: Sequence[Row]) -> Figure | None:
    """Each judge's share of the advantage, and the monitor's figures; iterations with an alarm are
    marked.
    """
    shares = [m.group(0) for m in names(rows, r"advantage/share/.+")]
    panels = {"share of the advantage": shares} if len(shares) > 1 else {}
    for match in names(rows, r"monitor/([^/]+)(/.+)?"):
        if match.group(1) != "alarm":
            text = SIGNALS.get(match.group(1), match.group(1))
            panels.setdefault(text, []).append(match.group(0))
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
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])
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
SECONDS = ("rollout", "reward", "train", "sync", "refill")


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
