"""Filters in the order of the YAML: each scores a record, which stays if low <= score <= high.

Most look at one record and run in any worker: measures (`measures.py`), the tokens of the caption,
image-text similarity, and judges named `module:function`. Three look at the whole set and are
decided in one process, in its order, from a short key per record: `same_file`, `same_look` and
`balance`. So the kept set does not depend on how many workers there were.

The operators are those that arXiv:2605.10730 names per stage; it publishes no thresholds, so all of
them are ours.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.data import measures
from pipelines.data.records import Record
from rewards import images
from rewards.errors import RewardError
from rewards.judge import load_judge, run_judge
from rewards.types import Sample, Score, not_applicable
from rlhf.assets import resolve
from rlhf.errors import ConfigError

Use = Literal[
    "files",
    "min_side",
    "aspect",
    "rotation",
    "entropy",
    "sharpness",
    "noise",
    "blockiness",
    "bytes_per_pixel",
    "tokens",
    "similarity",
    "safety",
    "aesthetic",
    "same_file",
    "same_look",
    "balance",
]
JUDGED = ("safety", "aesthetic")  # without a scorer they are off
SCORED = (*JUDGED, "rotation", "similarity")  # may have a scorer
SET_WIDE = ("same_file", "same_look", "balance")
OPTIONS = {  # option -> the operators it belongs to
    "scorer": SCORED,
    "model": ("tokens", "similarity"),
    "distance": ("same_look",),
    "column": ("balance",),
    "cap": ("balance",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorConfig:
    """`low` and `high` bound the score, both included; leave out the one that is not meant.

    scorer    safety, aesthetic, rotation, similarity: a judge, `module:function` or `oracle/...`
    model     tokens: a base, whose tokenizer counts; similarity: a directory of open_clip
    distance  same_look: most bits of 64 in which two pictures are still the same
    column    balance: the column (or `kind`) of which at most `cap` records per value are kept
    """

    use: Use
    low: float | None = None
    high: float | None = None
    scorer: str | None = None
    model: str | None = None
    distance: int | None = None
    column: str | None = None
    cap: int | None = None

    def check(self) -> None:
        for option, uses in OPTIONS.items():
            if getattr(self, option) is not None and self.use not in uses:
                raise ConfigError(
                    f"operators, {self.use}: '{option}' belongs to {', '.join(uses)}: leave it out"
                )
        bounded = self.low is not None or self.high is not None
        if bounded == (self.use in SET_WIDE):
            expected = "no bounds" if self.use in SET_WIDE else "low, high or both"
            raise ConfigError(f"operators, {self.use}: expected {expected}, got {self.bounds()}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"operators, {self.use}: expected low <= high, got {self.bounds()}")
        if self.use == "similarity" and (self.model is None) == (self.scorer is None):
            raise ConfigError("operators, similarity: expected either model=DIR or scorer=NAME")
        if self.use == "balance" and (not self.column or (self.cap or 0) < 1):
            raise ConfigError("operators, balance: expected column=NAME and cap >= 1")
        if self.distance is not None and not 0 <= self.distance <= 16:
            raise ConfigError(f"operators, same_look: expected distance 0..16, got {self.distance}")

    @property
    def off(self) -> bool:
        """Whether it does nothing, for want of a scorer."""
        return self.use in JUDGED and self.scorer is None

    def bounds(self) -> str:
        """For tables: "3 to 7.5", "from 256", "up to 3", or what else decides."""
        if self.use == "balance":
            return f"{self.cap} per {self.column}"
        if self.use == "same_look":
            return f"{self.distance or 0} bits"
        if self.low is None or self.high is None:
            both = f"from {self.low:g}" if self.low is not None else ""
            return both or (f"up to {self.high:g}" if self.high is not None else "")
        return f"{self.low:g} to {self.high:g}"

    def keeps(self, value: float) -> bool:
        """Whether a score is within the bounds."""
        low_ok = self.low is None or value >= self.low
        return low_ok and (self.high is None or value <= self.high)


# --- one record at a time -------------------------------------------------------------------------

Scorer = Callable[[Sequence[Record]], list[Score]]


def scorer_of(config: OperatorConfig) -> Scorer:
    """The function behind an operator that is neither off nor set-wide. Loads models.

    Raises:
        ConfigError: its model or scorer cannot be loaded.
    """
    if config.scorer is not None:
        return _judged(config.scorer)
    if config.use == "similarity":
        from pipelines.data.similarity import Similarity

        return _each(Similarity(str(config.model)))
    if config.use == "tokens":
        return _each(_token_counter(config.model or "scenes"))
    return _each(measures.MEASURES[config.use])


def _each(measure: measures.Measure) -> Scorer:
    def scores(records: Sequence[Record]) -> list[Score]:
        values = [measure(record) for record in records]
        return [not_applicable("") if v is None else Score(value=v) for v in values]

    return scores


def _judged(name: str) -> Scorer:
    try:
        judge = load_judge(name)
    except RewardError as error:
        raise ConfigError(f"operators, scorer: {error}") from error

    def scores(records: Sequence[Record]) -> list[Score]:
        return run_judge(judge, [_sample(record) for record in records])

    return scores


def _sample(record: Record) -> Sample:
    target = record.columns.get("target")
    return Sample(
        image=images.from_pil(record.picture.pil),
        prompt=record.caption,
        category=str(record.columns.get("category") or "general"),
        sources=tuple(images.from_pil(one.pil) for one in record.sources),
        target=target if isinstance(target, str) else None,
        columns=record.columns,
    )


def _token_counter(model: str) -> measures.Measure:
    """Tokens of the caption alone, as the base's tokenizer makes them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(model), subfolder="processor")
    except (OSError, ValueError) as error:
        raise ConfigError(f"operators, tokens: no tokenizer in '{model}': {error}") from error
    return lambda record: float(len(tokenizer(record.caption)["input_ids"]))


