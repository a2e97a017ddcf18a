"""What a student learns, as pure functions. x = (1 - s) x0 + s eps, v = eps - x0; s = 1 is noise.

Every method asks the student for a velocity at some (x, s) and says which one it should have been,
v*; the loss is always

    L = sum_B weight bar((v_theta(x, s) - v*)^2)          bar: mean over latent dimensions

so methods differ in where they ask and in v*, through which no gradient flows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.coefficients import TABLE
from rlhf.kernels import kl_factor
from rlhf.schedule import build

Rows = Float[Tensor, "b n c"]
Levels = Float[Tensor, " b"]


def velocity_loss(v: Rows, target: Rows, weight_B: Levels) -> Float[Tensor, ""]:
    """sum_B weight bar((v - v*)^2); no gradient through v*."""
    return (weight_B * (v - target.detach()).square().flatten(1).mean(dim=1)).sum()


def average_velocity(
    x: Float[Tensor, "*b n c"],
    x_end: Float[Tensor, "*b n c"],
    s: Float[Tensor, "*b"],
    s_end: Float[Tensor, "*b"],
) -> Float[Tensor, "*b n c"]:
    """v* = (x - x_end) / (s - s_end): one Euler step with it goes from x at s to x_end at s_end.

    Of a segment of the teacher's trajectory it is the mean of the teacher's velocity over it.
    """
    return (x - x_end) / (s - s_end)[..., None, None]


def euler(x: Rows, v: Rows, s: Levels, s_end: Levels) -> Rows:
    """x - (s - s_end) v: one step of the sampler."""
    return x - (s - s_end)[:, None, None] * v


def score_difference(v_fake: Rows, v_real: Rows, t: Levels) -> Rows:
    """s_fake - s_real at x_t, of two velocity fields: (1 - t) / t (v_real - v_fake).

    From s(x_t) = -E[eps | x_t] / t and E[eps | x_t] = x_t + (1 - t) v. Its mean along the
    derivative of x_t is the gradient of KL(student at t | teacher at t) (DMD, arXiv:2311.18828).
    """
    return ((1 - t) / t)[:, None, None] * (v_real - v_fake)


def matching_gradient(x: Rows, x_t: Rows, v_fake: Rows, v_real: Rows, t: Levels) -> Rows:
    """The score difference in units that do not depend on t or the sample (DMD, eq. 8):

        g = (x0_fake - x0_real) / mean|x - x0_real|     x0 = x_t - t v, so x0_fake - x0_real =
                                                        t^2 / (1 - t) (s_fake - s_real)

    for a student's picture x that was noised to x_t.
    """
    factor = (t.square() / (1 - t))[:, None, None]
    gap = factor * score_difference(v_fake, v_real, t)
    x0_real = x_t - t[:, None, None] * v_real
    scale = (x - x0_real).abs().flatten(1).mean(dim=1).clamp_min(1e-6)
    return gap / scale[:, None, None]


def matching_target(v: Rows, gradient: Rows, s: Levels) -> tuple[Rows, Levels]:
    """v* and weight with which the gradient of `velocity_loss` is that of bar(g x), x = x_s - s v
    the student's clean prediction at level s:

        v* = v + g / s,  weight = s^2 / 2
    """
    return v + gradient / s[:, None, None], s.square() / 2


def path_weights(sigmas: Sequence[float], noise_level: float) -> list[float]:
    """gamma^2 / (2 q^2) of every step: with these the squared distances of velocities add up to the
    KL between the paths of two flow-SDE samplers of this noise level (arXiv:2505.05470).

    The SDE takes its last step without noise, where there is no such KL: that step has the weight
    of the one before it.
    """
    stop = len(sigmas) - 1 - TABLE["flow-sde"].tail
    schedule = build(sigmas, "flow-sde", noise_level, (0, stop))
    found = [kl_factor(schedule, i) for i in range(stop)]
    return found + [found[-1]] * (len(sigmas) - 1 - stop)


def by_prompt(x_KBNC: Float[Tensor, "k b ..."], prompts: int) -> Float[Tensor, "kb ..."]:
    """K stacks of B rows as K B rows with those of a prompt adjacent, as one call of a policy takes
    them.
    """
    return x_KBNC.unflatten(1, (prompts, -1)).transpose(0, 1).flatten(0, 2)


def levels_by_prompt(sigmas: Sequence[float], rows: int, prompts: int) -> Float[Tensor, " kb"]:
    """The levels of `by_prompt`: K of them, `rows` rows each."""
    each = torch.tensor(sigmas, dtype=torch.float32)[:, None].expand(-1, rows)
    return by_prompt(each, prompts)
