"""Stable Diffusion 3 (arXiv:2403.03206) as a policy: the stock pipeline's parts.

Text has one length, whatever the prompt: 77 tokens that two CLIPs give together, then those of T5,
which may be absent. Text attends to the picture, so nothing of it is constant over the steps but
what the frozen encoders read. A packed latent is one position of the autoencoder's grid, (H W, C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from jaxtyping import UInt8
from torch import Tensor

from rewards import images
from rlhf.errors import ConfigError
from rlhf.policies.base import Condition, Prefix
from rlhf.policies.config import PolicyConfig
from rlhf.policies.pipeline import Parts, PipelinePolicy, check_multiple, repeat
from rlhf.schedule import sd3_sigmas, static_shift, train_time


class StableDiffusion3Policy(PipelinePolicy):
    """The policy of a `StableDiffusion3Pipeline`, prompts only: it reads no source pictures."""

    PIPELINE = StableDiffusion3Pipeline
    LINEARS = (
        *("to_q", "to_k", "to_v", "to_out.0"),  # of the picture
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # of the text
    )
    READS = ("scheduler", "vae", "transformer")

    @classmethod
    def left_out(cls, config: PolicyConfig, index: Mapping[str, Any]) -> dict[str, None]:
        absent = index.get("text_encoder_3", (None,))[0] is None
        third = {"text_encoder_3": None, "tokenizer_3": None}
        return third if absent or config.t5_tokens == 0 else {}

    @classmethod
    def tokens(cls, size: tuple[int, int], parts: Parts) -> int:
        px, patch = _latent_px(parts), parts["transformer"]["patch_size"]
        check_multiple(size, px * patch)
        most = parts["transformer"]["pos_embed_max_size"] * px * patch
        if max(size) > most:
            raise ConfigError(
                f"expected a height and width of at most {most}, got {size[0]}x{size[1]}: the model"
                " has no positions beyond"
            )
        return (size[0] // px) * (size[1] // px)

    @classmethod
    def grid(cls, steps: int, size: tuple[int, int], parts: Parts) -> tuple[float, ...]:
        cls.tokens(size, parts)
        return sd3_sigmas(steps, static_shift(parts["scheduler"]))

    @torch.no_grad()
    def encode_variants(
        self, texts: Sequence[str], sources: Sequence[np.ndarray] = ()
    ) -> list[Condition]:
        """Conditions of several prompts. Raises ConfigError for source pictures."""
        if sources:
            raise ConfigError(
                "expected prompts without source pictures, got some: Stable Diffusion 3 makes"
                " pictures from text alone, use a Qwen-Image-2.1 base for edits"
            )
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(texts),
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.t5_tokens,
        )
        no_slots = torch.zeros(embeds.shape[1], dtype=torch.bool)
        return [
            Condition(embeds_PLD=e[None].float(), image_slots_L=no_slots, pooled_PE=p[None].float())
            for e, p in zip(embeds, pooled, strict=True)
        ]

    def prefix(self, condition: Condition, slot: str = "train") -> Prefix:
        """Empty: there is nothing to compute beforehand."""
        return Prefix()

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
        """See `Policy.velocity`."""
        rows, copies = len(x_BNC), len(x_BNC) // len(condition.embeds_PLD)
        assert condition.pooled_PE is not None
        embeds, pooled = (
            repeat(t.to(self.device, self.dtype), copies)
            for t in (condition.embeds_PLD, condition.pooled_PE)
        )
        out = self.slots.call(
            slot,
            hidden_states=self._unpacked(x_BNC.to(self.device, self.dtype), size),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=train_time(sigma_B.to(self.device)).expand(rows),
            return_dict=False,
        )[0]
        return out.float().flatten(2).transpose(1, 2).to(x_BNC.device)

    def _unpacked(self, x_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W), as the transformer and the autoencoder take it."""
        px = self.pipeline.vae_scale_factor
        return x_BNC.transpose(1, 2).unflatten(2, (size[0] // px, size[1] // px))

    @torch.no_grad()
    def decode(self, x0_GNC: Tensor, size: tuple[int, int]) -> UInt8[Tensor, "g 3 h w"]:
        config = self.pipeline.vae.config
        latents = self._unpacked(x0_GNC.float(), size) / config.scaling_factor
        if config.shift_factor is not None:
            latents = latents + config.shift_factor
        decoded = self.pipeline.vae.decode(latents.to(self.device, self.dtype), return_dict=False)
        return images.to_uint8(decoded[0].float()).cpu()


def _latent_px(parts: Parts) -> int:
    """Side of a picture's square that is one position of the latents."""
    return 2 ** (len(parts["vae"]["block_out_channels"]) - 1)
