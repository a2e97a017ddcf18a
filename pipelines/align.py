"""`rlhf align`: train a policy on the scores of judges.

Guided rollouts, unguided training: `rollout.guidance` is the guidance of the pictures that are
scored, and `train_guidance` (1 by default) that of the field in the loss. See `rlhf.loop` for the
iteration itself.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rewards import images
from rlhf import checkpoint, page
from rlhf.bare import work_of
from rlhf.cluster import make_cluster
from rlhf.cluster.base import Cluster
from rlhf.errors import Interrupted, LearnerLost, RewardHacked
from rlhf.evaluation import Evaluation, Measured, evaluate, gains
from rlhf.loop import align, align_overlapped
from rlhf.metrics import MetricsLog
from rlhf.monitor import Monitor
from rlhf.plan import Config, Plan
from rlhf.prompts import batch_of, load_prompts
from rlhf.run import Run
from rlhf.types import GroupRef, Prompt, Version


class Recorder:
    """Rows, pictures, held-out figures and checkpoints of a run; stops it cleanly on SIGTERM."""

    def __init__(
        self, run: Run, config: Config, cluster: Cluster, held_out: Sequence[Prompt]
    ) -> None:
        self.run, self.config, self.cluster, self.held_out = run, config, cluster, held_out
        cards = cluster.cards()
        watch = [card.name for card in cards[len(config.judges) :]]
        self.monitor = Monitor(config.monitor, cards, watch, run.rows())
        self.log = MetricsLog(run.root)
        self.console = Console(stderr=True, markup=False)
        self.latest: Evaluation | None = None
        self.stopping = False

    def measure(self, slot: str, name: str) -> Evaluation:
        """Evaluate a slot and keep its guided pictures as samples/<name>.png."""
        version = self.cluster.publish(slot)
        result = evaluate(self.cluster, self.held_out, version, self.config.protocol())
        pictures = self.cluster.pixels(result.shown)
        shown = [ref.prompt for ref in result.shown]
        per = self.config.evaluation.per_prompt
        images.contact_sheet(sheet(shown, pictures)).save(self.run.samples / f"{name}.png")
        texts = [p.text for p in shown]
        self.run.write_json("samples/prompts.json", {"prompts": texts, "per_prompt": per})
        self.cluster.release(result.shown)
        self.latest = result
        return result

    def observe(
        self, iteration: int, refs: list[GroupRef], row: dict[str, float], version: Version
    ) -> Version:
        """See `rlhf.loop.Observer`. Returns the version that the next rollouts use."""
        c = self.config
        row |= {"policy_version": version.step}
        row |= {"reward_calls": row["samples"] * len(c.recipe().judges)}
        last = iteration == c.iterations
        if last or (c.evaluation.every and iteration % c.evaluation.every == 0):
            row |= self.measure(c.evaluation.slot, f"step_{iteration:06d}").row()
            version = self.cluster.publish("behaviour")
        figures, alarms = self.monitor.observe(row)
        self.log.log({"step": iteration, **row, **figures})
        self.console.print(progress_line(iteration, c.iterations, row), highlight=False)
        for alarm in self.monitor.new(alarms) if c.monitor.warn else ():
            self.console.print(f"      warning: {alarm.text}", style="yellow", highlight=False)
        hacked = bool(alarms) and c.monitor.stop
        if last or self.stopping or hacked or iteration % c.checkpoints.every == 0:
            strict = [v for k, v in row.items() if k.endswith("/strict")]
            metric = float(np.mean(strict)) if strict else row.get("reward/total")
            keep = c.checkpoints
            self.cluster.save(
                self.run.checkpoints, iteration, keep.keep_last, keep.keep_best, metric
            )
        if hacked and not last:
            raise RewardHacked(
                f"stopped after iteration {iteration}: {alarms[0].text}: look at the pictures,"
                f" then continue with --resume {self.run.root} monitor.stop=false, or change the"
                " judges"
            )
        if self.stopping and not last:
            raise Interrupted(
                f"stopped after iteration {iteration}: continue with --resume {self.run.root}"
            )
        return version

    def stop(self, *_: object) -> None:
        self.stopping = True


def sheet(prompts: Sequence[Prompt], pictures: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Rows of pictures to look at: two prompts each, or where some are edits one each, behind what
    it edits.
    """
    rows = [list(group) for group in pictures]
    before = [[images.load_image(path) for path in p.sources] for p in prompts]
    most = max(map(len, before))
    if not most:
        return [sum(rows[i : i + 2], []) for i in range(0, len(rows), 2)]
    blank = [np.full_like(row[0], 255) for row in rows]
    return [
        [*sources, *[white] * (most - len(sources)), *row]
        for sources, white, row in zip(before, blank, rows, strict=True)
    ]


