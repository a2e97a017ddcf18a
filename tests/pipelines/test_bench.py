"""`rlhf bench step`: what is counted is what runs, and bare is less than real."""

import json
from dataclasses import replace

import pytest

from pipelines import bench
from rlhf.bare import Bare, captured, work_of
from rlhf.cluster.local import LocalCluster
from rlhf.cluster.pool import Here, Pool
from rlhf.errors import ConfigError
from rlhf.loop import align
from rlhf.plan import Config, Plan
from rlhf.prompts import load_prompts
from rlhf.types import Prompt
from tests.rlhf.tiny import make_policy

LOSSES = {
    "nft": (),
    "nft with kl": ("loss.kl=0.1", "loss.updates_per_rollout=3"),
    "nft guided": ("train_guidance=2.0",),
    "unguided": ("rollout.guidance=1.0",),
    "grpo": ("loss.name=grpo", "rollout.kernel=flow-sde", "rollout.window=[0,2]"),
    "branching": (
        "loss.name=grpo", "rollout.kernel=flow-sde", "rollout.window=[1,2]",
        "rollout.shared_noise=true",
    ),
    "replay": (
        "loss.name=grpo-recentred", "loss.old_logp=replay", "loss.updates_per_rollout=3",
        "rollout.kernel=flow-sde", "rollout.window=[0,2]",
    ),
    "guard with two kls": (
        "loss.name=guard", "loss.kl=0.1", "loss.kl_ema=0.1", "loss.kl_form=gaussian", "ema=0.9",
        "rollout.kernel=dance", "rollout.window=[0,2]",
    ),
    "awm": ("loss.name=awm", "loss.kl=0.1"),
    "a guided reference": ("loss.kl=0.1", "loss.kl_ema=0.1", "ema=0.9", "reference_guidance=2.0"),
    "uncached": ("rollout.cached_prefix=false",),
}  # fmt: skip


def settings(base, *more):
    return (
        f"policy.model={base}", "policy.lora.rank=4",
        "cluster.kind=local", "cluster.learner_threads=1",
        "rollout.steps=3", "rollout.guidance=2.0", "prompts_per_iteration=2", "group_size=3",
        "prompts.count=8", "loss.updates_per_rollout=2", "advantage_clip=5.0", *more,
    )  # fmt: skip


def small(base, *more, **fields) -> bench.StepConfig:
    return bench.StepConfig(align="align/hybrid", overrides=settings(base, *more), **fields)


def target(base, *more) -> Config:
    return small(base, *more).target()


def rows_through(module, work):
    """Rows of all calls of `module` with a target of 16 tokens, and the number of prefixes."""
    with captured(module) as calls:
        work()
    rows, prefixes = 0, 0
    for call in calls:
        if "group" in call:  # both in one pass
            rows, prefixes = rows + len(call["group"].x_BNC), prefixes + 1
        elif call["kv_cache_mode"] == "extract":
            prefixes += 1
        else:
            rows += len(call["hidden_states"])
    return rows, prefixes


@pytest.mark.parametrize("name", LOSSES)
def test_the_count_is_what_the_learner_runs_and_what_is_timed_bare(tiny_base, name):
    config = target(tiny_base, *LOSSES[name])
    work = work_of(2, 3, config.rollout, config.recipe().alignment)
    counts = work.counts()
    expected = counts["count/train/backward_rows"] + counts["count/train/forward_rows"]
    cluster = LocalCluster(config.recipe())
    learner, worker = cluster.learner, cluster.worker
    plan = replace(Plan.of(config, load_prompts(config.prompts)), iterations=1)
    learner._diagnostics = lambda rollouts: {}  # logging, not the loss
    seen = {}

    def counted(owner, verb, module):
        inner = getattr(owner, verb)

        def call(*args):
            out = []
            rows = rows_through(module, lambda: out.append(inner(*args)))
            seen[verb] = tuple(a + b for a, b in zip(seen.get(verb, (0, 0)), rows, strict=True))
            return out[0]

        setattr(owner, verb, call)

    counted(learner, "update", learner.policy.transformer)
    counted(worker, "rollout", worker.policy.transformer)
    align(cluster, plan, bench.Stopwatch())
    assert seen["update"] == (expected, counts["count/train/prefixes"])
    rollout = counts["count/rollout/forward_rows"], counts["count/rollout/prefixes"]
    assert seen["rollout"] == rollout

    bare = Bare(make_policy(tiny_base), work, config.rollout)
    prompts = plan.request(1).prompts
    module = bare.policy.transformer
    assert rows_through(module, lambda: bare.train(prompts)) == seen["update"]
    with captured(module) as calls:  # preparation runs each prefix and each branch once
        bare.rollout(prompts)
    assert len(calls) == work.rollout_calls + 2 * work.branches * (
        1 + bool(work.shared) + 2 * work.cached_prefix
    )


def test_the_figures_of_a_step(tiny_base, tmp_path):
    out = tmp_path / "step.json"
    config = bench.StepConfig(
        align="align/hybrid", overrides=settings(tiny_base), repeats=2, overhead=False, out=str(out)
    )
    result = bench.step(config)
    assert json.loads(out.read_text()) == result
    value = {name: metric["value"] for name, metric in result["metrics"].items()}
    bare = value["bench/rollout/bare_seconds"] + value["bench/train/bare_seconds"]
    assert value["bench/bare_seconds"] == pytest.approx(bare)
    assert value["bench/efficiency"] == pytest.approx(bare / value["bench/real_seconds"])
    assert 0.05 < value["bench/efficiency"] < 1.3
    text = bench.summarise_step(result)
    assert f"efficiency {value['bench/efficiency']:.3f}" in text and "Ray" not in text


