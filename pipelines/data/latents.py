"""Latents and conditions of a data set by layout, computed once by a policy's frozen parts."""

# What the stock classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelines.data.scenes import Example, pictures, rgba
from rlhf.policies.base import Condition
from rlhf.policies.qwen_image21 import QwenImage21Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Examples of one layout: packed latents (n, N, C), their conditions, and those of the empty
    prompt.
    """

    latents: Tensor
    condition: Condition
    empty: Condition


def _stack(conditions: list[Condition]) -> Condition:
    sources = [c.sources_PMC for c in conditions if c.sources_PMC is not None]
    return Condition(
        embeds_PLD=torch.cat([c.embeds_PLD for c in conditions]),
        image_slots_L=conditions[0].image_slots_L,
        sources_PMC=torch.cat(sources) if sources else None,
        source_shapes=conditions[0].source_shapes,
    )


def take(condition: Condition, index: Tensor) -> Condition:
    """Some rows of a condition."""
    return Condition(
        embeds_PLD=condition.embeds_PLD[index],
        image_slots_L=condition.image_slots_L,
        sources_PMC=None if condition.sources_PMC is None else condition.sources_PMC[index],
        source_shapes=condition.source_shapes,
    )


@torch.no_grad()
def make_buckets(
    policy: QwenImage21Policy, examples: list[Example], size: int, least: int
) -> list[Bucket]:
    """Latents and conditions of all examples by layout; layouts rarer than `least` are left out."""
    vae = policy.pipeline.vae
    grouped: dict[Any, list[tuple[Tensor, Condition, Condition]]] = defaultdict(list)
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        packed = policy.pack(
            vae.encode(rgba(pictures(part, size)).unsqueeze(2)).latent_dist.mode()[:, :, 0]
        )
        plain = policy.encode_variants([e.caption for e in part])
        nothing = policy.encode("")
        for one, latent, condition in zip(part, packed, plain, strict=True):
            picture, empty = one.source_picture(size), nothing
            if picture is not None:
                condition, empty = policy.encode_variants([one.caption, ""], (picture,))
            grouped[condition.layout].append((latent, condition, empty))
        policy.forget()
    return [
        Bucket(
            latents=torch.stack([latent for latent, _, _ in rows]),
            condition=_stack([c for _, c, _ in rows]),
            empty=_stack([e for _, _, e in rows]),
        )
        for rows in grouped.values()
        if len(rows) >= least
    ]
