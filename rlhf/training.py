"""The supervised loop that autoencoder, condition encoder and transformer share.

Batches are a function of the step, so a run continues bit for bit from its last checkpoint, and
over ranks (`rlhf.distributed`) each computes its share of the same batch. The first rank alone
writes; all of them read the checkpoint they continue from.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from rlhf import checkpoint
from rlhf.distributed import Ranks, sharded_like
from rlhf.errors import ConfigError, Interrupted
from rlhf.learner import Learner, Objective, StepOutcome
from rlhf.metrics import MetricsLog
from rlhf.run import Run

Batch = TypeVar("Batch")
Preview = Callable[[int, "Average | None"], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long to train and how often to write. `ema` is the decay of the averaged weights, 0 for
    none. `micro_batches`: equal parts in which a batch is computed, one after another and over the
    ranks.
    """

    steps: int
    log_every: int = 50
    save_every: int = 500
    ema: float = 0.0
    micro_batches: int = 1

    def check(self) -> None:
        if self.micro_batches < 1:
            raise ConfigError(
                f"pace.micro_batches: expected at least 1, got {self.micro_batches}: write one for"
                " each rank"
            )


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

    def whole(self, learner: Learner) -> Average:
        """The same with whole tensors on the first rank, none on others (a collective)."""
        other = Average({}, self.decay)
        other.tensors = learner.whole(self.tensors)
        return other


def open_run(config: Any, program: str, resume: Path | None, ranks: Ranks) -> Run:
    """The run of `config.runs` and `config.name`, made by the first rank; or the one to resume.

    Raises:
        ConfigError: the name is taken, or nothing to resume there (ClusterError on other ranks).
    """
    if resume is not None:
        return Run.open(resume)
    ranks.on_first(lambda: Run.create(config.runs, config.name, config, program))
    return Run.open(Path(config.runs) / config.name)


