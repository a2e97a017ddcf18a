"""`rlhf bench step`: one iteration against the forwards and backwards that it needs.

Bare: exactly those calls, at the same batch shapes, in as many processes with as many threads as
the real iteration has: rollouts in the rollout workers' number, training in the learners'. Real:
iterations of the cluster with its judges, decoder, optimiser and hand-over. Both are measured in
turn and their medians compared; `bench/efficiency` is bare over real.

`bench/ray_overhead`: one rollout worker and one learner on Ray, over the same in this process, - 1.

`rlhf bench scaling`: the rollout phase with one worker and with as many as configured, in turn, and
the bare forwards likewise: `bench/rollout/bare_speedup` is what these cores give to processes that
share nothing. Each turn starts a cluster of its own and ends it: as in a run, no other one sits on
the machine meanwhile. With `judged` finished groups are judged beside those that are still sampled,
as in a run: one worker leaves the judges a core of their own, as many workers as cores do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from rlhf import config as config_module
from rlhf.bare import Work, builder, work_of
from rlhf.cluster import make_cluster, room_for
from rlhf.cluster.base import Cluster, ClusterConfig, Recipe
from rlhf.cluster.pool import Here, Pool, Workers
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.loop import align
from rlhf.plan import Config as AlignConfig
from rlhf.plan import Plan
from rlhf.prompts import load_prompts
from rlhf.run import machine, report
from rlhf.types import GroupRef, Prompt, Version

PHASES = ("rollout", "reward", "train", "sync", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """`align`: the configuration whose iteration is timed, with `overrides` as on its command line.

    The first iteration is left out, `repeats` are kept. `overhead` also measures Ray's.
    """

    align: str = "align/scenes"
    overrides: tuple[str, ...] = ()
    repeats: int = 5
    overhead: bool = True
    out: str | None = None  # a JSON file to keep the figures in

    def check(self) -> None:
        if self.repeats < 1:
            raise ConfigError(f"repeats: expected at least 1, got {self.repeats}: 5 is usual")
        c = self.target()
        if c.staleness:
            raise ConfigError(
                f"{self.align}: expected the synchronous loop, got staleness={c.staleness}: write"
                " overrides='[staleness=0]'"
            )

    def target(self) -> AlignConfig:
        """The configuration that is timed. Raises ConfigError."""
        return config_module.load(AlignConfig, self.align, self.overrides, "align")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig(StepConfig):
    """See StepConfig; the rollout workers of the configuration are compared with one, without
    judges unless they are `judged` too, in `turns` of `repeats` iterations each.
    """

    repeats: int = 3
    turns: int = 4
    judged: bool = False

    def check(self) -> None:
        StepConfig.check(self)
        if self.turns < 1:
            raise ConfigError(f"turns: expected at least 1, got {self.turns}: 4 is usual")
        c = self.target().cluster
        if c.kind != "ray" or c.rollout_workers < 2:
            raise ConfigError(
                f"{self.align}: expected two rollout workers or more on Ray, got"
                f" cluster.kind={c.kind} and cluster.rollout_workers={c.rollout_workers}: write"
                " overrides='[cluster.rollout_workers=2]'"
            )


@dataclass
class Stopwatch:
    """An observer of the loop that keeps the rows."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def observe(
        self, iteration: int, refs: list[GroupRef], row: dict[str, float], version: Version
    ) -> Version:
        self.rows.append(row)
        return version

    def seconds(self, phase: str) -> float:
        """Median over the iterations after the first."""
        return statistics.median(row[f"seconds/{phase}"] for row in self.rows[1:])


class Bench:
    """Everything that is timed for one configuration; use it as a context manager."""

    def __init__(self, config: AlignConfig, clusters: Mapping[str, ClusterConfig]) -> None:
        prompts, recipe = load_prompts(config.prompts), config.recipe()
        self.config, self.plan = config, Plan.of(config, prompts)
        self.watches = {name: Stopwatch() for name in clusters}
        self._clusters: dict[str, Cluster] = {}
        self._recipes = {n: replace(recipe, cluster=c) for n, c in clusters.items()}

    def __enter__(self) -> Bench:
        try:
            for name, recipe in self._recipes.items():
                self._clusters[name] = make_cluster(recipe)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for cluster in reversed(self._clusters.values()):  # the first one started Ray
            cluster.close()
        self._clusters.clear()

    def iteration(self, number: int) -> None:
        """Run iteration `number` on every cluster, one after the other."""
        for name, cluster in self._clusters.items():
            align(cluster, replace(self.plan, iterations=number), self.watches[name], number - 1)


def _work(config: AlignConfig) -> Work:
    sampler, alignment = config.usual_sampler(), config.recipe().alignment
    return work_of(config.prompts_per_iteration, config.group_size, sampler, alignment)


