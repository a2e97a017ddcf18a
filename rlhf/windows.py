"""Where the noise of a group's rollout goes, and which of its noisy steps are trained.

`rollout.window` is the range of steps in which noise may go. Of it a group takes

    fixed     all
    sliding   `width` steps, `stride` further from the noise end every `every` iterations, and round
              again from the start (MixGRPO, arXiv:2507.21802)
    random    `width` steps anywhere, once for the whole group (Flow-GRPO-Fast)

Few trained steps near the noise end are what the reports train (arXiv:2606.27608: all of them hack
the reward within a few iterations; how many, and which, is not published). A step i of n is drawn
with probability in proportion to (1 - i/n)^emphasis (ours). Every draw is keyed by integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf import noise
from rlhf.errors import ConfigError

Kind = Literal["fixed", "sliding", "random"]
Range = tuple[int, int]  # (start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How a group's window lies in `rollout.window`; see the module."""

    kind: Kind = "fixed"
    width: int = 0  # steps of a sliding or random window
    every: int = 25  # iterations in which a sliding window stays
    stride: int = 1  # steps by which it moves

    def check(self) -> None:
        if (self.kind == "fixed") != (self.width == 0) or self.width < 0:
            raise ConfigError(
                "windows.width: expected 0 with kind fixed, which takes all of rollout.window, and"
                f" 1 or more with the others, got kind {self.kind} and width {self.width}"
            )
        if min(self.every, self.stride) < 1:
            raise ConfigError(
                "windows: expected every and stride of at least 1, got"
                f" {self.every} and {self.stride}"
            )

    def check_in(self, limits: Range) -> None:
        """Raise ConfigError where a window cannot move inside `limits`."""
        start, stop = limits
        if self.kind != "fixed" and not self.width < stop - start:
            raise ConfigError(
                f"windows.width: expected less than the {stop - start} steps of rollout.window="
                f"{list(limits)}, got {self.width}: nothing could move; write windows.kind=fixed"
            )

    def at(self, limits: Range, seed: int, iteration: int, group: int) -> Range:
        """The window of a group; iterations count from 1."""
        start, stop = limits
        if self.kind == "fixed":
            return limits
        last = stop - self.width
        if self.kind == "sliding":
            places = range(start, last + 1, self.stride)
            start = places[(iteration - 1) // self.every % len(places)]
        else:
            rows = noise.generator(23, seed, iteration, group)
            start = int(torch.randint(start, last + 1, (1,), generator=rows))
        return start, start + self.width

    def middle(self, limits: Range) -> Range:
        """A window in the middle of its range, for counting work."""
        if self.kind == "fixed":
            return limits
        start = (limits[0] + limits[1] - self.width) // 2
        return start, start + self.width


def emphasised(indices: Sequence[int], steps: int, emphasis: float) -> Float[Tensor, " n"]:
    """Weights of steps, (1 - i/steps)^emphasis: all alike at 0, more for high noise above."""
    return (1.0 - torch.tensor(indices, dtype=torch.float64) / steps) ** emphasis


def drawn(window: Range, steps: int, count: int, emphasis: float, *key: int) -> tuple[int, ...]:
    """`count` steps of a window in their order, drawn without replacement by `emphasised`."""
    indices = range(*window)
    rows = noise.generator(24, *key)
    weights = emphasised(indices, steps, emphasis)
    picked = torch.multinomial(weights, count, replacement=False, generator=rows)
    return tuple(sorted(indices[int(i)] for i in picked))
