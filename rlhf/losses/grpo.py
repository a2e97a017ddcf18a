"""Clipped ratio:  loss = max(-A rho, -A clip(rho, 1 - e_lo, 1 + e_hi)),  rho = exp(L_theta - L_old)

Flow-GRPO, arXiv:2505.05470 (after GRPO, arXiv:2402.03300). L is the mean over latent dimensions.

Differs from the paper:
1. Rollouts may be guided while L_old and L_theta are both of the *unguided* policy, at the guided
   transition. A guided L_old under an unguided L_theta is not a ratio of anything: see the tests.
2. Two forms of L, `plain` and `recentred` (losses/base.py); the function below is the same for
   both.
3. Samples that are not live have weight 0 instead of being dropped, so shapes never change.
"""

from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, clipped, keep_live, largest, ratio_metrics, wide


def grpo(
    logp_KG: Float[Tensor, "k g"],
    old_logp_KG: Float[Tensor, "k g"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
) -> LossTerms:
    """Mean over the K trained steps, weighted sum over samples. Clip ranges: distances from 1.

    Metrics: those of `ratio_metrics`; maximum: `ratio/max_dev`.
    """
    advantage = keep_live(wide(advantage_G), weight_G)
    log_ratio = keep_live(wide(logp_KG) - wide(old_logp_KG).detach(), weight_G, axis=1)
    per_step = clipped(log_ratio, advantage, clip_low, clip_high)
    return LossTerms(
        loss=(weight_G * per_step.mean(dim=0)).sum(),
        metrics=ratio_metrics(log_ratio, weight_G, clip_low, clip_high),
        maxima=largest(log_ratio),
    )
