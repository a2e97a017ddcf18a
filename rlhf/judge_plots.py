"""Figures of a judge's benchmark: reliability, score against gold, canaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf.plots import BEFORE, COLOURS, GRID, INK, MUTED, grid, legend, title

Metric = Mapping[str, float | int]


def _axis_names(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=8, color=MUTED)
    ax.set_ylabel(y, fontsize=8, color=MUTED)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))


def reliability(bins: Sequence[tuple[float, float, int]]) -> Figure | None:
    """Share of pairs won against the probability of winning: (P, share, n) of each bin."""
    if not bins:
        return None
    figure, (ax,) = grid(1, 1, 3.6)
    said, won, _ = zip(*bins, strict=True)
    ax.plot([0, 1], [0, 1], "--", color=MUTED, lw=1, label="calibrated")
    ax.plot(said, won, "-", color=COLOURS[0], lw=1.4, marker="o", ms=5, label="judge")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    title(ax, f"{sum(n for _, _, n in bins) // 2:,} pairs in both orders, {len(bins)} equal bins")
    _axis_names(ax, "probability that the first is better", "share in which it was")
    legend(ax)
    return figure


def against_gold(gold: np.ndarray, score: np.ndarray) -> Figure | None:
    """A dot for each picture."""
    if not len(gold):
        return None
    figure, (ax,) = grid(1, 1, 3.6)
    ax.plot(gold, score, ".", color=COLOURS[0], ms=4, alpha=0.4)
    title(ax, f"{len(gold):,} pictures")
    _axis_names(ax, "gold", "score, higher is better")
    return figure


def canaries(
    wins: Mapping[str, Metric], unearned: Mapping[str, Metric], bar: float
) -> Figure | None:
    """How often each canary beats its clean picture, in red where its gold is not better (where
    nobody knows, all of it).
    """
    if not wins:
        return None
    figure, (ax,) = grid(1, 1, 0.9 + 0.34 * len(wins))
    for position, (name, one) in enumerate(wins.items()):
        bad = unearned.get(name, one)
        ax.barh(position, one["value"], 0.6, color=BEFORE, label="earned" * (position == 0))
        label = "unearned" * (position == 0)
        ax.barh(position, bad["value"], 0.6, color=COLOURS[7], label=label)
        ax.plot([bad["low"], bad["high"]], [position] * 2, color=INK, lw=1.2, marker="|", ms=6)
    ax.axvline(bar, color=MUTED, lw=1, ls="--")
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_yticks(range(len(wins)), list(wins), fontsize=8.5, color=INK)
    legend(ax)
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    title(ax, f"share of pictures that score higher spoilt; the bar is {bar:.0%}")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    return figure
