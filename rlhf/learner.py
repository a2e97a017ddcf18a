"""The one optimiser loop body: every stage trains through `Learner.step`.

A Learner knows parameters by name and nothing of what they are for. An objective maps one
micro-batch to a loss that already carries its share of the whole batch, so the losses of the
micro-batches add up, within a process and over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.distributed import ALONE, Ranks, sharded_like, whole
from rlhf.errors import AlignError, ConfigError
from rlhf.parallel import Mode, wrap

Batch = TypeVar("Batch")
Objective = Callable[[Batch], tuple[Tensor, Mapping[str, float]]]


class Diverged(AlignError, RuntimeError):
    """Several gradients in a row were not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """AdamW (arXiv:1711.05101). `total_steps` 0 keeps the rate constant after the warm-up; else
    cosine to 5%. `parallel` says how several ranks hold the weights: all of them each (ddp) or in
    shards (fsdp); one rank holds all.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    total_steps: int = 0
    nonfinite_limit: int = 3
    parallel: Mode = "ddp"

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
    """`loss` and `metrics` are sums over the micro-batches of all ranks; `grad_norm` is that of the
    whole gradient, before clipping.
    """

    loss: float
    grad_norm: float
    skipped: bool
    metrics: dict[str, float]


class Learner:
    """Parameters by name, AdamW, clipping, accumulation, a rate schedule, and exact state.

    `factor` multiplies the rate of a step, counted from 1. With several ranks every method but
    `rate` is a collective: all of them call it. `module`, of which the parameters are all weights,
    is needed to shard; its weights and `parameters` are then other objects than before.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        config: LearnerConfig,
        ranks: Ranks = ALONE,
        module: torch.nn.Module | None = None,
        factor: Callable[[int], float] | None = None,
    ) -> None:
        if not parameters:
            raise ConfigError(
                "expected at least one trainable parameter, got none: unfreeze a module"
            )
        self.config, self.ranks, self.factor = config, ranks, factor
        self._parallel = wrap(dict(sorted(parameters.items())), config.parallel, ranks, module)
        self.parameters = self._parallel.parameters
        self.steps = 0
        self._nonfinite = 0
        self.optimiser = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def rate(self) -> float:
        """Learning rate of the next step."""
        c, step = self.config, self.steps
        rate = c.lr * min(1.0, (step + 1) / c.warmup_steps) if c.warmup_steps else c.lr
        if c.total_steps:
            done = min(1.0, step / c.total_steps)
            rate *= 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * done))
        return rate * self.factor(step + 1) if self.factor else rate

    def step(self, micro_batches: Iterable[Batch], objective: Objective) -> StepOutcome:
        """One optimiser step over the sum of the micro-batches' losses.

        Every rank is given all micro-batches and computes its share of them. A gradient that is not
        finite on one rank is not finite in the sum: all skip it and count it, and the schedule
        waits.

        Raises:
            ConfigError: fewer micro-batches than ranks.
            Diverged: `nonfinite_limit` such gradients in a row.
        """
        self.optimiser.zero_grad(set_to_none=True)
        mine = self.ranks.share(list(micro_batches))
        total, metrics = 0.0, {}
        for i, batch in enumerate(mine, start=1):
            loss, parts = self._parallel.backward(objective, batch, last=i == len(mine))
            total += float(loss)
            for name, value in parts.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        total, metrics = self._summed(total, metrics)
        norm = self._clip()
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

    def _summed(self, loss: float, metrics: dict[str, float]) -> tuple[float, dict[str, float]]:
        summed = self.ranks.sum({"": loss, **metrics})
        return summed.pop(""), summed

    @torch.no_grad()
    def _clip(self) -> float:
        """Norm of the whole gradient, which is then at most `max_grad_norm`."""
        params = [p for p in self.parameters.values() if p.grad is not None]
        grads = [p.grad for p in params if p.grad is not None]
        if not grads:
            return 0.0
        norm = whole(torch.nn.utils.get_total_norm(grads))
        torch.nn.utils.clip_grads_with_norm_(params, self.config.max_grad_norm, norm)
        return float(norm)

    def gathered(self) -> AbstractContextManager[dict[str, torch.nn.Parameter]]:
        """Context in which the module can be called and holds whole weights, given by name. What is
        written to sharded ones is lost at its end.
        """
        return self._parallel.gathered()

    def weights(self) -> dict[str, Tensor]:
        """Whole trained weights by name, in one layout however they are held; only on the first
        rank.
        """
        return self.whole(self.parameters)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of tensors laid out as the parameters, whole, on the first rank; empty on others.

        One at a time, and off the device if they were sharded: together they need not fit there.
        """
        kept = {}
        for name, tensor in tensors.items():
            held = tensor.detach()
            full = whole(held)
            if self.ranks.is_first:
                kept[name] = full.clone() if full is held else full.cpu()
        return kept

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Whole optimiser tensors by parameter name (`<name>/exp_avg`, ...), on the first rank, and
        counters.
        """
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = value
        return self.whole(tensors), {"steps": self.steps, "nonfinite": self._nonfinite}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `weights`; every rank gives all of them."""
        for name, parameter in self.parameters.items():
            parameter.copy_(sharded_like(tensors[name], parameter))

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Inverse of `state`; parameters that had no state yet get none. Every rank gives all."""
        for name, parameter in self.parameters.items():
            prefix = f"{name}/"
            own = {
                k[len(prefix) :]: v
                for k, v in tensors.items()
                if k.startswith(prefix) and "/" not in k[len(prefix) :]
            }
            if own:
                self.optimiser.state[parameter] = {
                    k: v.clone() if k == "step" else sharded_like(v, parameter).clone()
                    for k, v in own.items()
                }
        self.steps, self._nonfinite = int(counters["steps"]), int(counters["nonfinite"])
