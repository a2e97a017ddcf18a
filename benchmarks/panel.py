"""What a panel of judges costs an alignment run: by the run's own timers, and bare.

    python -m benchmarks.panel
    python -m benchmarks.panel --config align/scenes --iterations 8 'judges=[...]'

The run: `panel/share` is what the judges that train worked in an iteration, in seconds of their
worker (`seconds/judge/<name>`), over `seconds/total`, as if nothing ran beside them; it is the
figure to hold against the bar of 0.25. `panel/waited_share` is what the run waited for scores after
the last picture was made (`seconds/reward`), which all judges share, those that watch too. Medians
over iterations, the first left out.

Bare: milliseconds of one thread per picture of the categories that each judge judges, alone, on
groups of the run's size; `panel/bare/<category>/together` for the panel one after the other, as a
reward worker asks it, where judges on the same towers pay for a picture once, and `/apart` the sum
of what they take alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pipelines import align
from rewards.judge import Judge, load_judge, run_judge
from rewards.scenes import world
from rewards.scenes.candidates import answer
from rewards.scenes.render import render
from rewards.trained import TowersJudge
from rewards.types import Sample
from rlhf import config
from rlhf.files import atomic_write_text, json_text
from rlhf.metrics import Row
from rlhf.plan import Config
from rlhf.run import Run, machine, report

BAR = 0.25
KINDS = (("objects", 2), ("portraits", 1), ("text", 1), ("edits", 1))
Metrics = dict[str, dict[str, float | int]]


def shares(rows: Sequence[Row], judges: Sequence[str]) -> Metrics:
    """The figures of a run's rows; see the module."""
    rows = rows[1:]

    def median(values: Sequence[float]) -> dict[str, float | int]:
        return {"value": statistics.median(values), "n": len(values)}

    spent = {name: [row[f"seconds/judge/{name}"] for row in rows] for name in judges}
    total = [row["seconds/total"] for row in rows]
    worked = [sum(parts) for parts in zip(*spent.values(), strict=True)]
    out = {
        "panel/share": median([w / t for w, t in zip(worked, total, strict=True)]),
        "panel/waited_share": median([r["seconds/reward"] / r["seconds/total"] for r in rows]),
        "panel/seconds": median(worked),
        "iteration/seconds": median(total),
    }
    return out | {f"panel/seconds/{name}": median(values) for name, values in spent.items()}


def group(category: str, level: int, seed: int, size: int) -> list[Sample]:
    """Noisy pictures of one prompt, none like another."""
    rng = np.random.default_rng(seed)
    spec = world.draw(category, seed, level=level)  # type: ignore[arg-type]
    picture = render(spec.target if isinstance(spec, world.Edit) else spec)
    noisy = [np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255) for _ in range(size)]
    return [answer(spec, image.astype(np.uint8)) for image in noisy]


def milliseconds(judges: Sequence[Judge], groups: Sequence[Sequence[Sample]]) -> float:
    """Of one picture, by judges that have seen none of them."""
    for judge in judges:  # libraries warm up on another group
        run_judge(judge, groups[0])
    took = 0.0
    for samples in groups[1:]:
        for judge in judges:
            if isinstance(judge, TowersJudge):
                judge.model.towers.forget()
        began = time.perf_counter()
        for judge in judges:
            run_judge(judge, samples)
        took += time.perf_counter() - began
    return 1000 * took / sum(map(len, groups[1:]))


def bare(judges: Mapping[str, Judge], size: int, count: int) -> Metrics:
    """Milliseconds per picture, one by one and together."""
    torch.set_num_threads(1)
    out: Metrics = {}
    for category, level in KINDS:
        groups = [group(category, level, seed, size) for seed in range(count + 1)]
        mine = {name: j for name, j in judges.items() if j.card.covers(category)}
        alone = {name: milliseconds([judge], groups) for name, judge in mine.items()}
        found = alone | {
            "apart": sum(alone.values()),
            "together": milliseconds(list(mine.values()), groups),
        }
        for name, value in found.items():
            out[f"panel/bare/{category}/{name}"] = {"value": value, "n": count * size}
    return out


def measure(name: str, iterations: int, groups: int, overrides: Sequence[str]) -> dict:
    """Run the configuration without its evaluations, then the judges bare. Returns the result."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        own = [f"runs={folder}", "name=panel", f"iterations={iterations + 1}", "evaluation.every=0"]
        few = ["evaluation.per_prompt=1", "evaluation.steps=2"]
        given = config.load(Config, name, [*overrides, *own, *few], "align")
        align.run(given)
        rows = Run(Path(folder) / "panel").rows()
    loaded = [load_judge(spec) for spec in given.judges]
    judges = {judge.card.name: judge for judge in loaded}
    metrics = shares(rows, list(judges)) | bare(judges, given.group_size, groups)
    seconds = time.monotonic() - began
    facts = {"align": name, "overrides": list(overrides), "bar": BAR, "machine": machine()}
    return report("bench panel", seconds, metrics, **facts)


def main() -> int:
    """Measure, write, print; 1 where the panel costs more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="key=value, as for rlhf align")
    parser.add_argument("--config", default="align/scenes")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--groups", type=int, default=12, help="of each category, bare")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/panel.json"))
    asked = parser.parse_args()
    result = measure(asked.config, asked.iterations, asked.groups, asked.overrides)
    atomic_write_text(asked.out, json_text(result))
    for name, metric in result["metrics"].items():
        print(f"{name:<40} {metric['value']:.4g}")
    return int(result["metrics"]["panel/share"]["value"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
