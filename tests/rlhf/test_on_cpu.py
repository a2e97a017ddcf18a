"""The operations for a CPU compute what the stock ones do, and sharing the prefix changes nothing.

The stock side is the transformer without any of them, given the whole sequence of every row.
"""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf.bare import captured
from rlhf.policies import on_cpu
from rlhf.policies.base import stack
from tests.rlhf.tiny import TEXTS, make_policy, picture, shake

SIZE = (64, 64)
LEVELS = torch.linspace(0.95, 0.1, 6)
ROWS = 32


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch):
    monkeypatch.setattr(on_cpu, "FEWEST_PRODUCTS", ROWS * 48 * 80)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(base, train):
    """The same weights, stock and with every part in place whatever the processor."""
    with mock.patch.object(on_cpu, "PARTS", {}):
        stock = make_policy(base, train)
    with mock.patch.object(on_cpu, "prefers_onednn", lambda: True):
        suited = make_policy(base, train)
    for policy in (stock, suited):
        shake(policy, size=0.02)
    return stock, suited


@pytest.fixture(scope="module", params=["lora", "full"])
def policies(tiny_base, request):
    return pair(tiny_base, request.param)


def field(policy, guidance, sources, how):
    """v_u + w (v_c - v_u) of six rows, and the gradients of all trained weights."""
    x, fields = draws(6, 16, 64), []
    for text in (TEXTS[0], "")[: 2 if guidance > 1 else 1]:
        condition = policy.encode(text, sources)
        prefix = None if how == "whole" else policy.prefix(condition, once=how == "once")
        fields.append(policy.velocity(x, LEVELS, condition, size=SIZE, prefix=prefix))
    v = fields[0] if len(fields) == 1 else fields[1] + guidance * (fields[0] - fields[1])
    parameters = policy.slots.parameters
    grads = torch.autograd.grad(v.square().mean(), list(parameters.values()), allow_unused=True)
    return v.detach(), dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sources", [0, 1, 2], ids=["text", "edit", "two sources"])
@pytest.mark.parametrize("how", ["once", "shared", "whole"])
def test_velocities_and_gradients_are_the_stock_whole_sequences(policies, guidance, sources, how):
    stock, suited = policies
    pictures = [picture(1, 64, 96), picture(2, 96, 64)][:sources]
    v, grads = field(stock, guidance, pictures, "whole")
    got, mine = field(suited, guidance, pictures, how)
    assert v.std() > 0.1
    assert (got - v).abs().max() <= 1e-5 * guidance
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    for name, grad in grads.items():
        assert (grad is None) == (mine[name] is None)
        if grad is not None:
            assert (mine[name] - grad).abs().max() <= 2e-5 * largest, name


def test_prompts_of_one_layout_go_in_one_pass_with_their_siblings(policies):
    stock, suited = policies
    both = stack([suited.encode(t) for t in ("a red circle", "a red square")])
    x = draws(6, 16, 64)
    with torch.no_grad():
        want = stock.velocity(x, LEVELS, both, size=SIZE)
        got = suited.velocity(x, LEVELS, both, size=SIZE, prefix=suited.prefix(both, once=True))
    assert (got - want).abs().max() <= 1e-5
    assert (want[:3] - want[3:]).abs().max() > 1e-2


@pytest.mark.parametrize("slot", ["train", "reference"])
def test_one_pass_is_of_the_slot_that_is_asked_for(policies, slot):
    _, suited = policies
    condition, seen = suited.encode(TEXTS[0]), []
    with torch.no_grad():
        for once in (True, False):
            prefix = suited.prefix(condition, slot, once=once)
            call = dict(size=SIZE, prefix=prefix, slot=slot)
            seen.append(suited.velocity(draws(6, 16, 64), LEVELS, condition, **call))
        other = suited.velocity(draws(6, 16, 64), LEVELS, condition, size=SIZE)
    assert (seen[0] - seen[1]).abs().max() <= 1e-5
    assert ((seen[0] - other).abs().max() > 1e-3) == (slot == "reference")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_call_alone_with_its_prefix_is_one_call(tiny_base, checkpointing):
    """Checkpointing is of the stock blocks: there it stays two."""
    policy = make_policy(tiny_base, checkpointing=checkpointing)
    condition = policy.encode(TEXTS[0])
    with captured(policy.transformer) as calls:
        prefix = policy.prefix(condition, once=True)
        policy.velocity(draws(6, 16, 64), LEVELS, condition, size=SIZE, prefix=prefix)
    assert ["group" in call for call in calls] == ([False, False] if checkpointing else [True])


def test_the_calls_with_a_cache_are_given_no_token_of_the_condition(policies):
    """Nor is the modulation copied to every token, here or where the keys are computed."""
    _, suited = policies
    condition = suited.encode(TEXTS[0], [picture(1, 64, 96)])
    seen = []
    block = suited.transformer.transformer_blocks[0]
    inner = block._modulate
    spy = lambda h, m, mask: seen.append((tuple(m.shape), mask)) or inner(h, m, mask)  # noqa: E731
    with torch.no_grad(), mock.patch.object(block, "_modulate", spy):
        prefix = suited.prefix(condition)
        with mock.patch.object(suited.slots, "call", wraps=suited.slots.call) as call:
            suited.velocity(draws(6, 16, 64), LEVELS, condition, size=SIZE, prefix=prefix)
    given = call.call_args.kwargs
    assert given["encoder_hidden_states"].shape[1] == 0
    assert given["hidden_states"].shape[1] == 16
    assert [shape[0] for shape, _ in seen] == [1, 1, 6, 6]
    assert all(mask is None for _, mask in seen)


