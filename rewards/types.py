"""The nouns of judging: a sample goes in, a score with a state comes out.

Example: two prompts with three pictures each, one judge. `Scores.table["oracle/fidelity"]` is two
groups of three scores; a picture the judge broke down on has `Score(value=None, state="failed",
reason=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from rewards.errors import JudgeError, RewardConfigError

State = Literal["ok", "na", "failed"]
Need = Literal["source", "face", "mask"]  # what a judge cannot do without, beside the picture


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One picture to judge and all that a judge may look at. Never a policy, a seed or a run."""

    image: UInt8[np.ndarray, "3 h w"]  # RGB
    prompt: str
    category: str
    sources: tuple[UInt8[np.ndarray, "3 _ _"], ...] = ()  # pictures the edit started from, RGB
    target: str | None = None  # what the judge checks against; for scenes `world.dump(spec)`
    columns: Mapping[str, object] = field(default_factory=dict)  # free columns of the prompt set


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """`ok` has a finite value. `na`: the judge does not apply. `failed`: it should have, and did
    not answer.

    Raises:
        JudgeError: a value that is not finite, or a value beside another state than `ok`.
    """

    value: float | None = None
    state: State = "ok"
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)  # what the value was made of
    flags: tuple[str, ...] = ()  # what a reader should know: "truncated", "downscaled", ...

    def __post_init__(self) -> None:
        if self.state not in ("ok", "na", "failed"):
            raise JudgeError(
                f"expected state ok, na or failed, got {self.state!r}: use one of them"
            )
        if self.state == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise JudgeError(
                f"expected a finite value with state 'ok', got {self.value}: "
                "use state 'na' where the judge does not apply, 'failed' where it broke down"
            )
        if self.state != "ok" and self.value is not None:
            raise JudgeError(
                f"expected no value with state {self.state!r}, got {self.value}: leave it out"
            )


def not_applicable(reason: str) -> Score:
    """A score for a sample that the judge is not made for."""
    return Score(state="na", reason=reason)


def failed(reason: str) -> Score:
    """A score for a sample that the judge did not answer for."""
    return Score(state="failed", reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A rising map from what a model says to what the judge answers: straight between knots, flat
    beyond the first and the last, and without knots the identity.

    Raises:
        RewardConfigError: knots that do not rise in both coordinates.
    """

    raw: tuple[float, ...] = ()
    value: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.raw, self.raw[1:], strict=False))
        rising &= all(a <= b for a, b in zip(self.value, self.value[1:], strict=False))
        if len(self.raw) != len(self.value) or len(self.raw) == 1 or not rising:
            raise RewardConfigError(
                f"expected no knots or two and more that rise, got {self.raw} -> {self.value}:"
                " fit the calibration again"
            )

    def __call__(self, raw: float) -> float:
        """The calibrated value of a raw one; what is not finite stays as it is."""
        if not self.raw or not math.isfinite(raw):
            return raw
        return float(np.interp(raw, self.raw, self.value))


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCard:
    """Who judges, of what, on which scale, and what is known of it.

    `low` to `high` is the range of scores, and `better` says which end is the good one.
    `noise_floor` is the spread of scores that means nothing (standard deviation of re-scoring; see
    the advantages). `text_tokens` and `pixels` are the longest prompt and the longest side that the
    model sees; what is longer is cut or scaled down, and flagged. `temperature` makes a probability
    of two scores: P(a better than b) = sigmoid((a - b) / temperature), 0 where nobody fitted it.
    """

    name: str
    revision: str
    preprocessing: str
    categories: tuple[str, ...] = ("*",)  # "*" is all
    needs: tuple[Need, ...] = ()
    low: float = 0.0
    high: float = 1.0
    better: Literal["higher", "lower"] = "higher"
    noise_floor: float = 0.0
    temperature: float = 0.0
    calibration: Calibration = field(default_factory=Calibration)
    text_tokens: int | None = None
    pixels: int | None = None
    licence: str = "Apache-2.0"
    commercial: bool = True  # whether the licence of the weights allows commercial use

    def __post_init__(self) -> None:
        if not self.low < self.high or self.noise_floor < 0:
            raise RewardConfigError(
                f"judge {self.name!r}: expected low < high and noise_floor >= 0, "
                f"got {self.low}, {self.high} and {self.noise_floor}: correct its card"
            )

    def covers(self, category: str) -> bool:
        """Whether the judge is made for a prompt category."""
        return "*" in self.categories or category in self.categories


def card_of(stored: Mapping[str, Any]) -> JudgeCard:
    """A JudgeCard from its JSON form."""
    fields = dict(stored)
    map_of = fields.pop("calibration", {})
    lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
    calibration = Calibration(**{k: tuple(v) for k, v in map_of.items()})
    return JudgeCard(**{**fields, **lists}, calibration=calibration)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What all judges said of P groups of G samples: judge name -> groups -> samples, rectangular.

    `figures` are statistics of the pictures, one value per group; NaN where there is none.
    `seconds` each judge worked on all of them, the one that came first at a picture with the work
    that others share.

    Raises:
        JudgeError: a judge without a table, a table without a judge, or tables of unequal shape.
    """

    judges: tuple[JudgeCard, ...]
    table: Mapping[str, tuple[tuple[Score, ...], ...]]
    figures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = [card.name for card in self.judges]
        if sorted(names) != sorted(self.table):
            raise JudgeError(
                f"expected one table per judge {names}, got {list(self.table)}: name each once"
            )
        shapes = {tuple(len(group) for group in groups) for groups in self.table.values()}
        if len(shapes) > 1 or any(len(set(shape)) > 1 for shape in shapes):
            raise JudgeError(
                f"expected P x G scores of every judge, got group sizes {sorted(shapes)}"
            )