def test_the_first_iteration_is_left_out():
    watch = bench.Stopwatch(rows=[{"seconds/total": s} for s in (90.0, 1.0, 2.0, 4.0)])
    assert watch.seconds("total") == 2.0


def test_the_plan_needs_no_model():
    config = bench.StepConfig(repeats=1)
    text = bench.plan_step(config)
    c = config.target()
    rows = c.prompts_per_iteration * c.group_size * c.rollout.steps * 2
    assert f"{rows}" in text
    with pytest.raises(ConfigError, match="repeats"):
        bench.StepConfig(repeats=0).check()


def test_only_the_loop_that_is_timed_is_accepted(tiny_base):
    """`align`: figures of the overlapped loop would bear the wrong name."""
    ahead = ("cluster.kind=ray", "cluster.layout=disaggregated", "staleness=1")
    with pytest.raises(ConfigError, match="staleness=0"):
        small(tiny_base, *ahead).check()
    small(tiny_base).check()


class Takes:
    """Workers that say how many prompts each was given."""

    def __init__(self):
        self.taken = []

    def each(self, method, *args): ...

    def map(self, method, items):
        self.taken += [prompt for share in items for prompt in share]
        return iter([(share, float(len(share))) for share in items])

    def close(self): ...


def test_the_slowest_process_counts_and_every_prompt_is_somebodys():
    workers = Takes()
    prompts = [Prompt(id=str(i), text="a ring", category="objects") for i in range(5)]
    assert bench.slowest(workers, "train", prompts, 2) == 3.0
    assert sorted(p.id for p in workers.taken) == list("01234")


class Counter:
    def __init__(self):
        self.calls = 0

    def add(self, n):
        self.calls += 1
        if n < 0:
            raise ConfigError("expected n >= 0")
        return n + 100 * self.calls


def test_one_worker_does_everything_in_order():
    here = Here(Counter)
    assert list(here.map("add", [1, 2])) == [(1, 101), (2, 202)]
    assert here.each("add", 3) == [303]


@pytest.mark.ray
def test_a_pool_gives_every_item_to_one_worker_and_errors_come_back(ray_head):
    pool = Pool(Counter, 2)
    try:
        assert sorted(pool.each("add", 1)) == [101, 101]
        found = dict(pool.map("add", [10, 20, 30]))
        assert {item: result % 100 for item, result in found.items()} == {10: 10, 20: 20, 30: 30}
        with pytest.raises(ConfigError, match="n >= 0"):
            pool.each("add", -1)
    finally:
        pool.close()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_is_compared_with_this_process(tiny_base, ray_head):
    """The iteration of two learners; for Ray's share, one against this process."""
    more = ("cluster.kind=ray", "cluster.rollout_workers=1", "cluster.learners=2")
    config = small(tiny_base, *more, repeats=1)
    value = {n: m["value"] for n, m in bench.step(config)["metrics"].items()}
    ratio = value["bench/ray_seconds"] / value["bench/local_seconds"]
    assert value["bench/ray_overhead"] == pytest.approx(ratio - 1)
    assert 0 < value["bench/efficiency"] < 1.3


@pytest.mark.ray
@pytest.mark.slow
def test_one_rollout_worker_is_compared_with_two(tiny_base, tmp_path, ray_head):
    more = ("cluster.kind=ray", "cluster.rollout_workers=2")
    out = tmp_path / "scaling.json"
    config = bench.ScalingConfig(
        align="align/hybrid", overrides=settings(tiny_base, *more), repeats=2, turns=1,
        out=str(out),
    )  # fmt: skip
    config.check()
    result = bench.scaling(config)
    assert json.loads(out.read_text()) == result and result["judged"] is False
    value = {n: m["value"] for n, m in result["metrics"].items()}
    for name in ("rollout_seconds", "bare_seconds"):
        assert {n: len(seconds) for n, seconds in result[name].items()} == {"1": 2, "2": 2}
    ratio = value["bench/rollout/one_seconds"] / value["bench/rollout/all_seconds"]
    assert value["bench/rollout/speedup"] == pytest.approx(ratio)
    assert 0.5 < value["bench/rollout/bare_speedup"] < 4
    assert "with 2:" in bench.summarise_scaling(result)


def test_sampling_is_timed_with_nobody_judging_unless_asked(tiny_base):
    config = small(tiny_base).target()
    alone, judged = (bench.sampling(config, judged) for judged in (False, True))
    assert not alone.judges and judged.judges == ("oracle/fidelity",)
    plan = Plan.of(config, load_prompts(config.prompts))
    assert len(taken := bench.rollouts(alone, plan, repeats=2)) == 2 and min(taken) > 0
    assert "judged beside it" in bench.plan_scaling(bench.ScalingConfig(judged=True))
    assert "without judges" in bench.plan_scaling(bench.ScalingConfig())


def test_a_comparison_of_one_worker_with_itself_is_refused(tiny_base):
    with pytest.raises(ConfigError, match="expected two rollout workers or more"):
        bench.ScalingConfig(align="align/hybrid", overrides=settings(tiny_base)).check()
    assert "with 1 and with 2 workers of 1 threads" in bench.plan_scaling(bench.ScalingConfig())
