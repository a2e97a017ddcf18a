"""What the two processes of the data-parallel tests do. Started by `launch`, read by the tests."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from rlhf.distributed import ALONE, Ranks, session
from rlhf.learner import Learner, LearnerConfig
from rlhf.run import Run
from rlhf.training import Pace, train

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

    def steps(self, first: int, last: int) -> list[Any]:
        def share(batch):
            loss, metrics = self.objective(batch)
            return loss / 4, metrics

        return [self.learner.step(batch_of(s).split(3), share) for s in range(first, last + 1)]


def run_in(folder: Path) -> Run:
    for name in ("samples", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Run(folder)


def trained(job: Job, folder: Path, steps: int, **pace: Any) -> None:
    """`train` to `steps` in a run directory, from its newest checkpoint."""
    settings: dict[str, Any] = {"log_every": 2, "save_every": 2, "ema": 0.9, "micro_batches": 4}
    train(
        run_in(folder), job.learner, batch_of, job.objective, Pace(steps=steps, **settings | pace)
    )


def _enter(rank: int, world: int, port: int, work: Callable[..., None], args: tuple) -> None:
    for name, value in zip(
        ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        (rank, rank, world, "127.0.0.1", port),
        strict=True,
    ):
        os.environ[name] = str(value)
    torch.set_num_threads(1)
    with session(seconds=60) as ranks:
        work(ranks, *args)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(work: Callable[..., None], *args: Any, world: int = 2) -> None:
    """Run `work(ranks, *args)` in `world` processes that form a gloo group; errors come back."""
    mp.spawn(_enter, (world, free_port(), work, args), nprocs=world)


if __name__ == "__main__":
    sys.exit("imported by the tests")
