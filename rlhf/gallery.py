"""Pictures of many prompts at once, for looking at and measuring; nothing here is trained on.

Prompts of one layout (equal text length and source shapes) share a call, which is about twice as
fast as a call per prompt. Every picture depends on its own prompt and seed alone, up to rounding:
other batches change it by about 1e-6 before it is quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8

from rlhf import kernels, noise
from rlhf.errors import ConfigError
from rlhf.policies.base import Policy, stack
from rlhf.policies.open import Opening, open_policy
from rlhf.sampling import Sampler, guided_field

Pictures = UInt8[np.ndarray, "p g 3 h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A prompt, a seed for each of its pictures, and the pictures it edits (uint8 RGB)."""

    text: str
    seeds: tuple[int, ...]
    negative: str = ""
    sources: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts of one layout with equally many seeds; `index` is their place in the whole list."""

    index: tuple[int, ...]
    wanted: tuple[Wanted, ...]
    sampler: Sampler


class Painter:
    """Makes batches of pictures with a policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def batches(self, wanted: Sequence[Wanted], sampler: Sampler, rows: int = 64) -> list[Batch]:
        """The prompts by layout, about `rows` pictures to a batch. Raises ConfigError for a sampler
        that is stochastic.
        """
        if sampler.kernel != "ode":
            raise ConfigError(f"expected kernel ode to measure a model, got {sampler.kernel}")
        groups: dict[object, list[int]] = {}
        for i, one in enumerate(wanted):
            layout = self.policy.encode(one.text, one.sources).layout
            negative = self.policy.encode(one.negative, one.sources).layout
            groups.setdefault((layout, negative, len(one.seeds)), []).append(i)
        out = []
        for (_, _, seeds), members in groups.items():  # type: ignore[misc]
            size = max(1, rows // seeds)
            for start in range(0, len(members), size):
                part = tuple(members[start : start + size])
                picked = tuple(wanted[i] for i in part)
                out.append(Batch(index=part, wanted=picked, sampler=sampler))
        return out

    @torch.no_grad()
    def paint(self, batch: Batch) -> Pictures:
        """Pictures of a batch, uint8 (P, G, 3, H, W)."""
        policy, sampler = self.policy, batch.sampler
        condition = stack([policy.encode(w.text, w.sources) for w in batch.wanted])
        empty = None
        if sampler.guidance > 1:
            empty = stack([policy.encode(w.negative, w.sources) for w in batch.wanted])
        grid, shape = sampler.schedule(policy), policy.latent_shape(sampler.size)
        field = guided_field(policy, sampler, condition, empty, "train")
        x = torch.stack([noise.initial_noise(s, shape) for w in batch.wanted for s in w.seeds])
        for step in range(grid.n_steps):
            v_c, v_u = field(x, grid.sigmas[step])
            v = v_c if v_u is None else kernels.guide(v_c, v_u, sampler.guidance)
            x = kernels.step(x, v, grid, step).next
        pixels = policy.decode(x, sampler.size).numpy()
        return pixels.reshape(len(batch.wanted), -1, *pixels.shape[1:])


def make_painter(opening: Opening) -> Painter:
    """A painter of its own for a worker process. Raises what `open_policy` raises."""
    return Painter(open_policy(opening).policy)


def assemble(parts: Iterator[tuple[Batch, np.ndarray]], prompts: int) -> Pictures:
    """Painted batches in the order of the prompts. Raises ValueError unless each is there once."""
    rows: dict[int, np.ndarray] = {}
    for batch, pictures in parts:
        rows.update(zip(batch.index, pictures, strict=True))
    if sorted(rows) != list(range(prompts)):
        raise ValueError(f"expected pictures of {prompts} prompts, got those of {len(rows)}")
    return np.stack([rows[i] for i in range(prompts)])
