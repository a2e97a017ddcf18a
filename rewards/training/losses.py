"""Losses of reward models: pure functions of scores and judgements, a weighted sum over the batch.

`weight` holds each row's share of the whole step (its own weight over the sum of all weights of the
step), so the losses of micro-batches add up to the loss of the step. A row of weight 0 may hold
anything, NaN included. Arithmetic is in fp32, or fp64 where that comes in.

`preference` is P(first is better): 1 the first, 0 the second, 0.5 a tie; `z` is the first score
minus the second, in logits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

VARIANCE = (1e-4, 1e4)  # an uncertainty beyond these is cut: flat losses would reward its growth
_NODES, _MASS = np.polynomial.hermite_e.hermegauss(20)


def prompt_weights(groups: Sequence[str]) -> Float[Tensor, " b"]:
    """1 / (rows of its group), scaled to mean 1: every prompt counts the same, however often it was
    judged (the weighting of PickScore, arXiv:2305.01569).
    """
    rows = Counter(groups)
    weight = torch.tensor([1.0 / rows[group] for group in groups], dtype=torch.float32)
    return weight * (len(groups) / len(rows)) if groups else weight


def expectation(logits: Float[Tensor, "*b levels"]) -> Float[Tensor, "*b"]:
    """E = sum_l l softmax(logits)_l over levels 1..L, in [1, L]."""
    levels = torch.arange(1, logits.shape[-1] + 1, device=logits.device)
    return (_wide(logits).softmax(dim=-1) * levels).sum(dim=-1)


def mse_expectation(
    logits: Float[Tensor, "b levels"], rating: Float[Tensor, " b"], weight: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """(sum_l l p_l - rating)^2 with the rating on 1..L (arXiv:2606.27608)."""
    logits = torch.where((weight > 0)[:, None], logits, torch.zeros_like(logits))
    return _sum((expectation(logits) - _live(rating, weight)).square(), weight)


def bradley_terry(
    z: Float[Tensor, " b"],
    preference: Float[Tensor, " b"],
    weight: Float[Tensor, " b"],
    margin: float = 0.0,
) -> Float[Tensor, ""]:
    """-y log s(z - m) - (1 - y) log s(-z - m), s the logistic function (Bradley and Terry, 1952).

    With a margin m the better one has to lead by more than m logits; ties still pull to z = 0.
    """
    z, y = _live(z, weight), _live(preference, weight)
    return _sum(-y * F.logsigmoid(z - margin) - (1 - y) * F.logsigmoid(-z - margin), weight)


def within_prompts(error: Float[Tensor, " b"], prompt: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean of (error_i - error_j)^2 over pairs of ratings of one prompt: what a score that is too
    high for all of its pictures alike does not pay for. 0 without a pair.
    """
    error = _wide(error)
    pairs = (prompt[:, None] == prompt[None]).float().triu(1)
    squares = (error[:, None] - error[None]).square()
    return (squares * pairs).sum() / pairs.sum().clamp_min(1.0)


def positive(raw: Float[Tensor, ""], floor: float = 1e-3) -> Float[Tensor, ""]:
    """softplus(raw) + floor: a free parameter as a `log_k` above 0."""
    return F.softplus(_wide(raw)) + floor


