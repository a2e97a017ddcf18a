"""Faults in a real run, one by one, and what became of it. `make chaos` writes docs/faults.md.

    python -m benchmarks.chaos [--only NAME ...] [--work FOLDER] [--out FILE]

Each fault hits a run of `rlhf align` on the embedded base (Ray, two rollout workers, four
iterations, a checkpoint after each) at a fixed point of its second iteration or later. A run that
ended is continued with --resume. The final weights of all slots, the optimiser and the rows (times
apart) are compared with those of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.processes import actors, wait_for
from rlhf import checkpoint
from rlhf.files import atomic_write_text, json_text
from rlhf.metrics import read_rows
from rlhf.run import machine

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "faults.md", ROOT / "benchmarks" / "results" / "chaos.json"
ITERATIONS = 4
WAIT = 240.0  # seconds; most for a point of a run to be reached
JUDGE = f"{ROOT / 'benchmarks' / 'chaos_judge.py'}:redness"
SETTINGS = (
    "name=run", f"iterations={ITERATIONS}", "prompts_per_iteration=2", "group_size=4",
    "rollout.steps=4", "rollout.guidance=2.0", "policy.train=full", "loss.updates_per_rollout=2",
    "evaluation.every=0", "evaluation.steps=2", "evaluation.per_prompt=1", "checkpoints.every=1",
    "prompts.count=0", "evaluation.prompts.count=0", f"judges=['{JUDGE}']", "cluster.kind=ray",
    "cluster.rollout_workers=2", "cluster.learner_threads=1", "cluster.judge_seconds=15",
)  # fmt: skip


@dataclass
class Trial:
    """One run in a folder of its own, and what was done to it."""

    folder: Path
    settings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    exits: list[int] = field(default_factory=list)
    output: str = ""
    process: subprocess.Popen | None = None
    below: list[int] = field(default_factory=list)  # actors that end with the process

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "run"

    def start(self, resume: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        prompts = self.folder / "prompts.jsonl"
        texts = [f"a {c} {s} on white" for c in ("red", "blue") for s in ("circle", "square")]
        lines = [{"prompt": text, "folder": str(self.folder)} for text in texts]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths = (f"runs={self.folder / 'runs'}", f"prompts.source={prompts}")
        words = ("--resume", str(self.run)) if resume else (*SETTINGS, *paths)
        words += () if resume else (f"evaluation.prompts.source={prompts}", *self.settings)
        log = (self.folder / "output.txt").open("a")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "align", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def rows(self) -> list[dict[str, Any]]:
        rows = read_rows(self.run / "metrics.jsonl") if self.run.is_dir() else []
        return [{k: v for k, v in r.items() if not k.startswith("seconds/")} for r in rows]

    def until(self, rows: int, kind: str = "", doing: str = "") -> list[int]:
        """Wait for so many rows and then for an actor of a kind to be at a method; the ids of the
        kind's actors, those at it first.
        """
        reached = lambda: len(self.rows()) >= rows  # noqa: E731
        at = lambda: actors(self.pid, doing)[kind] if kind else [self.pid]  # noqa: E731
        if not (wait_for(reached, self.alive, WAIT) and wait_for(at, self.alive, WAIT)):
            raise RuntimeError(f"the run ended too early: {self.folder / 'output.txt'}")
        first = at()
        rest = actors(self.pid)[kind] if kind else []
        return [*first, *(pid for pid in rest if pid not in first)]

    def end(self) -> int:
        assert self.process is not None
        self.exits.append(self.process.wait(2 * WAIT))
        there = lambda: any(Path(f"/proc/{pid}").exists() for pid in self.below)  # noqa: E731
        wait_for(lambda: not there(), lambda: True, WAIT)
        self.output = (self.folder / "output.txt").read_text()
        return self.exits[-1]


def kill(kind: str, doing: str, count: int = 1, how: int = signal.SIGKILL) -> Callable:
    """Send a signal to actors of a kind while one of them is at a method."""

    def strike(trial: Trial) -> None:
        for pid in trial.until(1, kind, doing)[:count]:
            os.kill(pid, how)

    return strike


def driver(how: int) -> Callable[[Trial], None]:
    """Send a signal to the driver, which takes its actors along."""

    def strike(trial: Trial) -> None:
        (pid,) = trial.until(2)
        trial.below = [actor for some in actors(pid).values() for actor in some]
        os.kill(pid, how)

    return strike


def no_space(trial: Trial) -> None:
    """From now on the learner can write no file beyond a few bytes, as on a full disk."""
    learner = trial.until(1, "learner", "update")[0]
    resource.prlimit(learner, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def hang(name: str) -> Callable[[Trial], None]:
    def strike(trial: Trial) -> None:
        trial.until(1, "rollout", "rollout")
        (trial.folder / name).touch()

    return strike


@dataclass(frozen=True)
class Fault:
    """What is done, to a run with which settings, and what is expected to come of it."""

    what: str
    strike: Callable[[Trial], None]
    expected: str
    settings: tuple[str, ...] = ()


FAULTS = {
    "rollout": Fault(
        "a rollout worker is killed while it samples",
        kill("rollout", "rollout"),
        "replaced; its group is sampled again",
    ),
    "rollouts": Fault(
        "both rollout workers are killed at once",
        kill("rollout", "rollout", 2),
        "replaced; their groups are sampled again",
    ),
    "rollout-hangs": Fault(
        "a rollout worker stops and answers no more",
        kill("rollout", "rollout", 1, signal.SIGSTOP),
        "killed after `cluster.timeout_seconds`, replaced",
        ("cluster.timeout_seconds=60",),
    ),
    "reward": Fault(
        "the reward worker is killed", kill("reward", ""), "replaced; its group is judged again"
    ),
    "judge-hangs": Fault(
        "a judge hangs once",
        hang("hang"),
        "its worker is killed after `cluster.judge_seconds`, replaced, asked again",
    ),
    "judge-always-hangs": Fault(
        "a judge hangs from now on",
        hang("always"),
        "its scores are `failed`; the run stops at `max_failed_share`",
    ),
    "learner": Fault(
        "the learner is killed while it trains",
        kill("learner", "update"),
        "the run goes back to its last checkpoint by itself",
    ),
    "driver": Fault(
        "the driver is killed", driver(signal.SIGKILL), "its actors end with it; --resume"
    ),
    "sigterm": Fault(
        "SIGTERM to the driver", driver(signal.SIGTERM), "a checkpoint, a clean end; --resume"
    ),
    "disk": Fault(
        "the disk is full when the learner writes a checkpoint",
        no_space,
        "the run stops, the checkpoints before stay whole; --resume",
    ),
    "node": Fault(
        "a node with a rollout worker is lost",
        lambda trial: None,  # see `lose_a_node`
        "the other worker goes on; what lay there is sampled again",
        ("cluster.layout=disaggregated",),
    ),
}


def lose_a_node(trial: Trial) -> None:
    """The run joins two simulated nodes; the second has room for one rollout worker."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80_000_000}
    os.environ["RAY_AUTH_MODE"] = trial.environment["RAY_AUTH_MODE"] = "disabled"
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **small})
    other = nodes.add_node(num_cpus=1, object_store_memory=small["object_store_memory"])
    try:
        trial.settings = (*trial.settings, f"cluster.address={nodes.address}")
        trial.start()
        raylet = other.all_processes["raylet"][0].process.pid  # below us, not below the run
        at = lambda: actors(raylet, "rollout")["rollout"]  # noqa: E731
        wait_for(lambda: len(trial.rows()) >= 1, trial.alive, WAIT)
        wait_for(at, trial.alive, WAIT)
        nodes.remove_node(other, allow_graceful=False)
        trial.end()
    finally:
        nodes.shutdown()


