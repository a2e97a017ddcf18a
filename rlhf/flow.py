"""Flow matching (arXiv:2210.02747): v(x_sigma) regresses eps - x0, x_sigma = (1 - sigma) x0 + sigma
eps. The objective of pretraining, and how it is read apart by noise level.

`copies` noisy versions of a picture share the keys and values of its caption, which the
block-causal model computes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.policies.base import Condition
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.policies.qwen_image21 import QwenImage21Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of one layout: the P prompts of `condition`, each with the same number of noisy copies,
    siblings adjacent; B is their product.
    """

    latents: Float[Tensor, "b n c"]
    noise: Float[Tensor, "b n c"]
    sigma: Float[Tensor, " b"]
    condition: Condition


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Pictures of one size (height, width), in parts by layout. `weight` 0: of no account."""

    parts: tuple[Part, ...]
    size: tuple[int, int]
    weight: float = 1.0

    @property
    def rows(self) -> int:
        return sum(len(part.latents) for part in self.parts)


def logit_normal(u: Tensor, shift: float) -> Tensor:
    """Noise levels of standard normal draws: e^m s / (1 + (e^m - 1) s) with s = sigmoid(u), m the
    shift; logit-normal (arXiv:2403.03206), moved to higher noise as in sampling.
    """
    s, odds = u.sigmoid(), math.exp(shift)
    return odds * s / (1 + (odds - 1) * s)


def flow_errors(
    policy: QwenImage21Policy, part: Part, size: tuple[int, int], slot: str = "train"
) -> Float[Tensor, " b"]:
    """Mean squared error of the velocity of each row, under the weights of a slot."""
    sigma = part.sigma[:, None, None]
    x = (1 - sigma) * part.latents + sigma * part.noise
    prefix = policy.prefix(part.condition, slot)
    v = policy.velocity(x, part.sigma, part.condition, size=size, prefix=prefix, slot=slot)
    return (v - (part.noise - part.latents)).pow(2).mean((1, 2))


def flow_matching(policy: QwenImage21Policy, batch: Batch) -> Tensor:
    """Mean over the rows of the batch, whatever their layouts, times its weight."""
    errors = [flow_errors(policy, part, batch.size) for part in batch.parts]
    return torch.cat(errors).mean() * batch.weight


@torch.no_grad()
def loss_by_level(
    policy: QwenImage21Policy,
    batches: Sequence[Batch],
    edges: Sequence[float],
    slot: str = "train",
) -> dict[float, float]:
    """Mean error of the rows between each two neighbouring `edges` of sigma, by the middle of the
    two; a bin without rows is absent.
    """
    sigmas = torch.cat([part.sigma for batch in batches for part in batch.parts])
    errors = torch.cat(
        [flow_errors(policy, part, batch.size, slot) for batch in batches for part in batch.parts]
    )
    out = {}
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (sigmas >= low) & (sigmas < high)
        if inside.any():
            out[round((low + high) / 2, 6)] = float(errors[inside.to(errors.device)].mean())
    return out


def mixed_precision(policy: PipelinePolicy, precision: str) -> torch.autocast:
    """Context of forward passes with products in `precision`."""
    return torch.autocast(policy.device.type, torch.bfloat16, enabled=precision == "bfloat16")
