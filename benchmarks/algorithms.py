"""Every algorithm, and where guidance goes, on one figure: by pictures and at equal wall time.

    python -m benchmarks.algorithms                        # every arm, seed 0; again to continue
    python -m benchmarks.algorithms --arms hybrid guided unguided --seeds 0 1 2
    python -m benchmarks.algorithms --draw                 # table and figure of what is done

An arm is a shipped configuration and what it changes there; all have the same prompts, initial
latents, oracle and held-out prompts, and run in one process with one thread. The last three were
measured later and on slower cores; they are in benchmarks/results/further (--out), ten-updates on
twice as many held-out pictures. Writes
benchmarks/results/algorithms/<arm>-seed<k>.{jsonl,result.json,yaml}, table.md and
benchmarks/results/algorithms.png. A run that is there is not computed again; one that was killed
continues.

Seconds are those of the iterations, without evaluations. The columns at equal time read each run
where the quickest arm ended, on straight lines between its evaluations. "+10 points" is the number
of pictures at which the mean of the seeds first gained ten points with guidance, on the same lines;
a dash: never.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np

from benchmarks.arms import Arms, Done, arguments, compare, shown
from rlhf import plots
from rlhf.panel_plots import shared_legend
from rlhf.run import Run

COMMON = (
    "iterations=20", "checkpoints.every=10", "cluster.kind=local", "cluster.learner_threads=1",
    "evaluation.every=5", "evaluation.per_prompt=2",
)  # fmt: skip
LONG = ("iterations=30", "evaluation.every=10")
FINER = ("iterations=26", "checkpoints.every=13", "evaluation.every=13", "evaluation.per_prompt=4")
ARMS: Arms = {
    "hybrid": ("align/hybrid",),  # guided rollouts, unguided training
    "guided": ("align/guided",),  # guidance in both
    "unguided": ("align/unguided",),  # in neither
    "hybrid-high-noise": ("align/hybrid", "loss.sigma_span=[0.0,0.5]"),
    "awm": ("align/awm",),
    "grpo": ("align/grpo",),
    "grpo-all-steps": ("align/grpo", "rollout.window=[0,9]"),
    "grpo-recentred": ("align/grpo", "loss.name=grpo-recentred"),
    "guard": ("align/guard",),
    "dppo": ("align/dppo",),
    "ten-updates": ("align/objects", *FINER),
    "grpo-cps": ("align/grpo_cps", *LONG),
    "grpo-cps-recentred": (
        "align/grpo_cps", *LONG, "loss.name=grpo-recentred", "rollout.guidance=2.0",
    ),
}  # fmt: skip
GUIDED, UNGUIDED = "heldout/objects/strict", "heldout/objects/strict/w1"
POINTS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Means of an arm's seeds, equal lengths; 0 iterations first."""

    pictures: np.ndarray
    seconds: np.ndarray
    guided: np.ndarray
    unguided: np.ndarray


def curve(runs: Sequence[Run]) -> Curve:
    """Of one run per seed, cut to the evaluations that all of them have."""
    columns = []
    for run in runs:
        rows = run.rows()
        spent = np.cumsum([row["seconds/total"] for row in rows])
        seen = np.cumsum([row["samples"] for row in rows])
        metrics = run.read_json("result.json")["metrics"]  # type: ignore[index]
        at = [i for i, row in enumerate(rows) if GUIDED in row]
        columns.append(
            [np.array([0.0, *(values[i] for i in at)]) for values in (seen, spent)]
            + [
                np.array([metrics[name]["before"], *(rows[i][name] for i in at)])
                for name in (GUIDED, UNGUIDED)
            ]
        )
    length = min(len(one[0]) for one in columns)
    found = [np.mean([one[k][:length] for one in columns], axis=0) for k in range(4)]
    return Curve(pictures=found[0], seconds=found[1], guided=found[2], unguided=found[3])


def reached(one: Curve, points: float) -> float | None:
    """Pictures at which the guided mean first gained `points`; None if it never did."""
    gained = one.guided - one.guided[0]
    for i in range(1, len(gained)):
        if gained[i] >= points:
            part = (points - gained[i - 1]) / (gained[i] - gained[i - 1])
            return float(one.pictures[i - 1] + part * (one.pictures[i] - one.pictures[i - 1]))
    return None


def table(done: Done) -> str:
    """Markdown, a line per arm."""
    curves = {arm: curve(runs) for arm, runs in done.items()}
    end = min(one.seconds[-1] for one in curves.values())
    lines = [
        f"| arm | seeds | guided gain | unguided gain | seconds | guided at {end:.0f} s | unguided"
        f" at {end:.0f} s | pictures to +{100 * POINTS:.0f} points |",
        "|---" * 8 + "|",
    ]
    for arm, runs in done.items():
        one, metrics = curves[arm], [run.read_json("result.json")["metrics"] for run in runs]  # type: ignore[index]
        cells = [shown([m[name] for m in metrics]) for name in (GUIDED, UNGUIDED)]
        at = [float(np.interp(end, one.seconds, y) - y[0]) for y in (one.guided, one.unguided)]
        pictures = reached(one, POINTS)
        cells += [f"{one.seconds[-1]:.0f}", *(f"{value:+.3f}" for value in at)]
        cells.append("-" if pictures is None else f"{pictures:,.0f}")
        lines.append(f"| {arm} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(done: Done, path: Path) -> None:
    """Held-out curves, guided above and unguided below, by pictures and by seconds."""
    curves = {arm: curve(runs) for arm, runs in done.items()}
    end = min(one.seconds[-1] for one in curves.values())
    figure, axes = plots.grid(4, 2, 2.8)
    for k, (arm, one) in enumerate(curves.items()):
        look = {"color": plots.COLOURS[k % len(plots.COLOURS)], "lw": 1.4, "marker": "o", "ms": 3}
        look["ls"] = "-" if k < len(plots.COLOURS) else "--"
        for row, y in enumerate((one.guided, one.unguided)):
            axes[2 * row].plot(one.pictures, y, label=arm, **look)
            axes[2 * row + 1].plot(one.seconds, y, label=arm, **look)
    for i, ax in enumerate(axes):
        plots.title(ax, f"held-out objects strictly right, {('with', 'without')[i // 2]} guidance")
        ax.set_xlabel(("pictures", "seconds of training")[i % 2])
        if i % 2:
            ax.axvline(end, color=plots.MUTED, lw=0.8)
    shared_legend(figure, axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__, "algorithms")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    asked = parser.parse_args()
    arms = {arm: (ARMS[arm][0], *COMMON, *ARMS[arm][1:]) for arm in asked.arms}
    compare(asked, "algorithms", arms, table, draw)


if __name__ == "__main__":
    main()
