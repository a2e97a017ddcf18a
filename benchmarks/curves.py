"""Keep the metrics of runs and draw their held-out curves on one figure.

    python benchmarks/curves.py demo runs/hybrid-seed0 runs/hybrid-seed1

writes benchmarks/results/demo/<run>.jsonl, <run>.result.json and benchmarks/results/demo.png.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rlhf.run import Run

RESULTS = Path(__file__).parent / "results"
SERIES = ("heldout/objects/strict", "heldout/objects/strict/w1")


def keep(run: Run, folder: Path) -> None:
    """Copy what a reader needs to redraw the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.root / "metrics.jsonl", folder / f"{run.name}.jsonl")
    shutil.copyfile(run.root / "result.json", folder / f"{run.name}.result.json")
    shutil.copyfile(run.config_path, folder / f"{run.name}.yaml")


def points(run: Run, series: str) -> list[tuple[int, float]]:
    """(iteration, value), with the measurement before training at 0."""
    metric = (run.read_json("result.json") or {"metrics": {}})["metrics"].get(series)
    start = [(0, metric["before"])] if metric else []
    return start + [(r["step"], r[series]) for r in run.rows() if r.get(series) is not None]


def draw(runs: list[Run], path: Path) -> None:
    """One panel per series, one line per run."""
    figure, axes = plt.subplots(1, len(SERIES), figsize=(10, 3.6), sharey=True)
    for axis, series in zip(axes, SERIES, strict=True):
        for run in runs:
            line = points(run, series)
            if line:
                axis.plot(*zip(*line, strict=True), marker="o", ms=3, label=run.name)
        axis.set(title=series, xlabel="iteration")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share strictly right")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", help="name of the figure and of its folder under benchmarks/results"
    )
    parser.add_argument("runs", nargs="+", help="run directories")
    given = parser.parse_args()
    runs = [Run.open(path) for path in given.runs]
    for run in runs:
        keep(run, RESULTS / given.name)
    draw(runs, RESULTS / f"{given.name}.png")
    for run in runs:
        for series in SERIES:
            line = points(run, series)
            if line:
                print(f"{run.name:24s} {series:28s} {line[0][1]:.3f} -> {line[-1][1]:.3f}")


if __name__ == "__main__":
    main()
