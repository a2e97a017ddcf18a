"""A hand-over proves itself: by bytes, by number, and by what the weights do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf import weights
from rlhf.alignment import AlignmentLearner
from rlhf.errors import AlignError, CheckpointError, HandoverError, StaleRollouts
from rlhf.policies.families import family_of
from rlhf.rollout import RolloutWorker
from rlhf.types import Advantages
from tests.rlhf.tiny import (
    alignment,
    make_policy,
    policy_config,
    request,
    same,
    sampler,
    shake,
    snapshot,
    stock_pipeline,
)


@pytest.fixture
def learner(any_base):
    policy = make_policy(any_base)
    shake(policy)
    return AlignmentLearner(policy, alignment())


@pytest.fixture
def worker(any_base):
    return RolloutWorker(make_policy(any_base))


def test_checksum_sees_every_bit_name_shape_and_type():
    base = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1.0)}
    first = weights.checksum(base)
    assert first == weights.checksum(dict(reversed(list(base.items()))))
    flipped = base["a"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [
        {**base, "a": flipped},
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {**base, "b": torch.tensor(2.0)},
        {"a": base["a"]},
    ]
    sums = [first, *map(weights.checksum, others)]
    assert len(set(sums)) == len(sums)


def test_a_hand_over_binds_every_module_of_the_slot(learner, worker):
    handover = learner.publish("train")
    bound = worker.bind(handover)
    tensors = learner.policy.slots.tensors("train")
    assert same(tensors, worker.policy.slots.tensors("train"))
    assert bound.checksum == handover.version.checksum == weights.checksum(tensors)
    assert bound.modules == len(tensors) and bound.probe_gap == 0.0
    assert worker.version == handover.version


def test_slots_hand_over_their_own_weights(learner, worker):
    sums = {slot: learner.publish(slot).version.checksum for slot in ("train", "reference")}
    assert len(set(sums.values())) == 2
    worker.bind(learner.publish("reference"))
    assert same(worker.policy.slots.tensors("train"), learner.policy.slots.tensors("reference"))


def test_one_changed_bit_on_the_way_is_refused(learner, worker):
    handover = learner.publish("train")
    name = sorted(handover.arrays)[0]
    array = np.array(handover.arrays[name])
    array.view(np.int32).flat[0] ^= 1
    with pytest.raises(HandoverError, match="the transport changed them"):
        worker.bind(replace(handover, arrays={**handover.arrays, name: array}))
    assert worker.version is None  # and so every rollout is refused


def test_a_failed_bind_forgets_the_version_before(learner, worker):
    """Half-bound weights must not sample under the name of the old ones."""
    good = learner.publish("train")
    worker.bind(good)
    bad = replace(good, probe=good.probe + 1)
    with pytest.raises(HandoverError):
        worker.bind(bad)
    ref = request(1, sampler()).refs(good.version)[0]
    with pytest.raises(StaleRollouts):
        worker.rollout(ref, request(1, sampler()))


def test_nothing_to_bind_is_an_error(learner, worker, any_base):
    handover = learner.publish("train")
    with pytest.raises(HandoverError, match="got none"):
        worker.bind(replace(handover, arrays={}))
    with pytest.raises(CheckpointError):
        RolloutWorker(make_policy(any_base, train="none")).bind(handover)


def test_missing_or_renamed_tensors_are_refused(learner, worker):
    handover = learner.publish("train")
    for arrays in (
        dict(list(handover.arrays.items())[1:]),
        {f"base.{n}": a for n, a in handover.arrays.items()},
    ):
        with pytest.raises(AlignError, match="use the same base"):
            worker.bind(replace(handover, arrays=arrays))


def test_another_base_under_the_same_adapters_is_refused(learner, any_base):
    made = stock_pipeline(any_base)
    with torch.no_grad():
        next(made.transformer.parameters()).mul_(1.1)
    other = family_of(str(any_base))(made, policy_config(any_base))
    with pytest.raises(HandoverError, match="another base"):
        RolloutWorker(other).bind(learner.publish("train"))


def test_a_probe_that_is_not_a_number_is_refused(learner, worker):
    handover = learner.publish("train")
    with pytest.raises(HandoverError, match="gap of nan"):
        worker.bind(replace(handover, probe=np.full_like(handover.probe, np.nan)))


def test_a_hand_over_is_a_copy(learner):
    handover = learner.publish("train")
    before = {n: a.copy() for n, a in handover.arrays.items()}
    shake(learner.policy, seed=8)
    assert all(np.array_equal(before[n], a) for n, a in handover.arrays.items())


def test_a_stale_version_is_refused_by_the_worker(learner, worker):
    asked = request(1, sampler())
    first = learner.publish("behaviour")
    with pytest.raises(StaleRollouts, match="publish before rollout"):
        worker.rollout(asked.refs(first.version)[0], asked)  # nothing bound yet
    worker.bind(first)
    for change in ({"step": 1}, {"slot": "train"}, {"checksum": "0"}):
        stale = asked.refs(replace(first.version, **change))[0]
        with pytest.raises(StaleRollouts):
            worker.rollout(stale, asked)
    worker.rollout(asked.refs(first.version)[0], asked)


def test_a_stale_version_is_refused_by_the_learner_before_it_learns(learner, worker):
    asked = request(1, sampler())
    advantages = Advantages(
        value_PG=torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 2),
        live_PG=torch.ones(2, 4, dtype=torch.bool),
    )

    def roll(slot):
        handover = learner.publish(slot)
        worker.bind(handover)
        return [worker.rollout(ref, asked) for ref in asked.refs(handover.version)]

    first = roll("behaviour")
    learner.update(first, advantages)
    before = snapshot(learner.policy)
    for rollouts in (first, roll("train"), [*roll("behaviour")[:1], first[1]]):
        with pytest.raises(StaleRollouts):
            learner.update(rollouts, advantages)
    assert same(before, learner.policy.slots.tensors("train")) and learner.iteration == 1
    learner.update(roll("behaviour"), advantages)
    assert learner.iteration == 2