def test_the_pipelines_own_first_step_fills_a_cache_and_keeps_its_velocities(policies):
    """Keys alone are wanted by `prefix`; in the stock loop the same call makes a step."""
    stock, suited = policies
    condition, seen = suited.encode(TEXTS[0]), []
    for policy in policies:
        cache = on_cpu.QwenImage21KVCache(len(policy.transformer.transformer_blocks))
        time = torch.full((1,), 0.7)
        with torch.no_grad():
            shape = (1, 4, 4)
            x = draws(1, 16, 64)
            seen.append(policy._call("train", x, time, condition, shape, cache, "extract"))
    assert (seen[0] - seen[1]).abs().max() <= 1e-5


def test_checkpointing_recomputes_the_same(tiny_base):
    plain, saving = (make_policy(tiny_base, "full", checkpointing=c) for c in (False, True))
    v, grads = field(plain, 1.0, [], "shared")
    got, mine = field(saving, 1.0, [], "shared")
    assert torch.equal(v, got)
    largest = max(float(g.abs().max()) for g in grads.values() if g is not None)
    for name, grad in grads.items():
        if grad is not None:
            assert (mine[name] - grad).abs().max() <= 1e-5 * largest, name


def test_weights_keep_their_names(policies):
    stock, suited = policies
    assert suited.transformer.state_dict().keys() == stock.transformer.state_dict().keys()
    swapped = [m for m in suited.transformer.modules() if isinstance(m, on_cpu.OneDnnLinear)]
    assert len(swapped) > 10 and not any(
        isinstance(m, on_cpu.OneDnnLinear) for m in stock.transformer.modules()
    )


# --- one operation at a time --------------------------------------------------------------------


def linears(inputs=48, outputs=80):
    plain = nn.Linear(inputs, outputs, bias=False)
    fast = nn.Linear(inputs, outputs, bias=False)
    fast.__class__ = on_cpu.OneDnnLinear
    fast.load_state_dict(plain.state_dict())
    return plain, fast


@pytest.mark.parametrize("rows", [1, 3, 8], ids=lambda n: f"{16 * n} rows")
def test_linear(rows):
    plain, fast = linears()
    seen = []
    for layer in (plain, fast):
        x = draws(rows, 16, 48).requires_grad_()
        y = layer(x)
        y.backward(draws(rows, 16, 80, seed=1))
        seen.append((y, x.grad, layer.weight.grad))
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


def test_linear_takes_small_products_other_types_and_autocast_as_torch_does():
    plain, fast = linears()
    x = draws(ROWS, 48)
    with mock.patch.object(on_cpu, "_product", wraps=on_cpu._product) as product:
        few = x[:-1]
        assert torch.equal(fast(few), plain(few))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), plain(x)) and fast(x).dtype is torch.bfloat16
        fast.bfloat16(), plain.bfloat16()
        assert torch.equal(fast(x.bfloat16()), plain(x.bfloat16()))
        assert not product.called
        fast.float()(x)
        assert product.called


@pytest.mark.parametrize("asked", [(True, False), (False, True)], ids=["input", "weight"])
def test_linear_computes_only_the_gradients_that_are_asked_for(asked):
    _, fast = linears()
    x = draws(40, 48).requires_grad_(asked[0])
    fast.weight.requires_grad_(asked[1])
    with mock.patch.object(on_cpu, "_product", wraps=on_cpu._product) as product:
        fast(x).sum().backward()
    assert product.call_count == 2
    assert ((x.grad is None), (fast.weight.grad is None)) == (not asked[0], not asked[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_rotate(dtype):
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen

    norm = RMSNorm(32, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    turns = torch.polar(torch.ones(10, 16), draws(10, 16, seed=3))
    seen = []
    for ours in (True, False):
        norm.weight.grad = None
        x = draws(4, 10, 6, 32).to(dtype if ours else torch.float32).requires_grad_()
        if ours:
            y = on_cpu.norm_rotate(x, norm.weight, turns, norm.eps)
        else:
            y = apply_rotary_emb_qwen(norm(x), turns, use_real=False)
        y.backward(draws(4, 10, 6, 32, seed=1).to(y.dtype))
        seen.append((y.float(), x.grad.float(), norm.weight.grad.clone()))
    near = dict(rtol=1e-4, atol=1e-5) if dtype is torch.float32 else dict(rtol=2e-2, atol=5e-2)
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("tokens", [(40, 16), (40, 64), (104, 64)], ids=str)
def test_attention_by_products_is_the_fused_one(tokens, masked):
    keys = sum(tokens)
    queries = keys if masked else tokens[1]
    mask = on_cpu.prefill_mask(((0, tokens[0], True),), keys) if masked else None
    q, k, v = draws(2, queries, 2, 32), draws(2, keys, 2, 32, seed=1), draws(2, keys, 2, 32, seed=2)
    want = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
    want = want.transpose(1, 2).flatten(2)
    torch.testing.assert_close(on_cpu.attention(q, k, v, mask), want)
    half = [t.bfloat16() for t in (q, k, v)]
    assert (on_cpu.attention(*half, mask).float() - want).abs().max() < 0.05


def test_a_prefill_is_causal_and_pictures_see_all_of_themselves():
    mask = on_cpu.prefill_mask(((0, 2, True), (2, 5, False), (5, 6, True)), 8)
    rows = ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]
    assert rows == [
        "x.......",
        "xx......",
        "xxxxx...",
        "xxxxx...",
        "xxxxx...",
        "xxxxxx..",
        "xxxxxxxx",
        "xxxxxxxx",
    ]
