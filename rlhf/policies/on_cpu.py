"""What the stock transformer computes, by operations that suit a CPU. `suit` puts them in place.

Values and gradients agree with the stock ones to float32's rounding. Each is here because it is
faster (`python -m benchmarks.prefix`, benchmarks/results/prefix.json):

- Linear layers by oneDNN in float32. torch takes MKL there, which keeps its AVX-512 kernels to
  processors of its maker: on others oneDNN is twice as fast.
- One call of attention per prefill, normalisation and rotation of queries and keys with a backward
  pass of their own, and plain products in bfloat16, where the backward pass of torch's fused
  attention takes five times as long on short sequences.
- Modulation by rows where all tokens take the same, in place of one copy per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21AttnProcessor,
    QwenImage21KVCache,
    QwenImage21KVLayerCache,
)
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEWEST_PRODUCTS = 2_500_000  # below, a oneDNN call costs more than it wins


@cache
def prefers_onednn() -> bool:
    """Whether float32 products are faster by oneDNN: AVX-512 on a processor not made by Intel."""
    facts = Path("/proc/cpuinfo")
    maker = facts.read_text() if facts.is_file() else "GenuineIntel"
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and "GenuineIntel" not in maker
    )


@cache
def _operation() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T. Either may be a transposed view."""
    return _operation()(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_input, by_weight = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if by_input else None,
            _product(grad.flatten(0, -2).t(), x.flatten(0, -2).t()) if by_weight else None,
        )


class OneDnnLinear(nn.Linear):
    """nn.Linear without bias; large float32 products go to oneDNN."""

    def forward(self, input: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
        weight = self.weight
        plain = input.dtype is weight.dtype is torch.float32 and input.is_cpu
        if (
            not plain
            or input.numel() * self.out_features < FEWEST_PRODUCTS
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(input)
        if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
            return _Linear.apply(input, weight)
        return _product(input, weight)


class _NormRotate(torch.autograd.Function):
    """Rotation of n w with n = x / rms(x) over the last axis; computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, turns: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = x32.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        unit = x32 * scale
        ctx.save_for_backward(unit, scale, weight, turns)
        return _rotated(unit * weight.float(), turns).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        unit, scale, weight, turns = ctx.saved_tensors
        back = _rotated(grad.float().contiguous(), turns.conj())
        by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (back * unit).flatten(0, -2).sum(0).to(weight.dtype)
        back *= weight.float()
        along = (back * unit).mean(-1, keepdim=True)
        return ((back - unit * along) * scale).to(grad.dtype), by_weight, None, None


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


def norm_rotate(
    x: Float[Tensor, "b s h d"],
    weight: Float[Tensor, " d"],
    turns: Complex[Tensor, "s half"],
    eps: float,
) -> Float[Tensor, "b s h d"]:
    """RMS norm of every head (arXiv:1910.07467), then rotary positions (arXiv:2104.09864)."""
    return _NormRotate.apply(x, weight, turns.unsqueeze(1), eps)


def attention(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b m h d"],
    v: Float[Tensor, "b m h d"],
    mask: Bool[Tensor, "n m"] | None = None,
) -> Float[Tensor, "b n hd"]:
    """softmax(q k^T / sqrt(d)) v of every head. True in the mask is seen; None sees all."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.dtype is torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = scores.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


@lru_cache(maxsize=256)
def prefill_mask(segments: tuple[tuple[int, int, bool], ...], tokens: int) -> Tensor:
    """(tokens, tokens) of a prefill: causal, but a picture sees all of itself, and so does what
    comes after the last segment, the target. A segment is (first, end, is text).
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    pictures = [(first, end) for first, end, is_text in segments if not is_text]
    target = (segments[-1][1] if segments else 0, tokens)
    for first, end in [*pictures, target]:
        mask[first:end, first:end] = True
    return mask


class ShortAttention(QwenImage21AttnProcessor):
    """The stock processor for keys without padding; anything else goes to its own code."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Any | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any | None = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None or key_valid is not None or rotary_emb is None:
            return super().__call__(
                attn,
                hidden_states,
                attention_mask=attention_mask,
                rotary_emb=rotary_emb,
                layer_cache=layer_cache,
                kv_cache_mode=kv_cache_mode,
                cache_write_slice=cache_write_slice,
                segments=segments,
                key_valid=key_valid,
            )
        heads = (-1, attn.inner_dim // attn.heads)
        q, k, v = (
            to(hidden_states).unflatten(-1, heads) for to in (attn.to_q, attn.to_k, attn.to_v)
        )
        q = norm_rotate(q, attn.norm_q.weight, rotary_emb, attn.norm_q.eps)
        k = norm_rotate(k, attn.norm_k.weight, rotary_emb, attn.norm_k.eps)
        if layer_cache is not None and kv_cache_mode == "cached":
            held_k, held_v = layer_cache.get()
            k, v = torch.cat([held_k, k], dim=1), torch.cat([held_v, v], dim=1)
        elif layer_cache is not None:
            layer_cache.store(k[:, cache_write_slice], v[:, cache_write_slice])
        mask = None if segments is None else prefill_mask(tuple(segments), k.shape[1])
        return attn.to_out[1](attn.to_out[0](attention(q, k, v, mask)))


class KeysOnlyLayer(QwenImage21KVLayerCache):
    """One layer of `KeysOnly`."""


class KeysOnly(QwenImage21KVCache):
    """A cache to be filled by a call whose velocities no one looks at."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(0)
        self.layer_caches = [KeysOnlyLayer() for _ in range(num_layers)]


def _by_rows(names: tuple[str, ...]):
    """A hook of a block: no choice of modulation token by token where all of them take the same.

    Where a cache stands for the condition, all are the target's and take their own row; the last
    row, of t = 0, is no one's. Where keys alone are wanted, all may take that one.
    """

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        rows = None
        if given.get("kv_cache_mode") == "cached":
            rows = given["modulation"][:-1]
        elif isinstance(given.get("layer_cache"), KeysOnlyLayer):
            rows = given["modulation"][-1:]
        if rows is not None:
            given |= {"modulation": rows, "target_token_mask": None}
        return (), given

    return hook


def _attend(transformer: Any) -> None:
    transformer.set_attn_processor(ShortAttention())


def _modulate(transformer: Any) -> None:
    for block in transformer.transformer_blocks:
        names = tuple(inspect.signature(block.forward).parameters)
        block.register_forward_pre_hook(_by_rows(names), with_kwargs=True)


def _multiply(transformer: Any) -> None:
    for module in transformer.modules():
        if prefers_onednn() and type(module) is nn.Linear and module.bias is None:
            module.__class__ = OneDnnLinear


PARTS = {"attention": _attend, "modulation": _modulate, "linear": _multiply}


def suit(transformer: Any) -> None:
    """Put the operations of this module in place, in this transformer. Weights keep their names."""
    for part in PARTS.values():
        part(transformer)
