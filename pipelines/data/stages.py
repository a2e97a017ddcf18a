"""The curriculum of the transformer: phases of optimisation, and in them stages of data.

As in arXiv:2605.10730: a phase has its learning rate and its share of edits, a stage its
resolutions and its data. How stages map to phases, and how long each lasts, is not published; a
configuration says both. A run without phases is one phase of one stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Data of a part of a run. `share` is relative to those of all stages; `resolutions` are sides
    of squares of equal area, in px; `data` is a folder that `rlhf data` wrote. What is None is the
    phase's or the program's.
    """

    name: str
    share: float = 1.0
    resolutions: tuple[int, ...] | None = None
    edits: float | None = None
    data: str | None = None
    mixture: dict[str, float] | None = None
    captions: dict[str, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """`rate` is relative to the program's learning rate; `edits` the share of batches that are,
    None for the program's.
    """

    name: str
    stages: tuple[Stage, ...]
    rate: float = 1.0
    edits: float | None = None

    def check(self) -> None:
        if not self.stages or self.rate <= 0:
            raise ConfigError(
                f"phase {self.name}: expected stages and a rate above 0, got {len(self.stages)} and"
                f" {self.rate}"
            )
        for stage in self.stages:
            if stage.share <= 0:
                raise ConfigError(
                    f"stage {stage.name}: expected a share above 0, got {stage.share}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a stage trains on. Without `data` these are scenes."""

    resolutions: tuple[int, ...]
    edits: float
    data: str | None
    mixture: Mapping[str, float]
    captions: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Steps `first` to `last`, counted from 1, of one stage."""

    number: int
    name: str
    phase: str
    first: int
    last: int
    rate: float
    settings: Settings

    def batches_before(self, step: int, edits: bool) -> int:
        """Batches of edits (or of plain prompts) in this span before `step`: as near to the share
        as whole numbers are, at every step.
        """
        done = step - self.first
        of_edits = int(np.floor(done * self.settings.edits + 0.5))
        return of_edits if edits else done - of_edits

    def is_edit(self, step: int) -> bool:
        return self.batches_before(step + 1, True) > self.batches_before(step, True)


def spans(phases: Sequence[Phase], steps: int, base: Settings) -> tuple[Span, ...]:
    """All stages in order, with what they leave open taken from their phase and from `base`.

    Raises:
        ConfigError: too few steps for one each.
    """
    named = [(phase, stage) for phase in phases for stage in phase.stages]
    if not named:
        only = Span(number=0, name="all", phase="all", first=1, last=steps, rate=1.0, settings=base)
        return (only,)
    ends = np.cumsum([stage.share for _, stage in named])
    lasts = [int(round(steps * end / ends[-1])) for end in ends]
    out = []
    for number, ((phase, stage), last) in enumerate(zip(named, lasts, strict=True)):
        first = lasts[number - 1] + 1 if number else 1
        if last < first:
            raise ConfigError(
                f"stage {stage.name}: expected at least one step, got none of {steps}: raise"
                " pace.steps or its share"
            )
        settings = Settings(
            resolutions=stage.resolutions or base.resolutions,
            edits=next(e for e in (stage.edits, phase.edits, base.edits) if e is not None),
            data=stage.data or base.data,
            mixture=stage.mixture or base.mixture,
            captions=base.captions if stage.captions is None else stage.captions,
        )
        span = Span(
            number=number,
            name=stage.name,
            phase=phase.name,
            first=first,
            last=last,
            rate=phase.rate,
            settings=settings,
        )
        out.append(span)
    return tuple(out)


def span_at(found: Sequence[Span], step: int) -> Span:
    """The span that holds a step, counted from 1; later steps belong to the last."""
    return next((span for span in found if step <= span.last), found[-1])
