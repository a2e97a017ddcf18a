"""DiffusionNFT:  loss = (A_max / beta) [ r E+ + (1 - r) E- ]

    r  = 1/2 + 1/2 clip(A / A_max, -1, 1)
    v+ = (1 - beta) v_old + beta v_theta,      v- = (1 + beta) v_old - beta v_theta
    E  = bar((x0_hat - x0)^2) / n,  x0_hat = x_s - s v,  n = stopgrad max(bar|x0_hat - x0|, 1e-5)

arXiv:2509.16117; its KL term is losses/kl.py. No likelihood: the x0 of a rollout is all it needs,
so guided rollouts of any sampler are consistent with unguided training. v_old is the velocity of
the weights that *sampled* x0, a lagged copy of the trained ones. At v_theta = v_old the gradient is
2 A s^2 (v_old - v*) / n for any beta; beta only weighs the size of the step (A_max beta bar(dv^2)),
and the value of the loss at that point says nothing.

Differs from the paper: A_max is 2 by default, since z-scores of small groups rarely pass it.
"""

from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, keep_live, per_sample, weighted, wide

FLOOR = 1e-5  # of the normaliser n


def noised(
    x0: Float[Tensor, "g *dims"], eps: Float[Tensor, "g *dims"], sigma_G: Float[Tensor, " g"]
) -> Float[Tensor, "g *dims"]:
    """x_s = (1 - s) x0 + s eps in float32, each sample at its own sigma."""
    s = per_sample(sigma_G, x0)
    return (1.0 - s) * wide(x0) + s * wide(eps)


def nft(
    v_theta: Float[Tensor, "g *dims"],
    v_old: Float[Tensor, "g *dims"],
    x_s: Float[Tensor, "g *dims"],
    x0: Float[Tensor, "g *dims"],
    sigma_G: Float[Tensor, " g"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    beta: float = 1.0,
    adv_max: float = 2.0,
) -> LossTerms:
    """Weighted sum over samples; velocities are the model's at (x_s, sigma_G). Latent units.

    `beta` > 0, `adv_max` > 0. Metric over live samples: `nft/drift` = bar((v_theta - v_old)^2).
    """
    theta, old = keep_live(wide(v_theta), weight_G), keep_live(wide(v_old).detach(), weight_G)
    x, clean = keep_live(wide(x_s), weight_G), keep_live(wide(x0), weight_G)
    s = per_sample(keep_live(sigma_G, weight_G), x)
    r = 0.5 + 0.5 * (keep_live(wide(advantage_G), weight_G) / adv_max).clamp(-1.0, 1.0)

    positive = _error(x - s * ((1.0 - beta) * old + beta * theta), clean)
    negative = _error(x - s * ((1.0 + beta) * old - beta * theta), clean)
    drift = (theta - old).square().flatten(1).mean(dim=1)
    return LossTerms(
        loss=(weight_G * (adv_max / beta) * (r * positive + (1.0 - r) * negative)).sum(),
        metrics={"nft/drift": weighted(drift, weight_G)},
    )


def _error(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """bar((x0_hat - x0)^2) / stopgrad bar|x0_hat - x0|, per sample."""
    d = (x0_hat - x0).flatten(1)
    return d.square().mean(dim=1) / d.detach().abs().mean(dim=1).clamp_min(FLOOR)