def progress_line(iteration: int, total: int, row: Mapping[str, float]) -> str:
    """One line for the terminal; of the held-out figures the strict ones, if there are any."""
    parts = [f"{iteration:4d}/{total}", f"reward {row.get('reward/total', float('nan')):.3f}"]
    parts += [
        f"live {row['advantage/live']:.2f}",
        f"loss {row['loss']:+.4f}",
        f"{row['seconds/total']:.1f} s",
    ]
    held = {k.removeprefix("heldout/"): v for k, v in row.items() if k.startswith("heldout/")}
    strict = {k: v for k, v in held.items() if "/strict" in k}
    return "  ".join([*parts, *(f"{name} {value:.3f}" for name, value in (strict or held).items())])


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Align, evaluate before and after, write result.json and report.html; returns the result.

    When a learner is lost, the run goes on from its last checkpoint, `cluster.restarts` times.
    """
    left = config.cluster.restarts
    while True:
        try:
            return _run(config, resume)
        except LearnerLost as error:
            home = resume or Path(config.runs) / config.name
            if not left or not (home / "config.yaml").is_file():
                raise
            said = f"{error}: goes on by itself"
            Console(stderr=True, markup=False).print(said, style="yellow")
            left, resume = left - 1, home


def _run(config: Config, resume: Path | None) -> dict[str, Any]:
    began, config = time.monotonic(), config.resolved()
    prompts, held_out = load_prompts(config.prompts), load_prompts(config.evaluation.prompts)
    batch_of(prompts, config.prompts_per_iteration, 1, config.seed, config.prompts.shares())
    config.check_model([*prompts, *held_out])
    if resume is None:
        Run.vacant(config.runs, config.name)
    cluster = make_cluster(config.recipe())
    try:  # what is wrong with the configuration shows here, and leaves no run directory behind
        plan = Plan.of(config, prompts, cluster.cards())
        home = Run.open(resume) if resume else Run.create(config.runs, config.name, config, "align")
        done = restore(home, cluster)
        recorder = Recorder(home, config, cluster, held_out)  # opens its log: after `restore`
    except BaseException:
        cluster.close()
        raise
    previous = signal.signal(signal.SIGTERM, recorder.stop)
    try:
        before = load_evaluation(home) or save_evaluation(
            home, recorder.measure("reference", "before")
        )
        loop, slot = align_overlapped if config.staleness else align, config.evaluation.slot
        loop(cluster, plan, recorder, done)
        after = recorder.latest if done < config.iterations else recorder.measure(slot, "after")
        assert after is not None
        last = home.samples / f"step_{config.iterations:06d}.png"
        if last.is_file():
            (home.samples / "after.png").write_bytes(last.read_bytes())
        cluster.export(slot, home.root / "export")
    except LearnerLost as error:
        if recorder.stopping:  # the signal went to the learner, too
            raise Interrupted(
                f"stopped by a signal that took a learner along: continue with --resume {home.root}"
            ) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
        recorder.log.close()
        cluster.close()
    earlier = sum(r.get("seconds/total") or 0.0 for r in home.rows()[:done])
    result = home.write_result(earlier + time.monotonic() - began, gains(before, after))
    page.write(home)
    return result


def restore(home: Run, cluster: Cluster) -> int:
    """Load the newest complete checkpoint; the iteration to continue after. Later rows are
    superseded.
    """
    newest = checkpoint.latest(home.root)
    done = cluster.load(newest) if newest else 0
    home.supersede(done)
    return done


def save_evaluation(home: Run, evaluation: Evaluation) -> Evaluation:
    """Keep the values of the first evaluation, so that a resumed run compares with the same
    pictures.
    """
    table = {
        n: {"values": m.values.tolist(), "clusters": m.clusters.tolist()}
        for n, m in evaluation.figures.items()
    }
    home.write_json("evaluations/before.json", {"values": table})
    return evaluation


def load_evaluation(home: Run) -> Evaluation | None:
    """The first evaluation of a run, or None."""
    stored = home.read_json("evaluations/before.json")
    if stored is None:
        return None
    figures = {
        n: Measured(values=np.array(m["values"]), clusters=np.array(m["clusters"]))
        for n, m in stored["values"].items()
    }
    return Evaluation(figures=figures, shown=())


def plan(config: Config) -> str:
    """The arithmetic of an iteration, for --dry-run."""
    samples = config.prompts_per_iteration * config.group_size
    judges, updates = len(config.recipe().judges), config.loss.updates_per_rollout
    alignment = config.recipe().alignment
    work = work_of(
        config.prompts_per_iteration, config.group_size, config.usual_sampler(), alignment
    )
    rows = work.counts()
    return "\n".join(
        [
            f"per iteration: {config.prompts_per_iteration} prompts x {config.group_size} samples"
            f" = {samples} pictures",
            f"  rollout: {work.steps} steps x {work.branches} branch(es) ="
            f" {rows['count/rollout/forward_rows']} forwards",
            f"  training: {updates} updates x {work.groups * work.train_rows} transitions"
            f" = {rows['count/train/backward_rows']} forward+backward,"
            f" {rows['count/train/forward_rows']} forwards",
            f"  judges: {judges} x {samples} = {judges * samples} calls",
            f"total: {config.iterations} iterations, {config.iterations * samples} pictures",
            f"memory: {memory(config)}",
        ]
    )


def memory(config: Config) -> str:
    """Weights per worker, from the sizes of the files of the base."""
    from rlhf.assets import resolve

    folder = Path(resolve(config.policy.model))
    if not folder.is_dir():
        return "unknown before the base is downloaded"
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2**20
    width = 4 if config.policy.dtype == "float32" else 2
    copies = config.cluster.rollout_workers + config.cluster.learners
    return f"{size * width / 2:.1f} MiB of weights in each of {copies} processes, activations apart"
