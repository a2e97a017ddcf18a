"""Arms of an alignment that are compared, and their seeds: what benchmarks/algorithms.py and
benchmarks/schemes.py have in common.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.curves import RESULTS, keep
from pipelines import align
from rlhf import config
from rlhf.files import atomic_write_text
from rlhf.plan import Config
from rlhf.run import Run

Gain = Mapping[str, float | int]
Done = dict[str, list[Run]]  # arm -> one run per seed
Arms = Mapping[str, Sequence[str]]  # its configuration, then overrides


def arguments(doc: str | None, name: str) -> argparse.ArgumentParser:
    """What both programs take, for results of this name."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="key=value, as for rlhf align")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", default=f"runs/{name}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="only what is done")
    return parser


def finished(base: str, name: str, overrides: Sequence[str]) -> Run:
    """The run of this name, found, continued or made. Raises ConfigError."""
    given = config.load(Config, base, [*overrides, f"name={name}"], "align")
    run = Run(Path(given.runs) / given.name)
    if not (run.root / "result.json").is_file():
        align.run(given, run.root if run.config_path.is_file() else None)
    return run


def compare(
    asked: argparse.Namespace,
    name: str,
    arms: Arms,
    table: Callable[[Done], str],
    draw: Callable[[Done, Path], None],
) -> None:
    """Run what is missing unless only a drawing was asked for; write runs, table and figure."""
    done: Done = {}
    for arm, (base, *own) in arms.items():
        for seed in asked.seeds:
            run = Run(Path(asked.runs) / f"{arm}-seed{seed}")
            if not asked.draw:
                given = [*own, *asked.overrides, f"runs={asked.runs}", f"seed={seed}"]
                run = finished(base, run.name, given)
            elif not (run.root / "result.json").is_file():
                continue
            keep(run, asked.out / name)
            done.setdefault(arm, []).append(run)
    text = table(done)
    atomic_write_text(asked.out / name / "table.md", text)
    draw(done, asked.out / f"{name}.png")
    print(text)


def spread(found: Sequence[Gain]) -> tuple[float, float, float]:
    """Mean gain, or value where there is none, and its range over seeds; the 95% interval over
    prompts of a single one.
    """
    values = [metric["gain"] if "gain" in metric else metric["value"] for metric in found]
    if len(values) == 1:
        return values[0], found[0]["low"], found[0]["high"]
    return sum(values) / len(values), min(values), max(values)


def shown(found: Sequence[Gain]) -> str:
    """`spread` as a cell of a table."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*spread(found))
