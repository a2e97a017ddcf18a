"""Frozen, guided teachers: which weights, how strongly guided, who is listened to where, and who
waits in main memory meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rlhf.distill.bundles import Bundle, Field, field_of
from rlhf.errors import ConfigError
from rlhf.policies.config import PolicyConfig
from rlhf.policies.open import Opening, describe_opening, open_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.weights import checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """`model`: a base, or runs/NAME with `checkpoint` (None: newest) and `slot`; None is the base
    that the student starts from. `categories`: its say by category of prompt, "*" for every other.
    `by_step`: its say at each step of the student, the last value for all that follow; together
    they are multiplied and shared out among the teachers.
    """

    model: str | None = None
    checkpoint: int | None = None
    slot: str = "train"
    guidance: float = 2.0
    categories: dict[str, float] = field(default_factory=lambda: {"*": 1.0})
    by_step: tuple[float, ...] = (1.0,)

    def check(self) -> None:
        if self.guidance < 1:
            raise ConfigError(f"guidance: expected 1 (unguided) or more, got {self.guidance}")
        if (
            not self.by_step
            or min(self.by_step) < 0
            or min(self.categories.values(), default=-1) < 0
        ):
            raise ConfigError(
                f"categories and by_step: expected weights of 0 or more, got {self.categories} and"
                f' {list(self.by_step)}: write {{"*": 1}} and [1]'
            )

    def say(self, category: str, step: int) -> float:
        """Its weight, before it is shared out."""
        own = self.categories.get(category, self.categories.get("*", 0.0))
        return own * self.by_step[min(step, len(self.by_step) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The guided velocity field of one slot of a policy."""

    config: TeacherConfig
    policy: PipelinePolicy
    slot: str
    own: bool = False  # whether the policy is its own, not the student's

    def field(self, bundle: Bundle) -> Field:
        """(x, sigma) -> v_u + w (v_c - v_u), without gradient."""
        return field_of(self.policy, bundle, self.slot, self.config.guidance)

    def place(self, present: bool) -> None:
        """A policy of its own to its device, or else to main memory; on a CPU these are one."""
        home = self.policy.device
        if self.own and home.type != "cpu":
            self.policy.pipeline.to(home if present else torch.device("cpu"))

    def checksum(self) -> str:
        """Of the weights it speaks with."""
        if self.policy.slots.parameters:
            return checksum(self.policy.slots.tensors(self.slot))
        return checksum(dict(self.policy.transformer.named_parameters()))


class Teachers:
    """v = sum_m lambda_m v_m with sum_m lambda_m = 1 for every category and step of the student
    (arXiv:2606.03746 for the steps). Who has no say in a bundle is not asked, and of those that
    are policies of their own only who has one is on the device.
    """

    def __init__(self, every: Mapping[str, Teacher]) -> None:
        self.every = dict(every)
        self.present: set[str] = set()

    def shares(self, category: str, step: int) -> dict[str, float]:
        """lambda of those that have a say. Raises ConfigError if nobody has."""
        said = {name: t.config.say(category, step) for name, t in self.every.items()}
        total = sum(said.values())
        if not total > 0:
            raise ConfigError(
                f"teachers: expected one with a say on prompts of '{category}' at step {step + 1},"
                f' got {said}: write teachers.NAME.categories={{"*": 1}}'
            )
        return {name: value / total for name, value in said.items() if value > 0}

    def check(self, categories: Sequence[str], steps: int) -> None:
        """Raise ConfigError for a category and step at which nobody has a say."""
        for category in categories:
            for step in range(steps):
                self.shares(category, step)

    def call(self, names: Iterable[str]) -> None:
        """These teachers to the device; the others off it first, so that there is room."""
        wanted = set(names)
        for name in sorted(self.present - wanted):
            self.every[name].place(False)
        for name in sorted(wanted - self.present):
            self.every[name].place(True)
        self.present = wanted

    def fields(self, bundle: Bundle, steps: Iterable[int]) -> Spoken:
        """What they say about a bundle at some steps of the student; valid until the next call."""
        shares = {step: self.shares(bundle.category, step) for step in steps}
        self.call({name for share in shares.values() for name in share})
        return Spoken(self, bundle, shares)

    def checksums(self) -> dict[str, str]:
        """Of the weights of each; equal before and after training."""
        return {name: teacher.checksum() for name, teacher in self.every.items()}