# --- the whole set --------------------------------------------------------------------------------

Key = Any  # JSON; None where the operator does not apply


def key_of(config: OperatorConfig, seed: int) -> Callable[[Record], Key]:
    """What a set-wide operator wants to know of each record."""
    if config.use == "same_file":
        return measures.file_key
    if config.use == "same_look":
        return measures.look_key
    column = str(config.column)

    def balance_key(record: Record) -> Key:
        value = record.kind if column == "kind" else record.columns.get(column)
        draw = hashlib.blake2b(f"{seed}/{record.id}".encode(), digest_size=6)
        return None if value is None else [str(value), int.from_bytes(draw.digest(), "big")]

    return balance_key


def select(config: OperatorConfig, keys: Sequence[Key]) -> list[bool]:
    """Which records stay, in the order of the set; those without a key do."""
    if config.use == "balance":
        return _balanced(keys, int(config.cap or 1))
    if config.use == "same_look":
        return _distinct(keys, config.distance or 0)
    seen: set[str] = set()
    return [key is None or not (key in seen or seen.add(key)) for key in keys]


def _balanced(keys: Sequence[Key], cap: int) -> list[bool]:
    """Of each value, the `cap` records with the smallest draws."""
    drawn: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None:
            drawn[key[0]].append((key[1], index))
    kept = {index for group in drawn.values() for _, index in sorted(group)[:cap]}
    return [key is None or index in kept for index, key in enumerate(keys)]


def _distinct(hashes: Sequence[int | None], distance: int) -> list[bool]:
    """Keep a hash unless one kept before is within `distance` bits.

    Two hashes that differ in at most d bits agree in one of any d + 1 bands, so only those that
    share a band are compared: exact, and far from all pairs.
    """
    edges = [round(64 * i / (distance + 1)) for i in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in zip(edges, edges[1:], strict=False)]
    tables: list[dict[int, list[int]]] = [defaultdict(list) for _ in bands]
    out = []
    for one in hashes:
        if one is None:
            out.append(True)
            continue
        places = [
            table[one >> low & mask] for table, (low, mask) in zip(tables, bands, strict=True)
        ]
        new = all((one ^ old).bit_count() > distance for place in places for old in place)
        if new:
            for place in places:
                place.append(one)
        out.append(new)
    return out
