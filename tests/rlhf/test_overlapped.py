"""Sampling ahead of training: how old samples are, that none is lost or doubled, exact resume."""

from dataclasses import replace

import pytest
import torch

from rlhf import checkpoint
from rlhf.alignment import AlignmentLearner
from rlhf.cluster.local import LocalCluster
from rlhf.errors import ConfigError, StaleRollouts
from rlhf.loop import align, align_overlapped
from rlhf.losses import LOSSES
from rlhf.plan import Config
from rlhf.rollout import RolloutWorker
from rlhf.types import Advantages
from tests.rlhf.test_cluster import Plan, Watch, assert_bitwise_equal
from tests.rlhf.tiny import alignment, make_policy, recipe, request, sampler

ITERATIONS = 4


def overlapped(tiny_base, staleness, loss="nft", **cluster):
    asked = recipe(tiny_base, loss, **cluster)
    return replace(asked, alignment=replace(asked.alignment, staleness=staleness))


def plan(staleness, loss="nft", iterations=ITERATIONS):
    return Plan(loss, iterations=iterations, staleness=staleness)


def ran(cluster, plan, folder, loop=align_overlapped, done=0):
    """Rows, pictures and every tensor; a checkpoint in `folder` after each iteration."""
    watch = Watch(cluster)
    observe = watch.observe

    def saving(iteration, refs, row, version):
        cluster.save(folder, iteration, ITERATIONS, 0, None)
        return observe(iteration, refs, row, version)

    watch.observe = saving
    try:
        loop(cluster, plan, watch, done)
    finally:
        cluster.close()
    return watch, checkpoint.load(folder)


def test_at_staleness_zero_it_is_the_synchronous_loop(tiny_base, tmp_path):
    one = ran(LocalCluster(recipe(tiny_base)), plan(0), tmp_path / "plain", align)
    two = ran(LocalCluster(recipe(tiny_base)), plan(0), tmp_path / "overlapped")
    assert [row.pop("rollout/staleness") for row in two[0].rows] == [0] * ITERATIONS
    assert_bitwise_equal(one, two)


@pytest.mark.parametrize("loss, staleness", [("nft", 1), ("nft", 2), ("grpo-recentred", 1)])
def test_samples_are_as_old_as_was_said_and_resume_is_exact(tiny_base, tmp_path, loss, staleness):
    cluster = lambda: LocalCluster(overlapped(tiny_base, staleness, loss))  # noqa: E731
    whole = ran(cluster(), plan(staleness, loss), tmp_path / "whole")
    ages = [min(i, staleness) for i in range(ITERATIONS)]
    assert [row["rollout/staleness"] for row in whole[0].rows] == ages
    past = {f"slots/behaviour.{ITERATIONS - 1 - i}" for i in range(staleness)}
    assert past == {name for name in whole[1].tensors if name.startswith("slots/behaviour.")}
    for done in (1, 2):
        again = cluster()
        assert again.load(tmp_path / "whole" / f"step_{done:06d}") == done
        rest = ran(again, plan(staleness, loss), tmp_path / f"from{done}", done=done)
        assert rest[0].rows == whole[0].rows[done:]
        for part, tensors in whole[1].tensors.items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, rest[1].tensors[part][name]), f"{part}/{name}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["nft", "grpo-recentred"])
def test_ray_samples_ahead_and_agrees_bitwise(tiny_base, tmp_path, ray_head, loss):
    from rlhf.cluster.ray import RayCluster

    class Busy(RayCluster):
        ahead = 0

        def update(self, refs, advantages):
            report = super().update(refs, advantages)
            done = [g for g in self._groups.values() if g.rollouts is not None]
            self.ahead += len(done) - len(refs)  # sampled while this one trained, or before
            return report

    local = ran(LocalCluster(overlapped(tiny_base, 1, loss)), plan(1, loss), tmp_path / "local")
    settings = {"kind": "ray", "layout": "disaggregated", "rollout_workers": 2}
    cluster = Busy(overlapped(tiny_base, 1, loss, **settings))
    assert_bitwise_equal(local, ran(cluster, plan(1, loss), tmp_path / "ray"))
    assert cluster.ahead > 0


def learnt(tiny_base, staleness, loss="nft", **changes):
    """A learner two updates on, and what was sampled before each and after both."""
    config = replace(alignment(loss, **changes), staleness=staleness)
    learner = AlignmentLearner(make_policy(tiny_base), config)
    worker, kept = RolloutWorker(make_policy(tiny_base)), []
    value = torch.randn(2, 4, generator=torch.Generator().manual_seed(5))
    good = Advantages(value_PG=value, live_PG=torch.ones(2, 4, dtype=torch.bool))
    for iteration in range(3):
        handover = learner.publish("behaviour")
        worker.bind(handover)
        asked = request(iteration, sampler(loss), LOSSES[loss].requires)
        kept.append([worker.rollout(ref, asked) for ref in asked.refs(handover.version)])
        if iteration < 2:
            learner.update(kept[-1], good)
    return learner, kept, good


def test_samples_beyond_the_bound_are_refused(tiny_base):
    learner, kept, good = learnt(tiny_base, staleness=1)
    before = {n: t.clone() for n, t in learner.policy.slots.tensors("train").items()}
    with pytest.raises(StaleRollouts, match="at most 1 before"):
        learner.update(kept[0], good)
    forged = [replace(r, ref=replace(r.ref, version=kept[1][0].ref.version)) for r in kept[2]]
    wrong = replace(forged[0].ref.version, checksum="other")
    with pytest.raises(StaleRollouts):
        learner.update([replace(r, ref=replace(r.ref, version=wrong)) for r in forged], good)
    assert all(torch.equal(t, before[n]) for n, t in learner.policy.slots.tensors("train").items())
    learner.update(kept[1], good)


def test_the_old_field_is_that_of_the_weights_that_sampled(tiny_base):
    for index, slot in ((1, "behaviour/1"), (2, "behaviour")):
        learner, kept, good = learnt(tiny_base, staleness=1)
        asked, velocity = set(), learner.policy.velocity

        def watched(*args, velocity=velocity, asked=asked, **kwargs):
            asked.add(kwargs["slot"])
            return velocity(*args, **kwargs)

        learner.policy.velocity = watched
        learner.update(kept[index], good)
        assert {name for name in asked if name.startswith("behaviour")} == {slot}


@pytest.mark.parametrize("old_logp", ["rollout", "replay"])
def test_a_ratio_is_to_the_weights_that_sampled(tiny_base, old_logp):
    """Old samples start at another ratio than 1, and are no replay mismatch."""
    learner, kept, good = learnt(tiny_base, 1, "grpo", old_logp=old_logp)
    assert learner.update(kept[1], good).metrics["ratio/first_max_dev"] > 1e-6
    learner, kept, good = learnt(tiny_base, 1, "grpo", old_logp=old_logp)
    assert learner.update(kept[2], good).metrics["ratio/first_max_dev"] <= 1e-6


def test_a_checkpoint_of_a_smaller_staleness_says_so(tiny_base, tmp_path):
    ran(LocalCluster(recipe(tiny_base)), plan(0), tmp_path, align)
    cluster = LocalCluster(overlapped(tiny_base, 1))
    cluster.load(tmp_path / "step_000002")
    with pytest.raises(ConfigError, match="written at a smaller staleness"):
        align_overlapped(cluster, plan(1), Watch(cluster), 2)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"staleness": -1}, "staleness: expected 0 or more"),
        ({"staleness": 1}, "write cluster.kind=ray cluster.layout=disaggregated"),
    ],
)
def test_a_staleness_that_cannot_be_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config(**settings).check()