def equal_parts(batch: Tensor, parts: int) -> Sequence[Tensor]:
    """Rows of a tensor in consecutive equal parts. Raises ConfigError if they do not divide."""
    if len(batch) % parts:
        raise ConfigError(
            f"pace.micro_batches: expected a divisor of the batch of {len(batch)}, got {parts}"
        )
    return batch.split(len(batch) // parts)


def train(
    run: Run,
    learner: Learner,
    batch_of: Callable[[int], Batch],
    objective: Objective,
    pace: Pace,
    *,
    preview: Preview | None = None,
    split: Callable[[Any, int], Sequence[Any]] = equal_parts,
    figures: Callable[[], Mapping[str, float]] = dict,
    companions: Mapping[str, Learner] | None = None,
) -> Average | None:
    """Train from the last checkpoint of `run` (or from now) to `pace.steps`; returns the average.

    The objective is a mean over the batch; `split` cuts a batch into `pace.micro_batches` equal
    parts, each weighted by its share. `preview(step, average)` is called on the first rank before
    each checkpoint, with whole weights in place: it may draw pictures and returns figures for the
    row. `figures()` are added to every row. `companions` are learners that `batch_of` steps along.
    Checkpoints hold weights, their average, the optimisers and the step. The average that is
    returned is whole on the first rank and empty on others.

    Raises:
        Interrupted: SIGTERM reached a rank; a checkpoint was written.
        ClusterError: another rank was lost.
    """
    book = _Book(run, learner, pace, preview, figures, companions or {})
    first = book.restore()
    parts = pace.micro_batches

    def share(batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        loss, metrics = objective(batch)
        return loss / parts, {name: value / parts for name, value in metrics.items()}

    with book.opened(first), _asked_to_stop() as asked:
        for step in range(first + 1, pace.steps + 1):
            batch = batch_of(step)
            outcome = learner.step(split(batch, parts) if parts > 1 else [batch], share)
            stopping = learner.ranks.any(asked.is_set()) and step < pace.steps
            book.enter(step, outcome, stopping)
            if stopping:
                raise Interrupted(f"stopped after step {step}: continue with --resume {run.root}")
    return book.average.whole(learner) if book.average is not None else None


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM, while the context lasts. Only the main thread can listen."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class _Book:
    """What a run keeps of its steps. Every rank has one; that of the first writes."""

    run: Run
    learner: Learner
    pace: Pace
    preview: Preview | None
    figures: Callable[[], Mapping[str, float]]
    companions: Mapping[str, Learner]
    losses: list[float] = field(default_factory=list)  # since the last row
    since: float = field(default_factory=time.monotonic)
    log: MetricsLog | None = None

    def __post_init__(self) -> None:
        self.average = Average(self.learner.parameters, self.pace.ema) if self.pace.ema else None
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            transient=True,
            disable=not self.learner.ranks.is_first,
        )
        self.task = self.progress.add_task(self.run.name, total=self.pace.steps)

    @contextlib.contextmanager
    def opened(self, first: int) -> Iterator[None]:
        self.log = MetricsLog(self.run.root) if self.learner.ranks.is_first else None
        self.progress.update(self.task, completed=first)
        try:
            with self.progress:
                yield
        finally:
            if self.log is not None:
                self.log.close()

    def enter(self, step: int, outcome: StepOutcome, stopping: bool) -> None:
        """Average, row, preview and checkpoint of one step, as far as they are due."""
        pace, learner = self.pace, self.learner
        if self.average is not None and not outcome.skipped:
            self.average.update(learner.parameters, step)
        self.losses.append(outcome.loss)
        text = f"{self.run.name} loss {outcome.loss:.4f}"
        self.progress.update(self.task, advance=1, description=text)
        row: dict[str, float] = {}
        if step % pace.log_every == 0 or step == pace.steps:
            row = self._row(outcome)
        due = step % pace.save_every == 0 or step == pace.steps
        if due and self.preview is not None:
            row |= self._previewed(step, self.preview)
        state = self._state() if due or stopping else None
        if row or state is not None:
            learner.ranks.on_first(lambda: self._write(step, row, state))

    def _row(self, outcome: StepOutcome) -> dict[str, float]:
        count = len(self.losses)
        row = {"loss": sum(self.losses) / count, "grad_norm": outcome.grad_norm}
        row |= {"lr": self.learner.rate(), "seconds/step": (time.monotonic() - self.since) / count}
        self.losses, self.since = [], time.monotonic()
        return row | outcome.metrics | dict(self.figures())

    def _previewed(self, step: int, preview: Preview) -> dict[str, float]:
        average = self.average.whole(self.learner) if self.average is not None else None
        figures: dict[str, float] = {}
        with self.learner.gathered():
            self.learner.ranks.on_first(lambda: figures.update(preview(step, average)))
        return figures

    def _write(self, step: int, row: Mapping[str, float], state: checkpoint.State | None) -> None:
        if row and self.log is not None:
            self.log.log({"step": step, **{k: v for k, v in row.items() if math.isfinite(v)}})
        if state is not None:
            checkpoint.save(self.run.checkpoints, step, state)

    def _state(self) -> checkpoint.State:
        optimiser, counters = self.learner.state()
        tensors = {"slots/train": self.learner.weights(), "optimiser": optimiser}
        if self.average is not None:
            tensors["slots/ema"] = self.learner.whole(self.average.tensors)
        meta: dict[str, Any] = {"learner": counters, "losses": self.losses}
        for name, other in self.companions.items():
            tensors[f"slots/{name}"] = other.weights()
            tensors[f"optimiser-{name}"], meta[f"learner-{name}"] = other.state()
        return checkpoint.State(tensors=tensors, meta=meta)

    def restore(self) -> int:
        """Load the newest checkpoint into learner and average; its step, or 0 if there is none.

        What the run holds beyond it is superseded.
        """
        newest = checkpoint.latest(self.run.root)
        step = 0 if newest is None else checkpoint.step_of(newest)
        self.learner.ranks.on_first(lambda: self.run.supersede(step))
        if newest is None:
            return 0
        state = checkpoint.load(newest)
        self.learner.load_weights(state.tensors["slots/train"])
        self.learner.load_state(state.tensors["optimiser"], state.meta["learner"])
        for name, other in self.companions.items():
            other.load_weights(state.tensors[f"slots/{name}"])
            other.load_state(state.tensors[f"optimiser-{name}"], state.meta[f"learner-{name}"])
        if self.average is not None:
            held, mine = state.tensors["slots/ema"], self.learner.parameters
            self.average.tensors = {k: sharded_like(v, mine[k]).clone() for k, v in held.items()}
        self.losses = list(state.meta.get("losses", []))
        return step
