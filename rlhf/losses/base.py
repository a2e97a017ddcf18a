"""What the losses share: their inputs and terms, how terms of micro-batches add up, masking,
log-prob forms, the clipped ratio.

Every loss is a pure function of named tensors over one or more whole groups, weighted per sample
with `weight_G` = live / (live samples in the whole iteration), so the loss of an iteration is the
plain *sum* over its micro-batches and each metric is a plain sum too.

A sample that is not live has weight 0 and may hold anything, NaN included. The losses replace its
entries before any arithmetic. What a network or a kernel computes from such a sample is not theirs
to save (0 * NaN is NaN in a backward pass): give those `keep_live(x, weight)` as well.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf import kernels
from rlhf.schedule import Schedule
from rlhf.types import Field

Form = Literal["plain", "recentred"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Loss and metrics of some samples. `metrics` add up over micro-batches, `maxima` do not."""

    loss: Float[Tensor, ""]  # weighted sum over the given samples; carries the gradient
    metrics: Mapping[str, Tensor] = field(default_factory=dict)  # 0-dim float64, detached
    maxima: Mapping[str, Tensor] = field(default_factory=dict)  # 0-dim float64, detached


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """What a ratio loss sees: K trained steps of the rollouts of a group."""

    logp_KG: Float[Tensor, "k g"]
    old_logp_KG: Float[Tensor, "k g"]
    kl_old_KG: Float[Tensor, "k g"] | None  # exact KL to the old policy's transition, with gradient
    q_K: Float[Tensor, " k"]  # std of each step
    h_K: Float[Tensor, " k"]  # length of each step in sigma


@dataclass(frozen=True, slots=True, kw_only=True)
class Noised:
    """What a forward-process loss sees: final latents noised afresh, and velocities there."""

    v_theta: Float[Tensor, "g *dims"]
    v_old: Float[Tensor, "g *dims"]
    x_s: Float[Tensor, "g *dims"]
    x0: Float[Tensor, "g *dims"]
    eps: Float[Tensor, "g *dims"]
    sigma_G: Float[Tensor, " g"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """An algorithm: what rollouts must hold for it, and its function.

    `function(Transitions or Noised, advantage_G, weight_G, LossConfig)`. `clip` is the published
    range. `lagged`: rollouts use a running average of the weights; else what was trained last.
    """

    name: str
    source: str  # arXiv id
    requires: tuple[Field, ...]
    function: Callable[..., LossTerms]
    clip: float = math.inf
    lagged: bool = False

    @property
    def form(self) -> Form | None:
        """How its log-prob is taken; None for losses without one."""
        return form_of(self.requires)


def form_of(requires: Sequence[Any]) -> Form | None:
    """The form of log-prob of what rollouts are asked to hold."""
    if "trajectory" not in requires:
        return None
    return "recentred" if "shift" in requires else "plain"


def summarise(terms: Sequence[LossTerms]) -> dict[str, float]:
    """Metrics of an update out of those of its micro-batches, `loss` included.

    `ratio/square_dev`, the second moment about 1, becomes `ratio/std`.
    """
    total = {"loss": 0.0}
    for term in terms:
        total["loss"] += float(term.loss.detach())
        for name, value in term.metrics.items():
            total[name] = total.get(name, 0.0) + float(value)
        for name, value in term.maxima.items():
            total[name] = max(total.get(name, -math.inf), float(value))
    if "ratio/square_dev" in total:
        square = total.pop("ratio/square_dev")
        total["ratio/std"] = math.sqrt(max(square - (total["ratio/mean"] - 1.0) ** 2, 0.0))
    return total


def keep_live(x: Tensor, weight_G: Float[Tensor, " g"], axis: int = 0) -> Tensor:
    """x with the entries of samples of weight 0 set to 0; `axis` is the sample axis."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return torch.where(
        (weight_G > 0).reshape(shape), x, torch.zeros((), dtype=x.dtype, device=x.device)
    )


def transition_log_prob(
    v_cond: Float[Tensor, "g *dims"],
    x: Float[Tensor, "g *dims"],
    x_next: Float[Tensor, "g *dims"],
    schedule: Schedule,
    index: int,
    form: Form = "plain",
    shift: Float[Tensor, "g *dims"] | None = None,
) -> Float[Tensor, " g"]:
    """Log-prob of a recorded transition under the *unguided* policy, nats per dim, fp32.

    plain      at x'. Its gradient also carries guidance's own pull.
    recentred  at y = x' - S, the guidance shift taken out: only the exploration noise is scored.

    Use it for the old log-prob (in the rollout, under no_grad) and for the new one: the same
    function on the same tensors is what makes the first ratio exactly 1. At guidance 1 S is zero
    and the two are bit-equal. Raises ValueError for a step without noise, or a recentred form
    without `shift`.
    """
    replayed = kernels.step(x, v_cond, schedule, index, x_next=x_next)
    scored = replayed.next
    if form == "recentred":
        if shift is None:
            raise ValueError(
                "expected the guidance shift for the recentred form, got None: record it "
                "(kernels.guidance_shift), or use form 'plain' at guidance 1"
            )
        scored = scored.float() - shift.float()
    return kernels.log_prob(scored, replayed.mean, replayed.q)


def clipped(
    log_ratio_KG: Float[Tensor, "k g"],
    advantage_G: Float[Tensor, " g"],
    low: float,
    high: float,
) -> Float[Tensor, "k g"]:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) with rho = exp(log_ratio): the pessimistic one
    of the two surrogates (PPO, arXiv:1707.06347). The inputs hold live samples only.
    """
    ratio = log_ratio_KG.exp()
    held = ratio.clamp(1.0 - low, 1.0 + high)
    return torch.maximum(-advantage_G * ratio, -advantage_G * held)


def ratio_metrics(
    log_ratio_KG: Float[Tensor, "k g"],
    weight_G: Float[Tensor, " g"],
    low: float = math.inf,
    high: float = math.inf,
) -> dict[str, Tensor]:
    """`ratio/mean`, `ratio/square_dev`, `clip/low`, `clip/high` (shares of ratios outside the
    range, whatever the sign of A) over live samples.
    """
    r = log_ratio_KG.detach().double().exp()
    return {
        "ratio/mean": weighted(r.mean(dim=0), weight_G),
        "ratio/square_dev": weighted((r - 1.0).square().mean(dim=0), weight_G),
        "clip/low": weighted((r < 1.0 - low).double().mean(dim=0), weight_G),
        "clip/high": weighted((r > 1.0 + high).double().mean(dim=0), weight_G),
    }


def largest(log_ratio_KG: Float[Tensor, "k g"]) -> dict[str, Tensor]:
    """`ratio/max_dev` = max |L_theta - L_old|."""
    return {"ratio/max_dev": log_ratio_KG.detach().double().abs().max()}


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def weighted(value_G: Tensor, weight_G: Tensor) -> Tensor:
    """sum_G weight value, detached float64: one metric."""
    return (weight_G.detach().double() * value_G.detach().double()).sum()


def per_sample(value_G: Tensor, like: Tensor) -> Tensor:
    """(G,) shaped to multiply a (G, ...) tensor, at least float32."""
    return wide(value_G).reshape(-1, *[1] * (like.ndim - 1))
