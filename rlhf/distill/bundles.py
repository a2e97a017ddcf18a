"""What a step of distillation works on: prompts of one category and one layout, with seeds.

Which ones is a function of (seed, step), so a run continues bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rewards import images
from rlhf import kernels, noise
from rlhf.errors import ConfigError
from rlhf.policies.base import Condition, Policy, stack
from rlhf.sampling import Sampler, guided_field
from rlhf.types import Prompt

_ORDER, _MEMBERS, _SEEDS = 41, 42, 43  # keys of draws
Field = Callable[[Tensor, "float | Tensor"], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """P prompts of one call, G seeds of each; a batch has B = P G rows, those of a prompt adjacent.

    `weight`: rows over those of a full bundle, so that every row counts alike. `key` are integers
    that no other bundle of the run has, `step` among them.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    size: tuple[int, int]
    weight: float
    key: tuple[int, ...]

    @property
    def category(self) -> str:
        return self.prompts[0].category

    @property
    def rows(self) -> int:
        return sum(map(len, self.seeds))

    def noises(self, policy: Policy) -> Tensor:
        """x at sigma = 1 of its seeds, (B, N, C)."""
        shape = policy.latent_shape(self.size)
        return torch.stack([noise.initial_noise(s, shape) for own in self.seeds for s in own])

    def drawn(self, policy: Policy, rows: torch.Generator) -> Tensor:
        """Noise of its rows, (B, N, C), out of a generator."""
        return torch.randn((self.rows, *policy.latent_shape(self.size)), generator=rows)


def condition_of(policy: Policy, bundle: Bundle, negative: bool = False) -> Condition:
    """Conditions of its prompts, or of their negatives, by a policy's encoder."""
    found = []
    for prompt in bundle.prompts:
        sources = [images.load_image(p) for p in prompt.sources]
        found.append(policy.encode(prompt.negative if negative else prompt.text, sources))
    return stack(found)


@torch.no_grad()
def field_of(policy: Policy, bundle: Bundle, slot: str, guidance: float = 1.0) -> Field:
    """(x, sigma) -> velocity of a slot without gradient; guided above 1. Prefixes are computed
    here, once.
    """
    sampler = Sampler(guidance=guidance, height=bundle.size[0], width=bundle.size[1])
    empty = condition_of(policy, bundle, negative=True) if guidance > 1 else None
    both = guided_field(policy, sampler, condition_of(policy, bundle), empty, slot)

    @torch.no_grad()
    def field(x: Tensor, sigma: float | Tensor) -> Tensor:
        v_c, v_u = both(x, sigma)
        return v_c if v_u is None else kernels.guide(v_c, v_u, guidance)

    return field


def velocity_of(
    policy: Policy, bundle: Bundle, x: Tensor, sigma_B: Tensor, slot: str = "train"
) -> Tensor:
    """The unguided velocity of rows of a bundle under a slot, with gradient; `x` may hold the rows
    of a prompt several times.
    """
    condition = condition_of(policy, bundle)
    prefix = policy.prefix(condition, slot, once=True)
    return policy.velocity(x, sigma_B, condition, size=bundle.size, prefix=prefix, slot=slot)


class Bundles:
    """Bundles of all steps. `prompts` of them at most share one, `copies` seeds each.

    `noises`: epochs after which prompts meet the same bundles and seeds again, 0 for never.
    Raises ConfigError without prompts.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        policy: Policy,
        size: tuple[int, int],
        *,
        per: int,
        copies: int,
        noises: int,
        seed: int,
        parts: int,
    ) -> None:
        self.every, self.size, self.seed = list(prompts), size, seed
        self.per, self.copies, self.noises, self.parts = per, copies, noises, parts
        groups: dict[object, list[int]] = {}
        for i, prompt in enumerate(self.every):
            groups.setdefault(self._kind(policy, prompt), []).append(i)
        self.groups = list(groups.values())
        self.count = sum(-(-len(group) // per) for group in self.groups)
        if not self.count:
            raise ConfigError("prompts: expected at least one, got none")

    def _kind(self, policy: Policy, prompt: Prompt) -> object:
        """What the prompts of a bundle share."""
        sources = [images.load_image(p) for p in prompt.sources]
        layouts = [policy.encode(text, sources).layout for text in (prompt.text, prompt.negative)]
        return prompt.category, prompt.size or self.size, *layouts

    def at(self, step: int) -> tuple[Bundle, ...]:
        """The `parts` bundles of a step, counted from 1."""
        first = (step - 1) * self.parts
        return tuple(self._at(step, place) for place in range(first, first + self.parts))

    def _at(self, step: int, place: int) -> Bundle:
        epoch, position = divmod(place, self.count)
        order = np.random.default_rng([_ORDER, self.seed, epoch]).permutation(self.count)
        round = epoch % self.noises if self.noises else epoch
        members = self._members(round)[order[position]]
        chosen = tuple(self.every[i] for i in members)
        rows = len(chosen) * self.copies
        return Bundle(
            prompts=chosen,
            seeds=tuple(self._seeds(round, i) for i in members),
            size=chosen[0].size or self.size,
            weight=rows / (self.per * self.copies),
            key=(self.seed, step, place),
        )

    def _members(self, round: int) -> list[list[int]]:
        """The prompts of every bundle of a round, by position."""
        out = []
        for number, group in enumerate(self.groups):
            keyed = np.random.default_rng([_MEMBERS, self.seed, round, number])
            mixed = [group[i] for i in keyed.permutation(len(group))]
            out += [mixed[i : i + self.per] for i in range(0, len(mixed), self.per)]
        return out

    def _seeds(self, round: int, prompt: int) -> tuple[int, ...]:
        keyed = np.random.SeedSequence([_SEEDS, self.seed, round, prompt])
        return tuple(int(s >> np.uint64(1)) for s in keyed.generate_state(self.copies, np.uint64))


def split_bundles(batch: Sequence[Bundle], parts: int) -> list[tuple[Bundle, ...]]:
    """Each bundle is a micro-batch of its own."""
    return [(bundle,) for bundle in batch[:parts]]
