"""Noise levels of few steps, and a teacher's grid that passes through them.

A grid is what the stock pipeline calls `sample_sigmas`: one level for each step from 1 down,
without the 0 at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.errors import ConfigError
from rlhf.schedule import build

Grids = Mapping[tuple[int, int], Sequence[float]]  # noise levels by (height, width) of a picture

GRIDS: Mapping[str, tuple[float, ...]] = {
    "even-1": (1.0,),
    "even-2": (1.0, 0.5),
    "even-4": (1.0, 0.75, 0.5, 0.25),
    # denser where a picture's layout is settled; ours, see docs/distillation.md
    "early-2": (1.0, 0.75),
    "early-4": (1.0, 0.9, 0.75, 0.5),
    # the one that Qwen-Image-2.1-Turbo is configured with
    "turbo-8": (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568),
}


def grid_of(named: str | Sequence[float]) -> tuple[float, ...]:
    """Levels of a preset, or as given, with the 0 at the end: K + 1 values for K steps.

    Raises:
        ConfigError: no such preset, or levels that do not fall from exactly 1 to above 0.
    """
    if isinstance(named, str) and named not in GRIDS:
        raise ConfigError(
            f"grid: expected one of {', '.join(GRIDS)}, or a list of noise levels, got '{named}':"
            " write for example grid=[1,0.8,0.5,0.2]"
        )
    levels = GRIDS[named] if isinstance(named, str) else tuple(named)
    if not levels or levels[-1] <= 0:
        raise ConfigError(
            f"grid: expected noise levels from 1 to above 0, got {list(levels)}: the step to 0 is"
            " added"
        )
    return build((*levels, 0.0)).sigmas


def through(sigmas: Sequence[float], knots: Sequence[float]) -> tuple[float, ...]:
    """A grid of as many steps in which every knot takes the place of the level nearest to it.

    Raises:
        ConfigError: two knots nearest to one level, that is fewer steps than they need.
    """
    out = list(sigmas)
    taken: set[int] = set()
    for knot in knots[1:-1]:
        nearest = min(range(1, len(out) - 1), key=lambda i: abs(sigmas[i] - knot), default=0)
        if nearest in taken or not nearest:
            raise ConfigError(
                f"teacher_steps: expected a level of the teacher for each of the student's"
                f" {list(knots)}, got {len(sigmas) - 1} steps: raise teacher_steps"
            )
        taken.add(nearest)
        out[nearest] = knot
    return build(out).sigmas


def step_at(knots: Sequence[float], sigma: float) -> int:
    """The step k of a grid that a level belongs to: knots[k] >= sigma > knots[k + 1]."""
    return sum(sigma <= knot for knot in knots[1:-1])
