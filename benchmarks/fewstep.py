"""Distilled students beside their teacher and its base, each way to distil with several seeds.

    python -m benchmarks.fewstep segments=runs/seg-seed0 segments=runs/seg-seed1 dmd=runs/dmd-seed0
    python -m benchmarks.fewstep opd=runs/opd mix-rl=runs/mix-rl --name opd-edits --set \
        teacher=runs/edits 'parts=[edits]' 'settings=[w1]'

ARM=RUN: a finished run of `rlhf distill`, or any other that `rlhf evaluate` opens; the same arm
again is another seed of it. Each is measured by `rlhf evaluate` into
<run>/evaluations/<name>.json, with the settings below and those of --set; one that is there is not
measured again, and must have been measured alike. Writes benchmarks/results/<name>.json and
<name>.png, the share of strictly right pictures over the teacher's by kind of prompt; the name is
fewstep unless --name gives another.

A figure `<arm>/<...>` is the mean of its seeds, low and high their range and n their number; of a
single seed it is that run's own, with its 95% interval over prompts. `runs` holds those of each.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from benchmarks.arms import spread
from benchmarks.curves import RESULTS
from pipelines import evaluate
from rlhf import config, plots
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.panel_plots import shared_legend
from rlhf.run import Metric, Run, machine, report

COMMON = (
    "teacher=scenes", "baseline=scenes", "parts=[objects,portraits,text]", "levels=[2]",
    "per_prompt=8", "judges=[scenes/fidelity,scenes/aesthetics,scenes/portrait]",
)  # fmt: skip
Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # arm -> run -> its evaluation


def measured(run: Run, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The evaluation of a run under a name, read or made. Raises what `rlhf evaluate` raises."""
    known = run.read_json(f"evaluations/{name}.json")
    if known is not None:
        return known
    given = [*COMMON, *overrides, f"model={run.root}", f"id={name}"]
    return evaluate.run(config.load(evaluate.Config, None, given, "evaluate"))


def settings_of(found: Found) -> dict[str, Any]:
    """What all were measured with; steps are each student's own.

    Raises:
        ConfigError: not all with the same.
    """
    every = {name: one["settings"] for own in found.values() for name, one in own.items()}
    alike = {name: {k: v for k, v in s.items() if k != "steps"} for name, s in every.items()}
    first = next(iter(alike))
    for name, settings in alike.items():
        if settings != alike[first]:
            raise ConfigError(
                f"expected all runs to be measured alike, got {settings} of {name} beside"
                f" {alike[first]} of {first}: remove that evaluation of one of them"
            )
    return alike[first]


def joined(found: Sequence[Mapping[str, Metric]]) -> dict[str, dict[str, float | int]]:
    """The figures that all seeds of an arm have, of several seeds their mean and range."""
    names = [n for n in found[0] if n.startswith("fewstep/") and all(n in one for one in found)]
    if len(found) == 1:
        return {name: dict(found[0][name]) for name in names}
    out = {}
    for name in names:
        value, low, high = spread([one[name] for one in found])
        out[name] = {"value": value, "low": low, "high": high, "n": len(found)}
    return out


def ratios(metrics: Mapping[str, Metric], of: str = "") -> dict[str, Metric]:
    """Kind of prompt, or `all` -> strict ratio, of the student or with `/baseline` of the base."""
    found = (re.fullmatch(rf"fewstep/\d+/(.*?)/?strict_ratio{of}", name) for name in metrics)
    return {m.group(1) or "all": metrics[m.group()] for m in found if m is not None}


def draw(arms: Mapping[str, Mapping[str, Metric]], path: Path) -> None:
    """A line for each kind, a colour for each arm; a ring where the base is in as many steps."""
    figure, (ax,) = plots.grid(1, 1, 0.8 + 0.45 * max(len(ratios(m)) for m in arms.values()))
    kinds = list(dict.fromkeys(kind for metrics in arms.values() for kind in ratios(metrics)))
    for k, (arm, metrics) in enumerate(arms.items()):
        colour = plots.COLOURS[k % len(plots.COLOURS)]
        for of in ("", "/baseline"):
            for kind, metric in ratios(metrics, of).items():
                y = kinds.index(kind) + 0.6 * ((k + 0.5) / len(arms) - 0.5)
                if not of:
                    ax.plot([metric["low"], metric["high"]], [y, y], color=colour, lw=1.2)
                face, label = ("none", f"{arm}: base") if of else (colour, arm)
                ax.plot(metric["value"], y, "o", ms=5, color=colour, mfc=face, label=label)
    ax.axvline(1, color=plots.MUTED, lw=0.8)
    ax.grid(False)
    ax.set_yticks(range(len(kinds)), kinds, fontsize=8.5)
    ax.set_ylim(len(kinds) - 0.5, -0.5)
    plots.title(ax, "strictly right, over the teacher's share")
    shared_legend(figure, [ax])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def arms_of(items: Sequence[str]) -> dict[str, list[Run]]:
    """ARM=RUN. Raises ConfigError for another form, or what is no run."""
    out: dict[str, list[Run]] = {}
    for item in items:
        arm, equals, path = item.partition("=")
        if not (arm and equals and path):
            raise ConfigError(f"expected ARM=RUN, got '{item}': write segments=runs/fewstep")
        out.setdefault(arm, []).append(Run.open(path))
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="ARM=RUN")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--name", default="fewstep")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked, began = parser.parse_args(argv), time.monotonic()
    found = {
        arm: {str(run.root): measured(run, asked.name, asked.overrides) for run in runs}
        for arm, runs in arms_of(asked.runs).items()
    }
    settings = settings_of(found)
    arms = {arm: joined([one["metrics"] for one in own.values()]) for arm, own in found.items()}
    result = report(
        "benchmarks.fewstep",
        time.monotonic() - began,
        {f"{arm}/{name}": metric for arm, own in arms.items() for name, metric in own.items()},
        settings=settings,
        runs={arm: {n: one["metrics"] for n, one in own.items()} for arm, own in found.items()},
        machine=machine(),
    )
    if any(ratios(metrics) for metrics in arms.values()):  # no teacher that is ever right: none
        draw(arms, asked.out / f"{asked.name}.png")
    atomic_write_text(asked.out / f"{asked.name}.json", json_text(result))
    for arm, metrics in arms.items():
        for kind, metric in ratios(metrics).items():
            low, high = metric["low"], metric["high"]
            print(f"{arm:16s} {kind:16s} {metric['value']:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
