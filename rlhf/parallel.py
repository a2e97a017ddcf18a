"""How a loss is computed and its gradient added up over ranks: alone, DDP or FSDP2.

The objective runs *inside* the forward of the wrapper, so their hooks surround the whole loss,
however often it calls the network, with whatever weights and caches. Both average over the ranks,
and the losses of micro-batches add up: each loss is multiplied by the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rlhf.distributed import Ranks, whole
from rlhf.errors import ConfigError

Mode = Literal["ddp", "fsdp"]
Parameters = dict[str, torch.nn.Parameter]
Loss = Callable[[Any], tuple[Tensor, Mapping[str, float]]]


@runtime_checkable
class Parallel(Protocol):
    """`parameters` are those the optimiser moves; sharded where the mode shards."""

    parameters: Parameters

    def backward(
        self, objective: Loss, batch: Any, last: bool
    ) -> tuple[Tensor, Mapping[str, float]]:
        """Loss and metrics of one micro-batch, its gradient accumulated; with the `last` of a step
        the ranks' gradients are added up.
        """
        ...

    def gathered(self) -> Any:
        """Context in which the module holds whole weights, given by name (a collective)."""
        ...


class Alone:
    """One process."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def backward(
        self, objective: Loss, batch: Any, last: bool
    ) -> tuple[Tensor, Mapping[str, float]]:
        loss, metrics = objective(batch)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), metrics

    def gathered(self) -> Any:
        return nullcontext(self.parameters)


class _Whole(torch.nn.Module):
    """The objective as a module over `held`, the weights it uses."""

    def __init__(self, held: torch.nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(
        self, objective: Loss, batch: Any, finish: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = objective(batch)
        return finish(loss), dict(metrics)


class Replicas:
    """torch's DistributedDataParallel (arXiv:2006.15704): every rank holds all weights.

    Weights that a step leaves unused on every rank get no gradient, as in one process. The search
    for them also fixes the buckets, so that sums are made in one order from the first step on.
    """

    def __init__(self, parameters: Parameters, ranks: Ranks) -> None:
        self.parameters, self.ranks = parameters, ranks
        first = next(iter(parameters.values()))
        self._idle = torch.nn.Parameter(first.new_zeros(1))  # else torch warns that all are used
        held = torch.nn.ParameterList([*parameters.values(), self._idle])
        self._ddp = DistributedDataParallel(
            _Whole(held), find_unused_parameters=True, gradient_as_bucket_view=True
        )

    def backward(
        self, objective: Loss, batch: Any, last: bool
    ) -> tuple[Tensor, Mapping[str, float]]:
        with nullcontext() if last else self._ddp.no_sync():
            loss, metrics = self._ddp(objective, batch, self._with_gradient)
            (loss * self.ranks.world).backward()
        return loss.detach(), metrics

    def _with_gradient(self, loss: Tensor) -> Tensor:
        """The sums begin in the backward pass, so there must be one."""
        return loss if loss.requires_grad else loss + 0 * self._idle.sum()

    def gathered(self) -> Any:
        return nullcontext(self.parameters)


class Shards:
    """torch's fully_shard (FSDP2; ZeRO, arXiv:1910.02054): weights, gradients, moments in shards.

    The weights are gathered as one unit for the forward and backward of a step, so that keys and
    values kept from one call of the network for another stay valid.
    """

    def __init__(self, parameters: Parameters, module: torch.nn.Module, ranks: Ranks) -> None:
        self.ranks = ranks
        _check_all_train(parameters, module)
        places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for part in module.modules():
            for attribute, p in part.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(p), []).append((part, attribute))
        self._places = {name: places[id(p)] for name, p in parameters.items()}
        for p in module.parameters():
            dist.broadcast(p.data, 0)
        mesh = init_device_mesh(ranks.device.split(":")[0], (ranks.world,))
        self._whole: Any = fully_shard(_Whole(module), mesh=mesh)
        self.parameters = self._in_place()

    def _in_place(self) -> Parameters:
        """What the module holds now: shards between steps, whole weights in its forward pass."""
        return {name: getattr(*places[0]) for name, places in self._places.items()}

    def _put(self, parameters: Parameters) -> None:
        for name, places in self._places.items():
            for part, attribute in places:
                setattr(part, attribute, parameters[name])

    def backward(
        self, objective: Loss, batch: Any, last: bool
    ) -> tuple[Tensor, Mapping[str, float]]:
        self._whole.set_requires_gradient_sync(last)
        self._whole.set_reshard_after_backward(
            last
        )  # one gather a step, however many micro-batches
        loss, metrics = self._whole(objective, batch, self._as_on_all_ranks if last else _as_is)
        if loss.requires_grad:
            (loss * self.ranks.world).backward()
        return loss.detach(), metrics

    def _as_on_all_ranks(self, loss: Tensor) -> Tensor:
        """With a zero gradient for weights that only other ranks used, or that had theirs from an
        earlier micro-batch if this one has none: the ranks add up one buffer in one backward pass.
        """
        held, reached = self._in_place(), _reached(loss)
        mine = {n for n, p in held.items() if p.grad is not None or id(p) in reached}
        used = set(self.ranks.sum(dict.fromkeys(mine, 1.0)))
        touched = used - mine if loss.requires_grad else used
        return loss + sum(0 * held[name].sum() for name in sorted(touched))

    @contextmanager
    def gathered(self) -> Iterator[Parameters]:
        plain = {n: torch.nn.Parameter(whole(p.detach())) for n, p in self.parameters.items()}
        self._put(plain)
        try:
            yield plain
        finally:
            self._put(self.parameters)


def _as_is(loss: Tensor) -> Tensor:
    return loss


def _reached(loss: Tensor) -> set[int]:
    """The leaves (by id) that the backward pass of `loss` will reach."""
    seen, found, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))  # type: ignore[attr-defined]
        waiting += [after for after, _ in node.next_functions]
    return found


def _check_all_train(parameters: Parameters, module: torch.nn.Module) -> None:
    held, trained = {id(p) for p in module.parameters()}, {id(p) for p in parameters.values()}
    if held != trained:
        raise ConfigError(
            "learner.parallel=fsdp: expected every weight of the module to be trained, got"
            f" {len(trained & held)} of {len(held)} and {len(trained - held)} from elsewhere:"
            " write learner.parallel=ddp for LoRA or a part of a module"
        )


def wrap(
    parameters: Parameters, mode: Mode, ranks: Ranks, module: torch.nn.Module | None
) -> Parallel:
    """The way of `mode` over `ranks`; one rank needs none.

    Raises:
        ConfigError: fsdp without a module that holds exactly these weights.
    """
    if ranks.world == 1:
        return Alone(parameters)
    if mode == "ddp":
        return Replicas(parameters, ranks)
    if module is None:
        raise ConfigError(
            "learner.parallel=fsdp: expected a module to shard, and this stage names none: write"
            " learner.parallel=ddp"
        )
    return Shards(parameters, module, ranks)
