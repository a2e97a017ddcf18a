"""Named versions of the trainable weights of one module.

`train` is the module's own parameters. Every other slot is a set of tensors of the same names that
is put in place for a call and never changes the module: `behaviour` (what rollouts use),
`reference` (the frozen start), `ema`, `teacher/...`. For LoRA the reference has lora_B = 0, which
is the base model exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import CheckpointError, ConfigError


class Slots:
    """Weights by slot and name. Create it after the trainable parameters of `module` are chosen."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters: dict[str, torch.nn.Parameter] = dict(sorted(named.items()))
        self._held: dict[str, dict[str, Tensor]] = {}
        reference = {n: p.detach().clone() for n, p in self.parameters.items()}
        for name, value in reference.items():
            if "lora_B" in name:
                value.zero_()
        if reference:
            self._held["reference"] = reference

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", *self._held)

    def tensors(self, slot: str) -> dict[str, Tensor]:
        """The tensors of a slot, not copied. Raises ConfigError for a slot that does not exist."""
        if slot == "train":
            return {n: p.detach() for n, p in self.parameters.items()}
        if slot not in self._held:
            raise ConfigError(f"expected one of the slots {list(self.names)}, got '{slot}'")
        return self._held[slot]

    def copy(self, source: str, target: str) -> None:
        """target := source, made if it was not there."""
        self._held[target] = {n: t.detach().clone() for n, t in self.tensors(source).items()}

    def learn(self, slot: str) -> dict[str, torch.nn.Parameter]:
        """The tensors of a slot as parameters that can be trained beside `train`, in its place."""
        made = {n: torch.nn.Parameter(t.detach().clone()) for n, t in self.tensors(slot).items()}
        self._held[slot] = dict(made)
        return made

    def drop(self, slot: str) -> None:
        """Forget a slot, if it is there."""
        self._held.pop(slot, None)

    @torch.no_grad()
    def lag(self, target: str, decay: float) -> None:
        """target := decay * target + (1 - decay) * train."""
        for name, value in self.tensors(target).items():
            value.mul_(decay).add_(self.parameters[name].detach(), alpha=1 - decay)

    @torch.no_grad()
    def load(self, slot: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace a slot. Raises CheckpointError unless names and shapes are this module's."""
        mine = {n: tuple(p.shape) for n, p in self.parameters.items()}
        theirs = {n: tuple(t.shape) for n, t in tensors.items()}
        if mine != theirs:
            wrong = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
            raise CheckpointError(
                f"slot '{slot}': expected {len(mine)} tensors of this policy, got {len(theirs)};"
                f" {wrong[0]} is {theirs.get(wrong[0])} instead of {mine.get(wrong[0])}: use the"
                " same base,"
                " LoRA rank and targets"
            )
        if slot == "train":
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        else:
            self._held[slot] = {n: tensors[n].detach().clone() for n in self.parameters}

    def call(self, slot: str, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the weights of a slot in place."""
        if slot == "train" or not self.parameters:
            return self.module(*args, **kwargs)
        return torch.func.functional_call(self.module, self.tensors(slot), args, kwargs)
