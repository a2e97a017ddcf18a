"""What to watch in a transformer while it trains: how large its activations grow.

Massive activations (arXiv:2402.17762) are single values of the residual stream, thousands of times
its typical size; they cost bfloat16 its digits and quantisation its range.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Maxima:
    """Per block, over the calls so far: [largest |x|, sum of x^2, number of x], float64. A block
    that was not called has none.
    """

    seen: dict[int, Tensor]

    @property
    def largest(self) -> dict[int, float]:
        """max |x| of the output of each block, by its number from 0."""
        return {i: float(row[0]) for i, row in sorted(self.seen.items())}

    @property
    def ratio(self) -> dict[int, float]:
        """max |x| over the root mean square of the same output; 1 and more."""
        rows = sorted(self.seen.items())
        return {i: float(row[0] / (row[1] / row[2]).sqrt()) for i, row in rows}


@contextmanager
def activation_maxima(transformer: nn.Module) -> Iterator[Maxima]:
    """Collect from the outputs of `transformer.transformer_blocks`, of every call in the context,
    with or without gradient. Nothing is copied from the device before the figures are read.
    """
    found = Maxima({})

    def note(number: int, output: Tensor) -> None:
        x = output.detach()
        row = torch.stack(
            [x.abs().max().double(), x.float().pow(2).sum().double(), x.new_tensor(x.numel())]
        )
        known = found.seen.get(number)
        if known is not None:
            row = torch.cat([torch.maximum(known[:1], row[:1]), known[1:] + row[1:]])
        found.seen[number] = row

    def hook(number: int) -> Any:
        return lambda module, args, output: note(number, output)

    blocks: Any = transformer.transformer_blocks
    handles = [block.register_forward_hook(hook(i)) for i, block in enumerate(blocks)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
