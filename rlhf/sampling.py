"""Sampling one group of pictures of one prompt: hybrid classifier-free guidance, ODE or SDE steps.

v_g = v_u + w (v_c - v_u), so the conditional velocity is at hand at every guided step and the
log-prob of the *unguided* policy at the sampled transition costs no extra forward. w = 1 skips the
unconditional branch altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf import kernels, noise, schedule
from rlhf.coefficients import Kernel
from rlhf.errors import ConfigError
from rlhf.losses import form_of, transition_log_prob
from rlhf.policies.base import Condition, Policy
from rlhf.types import Field, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How pictures are made. `window` is the range of steps that are stochastic, `trained` names
    those of them that are stored and trained (empty: all).

    `shared_noise`: all members of a group start from the same x at sigma = 1. They branch at the
    first stochastic step; until there they are one and the same, and sampled as one.
    """

    steps: int = 10
    guidance: float = 1.0
    kernel: Kernel = "ode"
    noise_level: float = 0.7
    window: tuple[int, int] = (0, 0)
    trained: tuple[int, ...] = ()
    height: int = 64
    width: int = 64
    cached_prefix: bool = True
    shared_noise: bool = False

    def check(self) -> None:
        if self.guidance < 1:
            raise ConfigError(f"guidance: expected 1 (unguided) or more, got {self.guidance}")
        if self.steps < 1:
            raise ConfigError(f"steps: expected at least 1, got {self.steps}")

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def forwards(self, group_size: int) -> int:
        """Rows through the transformer for one group, prefixes not counted."""
        rows = group_size * (self.steps - self.shared_steps) + self.shared_steps
        return rows * (2 if self.guidance > 1 else 1)

    @property
    def shared_steps(self) -> int:
        """Steps that the members of a group take as one."""
        return self.window[0] if self.shared_noise else 0

    def schedule(self, policy: Policy) -> schedule.Schedule:
        """The grid of this sampler on a policy. Raises ConfigError for an impossible window."""
        level = self.noise_level if self.kernel != "ode" else 0.0
        return schedule.build(
            policy.sigmas(self.steps, self.size), self.kernel, level, self.window, self.trained
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """x0 (G, N, C), uint8 pictures (G, 3, H, W), the stored steps if asked for, and counts."""

    x0_GNC: Tensor
    pixels: Tensor
    schedule: schedule.Schedule
    trajectory: Trajectory | None
    forwards: int  # rows that went through the transformer, prefixes not counted
    guidance_cosine: float | None  # mean cosine of v_c - v_u and v_c; None unguided


def guided_field(
    policy: Policy, sampler: Sampler, condition: Condition, empty: Condition | None, slot: str
) -> Callable[[Tensor, float | Tensor], tuple[Tensor, Tensor | None]]:
    """(x, sigma) -> (v_c, v_u); v_u is None at guidance 1. Prefixes are computed here, once. sigma
    is one level, or one for each row.
    """
    if sampler.guidance > 1 and empty is None:
        raise ConfigError("guidance above 1 needs an unconditional condition, got none")
    pairs = [condition] + ([empty] if sampler.guidance > 1 and empty is not None else [])
    fixed = [policy.prefix(c, slot) if sampler.cached_prefix else None for c in pairs]

    def field(x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor | None]:
        level = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x))
        out = [
            policy.velocity(x, level, c, size=sampler.size, prefix=p, slot=slot)
            for c, p in zip(pairs, fixed, strict=True)
        ]
        return out[0], out[1] if len(out) > 1 else None

    return field


@torch.no_grad()
def sample(
    policy: Policy,
    sampler: Sampler,
    text: str,
    *,
    negative: str = "",
    sources: Sequence[np.ndarray] = (),
    seeds: Sequence[int],
    slot: str = "train",
    store: Sequence[Field] = (),
    train_guidance: float = 1.0,
) -> Sampled:
    """Sample one picture per seed of one prompt; `store` is what a loss `requires`.

    With "trajectory" the window's steps are kept, and their log-probs under the policy at
    `train_guidance`: those are the old ones.
    """
    form = form_of(store)
    grid = sampler.schedule(policy)
    condition = policy.encode(text, sources)
    empty = policy.encode(negative, sources) if sampler.guidance > 1 else None
    field = guided_field(policy, sampler, condition, empty, slot)
    shape = policy.latent_shape(sampler.size)
    starts = seeds[:1] if sampler.shared_noise else seeds
    x = torch.stack([noise.initial_noise(s, shape) for s in starts])
    kept: list[dict[str, Tensor]] = []
    cosines, forwards = [], 0
    for index in range(grid.n_steps):
        if index == sampler.shared_steps:
            x = x.expand(len(seeds), *shape)
        forwards += len(x) * (1 if empty is None else 2)
        v_c, v_u = field(x, grid.sigmas[index])
        v = v_c if v_u is None else kernels.guide(v_c, v_u, sampler.guidance)
        if v_u is not None:
            gap = (v_c - v_u).flatten(1)
            cosines.append(torch.cosine_similarity(gap, v_c.flatten(1)).mean())
        stochastic = index in grid.noisy
        z = torch.stack([noise.step_noise(s, index, shape) for s in seeds]) if stochastic else None
        done = kernels.step(x, v, grid, index, z)
        if index in grid.trained and form is not None:
            v_train = v_c if v_u is None else kernels.guide(v_c, v_u, train_guidance)
            shift = kernels.guidance_shift(v, v_train, grid, index) if "shift" in store else None
            logp = transition_log_prob(v_train, x, done.next, grid, index, form, shift)
            step = {"x_KGNC": x, "next_KGNC": done.next, "logp_KG": logp}
            step |= {} if shift is None else {"shift_KGNC": shift}
            step |= {"velocity_KGNC": v_train.float()} if "velocity" in store else {}
            kept.append(step)
        x = done.next
    return Sampled(
        x0_GNC=x,
        pixels=policy.decode(x, sampler.size),
        schedule=grid,
        trajectory=_trajectory(grid.trained, kept) if kept else None,
        forwards=forwards,
        guidance_cosine=float(torch.stack(cosines).mean()) if cosines else None,
    )


def _trajectory(index_K: Sequence[int], kept: list[dict[str, Tensor]]) -> Trajectory:
    stacks = {name: torch.stack([step[name] for step in kept]) for name in kept[0]}
    return Trajectory(index_K=tuple(index_K), **stacks)
