"""Invariant 5 (the stock pipeline's samples), and what a policy promises about layouts."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import images
from rlhf import noise
from rlhf.errors import ConfigError
from rlhf.policies.base import Policy, stack
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.qwen_image21 import QwenImage21Pipeline
from rlhf.sampling import Sampler, guided_field, sample
from tests.rlhf.tiny import (
    TEXTS,
    close_pictures,
    drawn,
    make_policy,
    noises,
    picture,
    shake,
    stock_pipeline,
)

SIZES = [(64, 64), (64, 96)]


@pytest.fixture(scope="module")
def any_policy(any_base):
    return make_policy(any_base)


@pytest.fixture(scope="module")
def any_moved(any_base):
    """A policy whose LoRA is not zero."""
    made = make_policy(any_base)
    shake(made)
    return made


@pytest.fixture(scope="module")
def stock(tiny_base):
    return stock_pipeline(tiny_base)


@pytest.fixture(scope="module")
def policy(tiny_base):
    return make_policy(tiny_base)


@pytest.fixture(scope="module")
def moved(tiny_base):
    made = make_policy(tiny_base)
    shake(made)
    return made


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "whole"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("text", TEXTS[:3])
def test_ode_samples_are_the_stock_pipelines(any_base, any_policy, text, size, guidance, cached):
    made_by = Sampler(
        steps=4, guidance=guidance, height=size[0], width=size[1], cached_prefix=cached
    )
    got, pipeline = sample(any_policy, made_by, text, seeds=(11, 12)), stock_pipeline(any_base)
    caches = isinstance(pipeline, QwenImage21Pipeline)
    extra = {"use_kv_cache": cached} if caches else {}
    for i, seed in enumerate((11, 12)):
        want, pixels = drawn(pipeline, any_policy, text, seed, size, guidance, **extra)
        assert (got.x0_GNC[i] - want).abs().max() <= 1e-4 and want.std() > 0.1
        assert close_pictures(got.pixels[i].numpy(), pixels)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sources", [(5,), (5, 6)], ids=["one source", "two sources"])
def test_edits_are_the_stock_pipelines(stock, policy, guidance, sources):
    pictures = [picture(seed, 64, 64) for seed in sources]
    got = sample(
        policy, Sampler(steps=4, guidance=guidance), TEXTS[1], sources=pictures, seeds=(3, 4)
    )
    extra = {"image": [Image.fromarray(p.transpose(1, 2, 0)) for p in pictures]}
    extra |= {"output_resolution": 64}
    for i, seed in enumerate((3, 4)):
        want, _ = drawn(stock, policy, TEXTS[1], seed, (64, 64), guidance, **extra)
        assert (got.x0_GNC[i] - want).abs().max() <= 1e-4
    plain = sample(policy, Sampler(steps=4), TEXTS[1], seeds=(3, 4))
    assert (got.x0_GNC - plain.x0_GNC).abs().max() > 1e-3  # the source is looked at


def velocity(policy, condition, cached, rows=6, size=(64, 64), seed=0, slot="train"):
    x = noises(policy, range(seed, seed + rows), size)
    level = torch.linspace(0.95, 0.1, rows)
    prefix = policy.prefix(condition, slot) if cached else None
    return policy.velocity(x, level, condition, size=size, prefix=prefix, slot=slot)


@pytest.mark.parametrize("edit", [False, True], ids=["text", "edit"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_cached_prefix_changes_nothing(moved, size, edit):
    condition = moved.encode(TEXTS[0], [picture(1, 64, 96)] if edit else [])
    with torch.no_grad():
        whole, cached = (velocity(moved, condition, c, size=size) for c in (False, True))
    assert whole.std() > 0.1
    assert (whole - cached).abs().max() <= 1e-5


def test_gradients_of_the_adapters_flow_through_the_prefix(moved):
    condition = moved.encode(TEXTS[0])
    parameters = list(moved.slots.parameters.values())
    with torch.no_grad():
        constant = moved.prefix(condition)
    gradients = []
    for prefix in (None, moved.prefix(condition), constant):
        x = torch.stack([noise.initial_noise(i, (16, 64)) for i in range(6)])
        level = torch.linspace(0.95, 0.1, 6)
        v = moved.velocity(x, level, condition, size=(64, 64), prefix=prefix)
        gradients.append(torch.autograd.grad(v.square().mean(), parameters, allow_unused=True))
    largest = max(g.abs().max() for g in gradients[0])
    missed = 0.0
    for whole, cached, cut in zip(*gradients, strict=True):
        assert (whole - cached).abs().max() <= 1e-4 * largest
        missed = max(missed, float((whole - cut).abs().max()))
    assert missed > 0.1 * largest  # what a prefix without gradient would lose


def test_a_batch_of_one_is_a_batch_of_many(any_moved):
    condition, x = any_moved.encode(TEXTS[0]), noises(any_moved, range(5))
    level = torch.linspace(0.9, 0.2, 5)
    with torch.no_grad():
        prefix = any_moved.prefix(condition)
        many = any_moved.velocity(x, level, condition, size=(64, 64), prefix=prefix)
        for i in range(5):
            rows = slice(i, i + 1)
            one = any_moved.velocity(x[rows], level[rows], condition, size=(64, 64), prefix=prefix)
            assert (many[rows] - one).abs().max() <= 1e-5


def test_prompts_of_one_layout_share_a_call_with_siblings_adjacent(any_moved):
    first, second = (any_moved.encode(t) for t in ("a red circle", "a red square"))
    assert first.layout == second.layout
    both, x = stack([first, second]), noises(any_moved, range(4))
    with torch.no_grad():
        got = velocity(any_moved, both, True, rows=4)
        level = torch.linspace(0.95, 0.1, 4)
        for condition, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
            want = any_moved.velocity(x[rows], level[rows], condition, size=(64, 64))
            assert (got[rows] - want).abs().max() <= 1e-5
        assert (want - any_moved.velocity(x[rows], level[rows], first, size=(64, 64))).any()


@pytest.mark.parametrize("edit", [False, True], ids=["text", "edit"])
def test_conditions_have_their_exact_lengths_alone_or_in_a_batch(policy, edit):
    sources = [picture(1, 64, 64)] if edit else []
    together = policy.encode_variants(TEXTS, sources)
    lengths = set()
    for text, one in zip(TEXTS, together, strict=True):
        alone = policy.encode_variants([text], sources)[0]
        assert alone.layout == one.layout
        assert torch.equal(alone.image_slots_L, one.image_slots_L)
        assert int(one.image_slots_L.sum()) == (4 if edit else 0)
        assert (alone.embeds_PLD - one.embeds_PLD).abs().max() <= 1e-4
        lengths.add(one.layout)
    assert len(lengths) > 1


def test_the_condition_cache_keeps_pictures_of_other_shapes_apart(policy):
    """White pictures of 64x96 and 96x64 have the same bytes."""
    layouts = {
        policy.encode("make it red", [np.full((3, h, w), 255, np.uint8)]).source_shapes
        for h, w in ((64, 96), (96, 64))
    }
    assert layouts == {((1, 4, 6),), ((1, 6, 4),)}
    assert policy.encode("again") is policy.encode("again")


def test_the_conditions_that_were_used_last_are_remembered(policy, monkeypatch):
    monkeypatch.setattr("rlhf.policies.pipeline.REMEMBERED", 2)
    policy.forget()
    first, second = (policy.encode(text) for text in TEXTS[:2])
    assert policy.encode(TEXTS[0]) is first
    policy.encode(TEXTS[2])
    assert policy.encode(TEXTS[0]) is first and len(policy._conditions) == 2
    assert policy.encode(TEXTS[1]) is not second


def test_latents_are_normalised_as_the_pipeline_does(stock, policy):
    source = picture(2, 64, 96)
    rgba = torch.cat([images.to_float(source[None]), torch.ones(1, 1, 64, 96)], dim=1)
    with torch.no_grad():
        want = stock._encode_vae_image(rgba.unsqueeze(2), None)
    grid = want[:, :, 0].flatten(2).transpose(1, 2)
    got = policy.encode("x", [source]).sources_PMC
    assert (got - grid).abs().max() <= 1e-5 and grid.std() > 0.1


def test_decode_inverts_pack_and_gives_uint8(policy):
    x0 = torch.stack([noise.initial_noise(s, (24, 64)) for s in (1, 2)])
    pixels = policy.decode(x0, (64, 96))
    assert pixels.dtype is torch.uint8 and pixels.shape == (2, 3, 64, 96)
    assert not torch.equal(pixels[0], pixels[1])
    config = policy.pipeline.vae.config
    raw = x0 * torch.tensor(config.latents_std) + torch.tensor(config.latents_mean)
    grid = raw.transpose(1, 2).unflatten(2, (4, 6))
    assert (policy.pack(grid) - x0).abs().max() <= 1e-5


def test_samples_depend_on_their_own_seed_and_the_number_of_steps(any_policy):
    made_by = Sampler(steps=3)
    first, again = (sample(any_policy, made_by, TEXTS[0], seeds=s).x0_GNC for s in ((1, 2), (2, 1)))
    assert torch.equal(first, again.flip(0)) and not torch.equal(first[0], first[1])


def test_shared_noise_starts_all_siblings_from_one_x(any_policy):
    stochastic = dict(kernel="flow-sde", window=(1, 2), steps=4)
    made_by = Sampler(**stochastic, shared_noise=True)
    got = sample(any_policy, made_by, TEXTS[0], seeds=(1, 2), store=("trajectory",))
    assert torch.equal(got.trajectory.x_KGNC[0, 0], got.trajectory.x_KGNC[0, 1])
    assert not torch.equal(got.x0_GNC[0], got.x0_GNC[1])


def test_the_policy_is_a_policy_and_all_but_the_adapters_is_frozen(any_policy):
    assert isinstance(any_policy, Policy)
    found = any_policy.pipeline.components.values()
    parts = [part for part in found if isinstance(part, torch.nn.Module)]
    assert any_policy.transformer in parts and len(parts) >= 3
    trainable = [n for part in parts for n, p in part.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in n for n in trainable)
    assert not any(part.training for part in parts)


def test_adapters_start_the_same_whatever_was_drawn_before(any_base):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    first = make_policy(any_base).slots.tensors("train")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(321)
    second = make_policy(any_base).slots.tensors("train")
    other = make_policy(any_base, seed=1).slots.tensors("train")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.slow
def test_bfloat16_trains_float32_masters(any_base):
    made = make_policy(any_base, dtype="bfloat16")
    assert {t.dtype for t in made.slots.tensors("train").values()} == {torch.float32}
    v = velocity(made, made.encode(TEXTS[0]), True, rows=2)
    assert v.dtype is torch.float32 and torch.isfinite(v).all()


@pytest.mark.slow
def test_steps_of_a_bfloat16_model_are_float32(any_base):
    """The Euler steps of the pipeline, had it rounded nothing but the velocities."""
    made, how = make_policy(any_base, dtype="bfloat16"), Sampler(steps=6, cached_prefix=False)
    condition, x = made.encode(TEXTS[1]), noises(made, (3,))
    rounded = x.bfloat16().float()
    sigmas = how.schedule(made).sigmas
    with torch.no_grad():
        for s, after in itertools.pairwise(sigmas):
            v = made.velocity(x, torch.full((1,), s), condition, size=(64, 64))
            x, rounded = x + (after - s) * v, (rounded + (after - s) * v).bfloat16().float()
    got = sample(made, how, TEXTS[1], seeds=(3,)).x0_GNC
    assert got.dtype is torch.float32 and (got - x).abs().max() <= 1e-5
    assert (got - rounded).abs().max() > 1e-3


# --- refusals -----------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_refused(tmp_path):
    for model in ("nothing-here", str(tmp_path), "./a/b/c"):
        with pytest.raises(ConfigError, match="policy.model: expected a directory"):
            load_policy(PolicyConfig(model=model))


def test_another_pipeline_class_is_refused(any_base, tmp_path):
    shutil.copytree(any_base, tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ConfigError, match="StableDiffusion3Pipeline, got a FluxPipeline"):
        load_policy(PolicyConfig(model=str(tmp_path / "other")))


def test_a_base_without_a_part_is_refused(any_base, tmp_path):
    shutil.copytree(any_base, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "transformer")
    with pytest.raises(ConfigError, match="could not open"):
        load_policy(PolicyConfig(model=str(tmp_path / "half")))


@pytest.mark.parametrize("size", [(65, 64), (48, 64), (0, 32), (64, 16)], ids=str)
def test_an_impossible_size_is_refused(policy, size):
    with pytest.raises(ConfigError, match="multiples of 32, got .*: write"):
        policy.latent_shape(size)
    with pytest.raises(ConfigError, match="multiples of 32"):
        sample(policy, Sampler(height=size[0], width=size[1]), "x", seeds=(1,))


def test_a_source_picture_of_an_impossible_size_is_refused(policy):
    with pytest.raises(ConfigError, match="multiples of 32"):
        policy.encode("x", [picture(0, 80, 64)])


def test_guidance_without_an_unconditional_branch_is_refused(any_policy):
    condition = any_policy.encode("x")
    with pytest.raises(ConfigError, match="unconditional"):
        guided_field(any_policy, Sampler(guidance=3.0), condition, None, "train")


def test_full_weights_in_bfloat16_and_unknown_modes_are_refused(tiny_base):
    for changes, words in (
        (dict(train="full", dtype="bfloat16"), "full weights are trained in float32"),
        (dict(train="some"), "expected lora, full or none"),
        (dict(dtype="float16"), "expected float32 or bfloat16"),
    ):
        with pytest.raises(ConfigError, match=words):
            PolicyConfig(model=str(tiny_base), **changes).check()
