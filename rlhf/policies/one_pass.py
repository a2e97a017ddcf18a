"""Conditions of Qwen-Image-2.1 and all the targets that share them, through the blocks in one pass.

Tokens lie one after the other, those of the conditions first, so that every linear layer is one
product for all of them: two calls, one for the keys and values of the condition and one for the
targets, spend on 40 tokens what 120 should take. The numbers are those of the stock transformer on
whole sequences, to float32's rounding. For calls that are alone with their condition, as in
training.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.policies.on_cpu import attention, norm_rotate
from rlhf.policies.pipeline import repeat

Scales = tuple[Tensor, ...]  # four, a row each for every token


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """P conditions of one layout and B targets, siblings adjacent."""

    x_BNC: Float[Tensor, "b n c"]
    time_B: Float[Tensor, " b"]  # 0 to 1
    embeds_PLD: Float[Tensor, "p l d"]
    slots_L: Bool[Tensor, " l"]  # True where the text holds a slot of a source picture
    sources_PMC: Float[Tensor, "p m c"] | None
    shapes: tuple[tuple[int, int, int], ...]  # of the sources, then of the target


def install(transformer: Any) -> None:
    """Let a transformer take a `Group`, as `transformer(group=...)`, beside its own arguments."""
    stock = transformer.forward

    @wraps(stock)
    def forward(*args: Any, group: Group | None = None, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if group is None else velocities(transformer, group)

    transformer.forward = forward


def velocities(model: Any, group: Group) -> Tensor:
    """(B, N, C), as the stock transformer's output for the target."""
    x, count = model.img_in(group.x_BNC), group.x_BNC.shape[1]
    slots = torch.cat([group.slots_L, group.slots_L.new_ones(count // 4)])
    pictures = slots.repeat_interleave(torch.where(slots, 4, 1))
    turns = model.pos_embed(list(group.shapes), pictures, device=x.device)
    ids = model.build_token_metadata(pictures, list(group.shapes))[0][:-count]
    condition = _condition_tokens(model, group, pictures[:-count])
    time = torch.cat([group.time_B.to(x.dtype), group.time_B.new_zeros(1, dtype=x.dtype)])
    embedded = model.time_text_embed(time, x)
    rows = _Rows(prompts=len(condition), held=len(ids), targets=len(x), count=count)
    scales = tuple(rows.of_tokens(s) for s in _scales(model.modulation(embedded)))
    turns = torch.cat([turns[:-count].repeat(len(condition), 1), turns[-count:].repeat(len(x), 1)])
    mask = _seen(ids)
    h = torch.cat([condition.flatten(0, 1), x.flatten(0, 1)])
    *blocks, last = model.transformer_blocks
    for block in blocks:
        h = _block(block, h, scales, turns, mask, rows)
    h = _block(last, h, scales, turns, None, rows)
    return model.proj_out(model.norm_out(h.unflatten(0, (-1, count)), embedded[:-1], None))


def _condition_tokens(model: Any, group: Group, pictures: Tensor) -> Tensor:
    """(P, held, width): every slot of a source picture becomes its 2 x 2 latents."""
    repeats = torch.where(group.slots_L, 4, 1)
    tokens = model.txt_in(group.embeds_PLD).repeat_interleave(repeats, dim=1)
    if group.sources_PMC is not None:
        tokens[:, pictures] = model.img_in(group.sources_PMC).to(tokens.dtype)
    return tokens


def _scales(modulation: Tensor) -> Scales:
    """Factors of the two branches of every block and of what they add, in turn."""
    scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
    return 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()


def _seen(ids: Tensor) -> Tensor:
    """(held, held): causal, but a picture sees all of itself. Text has the id -1."""
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril()
    return causal | ((ids[:, None] == ids) & (ids >= 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Which tokens are whose."""

    prompts: int
    held: int  # tokens of a condition
    targets: int
    count: int  # tokens of a target

    @property
    def first(self) -> int:
        """The first token of a target."""
        return self.prompts * self.held

    def of_tokens(self, rows: Tensor) -> Tensor:
        """Rows of the targets, then that of t = 0, to a row for every token."""
        held = rows[-1:].expand(self.first, -1)
        return torch.cat([held, rows[:-1].repeat_interleave(self.count, dim=0)])

    def apart(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(prompts, held, ...) and (targets, count, ...) of all tokens."""
        held, target = t[: self.first], t[self.first :]
        return held.unflatten(0, (self.prompts, -1)), target.unflatten(0, (self.targets, -1))


def _block(
    block: Any, h: Tensor, scales: Scales, turns: Tensor, mask: Tensor | None, rows: _Rows
) -> Tensor:
    """One block on all tokens. Without a mask it is the last, and only the targets come out."""
    attn, first = block.attn, 0 if mask is not None else rows.first
    scale1, gate1, scale2, gate2 = scales
    seen = block.img_norm1(h) * scale1
    heads = (-1, attn.inner_dim // attn.heads)
    q = attn.to_q(seen[first:]).unflatten(-1, heads)
    k, v = (to(seen).unflatten(-1, heads) for to in (attn.to_k, attn.to_v))
    q = norm_rotate(q[None], attn.norm_q.weight, turns[first:], attn.norm_q.eps)[0]
    k = norm_rotate(k[None], attn.norm_k.weight, turns, attn.norm_k.eps)[0]
    out = attn.to_out[1](attn.to_out[0](_attended(q, k, v, mask, rows)))
    h = h[first:] + gate1[first:] * out
    return h + gate2[first:] * block.img_mlp(block.img_norm2(h) * scale2[first:])


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rows: _Rows) -> Tensor:
    """(tokens, width): conditions see themselves, a target its condition and itself."""
    (held_k, k), (held_v, v) = rows.apart(k), rows.apart(v)
    copies = rows.targets // rows.prompts
    keys, values = (
        torch.cat([repeat(held, copies), own], dim=1) for held, own in ((held_k, k), (held_v, v))
    )
    own_q = q[-rows.targets * rows.count :].unflatten(0, (rows.targets, -1))
    out = attention(own_q, keys, values).flatten(0, 1)
    if mask is None:
        return out
    held_q = q[: rows.first].unflatten(0, (rows.prompts, -1))
    return torch.cat([attention(held_q, held_k, held_v, mask).flatten(0, 1), out])
