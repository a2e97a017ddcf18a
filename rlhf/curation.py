"""Which prompts are worth training on: those whose pictures a frozen policy makes so differently
that judges tell them apart.

A prompt is kept where the composite reward of its pictures spans more than a threshold (range
filter, arXiv:2606.27608; the threshold is not published). What a group said is stored as plain
data, so that another threshold, or other weights, need no new pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from rewards.types import Score, Scores, card_of
from rlhf.advantage import spreads
from rlhf.errors import PromptError
from rlhf.prompts import KNOWN
from rlhf.types import Prompt

Why = Literal["kept", "narrow_high", "narrow_low", "few", "required", "unjudged"]
WHYS: tuple[Why, ...] = get_args(Why)
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of a prompt. `range` is None where fewer than two pictures have a reward.

    `narrow_high` and `narrow_low`: the range is not above the threshold, in the upper or lower half
    of what judges can say; `few`, `required`, `unjudged`: see `rlhf.advantage.GroupCounts`.
    """

    why: Why
    range: float | None = None

    @property
    def kept(self) -> bool:
        return self.why == "kept"


def verdicts(
    scores: Scores,
    weights: Mapping[str, Mapping[str, float]],
    categories: Sequence[str],
    threshold: float,
    required: Sequence[str] = (),
) -> list[Verdict]:
    """One verdict per group. Raises ConfigError for weights that do not fit the judges."""
    out = []
    for spread in spreads(scores, weights, categories, required):
        if spread.lost:
            out.append(Verdict(why=spread.lost))  # type: ignore[arg-type]
            continue
        narrow: Why = "narrow_high" if spread.height >= 0.5 else "narrow_low"
        wide = spread.range > threshold
        out.append(Verdict(why="kept" if wide else narrow, range=spread.range))
    return out


def counts(categories: Sequence[str], found: Sequence[Verdict]) -> dict[str, dict[str, Any]]:
    """Category -> number of prompts by verdict, their sum `prompts`, and the `QUANTILES` of their
    ranges as `range` (None without any).
    """
    out: dict[str, dict[str, Any]] = {}
    for category in sorted(set(categories)):
        own = [v for c, v in zip(categories, found, strict=True) if c == category]
        ranges = [v.range for v in own if v.range is not None]
        row: dict[str, Any] = {"prompts": len(own)}
        row |= {why: sum(v.why == why for v in own) for why in WHYS}
        row["range"] = np.quantile(ranges, QUANTILES).tolist() if ranges else None
        out[category] = row
    return out


# --- as plain data --------------------------------------------------------------------------------


def row_of(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a row that `load_prompts` reads back. Raises PromptError for a free column that
    JSON cannot hold.
    """
    row = {
        "prompt": prompt.text,
        "category": prompt.category,
        "negative_prompt": prompt.negative or None,
        "source_images": list(prompt.sources) or None,
        "height": None if prompt.size is None else prompt.size[0],
        "width": None if prompt.size is None else prompt.size[1],
        "target": prompt.target,
    }
    row = {name: value for name, value in row.items() if value is not None}
    for name, value in prompt.columns.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PromptError(
                f"{prompt.id}: expected a column '{name}' that JSON can hold, got"
                f" {type(value).__name__}: drop the column"
            ) from error
        assert name not in KNOWN
        row[name] = value
    return row


def stored(scores: Scores) -> dict[str, Any]:
    """Scores as JSON data, without what the judges say of their parts."""
    return {
        "judges": [asdict(card) for card in scores.judges],
        "table": {
            name: [[[s.value, s.state, s.reason] for s in group] for group in groups]
            for name, groups in scores.table.items()
        },
    }


def restored(data: Mapping[str, Any]) -> Scores:
    """The scores that `stored` wrote."""
    return Scores(
        judges=tuple(card_of(card) for card in data["judges"]),
        table={
            name: tuple(
                tuple(Score(value=v, state=state, reason=why) for v, state, why in group)
                for group in groups
            )
            for name, groups in data["table"].items()
        },
    )
