"""Qwen-Image-2.1 as a policy: the stock pipeline's parts, called one layout at a time.

Text and source tokens are modulated at t = 0 and attend causally, so their keys and values are the
same for every step and every member of a group: `prefix` computes them once per prompt, `velocity`
expands them over the rows. On a CPU a call that is alone with its prefix computes both in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from jaxtyping import UInt8
from torch import Tensor

from rewards import images
from rlhf.policies import on_cpu, one_pass
from rlhf.policies.base import Condition, Prefix
from rlhf.policies.pipeline import Parts, PipelinePolicy, check_multiple, repeat
from rlhf.schedule import model_time, qwen_image21_sigmas

LATENT_PX = 16
CELL_PX = 32  # one slot of the condition encoder covers 2x2 latents


def tokens_of(size: tuple[int, int]) -> int:
    """Latent tokens of a picture of (height, width). Raises ConfigError for a size the model cannot
    make.
    """
    check_multiple(size, CELL_PX)
    return (size[0] // LATENT_PX) * (size[1] // LATENT_PX)


class KVPrefix(Prefix):
    """A key-value cache of P prompts, expanded over rows on use."""

    def __init__(self, cache: QwenImage21KVCache, prompts: int) -> None:
        self.cache, self.prompts = cache, prompts

    def expanded(self, rows: int) -> QwenImage21KVCache:
        copies = rows // self.prompts
        if copies == 1:
            return self.cache
        out = QwenImage21KVCache(len(self.cache.layer_caches))
        for mine, theirs in zip(out.layer_caches, self.cache.layer_caches, strict=True):
            k, v = theirs.get()
            mine.k, mine.v = (repeat(t, copies) for t in (k, v))
        return out


class Along(Prefix):
    """Nothing yet: the call that it is given to computes the condition along with the targets."""


def _elsewhere(condition: Condition) -> Condition:
    """A condition of no tokens after which a target has the same positions.

    With a cache the transformer still takes in the condition's tokens and then drops them. Text
    advances the position by one a token, a picture by its longer side whatever its area: one of
    no width stands for all of them.
    """
    text = len(condition.image_slots_L) - int(condition.image_slots_L.sum())
    extent = text + sum(max(height, width) for _, height, width in condition.source_shapes)
    return Condition(
        embeds_PLD=condition.embeds_PLD[:, :0],
        image_slots_L=condition.image_slots_L[:0],
        source_shapes=((1, extent, 0),),
    )


class QwenImage21Policy(PipelinePolicy):
    """The policy of a `QwenImage21Pipeline`."""

    PIPELINE = QwenImage21Pipeline
    LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "img_mlp.out")

    @classmethod
    def tokens(cls, size: tuple[int, int], parts: Parts) -> int:
        return tokens_of(size)

    @classmethod
    def grid(cls, steps: int, size: tuple[int, int], parts: Parts) -> tuple[float, ...]:
        own = parts.get("pipeline", {}).get("sample_sigmas")
        return qwen_image21_sigmas(steps, tokens_of(size), parts["scheduler"], sample_sigmas=own)

    def _suit_cpu(self) -> None:
        on_cpu.suit(self.transformer)
        one_pass.install(self.transformer)

    # --- conditions
    # ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_variants(
        self, texts: Sequence[str], sources: Sequence[np.ndarray] = ()
    ) -> list[Condition]:
        """Conditions of several prompts about the same source pictures, each of its own exact
        length.
        """
        pictures: list[Any] = [images.to_pil(s).convert("RGBA") for s in sources]
        embeds, mask, slots = self.pipeline.encode_prompt(list(texts), image=pictures or None)
        lengths = [embeds.shape[1]] * len(texts) if mask is None else mask.sum(1).tolist()
        latents, shapes = self._encode_sources(sources)
        return [
            Condition(
                embeds_PLD=row[None, :n].float(),
                image_slots_L=slot[:n],
                sources_PMC=latents,
                source_shapes=shapes,
            )
            for row, slot, n in zip(embeds, slots, lengths, strict=True)
        ]

    def _encode_sources(self, sources: Sequence[np.ndarray]):
        packed, shapes = [], []
        for source in sources:
            size = (source.shape[1], source.shape[2])
            self.latent_shape(size)
            rgb = images.to_float(torch.from_numpy(source)[None])
            rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1).to(self.device, self.dtype)
            packed.append(
                self.pack(self.pipeline.vae.encode(rgba.unsqueeze(2)).latent_dist.mode()[:, :, 0])
            )
            shapes.append((1, size[0] // LATENT_PX, size[1] // LATENT_PX))
        return (torch.cat(packed, dim=1) if packed else None), tuple(shapes)

    # --- the velocity field
    # ----------------------------------------------------------------------------------

    def prefix(self, condition: Condition, slot: str = "train", *, once: bool = False) -> Prefix:
        """Keys and values of the condition tokens; the smallest target rides along unused."""
        if once and self.device.type == "cpu" and not self.config.checkpointing:
            return Along()
        prompts = len(condition.embeds_PLD)
        target = condition.embeds_PLD.new_zeros(prompts, 4, self.transformer.config.in_channels)
        cache = on_cpu.KeysOnly(len(self.transformer.transformer_blocks))
        self._call(slot, target, target.new_zeros(prompts), condition, (1, 2, 2), cache, "extract")
        return KVPrefix(cache, prompts)

    def velocity(
        self,
        x_BNC: Tensor,
        sigma_B: Tensor,
        condition: Condition,
        *,
        size: tuple[int, int],
        prefix: Prefix | None = None,
        slot: str = "train",
    ) -> Tensor:
        """See `Policy.velocity`. Without a prefix the whole sequence is computed (same numbers in
        float32).
        """
        shape = (1, size[0] // LATENT_PX, size[1] // LATENT_PX)
        time = model_time(sigma_B.to(self.device), self.dtype)
        if isinstance(prefix, Along):
            out = self._in_one_pass(slot, x_BNC, time, condition, shape)
        elif isinstance(prefix, KVPrefix):
            cache, seen = prefix.expanded(len(x_BNC)), _elsewhere(condition)
            out = self._call(slot, x_BNC, time, seen, shape, cache, "cached")
        else:
            out = self._call(slot, x_BNC, time, condition, shape, None, None)
        return out[:, -x_BNC.shape[1] :].float().to(x_BNC.device)

    def _in_one_pass(self, slot, x_BNC, time_B, condition, shape) -> Tensor:
        sources = condition.sources_PMC
        group = one_pass.Group(
            x_BNC=x_BNC.to(self.device, self.dtype),
            time_B=time_B.expand(len(x_BNC)),
            embeds_PLD=condition.embeds_PLD.to(self.dtype),
            slots_L=condition.image_slots_L,
            sources_PMC=None if sources is None else sources.to(self.dtype),
            shapes=(*condition.source_shapes, shape),
        )
        return self.slots.call(slot, group=group)

    def _call(self, slot, x_BNC, time_B, condition, shape, cache, mode) -> Tensor:
        rows, copies = len(x_BNC), len(x_BNC) // len(condition.embeds_PLD)
        tokens = x_BNC.to(self.device, self.dtype)
        if condition.sources_PMC is not None:
            tokens = torch.cat(
                [repeat(condition.sources_PMC, copies).to(tokens.dtype), tokens], dim=1
            )
        slots = torch.cat(
            [condition.image_slots_L, condition.image_slots_L.new_ones(shape[1] * shape[2] // 4)]
        )
        return self.slots.call(
            slot,
            hidden_states=tokens,
            encoder_hidden_states=repeat(condition.embeds_PLD, copies).to(self.dtype),
            timestep=time_B.expand(rows),
            img_shapes=[[*condition.source_shapes, shape]] * rows,
            img_mask=slots.expand(rows, -1),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]

    # --- latents and pictures
    # --------------------------------------------------------------------------------

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=like.device).view(1, 1, -1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def pack(self, latents_BCYX: Tensor) -> Tensor:
        """Encoder output to normalised packed latents (B, N, C), float32."""
        packed = latents_BCYX.float().flatten(2).transpose(1, 2)
        mean, std = self._statistics(packed)
        return (packed - mean) / std

    @torch.no_grad()
    def decode(self, x0_GNC: Tensor, size: tuple[int, int]) -> UInt8[Tensor, "g 3 h w"]:
        mean, std = self._statistics(x0_GNC)
        grid = (x0_GNC.float() * std + mean).transpose(1, 2)
        grid = grid.unflatten(2, (1, size[0] // LATENT_PX, size[1] // LATENT_PX))
        decoded = self.pipeline.vae.decode(grid.to(self.device, self.dtype), return_dict=False)[0][
            :, :3, 0
        ]
        return images.to_uint8(decoded.float()).cpu()
