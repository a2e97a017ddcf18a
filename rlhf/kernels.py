"""One step function for sampling and replay, and the densities of its transitions.

    mean = alpha x + gamma v,   x' = mean + q z       (coefficients: rlhf/coefficients.py)

All arithmetic is float32 with coefficients computed in Python floats. x' is rounded to the stored
dtype (that of x) *before* anything else reads it: the next step, the record and the log-prob see
one tensor. Log-probs and KL are means over the latent dimensions, in nats per dimension, so a
ratio is the true one to the power 1/D and clip ranges are small.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from rlhf.coefficients import Coefficients
from rlhf.schedule import Schedule

LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One transition. `q` = 0 marks an Euler step, which has no log-prob."""

    mean: Float[Tensor, "*b"]  # fp32
    next: Float[Tensor, "*b"]  # in the dtype of x, the only x' there is
    q: float


def coefficients(schedule: Schedule, index: int) -> Coefficients:
    """(alpha, gamma, q) of step `index` as Python floats. IndexError outside 0..n_steps-1."""
    return schedule.coefficients(index)


def step(
    x: Float[Tensor, "*b"],
    v: Float[Tensor, "*b"],
    schedule: Schedule,
    index: int,
    noise: Float[Tensor, "*b"] | None = None,
    x_next: Float[Tensor, "*b"] | None = None,
) -> Step:
    """Step `index` of `schedule` from x along v. Give `noise` to sample, `x_next` to replay.

    On a step with q = 0 the noise is not used (x' = mean). The gradient of v flows into `mean`; x'
    is a sample and carries none. Raises ValueError when a stochastic step gets neither noise nor
    x_next.
    """
    alpha, gamma, q = schedule.coefficients(index)
    mean = alpha * x.float() + gamma * v.float()
    if x_next is None:
        if q > 0.0 and noise is None:
            raise ValueError(
                f"expected noise (to sample) or x_next (to replay) at step {index}, got neither: "
                "pass rlhf.noise.step_noise(seed, index, shape)"
            )
        fresh = mean if q == 0.0 or noise is None else mean + q * noise.to(mean)
        x_next = fresh.to(x.dtype)
    return Step(mean=mean, next=x_next.detach(), q=q)


def log_prob(
    x_next: Float[Tensor, "b *dims"], mean: Float[Tensor, "b *dims"], q: float
) -> Float[Tensor, " b"]:
    """log N(x'; mean, q^2) per latent dimension: nats per dim, fp32, x' detached.

    L = -bar((x' - mean)^2) / (2 q^2) - log q - log sqrt(2 pi). Raises ValueError for q <= 0: an
    Euler step has no density, and a made-up 0 would train.
    """
    _need_noise(q)
    square = (x_next.detach().float() - mean.float()).square()
    return -_mean_over_dims(square) / (2.0 * q * q) - math.log(q) - LOG_SQRT_2PI


def kl_factor(schedule: Schedule, index: int) -> float:
    """gamma^2 / (2 q^2): the exact KL of two transitions from one x is bar(dv^2) times this.

    Raises ValueError for a step without noise.
    """
    _, gamma, q = schedule.coefficients(index)
    _need_noise(q)
    return gamma * gamma / (2.0 * q * q)


def guidance_shift(
    v_guided: Float[Tensor, "*b"], v_cond: Float[Tensor, "*b"], schedule: Schedule, index: int
) -> Float[Tensor, "*b"]:
    """S = mean_guided - mean_cond = gamma (v_g - v_c), fp32: what guidance added to one transition.

    Exactly zero at guidance 1.
    """
    return schedule.coefficients(index).gamma * (v_guided.float() - v_cond.float())


def guide(
    v_cond: Float[Tensor, "*b"], v_uncond: Float[Tensor, "*b"], guidance: float
) -> Float[Tensor, "*b"]:
    """v_g = v_u + w (v_c - v_u). At w = 1 the result is v_c itself, bit for bit."""
    if guidance == 1.0:
        return v_cond
    return v_uncond + guidance * (v_cond - v_uncond)


def _mean_over_dims(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _need_noise(q: float) -> None:
    if not q > 0.0:
        raise ValueError(
            f"expected a stochastic step (q > 0), got q = {q}: Euler steps have no density, "
            "leave them out of the record"
        )
