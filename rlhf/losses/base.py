"""What the losses share: their terms, how terms of micro-batches add up, masking, log-prob forms.

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
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf import kernels
from rlhf.coefficients import Kernel
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
class Loss:
    """An algorithm: what rollouts must hold for it, the kernels it is defined for, its function."""

    name: str
    requires: tuple[Field, ...]
    kernels: tuple[Kernel, ...]  # the first one is the default
    function: Callable[..., LossTerms]
    form: Form | None = None  # how its log-prob is taken; None for losses without one


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


def velocity_kl(
    v: Float[Tensor, "g *dims"], v_ref: Float[Tensor, "g *dims"], weight_G: Float[Tensor, " g"]
) -> Float[Tensor, ""]:
    """sum_G weight bar((v - v_ref)^2), a KL that does not change with the grid."""
    d = keep_live(v.float(), weight_G) - keep_live(v_ref.float().detach(), weight_G)
    return (weight_G * d.square().flatten(1).mean(dim=1)).sum()


def weighted(value_G: Tensor, weight_G: Tensor) -> Tensor:
    """sum_G weight value, detached float64: one metric."""
    return (weight_G.detach().double() * value_G.detach().double()).sum()
