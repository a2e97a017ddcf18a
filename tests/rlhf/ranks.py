"""What the two processes of the data-parallel tests do. Started by `launch`, read by the tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file

from rlhf.distributed import ALONE, Ranks, session
from rlhf.errors import AlignError, CheckpointError, ClusterError, ConfigError, Interrupted
from rlhf.learner import Learner, LearnerConfig, StepOutcome
from rlhf.run import Run
from rlhf.training import Average, Pace, train

SIZE = 12  # rows of a batch, in four micro-batches


class Net(torch.nn.Module):
    """Uneven shapes, a weight that only odd steps use, and one used twice through a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 7)
        self.last = torch.nn.Linear(7, 3)
        self.sometimes = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.first(x).tanh()
        return hidden if cache is None else self.last(hidden * cache)


def batch_of(step: int) -> torch.Tensor:
    """(SIZE, 6): inputs, and whether the step is odd."""
    rows = torch.randn(SIZE, 5, generator=torch.Generator().manual_seed(step))
    return torch.cat([rows, torch.full((SIZE, 1), float(step % 2))], dim=1)


class Job:
    """A network and its learner, the same in every process."""

    def __init__(self, ranks: Ranks = ALONE, **settings: Any) -> None:
        torch.manual_seed(3)
        self.net = Net()
        config = LearnerConfig(lr=0.02, max_grad_norm=0.05, weight_decay=0.1, **settings)
        named = dict(self.net.named_parameters())
        self.learner = Learner(named, config, ranks, self.net)

    def objective(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        x = batch[:, :5]
        out = self.net(x, self.net(x.roll(1, 1)))  # two calls, one loss
        if batch[0, 5]:
            out = out + self.net.sometimes(x)
        loss = (out - x[:, :3]).pow(2).mean()
        return loss, {"rows": float(len(x))}

    def share(self, batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        loss, metrics = self.objective(batch)
        return loss / 4, metrics

    def steps(self, first: int, last: int, dead: tuple[int, ...] = ()) -> list[StepOutcome]:
        """Optimiser steps; micro-batches in `dead` have a loss without gradient."""

        def objective(item: tuple[int, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            index, batch = item
            return (torch.zeros(()), {}) if index in dead else self.share(batch)

        batches = (list(enumerate(batch_of(s).split(3))) for s in range(first, last + 1))
        return [self.learner.step(batch, objective) for batch in batches]


def run_in(folder: Path) -> Run:
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Run(folder)


def trained(job: Job, folder: Path, steps: int, batches=batch_of) -> None:
    """`train` to `steps` in a run directory, from its newest checkpoint."""
    pace = Pace(steps=steps, log_every=3, save_every=2, ema=0.9, micro_batches=4)
    train(run_in(folder), job.learner, batches, job.objective, pace, preview=preview(job))


class Killed(Exception):
    pass


def killed(job: Job, folder: Path) -> None:
    """`trained`, killed at step 5: what it did since its checkpoint of step 4 is lost."""

    def batches(step: int) -> torch.Tensor:
        if step == 5:
            raise Killed
        return batch_of(step)

    with contextlib.suppress(Killed):
        trained(job, folder, 6, batches)


def preview(job: Job) -> Callable[[int, Average | None], dict[str, float]]:
    """Calls the network with whole weights in place; the figure is a function of them."""

    @torch.no_grad()
    def figure(step: int, average: Average | None) -> dict[str, float]:
        assert average is not None and len(average.tensors) == 6
        return {"figure": float(job.net(batch_of(0)[:, :5], torch.ones(1)).sum())}

    return figure


def everything(ranks: Ranks, folder: Path, mode: str) -> None:
    """All that the two processes do; the first leaves what the tests read in `folder`."""
    new = functools.partial(Job, ranks, parallel=mode)
    for part in (_steps, _spoilt, _runs, _told, _lost):
        part(ranks, folder, new)


def _steps(ranks: Ranks, folder: Path, new: Callable[[], Job]) -> None:
    for name, dead in (("steps", ()), ("dead", (3,))):
        job = new()
        outcomes = [asdict(o) for o in job.steps(1, 6, dead)]
        weights = job.learner.weights()
        if ranks.is_first:
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(outcomes))


def _spoilt(ranks: Ranks, folder: Path, new: Callable[[], Job]) -> None:
    """A gradient that is not finite in the last micro-batch, which the second rank computes."""
    job = new()
    job.steps(1, 2)
    before = job.learner.weights(), job.learner.state()
    spoilt = list(batch_of(3).split(3))
    spoilt[3] = spoilt[3] * float("inf")
    outcome = job.learner.step(spoilt, job.share)
    after = job.learner.weights(), job.learner.state()
    job.steps(4, 4)
    moved = job.learner.weights()
    if ranks.is_first:
        assert same(before[0], after[0]) and same(before[1][0], after[1][0])
        assert not same(after[0], moved)
    said = {"skipped": outcome.skipped, **after[1][1]}
    (folder / f"spoilt_{ranks.rank}.json").write_text(json.dumps(said))


def _runs(ranks: Ranks, folder: Path, new: Callable[[], Job]) -> None:
    trained(new(), folder / "straight", 6)
    killed(new(), folder / "killed")
    trained(new(), folder / "killed", 6)
    trained(new(), folder / "from_one", 6)  # one process was killed there

    def batches(step: int) -> torch.Tensor:
        if step == 3 and not ranks.is_first:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_of(step)

    try:
        trained(new(), folder / "stopped", 6, batches)
    except Interrupted as stopped:
        (folder / f"stopped_{ranks.rank}.txt").write_text(str(stopped))
    if ranks.is_first:
        shutil.copytree(folder / "stopped", folder / "at_three")
    trained(new(), folder / "stopped", 6)


def _told(ranks: Ranks, folder: Path, new: Callable[[], Job]) -> None:
    """What the ranks say to each other."""
    total, mean = ranks.sum({"a": 1.0 + ranks.rank}), ranks.mean({"a": 1.0 + ranks.rank})
    said: dict[str, Any] = {"sum": total, "mean": mean, "any": ranks.any(ranks.rank == 1)}
    said["share"] = list(ranks.share(range(5)))

    def fail() -> None:
        raise CheckpointError("the disk is full")

    try:
        ranks.on_first(fail)
    except AlignError as error:
        said["failed"] = [type(error).__name__, str(error)]
    try:
        new().learner.step([batch_of(1)], Job().share)
    except ConfigError as error:
        said["idle"] = str(error)
    (folder / f"told_{ranks.rank}.json").write_text(json.dumps(said))


def _lost(ranks: Ranks, folder: Path, new: Callable[[], Job]) -> None:
    """The second rank has left; the first still waits for it."""
    if ranks.is_first:
        try:
            ranks.barrier()
        except ClusterError as error:
            (folder / "lost.txt").write_text(str(error))
    os._exit(0)


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _enter(rank: int, world: int, port: int, work: Callable[..., None], args: tuple) -> None:
    _place(rank, world, port)
    with session(seconds=60) as ranks:
        work(ranks, *args)


def _place(rank: int, world: int, port: int) -> None:
    """Say where the ranks meet, as torchrun does."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, world, "127.0.0.1", port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    torch.set_num_threads(1)


def launch(work: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run `work(ranks, *args)` in `world` processes that form a gloo group; errors come back."""
    mp.spawn(_enter, (world, _free_port(), work, args), nprocs=world)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _programs(rank: int, world: int, ports: list[int], calls: list[Callable[[], object]]) -> None:
    for port, call in zip(ports, calls, strict=True):
        _place(rank, world, port)
        call()


def launch_programs(calls: list[Callable[[], object]], world: int = 2) -> None:
    """Run programs, which look for other ranks themselves, one after the other in `world`
    processes; errors come back.
    """
    mp.spawn(_programs, (world, [_free_port() for _ in calls], calls), nprocs=world)
