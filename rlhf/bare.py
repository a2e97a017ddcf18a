"""What an iteration has to compute, and how long that takes with nothing around it.

`Work` counts the transformer's forwards and backwards that the loss cannot do without. `Bare` runs
them on the transformer itself, inputs made beforehand: no sampler, no decoder, no judges, no
optimiser, no hand-over of weights. What the real iteration takes beyond that is what could be won.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rewards import images
from rlhf import noise
from rlhf.alignment import AlignmentConfig
from rlhf.policies.base import Condition, Prefix
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.sampling import Sampler
from rlhf.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one iteration. A row is one latent through the transformer; a call takes many at once.

    Every call of velocities has the keys and values of its prompt computed before it, once per
    group in a rollout and once per group and update in training, where `cached_prefix` says so.
    """

    groups: int
    group_size: int
    steps: int
    branches: int  # 2 with guidance: conditional and unconditional
    updates: int
    train_rows: int  # rows of one training call, which goes forward and backward
    train_branches: int  # calls that make up the trained field; 2 with guidance in the loss
    still: int  # fields without gradient per group and update: the old one, the reference's
    replayed: int  # further ones in the first update, for old log-probs that are computed again
    cached_prefix: bool

    @property
    def rollout_calls(self) -> int:
        return self.groups * self.steps * self.branches

    @property
    def train_calls(self) -> int:
        """Forward and backward."""
        return self.groups * self.updates * self.train_branches

    @property
    def still_calls(self) -> int:
        """Forward alone, in training."""
        return self.groups * (self.updates * self.still + self.replayed) * self.train_branches

    def counts(self) -> dict[str, int]:
        """Rows by what is done to them; prefixes are rows of a prompt's tokens."""
        prefixes = self.groups * self.branches, self.train_calls + self.still_calls
        return {
            "count/rollout/forward_rows": self.rollout_calls * self.group_size,
            "count/rollout/prefixes": prefixes[0] if self.cached_prefix else 0,
            "count/train/backward_rows": self.train_calls * self.train_rows,
            "count/train/forward_rows": self.still_calls * self.train_rows,
            "count/train/prefixes": prefixes[1] if self.cached_prefix else 0,
        }


def work_of(groups: int, group_size: int, sampler: Sampler, alignment: AlignmentConfig) -> Work:
    """The work of an iteration of `groups` prompts.

    A ratio loss replays the trained steps of the window under the new weights; a forward-process
    loss needs the field of the old weights beside the new one. A KL needs that of its slot.
    """
    loss = alignment.loss
    ratio = loss.loss.form is not None
    window = sampler.window[1] - sampler.window[0]
    return Work(
        groups=groups,
        group_size=group_size,
        steps=sampler.steps,
        branches=2 if sampler.guidance > 1 else 1,
        updates=loss.updates_per_rollout,
        train_rows=group_size * (window if ratio else 1),
        train_branches=2 if alignment.train_guidance > 1 else 1,
        still=int(not ratio) + len(loss.penalties),
        replayed=int(ratio and loss.old_logp == "replay"),
        cached_prefix=sampler.cached_prefix,
    )


@contextmanager
def captured(module: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Keyword arguments of every call of `module` inside the block."""
    calls: list[dict[str, Any]] = []

    def keep(_: torch.nn.Module, __: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


class Bare:
    """The work of some groups on a policy of its own. Times are seconds, preparation left out."""

    def __init__(self, policy: PipelinePolicy, work: Work, sampler: Sampler) -> None:
        self.policy, self.work, self.sampler = policy, work, sampler

    def rollout(self, prompts: Sequence[Prompt]) -> float:
        """The forwards of sampling one group of each prompt."""
        return sum(self._rollout(prompt) for prompt in prompts)

    def train(self, prompts: Sequence[Prompt]) -> float:
        """The forwards and backwards of all updates on one group of each prompt."""
        conditions = [self._conditions(prompt, self.work.train_branches) for prompt in prompts]
        x, sigma = self._inputs(self.work.train_rows)
        parameters = list(self.policy.slots.parameters.values())
        began = time.perf_counter()
        for update in range(self.work.updates):
            still = self.work.still + (self.work.replayed if update == 0 else 0)
            for branches in conditions:
                with torch.no_grad():
                    for _ in range(still):
                        for condition in branches:
                            self._velocity(x, sigma, condition)
                fields = [self._velocity(x, sigma, condition) for condition in branches]
                torch.stack(fields).square().mean().backward()
            for parameter in parameters:
                parameter.grad = None
        self._finish()
        return time.perf_counter() - began

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        shape = self.policy.latent_shape(self.sampler.size)
        return torch.randn((rows, *shape), generator=noise.generator(31)), torch.full((rows,), 0.7)

    def _conditions(self, prompt: Prompt, branches: int) -> list[Condition]:
        sources = [images.load_image(p) for p in prompt.sources]
        texts = (prompt.text, prompt.negative)[:branches]
        return [self.policy.encode(text, sources) for text in texts]

    def _velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        size, prefix = self.sampler.size, self._prefix(condition)
        return self.policy.velocity(x, sigma, condition, size=size, prefix=prefix)

    def _prefix(self, condition: Condition) -> Prefix | None:
        return self.policy.prefix(condition) if self.work.cached_prefix else None

    @torch.no_grad()
    def _rollout(self, prompt: Prompt) -> float:
        transformer = self.policy.transformer
        x, sigma = self._inputs(self.work.group_size)
        conditions = self._conditions(prompt, self.work.branches)
        with captured(transformer) as prefixes:
            fixed = [self._prefix(condition) for condition in conditions]
        with captured(transformer) as steps:
            for condition, prefix in zip(conditions, fixed, strict=True):
                self.policy.velocity(x, sigma, condition, size=self.sampler.size, prefix=prefix)
        began = time.perf_counter()
        for kwargs in prefixes:
            transformer(**kwargs)
        for _ in range(self.work.steps):
            for kwargs in steps:
                transformer(**kwargs)
        self._finish()
        return time.perf_counter() - began

    def _finish(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def make_bare(policy: PolicyConfig, work: Work, sampler: Sampler) -> Bare:
    """A `Bare` with its own copy of the policy, for a process of its own."""
    return Bare(load_policy(policy), work, sampler)


def builder(policy: PolicyConfig, work: Work, sampler: Sampler) -> partial[Bare]:
    """`make_bare` with its arguments, small enough to be sent."""
    return partial(make_bare, policy, work, sampler)
