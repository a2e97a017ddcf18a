"""Several processes that train one model: who they are, what they share, how they agree.

Processes are started by torchrun, or by Ray (`rlhf.cluster`), and found through torchrun's
environment; alone, every function here is the identity. The batch of a step is a function of the
step: each rank has the whole list of micro-batches and computes a contiguous share of it.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.errors import AlignError, ClusterError, ConfigError

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SECONDS = 1800.0  # longest wait for another rank: a preview on the first may take minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among `world`. `backend` None: alone, without a process group."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    backend: Literal["gloo", "nccl"] | None = None
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """The rank that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank. Raises ClusterError if one does not come."""
        if self.backend is not None:
            with self._reaching_others():
                dist.barrier()

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous part; the first ranks take one more where it does not divide.

        Raises:
            ConfigError: fewer items than ranks, so that one would have nothing to compute.
        """
        if len(items) < self.world:
            raise ConfigError(
                f"expected at least one micro-batch for each of {self.world} ranks, got"
                f" {len(items)}: write pace.micro_batches={self.world}, or start fewer processes"
            )
        per, more = divmod(len(items), self.world)
        begin = self.rank * per + min(self.rank, more)
        return items[begin : begin + per + (self.rank < more)]

    def sum(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Sum over the ranks by name, in their order, so equal on each; absent adds nothing."""
        total: dict[str, float] = {}
        for part in self.gather(dict(metrics)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def mean(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Mean over the ranks by name; all ranks give the same names."""
        return {name: value / self.world for name, value in self.sum(metrics).items()}

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        return any(self.gather(flag))

    def on_first(self, act: Callable[[], object]) -> None:
        """Call `act` on the first rank while the others wait.

        Raises:
            ClusterError: on the others, if it raised there.
        """
        failed: Exception | None = None
        if self.is_first:
            try:
                act()
            except Exception as error:
                failed = error
        said = self.gather(f"{type(failed).__name__}: {failed}" if failed else None)
        if failed is not None:
            raise failed
        if said[0] is not None:
            raise ClusterError(f"the first rank failed, so rank {self.rank} stops: {said[0]}")

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on each. Raises ClusterError if one does not
        answer in time.
        """
        if self.backend is None:
            return [value]
        values: list[T] = [value] * self.world
        with self._reaching_others():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ClusterError(
                f"rank {self.rank} of {self.world} lost another rank: {error}. Look at the output"
                " of the rank that ended first, then --resume RUN"
            ) from error


ALONE = Ranks()


def from_environment(device: str = "cpu") -> Ranks:
    """What torchrun says of this process; `ALONE` without it, or if it started only one.

    Raises:
        ConfigError: only some of torchrun's variables are set, or their values do not fit.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given:
        return Ranks(device=device)
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise ConfigError(
            f"expected all of {', '.join(VARIABLES)} or none, got {', '.join(given)} without"
            f" {', '.join(missing)}: start with torchrun, or unset them"
        )
    try:
        rank, world, local = (int(given[name]) for name in VARIABLES[:3])
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK: expected integers: {error}") from error
    if not 0 <= local <= rank < world:
        raise ConfigError(
            f"expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE, got {local}, {rank}, {world}: start"
            " with torchrun"
        )
    if device == "cpu":
        place, backend = "cpu", "gloo"
    else:
        place, backend = f"cuda:{local}", "nccl"
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"expected a GPU for each local rank, got {torch.cuda.device_count()} for"
                f" LOCAL_RANK={local}: lower --nproc-per-node"
            )
    if world == 1:
        return Ranks(device=place)
    return Ranks(rank=rank, world=world, local_rank=local, backend=backend, device=place)


def start(device: str = "cpu", seconds: float = SECONDS) -> Ranks:
    """Join the other ranks: gloo on `cpu`, nccl on `cuda`. No wait is longer than `seconds`.

    Raises:
        ConfigError: see `from_environment`.
        ClusterError: the others did not come.
    """
    ranks = from_environment(device)
    if ranks.backend is None:
        return ranks
    if ranks.backend == "nccl":
        torch.cuda.set_device(ranks.local_rank)
    try:
        wait = datetime.timedelta(seconds=seconds)
        dist.init_process_group(ranks.backend, timeout=wait)
    except (RuntimeError, ValueError) as error:
        raise ClusterError(
            f"rank {ranks.rank} of {ranks.world} could not join the others at"
            f" {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {seconds:.0f} s:"
            f" {error}. Start all of them with one torchrun command"
        ) from error
    return ranks


def stop() -> None:
    """Leave the group. Without one, nothing."""
    if dist.is_initialized():
        gc.collect()  # shards and hooks refer to the group: they go while the interpreter lives
        dist.destroy_process_group()


@contextmanager
def session(device: str = "cpu", seconds: float = SECONDS) -> Iterator[Ranks]:
    """`start`; at the end, where all went well, wait for the others; `stop`. Raises what `start`
    raises, and ClusterError for a lost rank.
    """
    ranks = start(device, seconds)
    try:
        yield ranks
        ranks.barrier()  # a rank that left would break what is on its way to another
    except AlignError:
        raise
    except dist.DistError as error:
        raise ClusterError(f"rank {ranks.rank} of {ranks.world} lost another: {error}") from error
    finally:
        stop()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, on every rank (a collective); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole `tensor`, equal on all ranks, laid out as `like` (a collective)."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