def rao_kupper(
    z: Float[Tensor, " b"],
    preference: Float[Tensor, " b"],
    log_k: Float[Tensor, ""],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """Win s(z - log k), loss s(-z - log k), tie (k^2 - 1) times their product (Rao and Kupper,
    1967). `log_k` > 0, see `positive`.

    Only 0.5 itself is a tie. Any other share is read as votes, y for and 1 - y against, so that k
    is learnt from ties that somebody called one.
    """
    z, y, log_k = _live(z, weight), _live(preference, weight), _wide(log_k)
    win, loss = F.logsigmoid(z - log_k), F.logsigmoid(-z - log_k)
    tie = win + loss + 2 * log_k + torch.log(-torch.expm1(-2 * log_k))
    return _sum(-_outcome(y, win, tie, loss), weight)


def davidson(
    s_a: Float[Tensor, " b"],
    s_b: Float[Tensor, " b"],
    preference: Float[Tensor, " b"],
    log_nu: Float[Tensor, ""],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """P(win), P(tie), P(loss) in proportion to e^{s_a}, nu e^{(s_a + s_b) / 2}, e^{s_b} (Davidson,
    1970). `log_nu` is free. Shares other than 0.5 are votes, as in `rao_kupper`.
    """
    z, y = _live(s_a, weight) - _live(s_b, weight), _live(preference, weight)
    three = torch.stack([z / 2, _wide(log_nu).to(z.dtype).expand_as(z), -z / 2], dim=1)
    win, tie, loss = three.log_softmax(dim=1).unbind(dim=1)
    return _sum(-_outcome(y, win, tie, loss), weight)


def pool_heads(
    mean: Float[Tensor, "b heads"], variance: Float[Tensor, "b heads"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Mean and variance of the average of independent heads: variances add, over heads squared."""
    heads = mean.shape[1]
    return _wide(mean).mean(dim=1), _wide(variance).sum(dim=1) / heads**2


def thurstone(
    mean_a: Float[Tensor, " b"],
    var_a: Float[Tensor, " b"],
    mean_b: Float[Tensor, " b"],
    var_b: Float[Tensor, " b"],
    preference: Float[Tensor, " b"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """-y log Phi(t) - (1 - y) log Phi(-t), t = (mean_a - mean_b) / sqrt(var_a + var_b): scores that
    are normal, compared by which is larger (Thurstone, 1927). The variance is cut to `VARIANCE`.
    """
    gap, variance = _difference(mean_a, var_a, mean_b, var_b, weight)
    y, t = _live(preference, weight), gap / variance.sqrt()
    return _sum(-y * _log_ndtr(t) - (1 - y) * _log_ndtr(-t), weight)


def expected_bradley_terry(
    mean_a: Float[Tensor, " b"],
    var_a: Float[Tensor, " b"],
    mean_b: Float[Tensor, " b"],
    var_b: Float[Tensor, " b"],
    preference: Float[Tensor, " b"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """-y E log s(z) - (1 - y) E log s(-z), z ~ N(mean_a - mean_b, var_a + var_b), the uncertainty
    ranking of HPSv3 (arXiv:2508.03789), by 20 Gauss-Hermite nodes where that draws samples. The
    variance is cut to `VARIANCE`.
    """
    gap, variance = _difference(mean_a, var_a, mean_b, var_b, weight)
    nodes = torch.as_tensor(_NODES, dtype=gap.dtype, device=gap.device)
    mass = torch.as_tensor(_MASS / _MASS.sum(), dtype=gap.dtype, device=gap.device)
    z = gap[:, None] + variance.sqrt()[:, None] * nodes
    win, loss = F.logsigmoid(z) @ mass, F.logsigmoid(-z) @ mass
    y = _live(preference, weight)
    return _sum(-y * win - (1 - y) * loss, weight)


def thresholds(raw: Float[Tensor, " cuts"]) -> Float[Tensor, " cuts"]:
    """Free parameters as rising thresholds: the first as it is, then steps softplus(raw) + 1e-3."""
    raw = _wide(raw)
    return torch.cat([raw[:1], F.softplus(raw[1:]) + 1e-3]).cumsum(dim=0)


def cumulative_link(
    score: Float[Tensor, " b"],
    rating: Float[Tensor, " b"],
    theta: Float[Tensor, " cuts"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """-log P(y = rating) of P(y <= k) = s(theta_k - score) on levels 1..L (McCullagh, 1980), theta
    the L - 1 rising `thresholds`. A rating between two levels is their mix.
    """
    s, theta = _live(score, weight), _wide(theta)
    rating = _live(rating, weight).clamp(1, theta.numel() + 1)
    lower = rating.floor()
    share = rating - lower
    low = _level(s, lower.long(), theta)
    high = _level(s, rating.ceil().long(), theta)
    return _sum(-(1 - share) * low - share * high, weight)


def plackett_luce(
    scores: Float[Tensor, "b pictures"],
    ranks: Float[Tensor, "b pictures"],
    weight: Float[Tensor, " b"],
) -> Float[Tensor, ""]:
    """-sum_i log(e^{s_i} / sum_{j not ranked before i} e^{s_j}): an order as choices of the best of
    what is left (Plackett, 1975). Rank 1 is best; a place of rank 0 is empty.

    Pictures of equal rank each stand against the whole tie (Breslow's treatment in Cox models), so
    order within it does not matter and it pulls its scores together; a tie of two alone is twice
    Bradley-Terry at 0.5, and a strict pair is Bradley-Terry.
    """
    live = (weight > 0)[:, None] & (ranks > 0)
    s = torch.where(live, _wide(scores), torch.zeros((), device=scores.device))
    left = live[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])  # b, i, j
    left = left | torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    rivals = s[:, None, :].masked_fill(~left, -math.inf).logsumexp(dim=2)
    return _sum(torch.where(live, rivals - s, torch.zeros_like(s)).sum(dim=1), weight)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _live(x: Tensor, weight: Tensor) -> Tensor:
    """x with 0 in rows of weight 0."""
    return torch.where(weight > 0, _wide(x), torch.zeros((), device=x.device))


def _sum(loss: Tensor, weight: Tensor) -> Tensor:
    return (_wide(weight) * loss).sum()


def _outcome(y: Tensor, win: Tensor, tie: Tensor, loss: Tensor) -> Tensor:
    """Log-likelihood of a preference: 0.5 is a tie, else votes."""
    return torch.where(y == 0.5, tie, y * win + (1 - y) * loss)


def _difference(
    mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and variance of first minus second."""
    variance = (_live(var_a, weight) + _live(var_b, weight)).clamp(*VARIANCE)
    return _live(mean_a, weight) - _live(mean_b, weight), variance


def _log_ndtr(x: Tensor) -> Tensor:
    """log Phi(x). Unlike torch's, its gradient does not cancel far below zero."""
    u = -x.clamp(max=0) / math.sqrt(2)
    below = torch.special.erfcx(u).log() - u.square() - math.log(2)
    above = torch.log1p(-torch.erfc(x.clamp(min=0) / math.sqrt(2)) / 2)
    return torch.where(x < 0, below, above)


def _level(s: Tensor, level: Tensor, theta: Tensor) -> Tensor:
    """log(s(b) - s(a)) = log s(b) + log s(-a) + log(1 - e^{a - b}), a and b the ends of a level."""
    cuts = theta.numel()
    upper, lower = level <= cuts, level > 1
    above, below = theta[(level - 1).clamp(max=cuts - 1)], theta[(level - 2).clamp(min=0)]
    zero = torch.zeros_like(s)
    width = torch.where(upper & lower, above - below, torch.ones_like(s))
    return (
        torch.where(upper, F.logsigmoid(above - s), zero)
        + torch.where(lower, F.logsigmoid(s - below), zero)
        + torch.where(upper & lower, torch.log(-torch.expm1(-width)), zero)
    )
