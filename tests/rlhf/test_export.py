"""Invariant 6: what a run exports makes the same pictures in a stock pipeline."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf import noise
from rlhf.policies.qwen_image21 import QwenImage21Pipeline
from rlhf.sampling import Sampler, sample
from tests.rlhf.tiny import make_policy, shake

TEXT = "a red circle left of a blue square"
SIZE = (64, 96)


def stock_of(base, folder, train):
    """A stock pipeline of the base with the export put in as its users would."""
    pipeline = QwenImage21Pipeline.from_pretrained(base, dtype=torch.float32)
    if train == "lora":
        pipeline.load_lora_weights(folder)
    else:
        kind = type(pipeline.transformer)
        pipeline.transformer = kind.from_pretrained(folder, dtype=torch.float32).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, shape, output):
    with torch.no_grad():
        return pipeline(
            TEXT,
            negative_prompt="",
            true_cfg_scale=3.0,
            num_inference_steps=4,
            height=SIZE[0],
            width=SIZE[1],
            latents=noise.initial_noise(7, shape)[None],
            output_type=output,
        ).images[0]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_export_makes_the_same_picture_in_a_stock_pipeline(tiny_base, tmp_path, train):
    policy = make_policy(tiny_base, train=train)
    shake(policy, size=0.05 if train == "lora" else 0.02)
    made_by = Sampler(steps=4, guidance=3.0, height=SIZE[0], width=SIZE[1])
    got = sample(policy, made_by, TEXT, seeds=(7,))
    base = sample(policy, made_by, TEXT, seeds=(7,), slot="reference")
    assert (got.x0_GNC - base.x0_GNC).abs().max() > 0.01  # the weights matter
    policy.export(str(tmp_path), policy.slots.tensors("train"))
    stock, shape = stock_of(tiny_base, tmp_path, train), policy.latent_shape(SIZE)
    assert (got.x0_GNC[0] - drawn(stock, shape, "latent")).abs().max() <= 1e-4
    want = np.asarray(drawn(stock, shape, "pil"))[..., :3].transpose(2, 0, 1)
    gap = np.abs(got.pixels[0].numpy().astype(int) - want.astype(int))
    assert gap.max() <= 1 and (gap > 0).mean() < 1e-3


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_slot_that_is_asked_for_is_exported(tiny_base, tmp_path, train):
    policy = make_policy(tiny_base, train=train)
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


def test_exporting_changes_no_weight(tiny_base, tmp_path):
    policy = make_policy(tiny_base, train="full")
    shake(policy, size=0.02)
    before = {n: (p, p.clone()) for n, p in policy.transformer.named_parameters()}
    policy.export(str(tmp_path), policy.slots.tensors("reference"))
    after = dict(policy.transformer.named_parameters())
    assert all(after[n] is p and torch.equal(p, copy) for n, (p, copy) in before.items())
    assert all(p.requires_grad for p in after.values())
