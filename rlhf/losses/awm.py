"""Advantage-weighted matching:  loss = max(-A' rho, -A' clip(rho, 1 - e_lo, 1 + e_hi))

    rho = exp(l_theta - stopgrad l_old),   l = -g(bar((v - v*)^2), s),   v* = eps - x0
    A'  = clip(A / A_max, -1, 1)

arXiv:2509.25050; its KL terms, to the reference and to an average of the weights, are losses/kl.py.
The flow-matching error of pretraining takes the place of a log-prob, at the same (s, eps) for new
and old weights: only the x0 of a rollout is needed, of any sampler, guided or not. g weighs it:

    uniform  g = E     sigma  g = s E     sigma2  g = s^2 E     ghuber  g = s ((E + d)^p - d^p) / p

with p = 1/4 and d = 1e-10; the paper argues for uniform, its configurations use ghuber. On-policy
and uniform the gradient is 2 A' (v - v*), NFT's first one without its normaliser and A_max.
"""

import math
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, clipped, keep_live, largest, ratio_metrics, weighted, wide

Weighting = Literal["uniform", "sigma", "sigma2", "ghuber"]
POWER, OFFSET = 0.25, 1e-10


def awm(
    v_theta: Float[Tensor, "g *dims"],
    v_old: Float[Tensor, "g *dims"],
    x0: Float[Tensor, "g *dims"],
    eps: Float[Tensor, "g *dims"],
    sigma_G: Float[Tensor, " g"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    adv_max: float = 2.0,
    weighting: Weighting = "uniform",
    clip_low: float = math.inf,
    clip_high: float = math.inf,
) -> LossTerms:
    """Weighted sum over samples; velocities are the model's at (1 - s) x0 + s eps, 0 < s <= 1.

    `adv_max` > 0. Metrics: those of `ratio_metrics` and `awm/error`, the mean of bar((v_theta -
    v*)^2); maximum: `ratio/max_dev`.
    """
    target = keep_live(wide(eps) - wide(x0), weight_G)
    s = keep_live(wide(sigma_G), weight_G)
    error, old = (
        (keep_live(wide(v), weight_G) - target).square().flatten(1).mean(dim=1)
        for v in (v_theta, v_old.detach())
    )
    log_ratio = (weigh(old, s, weighting) - weigh(error, s, weighting))[None]
    advantage = (keep_live(wide(advantage_G), weight_G) / adv_max).clamp(-1.0, 1.0)
    per_step = clipped(log_ratio, advantage, clip_low, clip_high)
    own = {"awm/error": weighted(error, weight_G)}
    return LossTerms(
        loss=(weight_G * per_step.mean(dim=0)).sum(),
        metrics=ratio_metrics(log_ratio, weight_G, clip_low, clip_high) | own,
        maxima=largest(log_ratio),
    )


def weigh(
    error_G: Float[Tensor, " g"], sigma_G: Float[Tensor, " g"], weighting: Weighting
) -> Float[Tensor, " g"]:
    """g(E, s), see the module."""
    if weighting == "uniform":
        return error_G
    if weighting == "sigma":
        return sigma_G * error_G
    if weighting == "sigma2":
        return sigma_G.square() * error_G
    return sigma_G / POWER * ((error_G + OFFSET) ** POWER - OFFSET**POWER)
