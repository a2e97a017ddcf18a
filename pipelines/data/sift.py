"""One unit of a data set through the operators, and the decisions that need the whole set.

    <work>/000012/rows.parquet    records that no operator on one record removed
                  counts.json     what was broken, and per other record how far it came and its keys

A unit's directory is built beside and renamed, so it is complete or not there. Operators that look
at the whole set only leave their keys here; `decide` runs them in the order of the set, as if the
operators had been applied one after the other in one process.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.operators import SET_WIDE, Key, OperatorConfig, key_of, scorer_of, select
from pipelines.data.records import Broken, Record, row_of, schema
from pipelines.data.sources import Item, SourceConfig, open_source
from rewards.errors import ImageError
from rlhf.files import atomic_directory, write_durably

BLIND = ("files", "tokens", "same_file")  # operators that do not need the decoded picture
ROW_GROUP = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Sifting:
    """What decides the outcome: two equal ones on the same files keep the same records."""

    source: SourceConfig
    operators: tuple[OperatorConfig, ...]
    seed: int = 0  # of `balance`
    batch: int = 16  # records that judges see at once, and whose pixels are in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A record that could be read. `until`: the operator that removed it, or their number; `row` of
    rows.parquet; `keys` for the set-wide operators that it reached.
    """

    until: int
    row: int | None
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What a unit came to."""

    broken: Mapping[str, int]  # reason -> records
    entries: tuple[Entry, ...]

    @property
    def seen(self) -> int:
        return sum(self.broken.values()) + len(self.entries)


@dataclass(slots=True)
class _Candidate:
    record: Record
    keys: list[Key] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    until: int | None = None
    broken: str | None = None

    @property
    def alive(self) -> bool:
        return self.until is None and self.broken is None


class Sifter:
    """Works through units; models are loaded once."""

    def __init__(self, sifting: Sifting, work: Path) -> None:
        self.sifting, self.work = sifting, work
        self.source = open_source(sifting.source)
        self._steps: list[tuple[OperatorConfig, Callable[[list[_Candidate], int], None]]] = [
            (one, self._step_of(one)) for one in sifting.operators
        ]

    def unit(self, index: int) -> Tally:
        """Read, filter and write one unit, unless that was done. Raises DataError if it cannot be
        read.
        """
        if unit_folder(self.work, index).is_dir():
            return read_tally(self.work, index)
        broken, entries = Counter[str](), list[Entry]()
        with (
            atomic_directory(unit_folder(self.work, index)) as part,
            parquet(part / "rows.parquet") as rows,
        ):
            for items in _batches(self.source.read(index), self.sifting.batch):
                for one in self._sift(items):
                    if one.broken is not None:
                        broken[one.broken] += 1
                        continue
                    row = None if one.until is not None else rows(row_of(one.record, one.scores))
                    until = len(self._steps) if one.until is None else one.until
                    entries.append(Entry(until=until, row=row, keys=tuple(one.keys)))
                broken.update(item.reason for item in items if isinstance(item, Broken))
            facts = {
                "broken": dict(sorted(broken.items())),
                "entries": [[e.until, e.row, e.keys] for e in entries],
            }
            write_durably(part / "counts.json", json.dumps(facts).encode())
        return read_tally(self.work, index)

    def _sift(self, items: Sequence[Item]) -> list[_Candidate]:
        everyone = [_Candidate(item) for item in items if isinstance(item, Record)]
        for number, (config, step) in enumerate(self._steps):
            alive = [one for one in everyone if one.alive]
            step(alive if config.use in BLIND else _decodable(alive), number)
        _decodable([one for one in everyone if one.alive])
        return everyone

    def _step_of(self, config: OperatorConfig) -> Callable[[list[_Candidate], int], None]:
        if config.off:
            return lambda candidates, number: None
        if config.use in SET_WIDE:
            key = key_of(config, self.sifting.seed)

            def note(candidates: list[_Candidate], number: int) -> None:
                for one in candidates:
                    one.keys.append(key(one.record))

            return note
        scorer = scorer_of(config)

        def judge(candidates: list[_Candidate], number: int) -> None:
            scores = scorer([one.record for one in candidates]) if candidates else []
            for one, score in zip(candidates, scores, strict=True):
                if score.state == "failed":
                    one.broken = f"{config.use} gave no score"
                elif score.value is not None:
                    one.scores[config.use] = round(score.value, 6)
                    one.until = None if config.keeps(score.value) else number

        return judge


def _batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _decodable(candidates: list[_Candidate]) -> list[_Candidate]:
    for one in candidates:
        try:
            one.record.decode()
        except ImageError:
            one.broken = "broken picture"
    return [one for one in candidates if one.alive]


# --- files ----------------------------------------------------------------------------------------


def unit_folder(work: Path, index: int) -> Path:
    """Where a unit is kept until the set is written."""
    return work / f"{index:06d}"


def read_tally(work: Path, index: int) -> Tally:
    """The counts of a finished unit."""
    facts = json.loads((unit_folder(work, index) / "counts.json").read_text())
    entries = (Entry(until=u, row=r, keys=tuple(keys)) for u, r, keys in facts["entries"])
    return Tally(broken=facts["broken"], entries=tuple(entries))


@contextmanager
def parquet(path: Path) -> Iterator[Callable[[Mapping[str, Any]], int]]:
    """A function that appends a row to a new file and returns its number. Synced at the end."""
    form, waiting, count = schema(), list[Mapping[str, Any]](), 0
    with open(path, "wb") as file, pq.ParquetWriter(file, form) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pa.Table.from_pylist(list(waiting), schema=form))
                waiting.clear()

        def add(row: Mapping[str, Any]) -> int:
            nonlocal count
            waiting.append(row)
            count += 1
            if len(waiting) >= ROW_GROUP:
                flush()
            return count - 1

        yield add
        flush()
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def write_kept(work: Path, index: int, kept: Sequence[int], target: Path) -> None:
    """The kept rows of a unit as `target`, which appears whole or not at all."""
    chosen, first = set(kept), 0
    part = target.with_name(f".{target.name}.tmp-0")
    with parquet(part) as rows:
        for group in pq.ParquetFile(unit_folder(work, index) / "rows.parquet").iter_batches():
            for number, row in enumerate(group.to_pylist(), start=first):
                if number in chosen:
                    rows(row)
            first += group.num_rows
    os.replace(part, target)


# --- the whole set --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of the set: kept rows per unit, and per operator what it saw and removed."""

    kept: tuple[tuple[int, ...], ...]
    seen: tuple[int, ...]
    removed: tuple[int, ...]


def decide(operators: Sequence[OperatorConfig], tallies: Sequence[Tally]) -> Decision:
    """Apply all operators in order; those on one record have already said where they removed it."""
    entries = [entry for tally in tallies for entry in tally.entries]
    alive, seen, removed, asked = list(range(len(entries))), [], [], 0
    for number, config in enumerate(operators):
        seen.append(len(alive))
        if config.use in SET_WIDE:
            stays = select(config, [entries[i].keys[asked] for i in alive])
            asked += 1
            alive = [i for i, stay in zip(alive, stays, strict=True) if stay]
        else:
            alive = [i for i in alive if entries[i].until != number]
        removed.append(seen[-1] - len(alive))
    living, kept, first = set(alive), [], 0
    for tally in tallies:
        mine = range(first, first + len(tally.entries))
        rows = (entries[i].row for i in mine if i in living)
        kept.append(tuple(row for row in rows if row is not None))
        first += len(tally.entries)
    return Decision(kept=tuple(kept), seen=tuple(seen), removed=tuple(removed))
