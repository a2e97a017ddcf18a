"""Slots: versions of the trainable weights beside the module, which itself never changes."""

import pytest
import torch

from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.slots import Slots
from tests.rlhf.tiny import make_policy, noises, same, shake, snapshot


def velocity(policy, slot, cached=True):
    condition = policy.encode("a red circle")
    x = noises(policy, range(2))
    with torch.no_grad():
        prefix = policy.prefix(condition, slot) if cached else None
        level = torch.tensor([0.9, 0.3])
        return policy.velocity(x, level, condition, size=(64, 64), prefix=prefix, slot=slot)


@pytest.fixture
def policy(any_base):
    made = make_policy(any_base)
    made.slots.copy("train", "behaviour")
    shake(made)
    return made


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "whole"])
def test_the_reference_is_the_base_exactly(any_base, policy, cached):
    base = make_policy(any_base, train="none")
    want = velocity(base, "train", cached)
    assert torch.equal(velocity(policy, "reference", cached), want)
    assert torch.equal(velocity(policy, "behaviour", cached), want)  # from before the shake
    assert (velocity(policy, "train", cached) - want).abs().max() > 1e-3


def test_calling_a_slot_never_changes_the_module(policy):
    before = {n: (p, p.clone()) for n, p in policy.transformer.named_parameters()}
    train = velocity(policy, "train")
    velocity(policy, "reference")
    with pytest.raises((TypeError, RuntimeError)):
        policy.slots.call("reference", hidden_states=torch.zeros(1, 2, 3))  # dies inside the call
    after = dict(policy.transformer.named_parameters())
    assert all(after[n] is p and torch.equal(p, copy) for n, (p, copy) in before.items())
    assert torch.equal(velocity(policy, "train"), train)


def test_a_slot_is_a_copy(policy):
    policy.slots.copy("train", "ema")
    kept = snapshot(policy, "ema")
    shake(policy, seed=3)
    assert same(kept, policy.slots.tensors("ema"))
    assert not same(kept, policy.slots.tensors("train"))
    assert set(policy.slots.names) == {"train", "reference", "behaviour", "ema"}


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_lag_keeps_that_share_of_itself(policy, decay):
    before, train = snapshot(policy, "behaviour"), snapshot(policy)
    policy.slots.lag("behaviour", decay)
    for name, value in policy.slots.tensors("behaviour").items():
        want = decay * before[name] + (1 - decay) * train[name]
        assert (value - want).abs().max() <= 1e-7
    assert same(train, policy.slots.tensors("train"))


@pytest.mark.parametrize("slot", ["train", "behaviour"])
def test_load_takes_exactly_this_modules_tensors(policy, slot):
    good = {n: torch.randn_like(t) for n, t in policy.slots.tensors("train").items()}
    policy.slots.load(slot, good)
    assert same(policy.slots.tensors(slot), good)
    name = sorted(good)[0]
    wrong = [
        {n: t for n, t in good.items() if n != name},
        {**good, "another.weight": torch.zeros(1)},
        {**good, name: torch.zeros(3, 3)},
        {},
    ]
    for tensors in wrong:
        with pytest.raises(CheckpointError, match="use the same base"):
            policy.slots.load(slot, tensors)
    assert same(policy.slots.tensors(slot), good)


def test_a_slot_that_does_not_exist_is_refused(policy):
    for verb in (policy.slots.tensors, lambda s: velocity(policy, s)):
        with pytest.raises(ConfigError, match="expected one of the slots"):
            verb("teacher/text")


def test_full_weights_have_slots_too(any_base):
    base = make_policy(any_base, train="none")
    policy = make_policy(any_base, train="full")
    names = {n for n, _ in policy.transformer.named_parameters()}
    assert set(policy.slots.parameters) == names
    shake(policy, size=0.02)
    assert torch.equal(velocity(policy, "reference"), velocity(base, "train"))
    assert not torch.equal(velocity(policy, "train"), velocity(base, "train"))


def test_a_module_without_trainable_weights_only_has_its_own(any_base):
    policy = make_policy(any_base, train="none")
    assert policy.slots.names == ("train",) and policy.slots.tensors("train") == {}


def test_gradients_reach_train_and_no_other_slot():
    module = torch.nn.Linear(2, 2)
    slots = Slots(module)
    slots.copy("train", "behaviour")
    x = torch.ones(1, 2)
    slots.call("train", x).sum().backward()
    assert module.weight.grad is not None
    assert not slots.call("behaviour", x).requires_grad
