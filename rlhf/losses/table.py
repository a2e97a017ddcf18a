"""The algorithms by the name a config uses, their settings, and which combinations are defined.

`LOSSES` says what each needs, `refusal` why two choices do not go together. The configuration check
and the table of docs/algorithms.md both read it here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rlhf.coefficients import TABLE, Kernel
from rlhf.errors import ConfigError
from rlhf.losses.awm import Weighting, awm
from rlhf.losses.base import Loss, LossTerms, Noised, Transitions
from rlhf.losses.dppo import dppo
from rlhf.losses.grpo import grpo
from rlhf.losses.guard import guard
from rlhf.losses.kl import KLForm
from rlhf.losses.nft import nft


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """Which loss, and how often one batch of rollouts is used.

    `clip_low`, `clip_high`: None is the algorithm's own range. `kl` holds the weights near the
    reference, `kl_ema` near their running average (losses/kl.py). `behaviour_lag`: after iteration
    i the behaviour slot keeps min(lag_max, lag_rate * i) of itself (NFT); for other losses it
    becomes `train`. `sigma_span` is the part of the grid that forward-process losses draw from, 0 =
    noise end. `divergence` is DPPO's limit, `weighting` AWM's g.
    """

    name: str = "nft"
    updates_per_rollout: int = 6
    clip_low: float | None = None
    clip_high: float | None = None
    divergence: float = 1e-5
    beta: float = 1.0
    adv_max: float = 2.0
    weighting: Weighting = "uniform"
    kl: float = 0.0
    kl_ema: float = 0.0
    kl_form: KLForm = "velocity"
    lag_max: float = 0.7
    lag_rate: float = 0.02
    sigma_span: tuple[float, float] = (0.0, 1.0)
    old_logp: Literal["rollout", "replay"] = "rollout"
    replay_tolerance: float = 1e-6

    def check(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(f"loss.name: expected one of {', '.join(LOSSES)}, got '{self.name}'")
        if self.updates_per_rollout < 1:
            raise ConfigError(
                f"loss.updates_per_rollout: expected at least 1, got {self.updates_per_rollout}"
            )
        if not 0 <= self.sigma_span[0] < self.sigma_span[1] <= 1:
            raise ConfigError(
                f"loss.sigma_span: expected 0 <= low < high <= 1, got {self.sigma_span}"
            )
        if min(self.beta, self.adv_max, self.divergence, *self.clips) <= 0:
            raise ConfigError(
                "loss: expected beta, adv_max, divergence, clip_low and clip_high above 0"
            )
        if not (0 <= self.lag_max < 1 and self.lag_rate >= 0):
            raise ConfigError(
                f"loss: expected 0 <= lag_max < 1 and lag_rate >= 0, got {self.lag_max} and"
                f" {self.lag_rate}"
            )
        if min(self.kl, self.kl_ema) < 0:
            raise ConfigError(
                f"loss.kl and loss.kl_ema: expected 0 or more, got {self.kl} and {self.kl_ema}"
            )

    @property
    def loss(self) -> Loss:
        return LOSSES[self.name]

    @property
    def clips(self) -> tuple[float, float]:
        """The clip range, distances from 1 below and above."""
        own = self.loss.clip
        low, high = self.clip_low, self.clip_high
        return own if low is None else low, own if high is None else high

    @property
    def penalties(self) -> tuple[tuple[str, float], ...]:
        """Slots that the weights are held near, with their coefficients."""
        return tuple((s, c) for s, c in (("reference", self.kl), ("ema", self.kl_ema)) if c > 0)


# --- the algorithms -------------------------------------------------------------------------------


def _grpo(t: Transitions, advantage: Tensor, weight: Tensor, config: LossConfig) -> LossTerms:
    return grpo(t.logp_KG, t.old_logp_KG, advantage, weight, *config.clips)


def _guard(t: Transitions, advantage: Tensor, weight: Tensor, config: LossConfig) -> LossTerms:
    assert t.kl_old_KG is not None
    ends = advantage, weight, *config.clips
    return guard(t.logp_KG, t.old_logp_KG, t.kl_old_KG, t.q_K, t.h_K, *ends)


def _dppo(t: Transitions, advantage: Tensor, weight: Tensor, config: LossConfig) -> LossTerms:
    assert t.kl_old_KG is not None
    return dppo(t.logp_KG, t.old_logp_KG, t.kl_old_KG, advantage, weight, config.divergence)


def _nft(n: Noised, advantage: Tensor, weight: Tensor, config: LossConfig) -> LossTerms:
    ends = advantage, weight, config.beta, config.adv_max
    return nft(n.v_theta, n.v_old, n.x_s, n.x0, n.sigma_G, *ends)


def _awm(n: Noised, advantage: Tensor, weight: Tensor, config: LossConfig) -> LossTerms:
    ends = advantage, weight, config.adv_max, config.weighting, *config.clips
    return awm(n.v_theta, n.v_old, n.x0, n.eps, n.sigma_G, *ends)


_ROWS = (
    Loss(
        name="grpo",
        source="2505.05470",
        requires=("trajectory",),
        function=_grpo,
        clip=1e-4,
    ),
    Loss(
        name="grpo-recentred",
        source="2505.05470",
        requires=("trajectory", "shift"),
        function=_grpo,
        clip=1e-4,
    ),
    Loss(
        name="guard",
        source="2510.22319",
        requires=("trajectory", "shift", "velocity"),
        function=_guard,
        clip=2e-6,
    ),
    Loss(
        name="dppo",
        source="2606.11025",
        requires=("trajectory", "shift", "velocity"),
        function=_dppo,
    ),
    Loss(
        name="nft",
        source="2509.16117",
        requires=("x0",),
        function=_nft,
        lagged=True,
    ),
    Loss(name="awm", source="2509.25050", requires=("x0",), function=_awm),
)
LOSSES: Mapping[str, Loss] = {row.name: row for row in _ROWS}


# --- what goes together ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the choices are that may not go together."""

    loss: Loss
    kernel: Kernel = "ode"
    kl_form: KLForm | None = None  # None without a KL
    replayed: bool = False  # old log-probs computed again by the learner
    own_grid: bool = False  # the base was distilled to a few noise levels of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A kind of choice that is not defined: why, and what to write instead."""

    applies: Callable[[Choice], bool]
    reason: str
    instead: str