def perform(name: str, work: Path) -> Trial:
    """The run with a fault, continued with --resume if it ended."""
    fault = FAULTS[name]
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    trial = Trial(folder, fault.settings)
    try:
        if name == "node":
            lose_a_node(trial)
        else:
            trial.start()
            fault.strike(trial)
            trial.end()
        if trial.exits[-1] != 0 and name != "judge-always-hangs":
            trial.start(resume=True)
            trial.end()
    finally:
        if trial.process is not None:
            trial.process.kill()  # nothing, where it has ended
    return trial


def undisturbed(work: Path) -> tuple[Trial, float]:
    trial = Trial(work / "undisturbed")
    kept = trial.folder / "seconds.json"
    if not kept.is_file():
        shutil.rmtree(trial.folder, ignore_errors=True)
        began = time.monotonic()
        trial.start()
        if trial.end() != 0:
            raise RuntimeError(trial.output)
        kept.write_text(json.dumps(time.monotonic() - began))
    return trial, json.loads(kept.read_text())


def same_weights(run: Path, other: Path) -> bool | None:
    """Whether all tensors of the last checkpoint are equal bit for bit; None if it is not there."""
    if not (run / "checkpoints" / f"step_{ITERATIONS:06d}").is_dir():
        return None
    mine, theirs = checkpoint.load(run, ITERATIONS), checkpoint.load(other, ITERATIONS)
    return mine.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(tensor, theirs.tensors[part][name])
        for part, tensors in mine.tensors.items()
        for name, tensor in tensors.items()
    )


