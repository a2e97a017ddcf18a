"""Staying near other weights:  loss + kl D(theta, reference) + kl_ema D(theta, ema)

Two forms of D, both means over latent dimensions, of fields at the same points:

    velocity   bar((v_theta - v_ref)^2)                          any loss; does not change with the
                                                                 grid (DiffusionNFT, AWM)
    gaussian   gamma^2 / (2 q^2) bar((v_theta - v_ref)^2)        KL of the two transitions, exact:
                                                                 ratio losses (arXiv:2505.05470)

A transition's mean is alpha x + gamma v, so the time step is inside gamma. Peers that divide by
2 sigma^2 instead of 2 q^2 leave it out and mean another coefficient at every number of steps.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, keep_live, wide

KLForm = Literal["velocity", "gaussian"]


def velocity_kl(
    v: Float[Tensor, "b *dims"], v_ref: Float[Tensor, "b *dims"], weight_B: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """sum_B weight bar((v - v_ref)^2); no gradient through v_ref."""
    d = keep_live(wide(v), weight_B) - keep_live(wide(v_ref).detach(), weight_B)
    return (weight_B * d.square().flatten(1).mean(dim=1)).sum()


def transition_weight(
    weight_G: Float[Tensor, " g"], factors: Sequence[float]
) -> Float[Tensor, " b"]:
    """Weights of the rows of K steps of G samples, steps first: weight factor_k / K.

    With `kernels.kl_factor` of the steps, `velocity_kl` is the exact Gaussian KL; with ones, the
    mean velocity KL over the steps.
    """
    factor = torch.tensor(factors, dtype=weight_G.dtype, device=weight_G.device) / len(factors)
    return (factor[:, None] * weight_G).flatten()


def penalty(name: str, distance: Float[Tensor, ""], coefficient: float) -> LossTerms:
    """coefficient * distance, and the distance itself as the metric kl/<name>."""
    metric = distance.detach().double()
    return LossTerms(loss=coefficient * distance, metrics={f"kl/{name}": metric})


def added(terms: Sequence[LossTerms]) -> LossTerms:
    """Terms about the same samples as one."""
    return LossTerms(
        loss=torch.stack([term.loss for term in terms]).sum(),
        metrics={name: value for term in terms for name, value in term.metrics.items()},
        maxima={name: value for term in terms for name, value in term.maxima.items()},
    )
