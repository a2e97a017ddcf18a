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

Size = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one iteration. A row is one latent through the transformer; a call takes many at once.

    Every call of velocities has the keys and values of its prompt computed before it, once per
    group in a rollout and once per group and update in training, where `cached_prefix` says so.
    """

    groups: int
    group_size: int
    steps: int
    shared: int  # of these, steps that the members of a group take as one row
    branches: int  # 2 with guidance: conditional and unconditional
    updates: int
    train_rows: int  # rows of one training call, which goes forward and backward
    train_branches: int  # calls that make up the trained field; 2 with guidance in the loss
    still: tuple[int, ...]  # calls of each field without gradient: the old one's, the reference's
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
        replayed = self.replayed * self.train_branches
        return self.groups * (self.updates * sum(self.still) + replayed)

    def _rows(self) -> int:
        return self.shared + (self.steps - self.shared) * self.group_size

    def counts(self) -> dict[str, int]:
        """Rows by what is done to them; prefixes are rows of a prompt's tokens."""
        prefixes = self.groups * self.branches, self.train_calls + self.still_calls
        return {
            "count/rollout/forward_rows": self.groups * self.branches * self._rows(),
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
    branches = _branches(alignment.train_guidance)
    old = () if ratio else (branches,)
    near = (_branches(alignment.guidance_of(slot)) for slot, _ in loss.penalties)
    trained = len(sampler.trained) or sampler.window[1] - sampler.window[0]
    return Work(
        groups=groups,
        group_size=group_size,
        steps=sampler.steps,
        shared=sampler.shared_steps,
        branches=_branches(sampler.guidance),
        updates=loss.updates_per_rollout,
        train_rows=group_size * (trained if ratio else 1),
        train_branches=branches,
        still=(*old, *near),
        replayed=int(ratio and loss.old_logp == "replay"),
        cached_prefix=sampler.cached_prefix,
    )


def _branches(guidance: float) -> int:
    """Calls that make up a field: above 1 the unconditional one as well."""
    return 2 if guidance > 1 else 1


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
        trained = self.work.train_branches
        most = max((trained, *self.work.still))
        conditions = [self._conditions(prompt, most) for prompt in prompts]
        inputs = [self._inputs(self.work.train_rows, self._size(prompt)) for prompt in prompts]
        parameters = list(self.policy.slots.parameters.values())
        began = time.perf_counter()
        for update in range(self.work.updates):
            replayed = (trained,) * (self.work.replayed if update == 0 else 0)
            for given, branches in zip(inputs, conditions, strict=True):
                with torch.no_grad():
                    for calls in (*self.work.still, *replayed):
                        for condition in branches[:calls]:
                            self._velocity(*given, condition)
                fields = [self._velocity(*given, condition) for condition in branches[:trained]]
                torch.stack(fields).square().mean().backward()
            for parameter in parameters:
                parameter.grad = None
        self._finish()
        return time.perf_counter() - began

    def _size(self, prompt: Prompt) -> Size:
        return prompt.size or self.sampler.size

    def _inputs(self, rows: int, size: Size) -> tuple[Tensor, Tensor, Size]:
        shape = self.policy.latent_shape(size)
        x = torch.randn((rows, *shape), generator=noise.generator(31))
        return x, torch.full((rows,), 0.7), size

    def _conditions(self, prompt: Prompt, branches: int) -> list[Condition]:
        sources = [images.load_image(p) for p in prompt.sources]
        texts = (prompt.text, prompt.negative)[:branches]
        return [self.policy.encode(text, sources) for text in texts]

    def _velocity(self, x: Tensor, sigma: Tensor, size: Size, condition: Condition) -> Tensor:
        prefix = self._prefix(condition, once=True)
        return self.policy.velocity(x, sigma, condition, size=size, prefix=prefix)

    def _prefix(self, condition: Condition, once: bool = False) -> Prefix | None:
        return self.policy.prefix(condition, once=once) if self.work.cached_prefix else None

    @torch.no_grad()
    def _rollout(self, prompt: Prompt) -> float:
        transformer = self.policy.transformer
        work, conditions = self.work, self._conditions(prompt, self.work.branches)
        with captured(transformer) as prefixes:
            fixed = [self._prefix(condition) for condition in conditions]
        rows: list[list[dict[str, Any]]] = []  # calls of a shared step and of any other
        for count in (1, work.group_size) if work.shared else (work.group_size,):
            x, sigma, size = self._inputs(count, self._size(prompt))
            with captured(transformer) as calls:
                for condition, prefix in zip(conditions, fixed, strict=True):
                    self.policy.velocity(x, sigma, condition, size=size, prefix=prefix)
            rows.append(calls)
        began = time.perf_counter()
        for kwargs in prefixes:
            transformer(**kwargs)
        for step in range(work.steps):
            for kwargs in rows[0 if step < work.shared else -1]:
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
