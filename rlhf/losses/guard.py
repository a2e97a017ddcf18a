"""GRPO-Guard:  loss = max(-A rho, -A clip(rho, 1 - e_lo, 1 + e_hi)) / h

    rho = exp(q (L_theta - L_old + b)),   b = bar((mu_theta - mu_old)^2) / (2 q^2)

arXiv:2510.22319. L_theta - L_old = -b + bar(z d) / q with d = mu_theta - mu_old: its first part
makes every ratio lean below 1, so that good samples are never clipped. b takes it out, q gives all
steps one spread (log rho = bar(z d)), and 1 / h undoes the time step inside d = gamma dv.

L is recentred (losses/base.py): z is the noise that was drawn. With guided rollouts and the plain
form bar(S d) / q would be left over and the ratio would lean again. At guidance 1 the forms agree.
"""

from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, clipped, keep_live, largest, ratio_metrics, weighted, wide


def guard(
    logp_KG: Float[Tensor, "k g"],
    old_logp_KG: Float[Tensor, "k g"],
    kl_old_KG: Float[Tensor, "k g"],
    q_K: Float[Tensor, " k"],
    h_K: Float[Tensor, " k"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    clip_low: float = 2e-6,
    clip_high: float = 2e-6,
) -> LossTerms:
    """Mean over the K trained steps, weighted sum over samples. `kl_old_KG` is b, with gradient.

    Metrics: those of `ratio_metrics`, of the corrected ratio, and `kl/old`, the mean of b; maximum:
    `ratio/max_dev`, of the ratio as it was.
    """
    advantage = keep_live(wide(advantage_G), weight_G)
    gap = keep_live(wide(logp_KG) - wide(old_logp_KG).detach(), weight_G, axis=1)
    b = keep_live(wide(kl_old_KG), weight_G, axis=1)
    log_ratio = q_K[:, None] * (gap + b)
    per_step = clipped(log_ratio, advantage, clip_low, clip_high) / h_K[:, None]
    bias = {"kl/old": weighted(b.mean(dim=0), weight_G)}
    return LossTerms(
        loss=(weight_G * per_step.mean(dim=0)).sum(),
        metrics=ratio_metrics(log_ratio, weight_G, clip_low, clip_high) | bias,
        maxima=largest(gap),
    )