@contextmanager
def bare(config: AlignConfig, count: int, threads: int) -> Iterator[Workers]:
    """The bare work of an iteration in `count` processes, or in this one where all is local."""
    c, build = config.cluster, builder(config.policy, _work(config), config.usual_sampler())
    workers: Workers = (
        Here(build, threads)
        if c.kind == "local"
        else Pool(build, count, threads, timeout=c.timeout_seconds, address=c.address)
    )
    try:
        yield workers
    finally:
        workers.close()


def slowest(workers: Workers, verb: str, prompts: Sequence[Prompt], count: int) -> float:
    """Seconds of the slowest of `count` processes that share the bare work on some prompts."""
    shares = [prompts[i::count] for i in range(count)]
    return max(seconds for _, seconds in workers.map(verb, shares))


def step(config: StepConfig) -> dict[str, Any]:
    """Measure; returns the figures. Raises ConfigError, and what a cluster raises."""
    began = time.monotonic()
    target = config.target()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("bench step", total=(config.repeats + 1) * (1 + config.overhead))
        advance = lambda: progress.update(bar, advance=1)  # noqa: E731
        metrics = _efficiency(target, config.repeats, advance)
        if config.overhead:
            metrics |= _overhead(target, config.repeats, advance)
    return _kept(config, "bench step", began, metrics)


def scaling(config: ScalingConfig) -> dict[str, Any]:
    """Measure the rollout phase; returns the figures. Raises ConfigError, and what a cluster
    raises.
    """
    began, target = time.monotonic(), config.target()
    many, plan = target.cluster.rollout_workers, Plan.of(target, load_prompts(target.prompts))
    taken: dict[int, list[float]] = {1: [], many: []}
    bare: dict[int, list[float]] = {1: [], many: []}
    with room_for(target.cluster):
        for _ in range(config.turns):
            for workers, seconds in taken.items():
                cluster = replace(target.cluster, rollout_workers=workers)
                recipe = sampling(replace(target, cluster=cluster), config.judged)
                seconds += rollouts(recipe, plan, config.repeats)
            for workers, seconds in bare_rollouts(target, plan, config.repeats).items():
                bare[workers] += seconds
    one, all_ = (statistics.median(taken[n]) for n in (1, many))
    figures = {
        "bench/rollout/speedup": one / all_,
        "bench/rollout/bare_speedup": statistics.median(bare[1]) / statistics.median(bare[many]),
        "bench/rollout/one_seconds": one,
        "bench/rollout/all_seconds": all_,
    }
    table: dict[str, dict[str, float | int]] = {
        name: {"value": value, "n": len(taken[1])} for name, value in figures.items()
    }
    table["bench/rollout/workers"] = {"value": many}
    return _kept(
        config,
        "bench scaling",
        began,
        table,
        judged=config.judged,
        rollout_seconds={str(n): values for n, values in taken.items()},
        bare_seconds={str(n): values for n, values in bare.items()},
    )


def sampling(config: AlignConfig, judged: bool) -> Recipe:
    """The recipe of a configuration, without judges unless they are asked for."""
    recipe = config.recipe()
    return recipe if judged else replace(recipe, judges=(), statistics=False)


def rollouts(recipe: Recipe, plan: Plan, repeats: int) -> list[float]:
    """Seconds of the rollout phase of iterations 2 to 1 + `repeats`, on a cluster of their own.
    Judges are waited for in between.
    """
    taken, cluster = [], make_cluster(recipe)
    try:
        for number in range(1, repeats + 2):
            version, request = cluster.publish("behaviour"), plan.request(number)
            began = time.monotonic()
            refs = cluster.rollout(request, version)
            taken.append(time.monotonic() - began)
            cluster.score(refs)
            cluster.release(refs)
    finally:
        cluster.close()
    return taken[1:]


def bare_rollouts(config: AlignConfig, plan: Plan, repeats: int) -> dict[int, list[float]]:
    """Seconds of the bare forwards of the same iterations in one process and in as many as there
    are rollout workers, in turn.
    """
    most = config.cluster.rollout_workers
    taken: dict[int, list[float]] = {1: [], most: []}
    with bare(config, most, config.cluster.rollout_threads) as workers:
        for number in range(1, repeats + 2):
            prompts = plan.request(number).prompts
            for processes, seconds in taken.items():
                seconds.append(slowest(workers, "rollout", prompts, processes))
    return {processes: seconds[1:] for processes, seconds in taken.items()}


