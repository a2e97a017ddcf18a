"""Invariant 6: what a run exports makes the same pictures in a stock pipeline."""

import pytest
import torch
from safetensors.torch import load_file

from rlhf.sampling import Sampler, sample
from tests.rlhf.tiny import close_pictures, drawn, make_policy, shake, stock_pipeline

TEXT = "a red circle left of a blue square"
SIZE = (64, 96)


def stock_of(base, folder, train):
    """A stock pipeline of the base with the export put in as its users would."""
    pipeline = stock_pipeline(base)
    if train == "lora":
        pipeline.load_lora_weights(folder)
    else:
        kind = type(pipeline.transformer)
        pipeline.transformer = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return pipeline


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_export_makes_the_same_picture_in_a_stock_pipeline(any_base, tmp_path, train):
    policy = make_policy(any_base, train=train)
    shake(policy, size=0.05 if train == "lora" else 0.02)
    made_by = Sampler(steps=4, guidance=3.0, height=SIZE[0], width=SIZE[1])
    got = sample(policy, made_by, TEXT, seeds=(7,))
    base = sample(policy, made_by, TEXT, seeds=(7,), slot="reference")
    assert (got.x0_GNC - base.x0_GNC).abs().max() > 0.01  # the weights matter
    policy.export(str(tmp_path), policy.slots.tensors("train"))
    want, pixels = drawn(stock_of(any_base, tmp_path, train), policy, TEXT, 7, SIZE, 3.0)
    assert (got.x0_GNC[0] - want).abs().max() <= 1e-4
    assert close_pictures(got.pixels[0].numpy(), pixels)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_slot_that_is_asked_for_is_exported(any_base, tmp_path, train):
    policy = make_policy(any_base, train=train)
    policy.slots.copy("train", "ema")
    shake(policy, size=0.02)
    policy.slots.lag("ema", 0.5)
    policy.export(str(tmp_path), policy.slots.tensors("ema"))
    stored = {}
    for path in tmp_path.glob("*.safetensors"):
        stored |= load_file(path)
    names = {n.replace(".default", ""): n for n in policy.slots.parameters}
    ema, train_now = policy.slots.tensors("ema"), policy.slots.tensors("train")
    found = {n.removeprefix("transformer."): t for n, t in stored.items()}
    assert names.keys() <= found.keys()
    assert all(torch.equal(found[short], ema[name]) for short, name in names.items())
    assert any(not torch.equal(found[short], train_now[name]) for short, name in names.items())


def test_exporting_changes_no_weight(any_base, tmp_path):
    policy = make_policy(any_base, train="full")
    shake(policy, size=0.02)
    before = {n: (p, p.clone()) for n, p in policy.transformer.named_parameters()}
    policy.export(str(tmp_path), policy.slots.tensors("reference"))
    after = dict(policy.transformer.named_parameters())
    assert all(after[n] is p and torch.equal(p, copy) for n, (p, copy) in before.items())
    assert all(p.requires_grad for p in after.values())
