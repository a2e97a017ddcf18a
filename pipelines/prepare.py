"""`rlhf data`: filter a data set by operators, in shards, and say what each of them removed.

    runs/<name>/data/NNNNNN.parquet    kept records; `datasets.load_dataset("parquet", ...)`
                result.json            counts per operator and per reason
                work/                  finished units, until the set is written

Units are done in this process or by the actors of Ray Data (`workers`): each loads tokenizers and
models once and is then given unit after unit; the unit of one that dies is done again. A run killed
at any moment continues with --resume to the same files and counts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from pipelines.data.operators import OperatorConfig
from pipelines.data.sift import (
    Decision,
    Sifter,
    Sifting,
    Tally,
    decide,
    read_tally,
    unit_folder,
    write_kept,
)
from pipelines.data.sources import SourceConfig, open_source
from rlhf.cluster.base import threads
from rlhf.cluster.dataflow import flow
from rlhf.config import to_dict
from rlhf.errors import ConfigError, DataError
from rlhf.files import sweep
from rlhf.run import Run

ENOUGH = 1000  # records after which the share of broken ones is looked at, and at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`workers` 0 is this process. `max_broken`: most of the records that may be unreadable, cut
    off, without a caption or without a score before the run stops.
    """

    name: str = "data"
    runs: str = "runs"
    source: SourceConfig = field(default_factory=SourceConfig)
    operators: tuple[OperatorConfig, ...] = (OperatorConfig(use="files", low=1.0),)
    seed: int = 0
    batch: int = 16
    max_broken: float = 0.05
    workers: int = 0
    threads: int = 1
    timeout_seconds: float = 3600.0
    address: str | None = None

    def check(self) -> None:
        if self.source.columns.caption is None:
            raise ConfigError("source.columns.caption: expected a column, got null: write its name")
        uses = [one.use for one in self.operators]
        twice = sorted({use for use in uses if uses.count(use) > 1})
        if twice:
            raise ConfigError(f"operators: expected each once, got {', '.join(twice)} again")
        if not 0 <= self.max_broken <= 1:
            raise ConfigError(f"max_broken: expected a share of 0 to 1, got {self.max_broken}")
        if self.workers < 0 or min(self.batch, self.threads) < 1:
            raise ConfigError(
                f"expected workers >= 0, batch >= 1 and threads >= 1, got {self.workers},"
                f" {self.batch} and {self.threads}"
            )

    def sifting(self) -> Sifting:
        """The part that decides the outcome."""
        return Sifting(
            source=self.source, operators=self.operators, seed=self.seed, batch=self.batch
        )


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Filter the set. Raises DataError, ConfigError or ClusterError."""
    began = time.monotonic()
    source = open_source(config.source)
    home = Run.open(resume) if resume else Run.create(config.runs, config.name, config, "data")
    finished = home.read_json("result.json")
    work = home.root / "work"
    mark = _mark(config, source.fingerprint)
    if (home.read_json("data.json") or {"mark": mark})["mark"] != mark:
        raise DataError(
            f"expected the files and settings that {home.root} was begun with, got others:"
            " start a new run"
        )
    if finished is not None:
        return finished
    home.write_json("data.json", {"mark": mark, "units": source.units})
    work.mkdir(exist_ok=True)
    sweep(work)
    tallies = _sift(config, work, source.units)
    decision = decide(config.operators, tallies)
    _write(home.root / "data", work, decision)
    result = home.write_result(
        time.monotonic() - began,
        _metrics(config, tallies, decision),
        **_table(config, tallies, decision),
    )
    shutil.rmtree(work)
    return result


def _mark(config: Config, fingerprint: str) -> str:
    """What must not change under a run."""
    settings = {"files": fingerprint, "settings": to_dict(config.sifting())}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _sift(config: Config, work: Path, units: int) -> list[Tally]:
    """The tallies of all units, doing those that are not there yet."""
    done = {i: read_tally(work, i) for i in range(units) if unit_folder(work, i).is_dir()}
    todo = [i for i in range(units) if i not in done]
    if todo:
        build = partial(Sifter, config.sifting(), work.absolute())
        units_done = (
            flow(
                build,
                "unit",
                todo,
                workers=config.workers,
                threads=config.threads,
                timeout=config.timeout_seconds,
                address=config.address,
            )
            if config.workers
            else _here(build, config.threads, todo)
        )
        for index, tally in track(units_done, "units", total=len(todo), transient=True):
            done[index] = tally
            _limit(config, list(done.values()), at_least=ENOUGH)
    tallies = [done[i] for i in range(units)]
    _limit(config, tallies)
    return tallies


def _here(
    build: Callable[[], Sifter], count: int, todo: Sequence[int]
) -> Iterator[tuple[int, Tally]]:
    """The units one after the other in this process."""
    with threads(count):
        sifter = build()
        for index in todo:
            yield index, sifter.unit(index)


def _broken(config: Config, tallies: list[Tally]) -> Counter[str]:
    """Reason -> records, those that the operator `files` removed among them."""
    total = Counter[str]()
    for tally in tallies:
        total.update(tally.broken)
    uses = [one.use for one in config.operators]
    if "files" in uses:
        place = uses.index("files")
        found = sum(e.until == place for tally in tallies for e in tally.entries)
        total.update({"broken picture": found} if found else {})
    return total


def _limit(config: Config, tallies: list[Tally], at_least: int = 1) -> None:
    broken, seen = _broken(config, tallies), sum(tally.seen for tally in tallies)
    if broken.total() > config.max_broken * max(seen, at_least):
        reasons = ", ".join(f"{n} {reason}" for reason, n in broken.most_common())
        raise DataError(
            f"expected at most {config.max_broken:.0%} broken records, got {broken.total()} of"
            f" {seen}: {reasons}. Mend the source, or allow more with max_broken=..."
        )


def _write(folder: Path, work: Path, decision: Decision) -> None:
    folder.mkdir(exist_ok=True)
    sweep(folder)
    for index, rows in enumerate(decision.kept):
        target = folder / f"{index:06d}.parquet"
        if rows and not target.is_file():
            write_kept(work, index, rows, target)


# --- what is said ---------------------------------------------------------------------------------


def _metrics(config: Config, tallies: list[Tally], decision: Decision) -> dict[str, Any]:
    kept, broken = sum(map(len, decision.kept)), _broken(config, tallies).total()
    out: dict[str, Any] = {
        "data/seen": {"value": sum(tally.seen for tally in tallies)},
        "data/broken": {"value": broken},
        "data/kept": {"value": kept},
    }
    for one, seen, removed in zip(config.operators, decision.seen, decision.removed, strict=True):
        out[f"removed/{one.use}"] = {"value": removed, "n": seen}
    return out


def _table(config: Config, tallies: list[Tally], decision: Decision) -> dict[str, Any]:
    rows = []
    for one, seen, removed in zip(config.operators, decision.seen, decision.removed, strict=True):
        bounds = "off: no scorer" if one.off else one.bounds()
        rows.append({"operator": one.use, "keeps": bounds, "seen": seen, "removed": removed})
    return {"operators": rows, "broken": dict(sorted(_broken(config, tallies).items()))}


def plan(config: Config) -> str:
    """What would be read, and by which operators."""
    source = open_source(config.source)
    lines = [f"{source.units} units of {config.source.layout} '{config.source.path}'"]
    width = max((len(one.use) for one in config.operators), default=0)
    for one in config.operators:
        lines.append(f"{one.use:<{width}}  {'off: no scorer' if one.off else one.bounds()}")
    return "\n".join(lines)


def summarise(result: Mapping[str, Any]) -> str:
    """The table of operators, then what was broken, then the totals."""
    heads = ("operator", "keeps", "seen", "removed")
    rows = [heads, *([str(row[h]) for h in heads] for row in result["operators"])]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}"
        for a, b, c, d in rows
    ]
    lines += [f"broken: {n} {reason}" for reason, n in result["broken"].items()]
    totals = {name: metric["value"] for name, metric in result["metrics"].items()}
    lines.append(
        f"{totals['data/kept']} of {totals['data/seen']} kept, {totals['data/broken']} broken,"
        f" {result['seconds']:.1f} s"
    )
    return "\n".join(lines)
