"""The rollout worker: a policy that samples the groups it gets with the weights it was given."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from rewards import images
from rlhf import weights
from rlhf.errors import StaleRollouts
from rlhf.policies.base import Policy
from rlhf.sampling import Sampler, sample
from rlhf.types import Field, Geometry, GroupRef, Prompt, Rollouts, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A batch of groups to sample: prompts with their seeds, how, and what to keep for the loss."""

    iteration: int
    prompts: tuple[Prompt, ...]
    seeds: tuple[tuple[int, ...], ...]
    sampler: Sampler
    purpose: str = "train"
    store: tuple[Field, ...] = ()
    train_guidance: float = 1.0

    def refs(self, version: Version) -> list[GroupRef]:
        """One handle per group, in order."""
        return [
            GroupRef(
                id=f"{self.iteration}/{self.purpose}/{i}",
                iteration=self.iteration,
                group=i,
                prompt=p,
                seeds=s,
                version=version,
            )
            for i, (p, s) in enumerate(zip(self.prompts, self.seeds, strict=True))
        ]


def seeds_of(seed: int, iteration: int, groups: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Sample seeds, `size` per group, keyed by (seed, iteration, group)."""
    draw = lambda g: np.random.SeedSequence([5, seed, iteration, g]).generate_state(size, np.uint64)  # noqa: E731
    return tuple(tuple(int(s >> np.uint64(1)) for s in draw(g)) for g in range(groups))


class RolloutWorker:
    """Samples groups. It refuses a group of another version than the one it is bound to."""

    def __init__(self, policy: Policy, threads: int = 1) -> None:
        self.policy = policy
        self.threads = threads
        self.version: Version | None = None

    def bind(self, handover: weights.Handover) -> weights.Bound:
        """Take new weights. Raises HandoverError."""
        self.version = None  # a failed hand-over may leave weights of no version behind
        bound = weights.bind(self.policy, handover)
        self.version = handover.version
        return bound

    def rollout(self, ref: GroupRef, request: Request) -> Rollouts:
        """Sample one group. Raises StaleRollouts."""
        if ref.version != self.version:
            raise StaleRollouts(
                f"expected to sample with {ref.version}, but this worker holds {self.version}:"
                " publish before rollout"
            )
        sampler = request.sampler
        sources = [images.load_image(p) for p in ref.prompt.sources]
        got = sample(
            self.policy,
            sampler,
            ref.prompt.text,
            negative=ref.prompt.negative,
            sources=sources,
            seeds=ref.seeds,
            store=request.store,
            train_guidance=request.train_guidance,
        )
        geometry = Geometry(
            group_size=len(ref.seeds),
            height=sampler.height,
            width=sampler.width,
            cached_prefix=sampler.cached_prefix,
            dtype=str(getattr(self.policy, "dtype", torch.float32)).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )
        stats = {"nfe": float(got.forwards)}
        return Rollouts(
            ref=ref,
            schedule=got.schedule,
            geometry=geometry,
            guidance=sampler.guidance,
            x0_GNC=got.x0_GNC,
            pixels=got.pixels,
            trajectory=got.trajectory,
            stats=stats,
        )