def measure(name: str, work: Path) -> dict[str, Any]:
    """What became of the run with a fault."""
    reference, usual = undisturbed(work)
    began = time.monotonic()
    trial = perform(name, work)
    seconds = time.monotonic() - began
    return {
        "fault": FAULTS[name].what,
        "expected": FAULTS[name].expected,
        "exits": trial.exits,
        "extra_seconds": round(seconds - usual, 1),
        "weights_equal": same_weights(trial.run, reference.run),
        "rows_equal": trial.rows() == reference.rows(),
        "last_words": trial.output.strip().splitlines()[-1][-300:],
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The table of docs/faults.md."""
    lines = ["| fault | what the run does | exit codes | extra seconds | final weights, rows |"]
    lines.append("|---|---|---|---|---|")
    for name in FAULTS:
        if (got := results.get(name)) is None:
            continue
        equal = {True: "equal, bit for bit", False: "**differ**", None: "none: it stopped"}
        same = got["weights_equal"] and got["rows_equal"]
        exits = ", then ".join(map(str, got["exits"]))
        lines.append(
            f"| {got['fault']} | {got['expected']} | {exits} | {got['extra_seconds']:.0f} |"
            f" {equal[same]} |"
        )
    return "\n".join(lines)


def write(results: dict[str, dict[str, Any]], out: Path, page: Path = PAGE) -> None:
    """Keep the results and put their table between the marks of the page."""
    atomic_write_text(out, json_text(results))
    before, start, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end -->")
    atomic_write_text(page, f"{before}{start}{table(results)}\n{end}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--work", type=Path, help="where runs are kept; by default nowhere")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no run is left behind
    results = json.loads(options.out.read_text()) if options.out.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for name in options.only:
            results[name] = measure(name, options.work or Path(folder))
            results[name]["machine"] = machine()
            print(f"{name}: {json.dumps(results[name])}", flush=True)
            write(results, options.out)
    stopped = {"judge-always-hangs": None}  # the one fault that no run survives
    bad = [n for n in options.only if results[n]["weights_equal"] is not stopped.get(n, True)]
    bad += [n for n in options.only if n not in stopped and not results[n]["rows_equal"]]
    print(f"{len(options.only) - len(bad)} of {len(options.only)} as expected {bad or ''}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
