"""Distribution matching (DMD, arXiv:2311.18828; several student steps: arXiv:2405.14867).

The student's pictures should be as likely as the teacher's at every noise level: its gradient is
the difference of two scores of the noised pictures. The real one is the frozen, guided teacher's,
the fake one that of a trainable copy, which is fitted to the student's pictures by flow matching.
There is neither a discriminator nor a regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf import noise
from rlhf.distill.bundles import Bundle, field_of, velocity_of
from rlhf.distill.method import Targets
from rlhf.distill.objectives import euler, matching_gradient, matching_target, velocity_loss
from rlhf.distill.teachers import Teachers
from rlhf.distill.trajectories import student_states
from rlhf.distributed import ALONE, Ranks
from rlhf.errors import ConfigError
from rlhf.flow import logit_normal, mixed_precision
from rlhf.learner import Learner, LearnerConfig
from rlhf.policies.pipeline import PipelinePolicy

FAKE = "fake"  # slot of the copy
_OWN, _STUDENT = 61, 62  # keys of draws
LEVELS = (0.02, 0.98)  # of noise at which the scores are compared: neither divides by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingConfig:
    """`ratio`: updates of the fake score for each of the student's. `shift` of the logit-normal
    noise levels at which the scores are compared. Values are ours; none are published.
    """

    ratio: int = 5
    shift: float = 0.5
    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(lr=2e-4))

    def check(self) -> None:
        if self.ratio < 1:
            raise ConfigError(
                f"matching.ratio: expected at least 1 update of the fake score for each of the"
                f" student's, got {self.ratio}: 5 is usual"
            )
        if self.learner.parallel != "ddp":
            raise ConfigError("matching.learner.parallel: expected ddp: slots are not sharded")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """Rows of the student at a drawn step: state, level, velocity there and clean prediction."""

    step: int
    x_s: Tensor
    s: Tensor
    v: Tensor
    x: Tensor


class DistributionMatching:
    """See `rlhf.distill.method.Method`."""

    trajectories = None

    def __init__(
        self,
        policy: PipelinePolicy,
        teachers: Teachers,
        sigmas: Sequence[float],
        config: MatchingConfig,
        precision: str = "float32",
        ranks: Ranks = ALONE,
    ) -> None:
        self.policy, self.teachers, self.config = policy, teachers, config
        self.precision = precision
        self.sigmas = tuple(sigmas)
        policy.slots.copy("reference", FAKE)
        self.fake = Learner(policy.slots.learn(FAKE), config.learner, ranks)
        self.companions: Mapping[str, Learner] = {FAKE: self.fake}
        self._last: Mapping[str, float] = {}

    def follow(self, batch: Sequence[Bundle]) -> None:
        """Fit the fake score to what the student makes now: `ratio` flow matching updates."""
        share = 1 / len(batch)
        for turn in range(self.config.ratio):
            outcome = self.fake.step(batch, lambda one, turn=turn: self._fit(one, turn, share))
            self._last = {"fake/loss": outcome.loss, "fake/grad_norm": outcome.grad_norm}

    def figures(self) -> Mapping[str, float]:
        return self._last

    @torch.no_grad()
    def targets(self, bundle: Bundle) -> Targets:
        """v* moves the student's clean prediction against the score difference."""
        rows = noise.generator(_STUDENT, *bundle.key)
        made = self._made(bundle, rows)
        t, eps = self._noise(bundle, rows)
        x_t = made.x + t[:, None, None] * (eps - made.x)
        v_real = self.teachers.fields(bundle, [made.step])(x_t, t, made.step)
        v_fake = field_of(self.policy, bundle, FAKE)(x_t, t)
        gradient = matching_gradient(made.x, x_t, v_fake, v_real, t)
        target, weight = matching_target(made.v, gradient, made.s)
        size = float(gradient.square().mean())
        return Targets(
            x_BNC=made.x_s,
            sigma_B=made.s,
            velocity_BNC=target,
            weight_B=weight / len(weight),
            metrics={"dmd/gradient": size},
        )

    def _fit(self, bundle: Bundle, turn: int, share: float) -> tuple[Tensor, dict[str, float]]:
        """The flow matching loss of a bundle that is a share of its step."""
        rows = noise.generator(_OWN, turn, *bundle.key)
        made = self._made(bundle, rows)
        t, eps = self._noise(bundle, rows)
        x_t = made.x + t[:, None, None] * (eps - made.x)
        with mixed_precision(self.policy, self.precision):
            v = velocity_of(self.policy, bundle, x_t, t, FAKE)
        each = torch.full_like(t, share * bundle.weight / len(t))
        return velocity_loss(v, eps - made.x, each), {}

    @torch.no_grad()
    def _made(self, bundle: Bundle, rows: torch.Generator) -> _Made:
        """The student's clean prediction at one of its steps, reached by its own steps."""
        step = int(torch.randint(len(self.sigmas) - 1, (1,), generator=rows))
        noises = bundle.drawn(self.policy, rows)
        x_s = student_states(self.policy, bundle, self.sigmas, noises, step)[-1]
        s = torch.full((bundle.rows,), self.sigmas[step])
        v = field_of(self.policy, bundle, "train")(x_s, s)
        return _Made(step=step, x_s=x_s, s=s, v=v, x=euler(x_s, v, s, torch.zeros_like(s)))

    def _noise(self, bundle: Bundle, rows: torch.Generator) -> tuple[Tensor, Tensor]:
        t = logit_normal(torch.randn(bundle.rows, generator=rows), self.config.shift)
        return t.clamp(*LEVELS), bundle.drawn(self.policy, rows)
