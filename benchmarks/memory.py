"""Does any process of a run grow over 200 iterations? A tiny model on Ray, looked at from outside.

    python -m benchmarks.memory --out benchmarks/results/memory.json

`growth` is the line through a process's anonymous memory (pages that no file holds and no other
process shares) over the iterations that are watched, in MiB from one end of the line to the other;
`first` and `last` are medians of its first and last tenth. Before them come `--settle` iterations
in which heaps find their size; `settling` is what they took. Ends with 1 if a process grows by more
than `--limit`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.processes import actors, anonymous_mib, wait_for
from rlhf.files import atomic_write_text, json_text
from rlhf.models.tiny import random_pipeline
from rlhf.run import machine

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "name=memory", "policy.lora.rank=4", "prompts_per_iteration=2", "group_size=4",
    "rollout.steps=3", "loss.updates_per_rollout=1", "prompts.source=scenes/objects/2@train",
    "prompts.count=1000", "evaluation.prompts.source=scenes/objects/1@align-heldout",
    "evaluation.prompts.count=2", "evaluation.per_prompt=1", "evaluation.steps=2",
    "evaluation.every=20", "checkpoints.every=20", "cluster.kind=ray", "cluster.rollout_workers=2",
    "cluster.learner_threads=1", "monitor.pictures=true",
)  # fmt: skip


def watch(process: subprocess.Popen, run: Path, iterations: int) -> dict[str, list[float]]:
    """Memory of the driver and of each actor after every iteration that was seen, in MiB."""
    found: dict[str, list[float]] = {}
    path = run / "metrics.jsonl"
    count = lambda: path.read_bytes().count(b"\n") if path.is_file() else 0  # noqa: E731
    seen = 0
    while seen < iterations:
        if not wait_for(lambda: count() > seen, lambda: process.poll() is None, 300):  # noqa: B023
            break
        seen = count()
        pids = {"driver": process.pid}
        for kind, some in actors(process.pid).items():
            pids |= {f"{kind} {pid}": pid for pid in some}
        for name, pid in pids.items():
            try:
                found.setdefault(name, []).append(anonymous_mib(pid))
            except OSError:  # the run ends
                continue
    return found


def growth(values: Sequence[float], settle: int) -> dict[str, float]:
    """Figures of one process; see the module's docstring. `settle`: values before those watched."""
    steady = np.array(values[settle:])
    slope = np.polyfit(np.arange(len(steady)), steady, 1)[0]
    tenth = max(len(steady) // 10, 1)
    return {
        "growth": float(slope * (len(steady) - 1)),
        "first": statistics.median(steady[:tenth]),
        "last": statistics.median(steady[-tenth:]),
        "settling": statistics.median(steady[:tenth]) - values[0],
        "n": len(steady),
    }


def measure(iterations: int, settle: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run and watch; figures by process."""
    total = settle + iterations
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        base = Path(folder) / "base"
        random_pipeline().save_pretrained(base)
        paths = (f"policy.model={base}", f"runs={folder}", f"iterations={total}")
        words = [sys.executable, "-m", "pipelines.cli", "align", *SETTINGS, *paths, *overrides]
        began = time.monotonic()
        process = subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            found = watch(process, Path(folder) / "memory", total)
            code = process.wait(300)
        finally:
            process.kill()  # nothing, where it has ended
            process.wait()
        if code != 0:
            raise RuntimeError(f"the run ended with {code}: start it by hand: {' '.join(words)}")
        kinds: dict[str, dict[str, float]] = {}
        for name, values in sorted(found.items()):
            kind = name.split()[0]
            number = sum(other.startswith(kind) for other in kinds)
            kinds[f"{kind} {number}" if kind != "driver" else kind] = growth(values, settle)
    return {
        "iterations": iterations,
        "settle": settle,
        "seconds": round(time.monotonic() - began, 1),
        "mib": kinds,
        "machine": machine(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--settle", type=int, default=200)
    parser.add_argument("--limit", type=float, default=4.0, help="MiB that a process may grow by")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    if options.iterations < 8 or options.settle < 0:
        parser.error(
            f"expected --iterations of at least 8 and --settle of at least 0, got"
            f" {options.iterations} and {options.settle}"
        )
    result = {
        **measure(options.iterations, options.settle, options.overrides),
        "limit": options.limit,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        atomic_write_text(options.out, json_text(result))
    grown = [name for name, one in result["mib"].items() if one["growth"] > options.limit]
    print(f"grown: {', '.join(grown)}" if grown else "nothing grew")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
