"""Clipped ratio:  loss = max(-A rho, -A clip(rho, 1 - e_lo, 1 + e_hi)),  rho = exp(L_theta - L_old)

Flow-GRPO, arXiv:2505.05470 (after GRPO, arXiv:2402.03300). L is the mean over latent dimensions.

Differs from the paper:
1. Rollouts may be guided while L_old and L_theta are both of the *unguided* policy, at the guided
   transition. A guided L_old under an unguided L_theta is not a ratio of anything: see the tests.
2. Two forms of L, `plain` and `recentred` (losses/base.py); the function below is the same for
   both.
3. Samples that are not live have weight 0 instead of being dropped, so shapes never change.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.losses.base import LossTerms, keep_live, weighted


def grpo(
    logp_KG: Float[Tensor, "k g"],
    old_logp_KG: Float[Tensor, "k g"],
    advantage_G: Float[Tensor, " g"],
    weight_G: Float[Tensor, " g"],
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
) -> LossTerms:
    """Mean over the K trained steps, weighted sum over samples. Clip ranges: distances from 1.

    Metrics over live samples: `ratio/mean`, `ratio/square_dev`, `clip/low`, `clip/high` (shares of
    ratios outside the range, whatever the sign of A); maximum: `ratio/max_dev` = max |L_theta -
    L_old|.
    """
    advantage = keep_live(advantage_G.float(), weight_G)
    log_ratio = keep_live(logp_KG.float() - old_logp_KG.float().detach(), weight_G, axis=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    per_step = torch.maximum(-advantage * ratio, -advantage * clipped)
    loss = (weight_G * per_step.mean(dim=0)).sum()

    r = ratio.detach().double()
    return LossTerms(
        loss=loss,
        metrics={
            "ratio/mean": weighted(r.mean(dim=0), weight_G),
            "ratio/square_dev": weighted((r - 1.0).square().mean(dim=0), weight_G),
            "clip/low": weighted((r < 1.0 - clip_low).double().mean(dim=0), weight_G),
            "clip/high": weighted((r > 1.0 + clip_high).double().mean(dim=0), weight_G),
        },
        maxima={"ratio/max_dev": log_ratio.detach().double().abs().max()},
    )