RULES: tuple[Rule, ...] = (
    Rule(
        applies=lambda c: c.kernel == "ode" and c.loss.form is not None,
        reason="an Euler step is certain: it has no density, so no ratio of densities",
        instead="rollout.kernel=flow-sde with a rollout.window, or loss.name=nft",
    ),
    Rule(
        applies=lambda c: c.loss.name == "guard" and c.kernel == "cps",
        reason="it divides by the time step that the drift is proportional to, and the drift of"
        " cps is not: fresh noise and what it replaces do not shrink with the step",
        instead="rollout.kernel=flow-sde, or loss.name=dppo",
    ),
    Rule(
        applies=lambda c: c.kl_form == "gaussian" and c.loss.form is None,
        reason="the Gaussian form is the KL of two transitions, and a forward-process loss trains"
        " none",
        instead="loss.kl_form=velocity",
    ),
    Rule(
        applies=lambda c: c.replayed and c.loss.form is None,
        reason="a forward-process loss has no log-prob that could be computed again",
        instead="loss.old_logp=rollout",
    ),
    Rule(
        applies=lambda c: c.own_grid and c.loss.form is None,
        reason="the base was distilled to a few noise levels of its own (sample_sigmas), and a loss"
        " at freshly drawn levels blurs what it makes of them",
        instead="loss.name=grpo with a rollout.window, or a base that is not distilled",
    ),
)


def refusal(choice: Choice) -> Rule | None:
    """The first rule against a choice, None if it is defined."""
    return next((rule for rule in RULES if rule.applies(choice)), None)


def check_choice(choice: Choice) -> None:
    """Raise ConfigError with the reason for a choice that is not defined."""
    rule = refusal(choice)
    if rule is not None:
        raise ConfigError(
            f"loss.name {choice.loss.name} is not defined here (kernel {choice.kernel}):"
            f" {rule.reason}; write {rule.instead}"
        )


def kernels_of(loss: Loss) -> tuple[Kernel, ...]:
    """The kernels a loss is defined for, the usual one first."""
    return tuple(k for k in TABLE if refusal(Choice(loss=loss, kernel=k)) is None)


def columns() -> dict[str, Callable[[Loss], Choice]]:
    """What `markdown` asks of every loss, by title."""

    def on(kernel: Kernel) -> Callable[[Loss], Choice]:
        return lambda loss: Choice(loss=loss, kernel=kernel)

    def usual(**more: Any) -> Callable[[Loss], Choice]:
        return lambda loss: Choice(loss=loss, kernel=kernels_of(loss)[0], **more)

    return {kernel: on(kernel) for kernel in TABLE} | {
        "velocity KL": usual(kl_form="velocity"),
        "Gaussian KL": usual(kl_form="gaussian"),
        "replay": usual(replayed=True),
        "distilled base": usual(own_grid=True),
    }


def markdown() -> str:
    """The table of what is defined, with the reasons as numbered lines."""
    asked, reasons = columns(), list(RULES)
    lines = [f"| `loss.name` | {' | '.join(asked)} |", "|---" * (len(asked) + 1) + "|"]
    for name, loss in LOSSES.items():
        rules = [refusal(ask(loss)) for ask in asked.values()]
        cells = ["yes" if rule is None else f"no ({reasons.index(rule) + 1})" for rule in rules]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    notes = [f"{i}. {r.reason[0].upper()}{r.reason[1:]}." for i, r in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"
