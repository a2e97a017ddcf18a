"""The one optimiser loop body: every stage trains through `Learner.step`.

A Learner knows parameters by name and nothing of what they are for. An objective maps one
micro-batch to a loss that already carries its share of the whole batch, so the losses of the
micro-batches add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.errors import AlignError, ConfigError

Batch = TypeVar("Batch")
Objective = Callable[[Batch], tuple[Tensor, Mapping[str, float]]]


class Diverged(AlignError, RuntimeError):
    """Several gradients in a row were not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """AdamW (arXiv:1711.05101). `total_steps` 0 keeps the rate constant after the warm-up; else
    cosine to 5%.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    total_steps: int = 0
    nonfinite_limit: int = 3

    def check(self) -> None:
        if self.lr <= 0:
            raise ConfigError(
                f"learner.lr: expected a positive learning rate, got {self.lr}: try 1e-4"
            )
        if self.max_grad_norm <= 0:
            raise ConfigError(
                f"learner.max_grad_norm: expected a positive norm, got {self.max_grad_norm}: 1.0"
                " is usual"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """`metrics` are sums over micro-batches; `grad_norm` is before clipping."""

    loss: float
    grad_norm: float
    skipped: bool
    metrics: dict[str, float]


class Learner:
    """Parameters by name, AdamW, clipping, accumulation, a rate schedule, and exact state."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], config: LearnerConfig) -> None:
        if not parameters:
            raise ConfigError(
                "expected at least one trainable parameter, got none: unfreeze a module"
            )
        self.parameters = dict(sorted(parameters.items()))
        self.config = config
        self.steps = 0
        self._nonfinite = 0
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )

    def rate(self) -> float:
        """Learning rate of the next step."""
        c, step = self.config, self.steps
        rate = c.lr * min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else c.lr
        if c.total_steps:
            done = min(1.0, step / c.total_steps)
            rate *= 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done))
        return rate

    def step(self, micro_batches: Iterable[Batch], objective: Objective) -> StepOutcome:
        """One optimiser step over the sum of the micro-batches' losses.

        A gradient that is not finite is skipped and counted, and the schedule waits.

        Raises:
            Diverged: `nonfinite_limit` such gradients in a row.
        """
        self.optimiser.zero_grad(set_to_none=True)
        total, metrics = 0.0, {}
        for batch in micro_batches:
            loss, parts = objective(batch)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        params = [p for p in self.parameters.values() if p.grad is not None]
        norm = (
            float(torch.nn.utils.clip_grad_norm_(params, self.config.max_grad_norm))
            if params
            else 0.0
        )
        skipped = not math.isfinite(norm)
        if skipped:
            self._nonfinite += 1
            if self._nonfinite >= self.config.nonfinite_limit:
                raise Diverged(
                    f"{self._nonfinite} gradients in a row were not finite at step {self.steps}:"
                    " lower learner.lr, or look at the samples of this step"
                )
        else:
            self._nonfinite = 0
            for group in self.optimiser.param_groups:
                group["lr"] = self.rate()
            self.optimiser.step()
            self.steps += 1
        return StepOutcome(loss=total, grad_norm=norm, skipped=skipped, metrics=metrics)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Optimiser tensors by parameter name (`<name>/exp_avg`, ...), and counters."""
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value.detach().clone()
        return tensors, {"steps": self.steps, "nonfinite": self._nonfinite}

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Inverse of `state`; parameters that had no state yet get none."""
        for name, parameter in self.parameters.items():
            prefix = f"{name}/"
            own = {
                k[len(prefix) :]: v
                for k, v in tensors.items()
                if k.startswith(prefix) and "/" not in k[len(prefix) :]
            }
            if own:
                self.optimiser.state[parameter] = {k: v.clone() for k, v in own.items()}
        self.steps, self._nonfinite = int(counters["steps"]), int(counters["nonfinite"])
