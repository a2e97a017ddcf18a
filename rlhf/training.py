"""The supervised loop that autoencoder, condition encoder and transformer share.

Batches are a function of the step, so a run continues bit for bit from its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from rlhf import checkpoint
from rlhf.learner import Learner, Objective
from rlhf.metrics import MetricsLog
from rlhf.run import Run

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long to train and how often to write. `ema` is the decay of the averaged weights, 0 for
    none.
    """

    steps: int
    log_every: int = 50
    save_every: int = 500
    ema: float = 0.0


class Average:
    """Exponential moving average of named weights, with a warm-up of the decay."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {k: v.detach().clone() for k, v in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in parameters.items():
            self.tensors[name].lerp_(value.detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        for name, value in parameters.items():
            value.data.copy_(self.tensors[name])


def train(
    run: Run,
    learner: Learner,
    batch_of: Callable[[int], Batch],
    objective: Objective,
    pace: Pace,
    *,
    preview: Callable[[int, Average | None], Mapping[str, float]] | None = None,
) -> Average | None:
    """Train from the last checkpoint of `run` (or from now) to `pace.steps`; returns the average.

    `preview(step, average)` is called before each checkpoint: it may draw pictures and returns
    figures for the row. Checkpoints hold weights, their average, the optimiser and the step.
    """
    average = Average(learner.parameters, pace.ema) if pace.ema else None
    first = _restore(run, learner, average)
    log = MetricsLog(run.root)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(run.name, total=pace.steps, completed=first)
        losses, since = [], time.monotonic()
        for step in range(first + 1, pace.steps + 1):
            outcome = learner.step([batch_of(step)], objective)
            if average is not None and not outcome.skipped:
                average.update(learner.parameters, step)
            losses.append(outcome.loss)
            progress.update(task, advance=1, description=f"{run.name} loss {outcome.loss:.4f}")
            row: dict[str, float] = {}
            if step % pace.log_every == 0 or step == pace.steps:
                seconds = time.monotonic() - since
                row = {"loss": sum(losses) / len(losses), "grad_norm": outcome.grad_norm}
                row |= {
                    "lr": learner.rate(),
                    "seconds/step": seconds / len(losses),
                    **outcome.metrics,
                }
                losses, since = [], time.monotonic()
            saving = step % pace.save_every == 0 or step == pace.steps
            if saving and preview is not None:
                row |= preview(step, average)
            if row:
                log.log({"step": step, **{k: v for k, v in row.items() if math.isfinite(v)}})
            if saving:
                checkpoint.save(run.checkpoints, step, _state(learner, average))
    log.close()
    return average


def _state(learner: Learner, average: Average | None) -> checkpoint.State:
    optimiser, counters = learner.state()
    tensors = {"slots/train": dict(learner.parameters), "optimiser": optimiser}
    if average is not None:
        tensors["slots/ema"] = average.tensors
    return checkpoint.State(tensors=tensors, meta={"learner": counters})


@torch.no_grad()
def _restore(run: Run, learner: Learner, average: Average | None) -> int:
    """Load the newest checkpoint into the learner; its step, or 0 if there is none."""
    newest = checkpoint.latest(run.root)
    if newest is None:
        run.supersede(0)
        return 0
    state = checkpoint.load(newest)
    for name, parameter in learner.parameters.items():
        parameter.copy_(state.tensors["slots/train"][name])
    learner.load_state(state.tensors["optimiser"], state.meta["learner"])
    if average is not None:
        average.tensors = {k: v.clone() for k, v in state.tensors["slots/ema"].items()}
    step = checkpoint.step_of(newest)
    run.supersede(step)
    return step
