"""The transition kernels as numbers:  x' = alpha x + gamma v + q z,  z ~ N(0, 1).

Every kernel in use is affine in the velocity, so three Python floats per step say all of it. A new
kernel is one more row of `TABLE`. Notation: a step goes from noise level s to s' < s, h = s - s' >
0, and a is the dimensionless noise level of the kernel.

    ode        alpha = 1, gamma = -h, q = 0
    flow-sde   Euler-Maruyama of  dx = (v - (g^2 / 2) score) dt + g dw  with g^2 = a^2 s / (1 - s)
               (Flow-GRPO, arXiv:2505.05470)
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Kernel = Literal["ode", "flow-sde"]


class Coefficients(NamedTuple):
    """x' = alpha x + gamma v + q z. Dimensionless; alpha and gamma of any sign, q >= 0."""

    alpha: float
    gamma: float
    q: float


def euler_maruyama(s: float, s_next: float, diffusion: float) -> Coefficients:
    """One step of  dx = (v - (g^2 / 2) score) dt + g dw,  g = `diffusion`, s > 0.

    score = -(x + (1 - s) v) / s.
    """
    h = s - s_next
    drift = diffusion**2 * h / (2.0 * s)
    return Coefficients(1.0 - drift, -h - drift * (1.0 - s), diffusion * math.sqrt(h))


def ode(s: float, s_next: float, s_max: float, a: float) -> Coefficients:
    """Plain Euler; `s_max` and `a` play no part."""
    return Coefficients(1.0, -(s - s_next), 0.0)


def flow_sde(s: float, s_next: float, s_max: float, a: float) -> Coefficients:
    """Flow-GRPO's kernel. On the first step `s_max`, the grid's second sigma, stands in for s.

    Only inside 1 - s, and as a clamp rather than a test for s == 1: a grid that begins one ulp
    below 1 must not divide by 1e-16. With it the first step has q = a on every grid.
    """
    return euler_maruyama(s, s_next, a * math.sqrt(s / (1.0 - min(s, s_max))))


TABLE: Mapping[Kernel, Callable[[float, float, float, float], Coefficients]] = {
    "ode": ode,
    "flow-sde": flow_sde,
}
