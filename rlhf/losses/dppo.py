"""Flow-DPPO:  loss = -A rho m,  rho = exp(L_theta - L_old)

    K = bar((mu_theta - mu_old)^2) / (2 q^2)
    m = 0 where K >= limit and the step leads further away (A > 0 and rho > 1, or A < 0 and rho < 1)
        1 elsewhere

arXiv:2606.11025. K is the exact KL of the two transitions, a trust region where the clip of a ratio
is a test on one sample. What leads back is never dropped. L is recentred (losses/base.py).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, keep_live, largest, ratio_metrics, weighted, wide


def dppo(
    logp_KG: Float[Tensor, "k g"],
    old_logp_KG: Float[Tensor, "k g"],
    kl_old_KG: Float[Tensor, "k g"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    limit: float = 1e-5,
) -> LossTerms:
    """Mean over the K trained steps, dropped ones counted as 0; weighted sum over samples.

    `kl_old_KG` and `limit` in nats per latent dimension. Metrics: those of `ratio_metrics`,
    `kl/old` (mean of K) and `dppo/dropped` (share); maximum: `ratio/max_dev`.
    """
    advantage = keep_live(wide(advantage_G), weight_G)
    log_ratio = keep_live(wide(logp_KG) - wide(old_logp_KG).detach(), weight_G, axis=1)
    kl = keep_live(wide(kl_old_KG).detach(), weight_G, axis=1)
    ratio = log_ratio.exp()
    further = (advantage * log_ratio.detach()) > 0
    dropped = further & (kl >= limit)
    per_step = torch.where(dropped, torch.zeros_like(ratio), -advantage * ratio)
    own = {
        "kl/old": weighted(kl.mean(dim=0), weight_G),
        "dppo/dropped": weighted(dropped.double().mean(dim=0), weight_G),
    }
    return LossTerms(
        loss=(weight_G * per_step.mean(dim=0)).sum(),
        metrics=ratio_metrics(log_ratio, weight_G) | own,
        maxima=largest(log_ratio),
    )
