"""The same alignment under each scheme of combining judges (`rlhf.advantage`).

    python -m benchmarks.schemes                          # every scheme, seed 0; again to continue
    python -m benchmarks.schemes --seeds 0 1 2 iterations=20
    python -m benchmarks.schemes --draw                   # table and figure of what is done

One run for each scheme and seed of `--config` with the given overrides: the same prompts, initial
latents, noise and weights. Writes benchmarks/results/schemes/<scheme>-seed<k>.{jsonl,result.json,
yaml}, table.md and benchmarks/results/schemes.png. A run that is there is not computed again.

The table has the guided held-out gains of each scheme: what the oracle says, then what the judges
that trained say, by category; with several seeds the mean and the range over seeds, with one the
95% interval over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib

matplotlib.use("Agg")
from matplotlib.ticker import MaxNLocator

from benchmarks.arms import Done, Gain, arguments, compare, shown, spread
from rlhf import plots
from rlhf.advantage import Scheme
from rlhf.panel_plots import Held, Panel, shared_legend
from rlhf.run import Run

SCHEMES: tuple[str, ...] = get_args(Scheme)


def gains(runs: Sequence[Run]) -> tuple[Panel, dict[Held, list[Gain]]]:
    """The guided held-out figures of runs with the same judges: one gain per run."""
    panel = Panel.of([row for run in runs for row in run.rows()])
    out: dict[Held, list[Gain]] = {}
    for run in runs:
        metrics: Mapping[str, Any] = (run.read_json("result.json") or {}).get("metrics", {})
        for name, metric in metrics.items():
            held = Held.of(name, panel)
            if held is not None and not held.setting and "gain" in metric:
                out.setdefault(held, []).append(metric)
    return panel, out


def share(runs: Sequence[Run], judge: str) -> str:
    """Mean of a judge's share of the advantage."""
    rows = [row for run in runs for row in run.rows()]
    _, values = plots.series(rows, f"advantage/share/{judge}")
    return f"{values.mean():.2f}" if len(values) else ""


def table(done: Done) -> str:
    """Markdown: a line per category and measure and per judge's share, a column per scheme."""
    panel, _ = gains([run for runs in done.values() for run in runs])
    found = {scheme: gains(runs)[1] for scheme, runs in done.items()}
    every = dict.fromkeys(held for own in found.values() for held in own)
    order = sorted(every, key=lambda h: (h.category, panel.order(h.measure)))
    lines = ["| held-out gain | " + " | ".join(done) + " |", "|---" * (1 + len(done)) + "|"]
    for held in order:
        cells = [shown(own[held]) if held in own else "" for own in found.values()]
        lines.append(f"| {held.category}: {panel.label(held.measure)} | {' | '.join(cells)} |")
    for judge in panel.trains:
        cells = [share(runs, judge) for runs in done.values()]
        if any(cells):
            lines.append(f"| share of the advantage: {judge} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(done: Done, path: Path) -> None:
    """Held-out gains: a panel for each category, a line per measure, a colour per scheme."""
    panel, every = gains([run for runs in done.values() for run in runs])
    found = {scheme: gains(runs)[1] for scheme, runs in done.items()}
    kinds = sorted({held.category for held in every})
    measures = sorted({held.measure for held in every}, key=panel.order)
    figure, axes = plots.grid(len(kinds), len(kinds), 0.5 * len(measures) + 1)
    for ax, kind in zip(axes, kinds, strict=True):
        for k, scheme in enumerate(done):
            own = {h.measure: found[scheme][h] for h in found[scheme] if h.category == kind}
            colour = plots.COLOURS[k % len(plots.COLOURS)]
            for row, measure in enumerate(measures):
                if measure in own:
                    value, low, high = spread(own[measure])
                    y = row + 0.22 * (k - (len(done) - 1) / 2)
                    ax.plot([low, high], [y, y], color=colour, lw=1.2)
                    ax.plot(value, y, "o", color=colour, ms=5, label=scheme)
        ax.axvline(0, color=plots.MUTED, lw=0.8)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=3))
        labels = map(panel.label, measures) if ax is axes[0] else [""] * len(measures)
        ax.set_yticks(range(len(measures)), list(labels), fontsize=8)
        ax.set_ylim(len(measures) - 0.5, -0.5)
        plots.title(ax, kind)
    shared_legend(figure, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__, "schemes")
    parser.add_argument("--config", default="align/scenes")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    asked = parser.parse_args()
    arms = {scheme: (asked.config, f"scheme={scheme}") for scheme in asked.schemes}
    compare(asked, "schemes", arms, table, draw)


if __name__ == "__main__":
    main()