def _kept(
    config: StepConfig, program: str, began: float, metrics: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """The result of a program, in its file too if one is asked for."""
    result = report(
        program,
        time.monotonic() - began,
        metrics,
        align=config.align,
        overrides=list(config.overrides),
        cluster=config_module.to_dict(config.target().cluster),
        machine=machine(),
        **extra,
    )
    if config.out:
        atomic_write_text(Path(config.out), json_text(result))
    return result


def plan_scaling(config: ScalingConfig) -> str:
    """What is timed, for --dry-run."""
    c = config.target()
    return (
        f"{config.turns} turns of {config.repeats + 1} iterations:"
        f" {c.prompts_per_iteration} groups of {c.group_size} with 1 and"
        f" with {c.cluster.rollout_workers} workers of {c.cluster.rollout_threads} threads,"
        f" {'judged beside it' if config.judged else 'without judges'}"
    )


def summarise_scaling(result: Mapping[str, Any]) -> str:
    """Seconds and their ratio."""
    value = {name.split("/")[-1]: m["value"] for name, m in result["metrics"].items()}
    return (
        f"rollout phase: {value['one_seconds']:.2f} s with one worker,"
        f" {value['all_seconds']:.2f} s with {value['workers']:.0f}:"
        f" {value['speedup']:.2f} times as fast (bare forwards: {value['bare_speedup']:.2f} times)"
    )


def _efficiency(config: AlignConfig, repeats: int, advance) -> dict[str, dict[str, float | int]]:
    c, alone = config.cluster, config.cluster.kind == "local"
    processes = {
        "rollout": (1 if alone else c.rollout_workers, c.rollout_threads),
        "train": (1 if alone else c.learners, c.learner_threads),
    }
    times: dict[str, list[float]] = {phase: [] for phase in processes}
    with ExitStack() as stack:
        stack.enter_context(room_for(c))
        workers = {
            phase: stack.enter_context(bare(config, *those)) for phase, those in processes.items()
        }
        real = stack.enter_context(Bench(config, {"real": c}))
        for number in range(1, repeats + 2):
            prompts = real.plan.request(number).prompts
            for phase, (count, _) in processes.items():
                times[phase].append(slowest(workers[phase], phase, prompts, count))
            real.iteration(number)
            advance()
        taken = {phase: real.watches["real"].seconds(phase) for phase in PHASES}
    rollout, train = (statistics.median(seconds[1:]) for seconds in times.values())
    figures: dict[str, float] = {
        "bench/efficiency": (rollout + train) / taken["total"],
        "bench/bare_seconds": rollout + train,
        "bench/real_seconds": taken["total"],
        "bench/rollout/bare_seconds": rollout,
        "bench/train/bare_seconds": train,
        **{f"bench/{p}/real_seconds": taken[p] for p in PHASES if p != "total"},
    }
    table: dict[str, dict[str, float | int]] = {
        name: {"value": value, "n": repeats} for name, value in figures.items()
    }
    table |= {name: {"value": value} for name, value in _work(config).counts().items()}
    return table


def _overhead(config: AlignConfig, repeats: int, advance) -> dict[str, dict[str, float | int]]:
    one = replace(config.cluster, kind="ray", rollout_workers=1, reward_workers=1, learners=1)
    clusters = {"ray": one, "local": replace(one, kind="local")}
    with Bench(config, clusters) as bench:
        for number in range(1, repeats + 2):
            bench.iteration(number)
            advance()
        seconds = {name: watch.seconds("total") for name, watch in bench.watches.items()}
    return {
        "bench/ray_overhead": {"value": seconds["ray"] / seconds["local"] - 1, "n": repeats},
        "bench/ray_seconds": {"value": seconds["ray"], "n": repeats},
        "bench/local_seconds": {"value": seconds["local"], "n": repeats},
    }


def plan_step(config: StepConfig) -> str:
    """The counts, for --dry-run."""
    lines = [f"{name:<30} {value}" for name, value in _work(config.target()).counts().items()]
    return "\n".join([f"one iteration of {config.align}:", *lines])


def summarise_step(result: Mapping[str, Any]) -> str:
    """Bare beside real, by phase."""
    value = {name: metric["value"] for name, metric in result["metrics"].items()}
    get = lambda name: value.get(name, 0.0)  # noqa: E731
    lines = [f"{name:<30} {number:>9,}" for name, number in value.items() if "count/" in name]
    lines += ["", f"{'seconds per iteration':<22} {'bare':>8} {'real':>8}"]
    for phase in PHASES[:-1]:
        bare, real = get(f"bench/{phase}/bare_seconds"), get(f"bench/{phase}/real_seconds")
        lines.append(f"{phase:<22} {bare:>8.2f} {real:>8.2f}")
    total = get("bench/bare_seconds"), get("bench/real_seconds")
    lines.append(f"{'total':<22} {total[0]:>8.2f} {total[1]:>8.2f}")
    lines += ["", f"efficiency {get('bench/efficiency'):.3f}"]
    if "bench/ray_overhead" in value:
        lines.append(
            f"Ray overhead {get('bench/ray_overhead'):+.1%}"
            f" ({get('bench/ray_seconds'):.2f} s, in process {get('bench/local_seconds'):.2f} s)"
        )
    return "\n".join(lines)
