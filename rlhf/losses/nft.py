"""DiffusionNFT:  loss = (A_max / beta) [ r E+ + (1 - r) E- ] + kl bar((v_theta - v_ref)^2)

    r  = 1/2 + 1/2 clip(A / A_max, -1, 1)
    v+ = (1 - beta) v_old + beta v_theta,      v- = (1 + beta) v_old - beta v_theta
    E  = bar((x0_hat - x0)^2) / n,  x0_hat = x_s - s v,  n = stopgrad max(bar|x0_hat - x0|, 1e-5)

arXiv:2509.16117. No likelihood: the x0 of a rollout is all it needs, so guided rollouts of any
sampler are consistent with unguided training. v_old is the velocity of the weights that *sampled*
x0, a lagged copy of the trained ones. At v_theta = v_old the gradient is 2 A s^2 (v_old - v*) / n
for any beta; beta only weighs the size of the step (A_max beta bar(dv^2)), and the value of the
loss at that point says nothing.

Differs from the paper: A_max is 2 by default, since z-scores of small groups rarely pass it.
"""

from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, keep_live, velocity_kl, weighted

FLOOR = 1e-5  # of the normaliser n


def noised(
    x0: Float[Tensor, "g *dims"], eps: Float[Tensor, "g *dims"], sigma_G: Float[Tensor, " g"]
) -> Float[Tensor, "g *dims"]:
    """x_s = (1 - s) x0 + s eps in float32, each sample at its own sigma."""
    s = _per_sample(sigma_G, x0)
    return (1.0 - s) * x0.float() + s * eps.float()


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
    v_ref: Float[Tensor, "g *dims"] | None = None,
    kl: float = 0.0,
) -> LossTerms:
    """Weighted sum over samples; velocities are the model's at (x_s, sigma_G). Latent units.

    `beta` > 0, `adv_max` > 0. Metrics over live samples: `nft/drift` = bar((v_theta - v_old)^2)
    and, with a `v_ref`, `kl/velocity`. Raises ValueError for kl > 0 without v_ref.
    """
    if kl > 0.0 and v_ref is None:
        raise ValueError(
            "expected v_ref with kl > 0, got None: pass the reference velocity or kl=0"
        )
    theta, old = keep_live(v_theta.float(), weight_G), keep_live(v_old.float().detach(), weight_G)
    x, clean = keep_live(x_s.float(), weight_G), keep_live(x0.float(), weight_G)
    s = _per_sample(keep_live(sigma_G, weight_G), x)
    r = 0.5 + 0.5 * (keep_live(advantage_G.float(), weight_G) / adv_max).clamp(-1.0, 1.0)

    positive = _error(x - s * ((1.0 - beta) * old + beta * theta), clean)
    negative = _error(x - s * ((1.0 + beta) * old - beta * theta), clean)
    loss = (weight_G * (adv_max / beta) * (r * positive + (1.0 - r) * negative)).sum()

    metrics = {"nft/drift": weighted((theta - old).square().flatten(1).mean(dim=1), weight_G)}
    if v_ref is not None:
        distance = velocity_kl(v_theta, v_ref, weight_G)
        metrics["kl/velocity"] = distance.detach().double()
        if kl > 0.0:
            loss = loss + kl * distance
    return LossTerms(loss=loss, metrics=metrics)


def _error(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """bar((x0_hat - x0)^2) / stopgrad bar|x0_hat - x0|, per sample."""
    d = (x0_hat - x0).flatten(1)
    return d.square().mean(dim=1) / d.detach().abs().mean(dim=1).clamp_min(FLOOR)


def _per_sample(value_G: Tensor, like: Tensor) -> Tensor:
    return value_G.float().reshape(-1, *[1] * (like.ndim - 1))