class Spoken:
    """What teachers say about one bundle; the prefixes of each are computed once."""

    def __init__(
        self, teachers: Teachers, bundle: Bundle, shares: Mapping[int, Mapping[str, float]]
    ) -> None:
        self.teachers, self.bundle, self.shares = teachers, bundle, shares
        self._open: dict[str, Field] = {}

    def __call__(self, x: Tensor, sigma: float | Tensor, step: int) -> Tensor:
        """The shared velocity at x, at a step of the student. Raises KeyError for a step that was
        not announced.
        """
        total = torch.zeros_like(x)
        for name, share in self.shares[step].items():
            if name not in self._open:
                self._open[name] = self.teachers.every[name].field(self.bundle)
            total += share * self._open[name](x, sigma)
        return total


def own_levels(configs: Mapping[str, TeacherConfig]) -> tuple[float, ...]:
    """The noise levels that teachers were distilled to: the only ones at which they can be asked.
    Empty where none of them was.

    Raises:
        ConfigError: levels of two kinds, guidance on a teacher that has levels, or no such model.
    """
    named = {name: one for name, one in configs.items() if one.model is not None}
    levels = {n: describe_opening(Opening(model=str(t.model))).levels for n, t in named.items()}
    levels = {name: found for name, found in levels.items() if found}
    if len(set(levels.values())) > 1:
        raise ConfigError(
            f"teachers: expected distilled ones to have the same noise levels, got {levels}: take"
            " teachers of one grid"
        )
    for name in levels:
        if configs[name].guidance > 1:
            raise ConfigError(
                f"teachers.{name}.guidance: expected 1 for a teacher that was distilled to noise"
                f" levels of its own, got {configs[name].guidance}: its guidance is in its weights"
            )
    return next(iter(levels.values()), ())


def open_teachers(
    student: PipelinePolicy, configs: Mapping[str, TeacherConfig], apart: bool = False
) -> Teachers:
    """Teachers by name. Those whose base and trained weights are laid out like the student's are
    slots `teacher/<name>` of it and share all that is frozen; others are policies of their own, and
    so are all if the student is `apart`, its frozen weights no longer its base's.

    Raises:
        ConfigError: none, or what `open_policy` raises.
    """
    if not configs:
        raise ConfigError("teachers: expected at least one, got none: write teachers={base: {}}")
    made = {}
    for name, one in configs.items():
        made[name] = _open(student, name, one, apart)
        made[name].place(False)  # the next one needs the room
    return Teachers(made)


def _open(student: PipelinePolicy, name: str, config: TeacherConfig, apart: bool) -> Teacher:
    own, model = student.config, config.model or student.config.model
    if model == own.model and not apart:
        return Teacher(config=config, policy=student, slot="reference")
    opening = Opening(
        model=model,
        checkpoint=config.checkpoint,
        slot=config.slot,
        device=own.device,
        dtype=own.dtype,
    )
    opened = open_policy(opening).policy
    if apart or not _alike(own, opened.config):
        opened.transformer.requires_grad_(False)
        opened.slots.drop("reference")
        return Teacher(config=config, policy=opened, slot="train", own=True)
    slot = f"teacher/{name}"
    student.slots.load(slot, opened.slots.tensors("train"))
    return Teacher(config=config, policy=student, slot=slot)


def _alike(one: PolicyConfig, other: PolicyConfig) -> bool:
    """Whether weights of one are a slot of the other."""
    return replace(one, seed=0, checkpointing=False) == replace(other, seed=0, checkpointing=False)
