"""The transition kernels as numbers:  x' = alpha x + gamma v + q z,  z ~ N(0, 1).

Every kernel in use is affine in the velocity, so three Python floats per step say all of it. A new
kernel is one more row of `TABLE`. Notation: a step goes from noise level s to s' < s, h = s - s' >
0, and a is the dimensionless noise level of the kernel.

    ode        alpha = 1, gamma = -h, q = 0
    flow-sde   Euler-Maruyama of  dx = (v - (g^2 / 2) score) dt + g dw  with g^2 = a^2 s / (1 - s)
               (Flow-GRPO, arXiv:2505.05470)
    dance      the same SDE with g = a at every level (DanceGRPO, arXiv:2505.07818)
    cps        x0_hat and the noise estimate put together again at s', where part of the noise is
               fresh:  (1 - s') x0_hat + s' cos(a pi/2) eps_hat + s' sin(a pi/2) z
               (Flow-CPS, arXiv:2509.05952)

All of them give x0 the coefficient 1 - s', and a = 0 is ode in each. Only ode and cps leave noise
of std s' exactly; an Euler-Maruyama step leaves more, by O(h^2).
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Kernel = Literal["ode", "flow-sde", "dance", "cps"]


class Coefficients(NamedTuple):
    """x' = alpha x + gamma v + q z. Dimensionless; alpha and gamma of any sign, q >= 0."""

    alpha: float
    gamma: float
    q: float


class Row(NamedTuple):
    """A kernel: (s, s', s_max, a) -> coefficients, and where it cannot be trained."""

    coefficients: Callable[[float, float, float, float], Coefficients]
    highest: float = math.inf  # noise level a from which on it says nothing new
    tail: int = 1  # so many steps at the end have too little noise for a log-prob


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


def dance(s: float, s_next: float, s_max: float, a: float) -> Coefficients:
    """DanceGRPO's kernel: as much noise per unit of time at every level."""
    return euler_maruyama(s, s_next, a)


def cps(s: float, s_next: float, s_max: float, a: float) -> Coefficients:
    """Flow-CPS's kernel, 0 <= a <= 1; q does not shrink with the step. q = 0 where s' = 0."""
    kept = s_next * math.cos(0.5 * math.pi * a)
    gamma = kept * (1.0 - s) - s * (1.0 - s_next)
    return Coefficients(1.0 - s_next + kept, gamma, s_next * math.sin(0.5 * math.pi * a))


TABLE: Mapping[Kernel, Row] = {
    "ode": Row(ode),
    "flow-sde": Row(flow_sde),
    "dance": Row(dance),
    "cps": Row(cps, highest=1.0, tail=2),  # before the last step gamma^2 / (2 q^2) is in hundreds
}
