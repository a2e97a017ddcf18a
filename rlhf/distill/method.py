"""What a method of distillation is: it asks the student somewhere and says what is right there.

segments       the teacher's guided trajectory, cut at the student's grid: v* is the mean
               velocity of a segment. Cheap, and a warm start for the others.
consistency    from any level of a segment to its end: v* leads where one teacher step and then
               the student itself lead (arXiv:2303.01469, by segments: arXiv:2405.18407)
dmd            distribution matching, in `matching.py`
opd            every state of the student's own trajectory: v* is the teacher's guided velocity
               there (arXiv:2606.27608)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf import noise
from rlhf.distill.bundles import Bundle, field_of, velocity_of
from rlhf.distill.grids import Grids
from rlhf.distill.objectives import (
    average_velocity,
    by_prompt,
    euler,
    levels_by_prompt,
    velocity_loss,
)
from rlhf.distill.teachers import Teachers
from rlhf.distill.trajectories import Trajectories, student_states
from rlhf.learner import Learner
from rlhf.policies.pipeline import PipelinePolicy

_STEP, _LEVEL, _NOISE = 51, 52, 53  # keys of draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Where a student is asked, and the velocity it should have had; see `objectives`. Rows of a
    prompt are adjacent; weights are shares of the rows, times what a method says.
    """

    x_BNC: Float[Tensor, "b n c"]
    sigma_B: Float[Tensor, " b"]
    velocity_BNC: Float[Tensor, "b n c"]
    weight_B: Float[Tensor, " b"]
    metrics: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Method(Protocol):
    """`companions` learn beside the student and are in its checkpoints."""

    companions: Mapping[str, Learner]

    @property
    def trajectories(self) -> Trajectories | None:
        """Those that its targets are made from, if they are."""
        ...

    def follow(self, batch: Sequence[Bundle]) -> None:
        """Whatever else is trained, before the student is asked about a batch."""
        ...

    def targets(self, bundle: Bundle) -> Targets:
        """Without gradient; a function of the bundle and of the weights."""
        ...

    def figures(self) -> Mapping[str, float]:
        """For every row of the run."""
        ...


class Alone:
    """Of a method that trains nothing but the student."""

    companions: Mapping[str, Learner] = {}

    def follow(self, batch: Sequence[Bundle]) -> None:
        return None

    def figures(self) -> Mapping[str, float]:
        return {}


def student_loss(
    policy: PipelinePolicy, bundle: Bundle, asked: Targets
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one bundle and what the method says of it, both times the bundle's weight."""
    v = velocity_of(policy, bundle, asked.x_BNC, asked.sigma_B)
    loss = velocity_loss(v, asked.velocity_BNC, asked.weight_B * bundle.weight)
    return loss, {name: value * bundle.weight for name, value in asked.metrics.items()}


class Segments(Alone):
    """All segments of the teachers' trajectories of a bundle's seeds."""

    def __init__(self, trajectories: Trajectories) -> None:
        self.trajectories = trajectories

    def targets(self, bundle: Bundle) -> Targets:
        states = self.trajectories.of(bundle)
        knots, prompts = self.trajectories.knots, len(bundle.prompts)
        s = levels_by_prompt(knots[:-1], bundle.rows, prompts)
        s_end = levels_by_prompt(knots[1:], bundle.rows, prompts)
        x, x_end = by_prompt(states[:-1], prompts), by_prompt(states[1:], prompts)
        v = average_velocity(x, x_end, s, s_end)
        return Targets(x_BNC=x, sigma_B=s, velocity_BNC=v, weight_B=torch.full_like(s, 1 / len(s)))


class Consistency(Alone):
    """One level in one segment for each row: the teachers' pictures of its seed, noised afresh."""

    def __init__(self, policy: PipelinePolicy, trajectories: Trajectories) -> None:
        self.policy, self.trajectories = policy, trajectories

    @torch.no_grad()
    def targets(self, bundle: Bundle) -> Targets:
        """v* = (x - f) / (s - s_end) with f = x' - (s' - s_end) v_theta(x', s'), and x' at the next
        level s' of the teachers' grid, one guided step away.
        """
        kept = self.trajectories
        knots, grid = kept.knots, torch.tensor(kept.grids[bundle.size])
        rows = noise.generator(_LEVEL, *bundle.key)
        step = int(torch.randint(len(knots) - 1, (1,), generator=rows))
        inside = torch.nonzero((grid <= knots[step]) & (grid > knots[step + 1]))[:, 0]
        at = inside[torch.randint(len(inside), (bundle.rows,), generator=rows)]
        s, s_next, s_end = grid[at], grid[at + 1], torch.full((bundle.rows,), knots[step + 1])
        x0, eps = kept.of(bundle)[-1], bundle.drawn(self.policy, rows)
        x = x0 + s[:, None, None] * (eps - x0)
        x_next = euler(x, kept.teachers.fields(bundle, [step])(x, s, step), s, s_next)
        own = field_of(self.policy, bundle, "train")(x_next, s_next)
        v = average_velocity(x, euler(x_next, own, s_next, s_end), s, s_end)
        return Targets(x_BNC=x, sigma_B=s, velocity_BNC=v, weight_B=torch.full_like(s, 1 / len(s)))


class OnPolicy(Alone):
    """Every state that the student visits on its way from fresh noise, without gradient through the
    way. `grids`: the student's for every size of a picture, `weights`: of each of their steps, 1
    for the plain squared distance.
    """

    trajectories = None

    def __init__(
        self,
        policy: PipelinePolicy,
        teachers: Teachers,
        grids: Grids,
        weights: Grids,
    ) -> None:
        self.policy, self.teachers = policy, teachers
        self.grids, self.weights = dict(grids), dict(weights)

    @torch.no_grad()
    def targets(self, bundle: Bundle) -> Targets:
        sigmas, prompts = self.grids[bundle.size], len(bundle.prompts)
        x = bundle.drawn(self.policy, noise.generator(_NOISE, *bundle.key))
        states = student_states(self.policy, bundle, sigmas, x, len(sigmas) - 2)
        speak = self.teachers.fields(bundle, range(len(states)))
        said = [speak(x, s, k) for k, (x, s) in enumerate(zip(states, sigmas, strict=False))]
        weight = levels_by_prompt(self.weights[bundle.size], bundle.rows, prompts)
        return Targets(
            x_BNC=by_prompt(torch.stack(states), prompts),
            sigma_B=levels_by_prompt(sigmas[:-1], bundle.rows, prompts),
            velocity_BNC=by_prompt(torch.stack(said), prompts),
            weight_B=weight / len(weight),
        )
