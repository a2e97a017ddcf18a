"""Reading a data set, unit by unit: a unit is a file of it, or so many rows of an indexed one.

Units are what workers share out and what a killed run keeps, so the same unit always gives the
same records. What cannot be a record comes out as `Broken` with a reason; nothing is passed over.
`datasets` opens parquet, its own sets and streams. Two layouts are read here, because of what
`datasets` 5 does with damaged ones: an image folder loses pictures that no metadata row names, and
a tar cut between two members ends without a word, one cut inside a member fails as a whole.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

from pipelines.data.records import Broken, Columns, Kind, Record, record_of
from rewards import images
from rlhf.errors import ConfigError, DataError

METADATA = "metadata.jsonl"
Item = Record | Broken
_FAULT = "\0fault"  # key in the row of a sample that cannot be read


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """`path`: a folder with metadata.jsonl, a glob of parquet or tar files, or, for `datasets`, a
    hub name or a directory of `save_to_disk`. `kind` is the caption kind where no column says.
    """

    path: str = "data/raw/*.tar"
    layout: Literal["folder", "parquet", "webdataset", "datasets"] = "webdataset"
    split: str = "train"  # these two of `datasets` only
    streaming: bool = False
    columns: Columns = field(default_factory=Columns)
    kind: Kind = "general"
    unit_rows: int = 1000  # rows per unit where a unit is not a file

    def check(self) -> None:
        if self.unit_rows < 1:
            raise ConfigError(
                f"source.unit_rows: expected at least 1, got {self.unit_rows}: 1000 is usual"
            )
        if self.streaming and self.layout != "datasets":
            raise ConfigError(
                f"source.streaming: expected layout datasets, got {self.layout}, which is read"
                " file by file as it is: leave it out"
            )


@runtime_checkable
class Source(Protocol):
    """`fingerprint` changes with the names and sizes of what is read."""

    units: int
    fingerprint: str

    def read(self, unit: int) -> Iterator[Item]:
        """The records of a unit, always the same. Raises DataError if it cannot be read at all."""
        ...


def open_source(config: SourceConfig) -> Source:
    """Look at a data set without reading its pictures. Raises DataError if there is none."""
    readers = {"folder": Folder, "parquet": Parquet, "webdataset": Tars, "datasets": Datasets}
    return readers[config.layout](config)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


def _files(config: SourceConfig) -> list[Path]:
    found = sorted(Path(name) for name in glob(config.path, recursive=True))
    if not found:
        raise DataError(
            f"source.path: expected {config.layout} files, got '{config.path}', which matches none:"
            " write a path or a glob such as data/*.tar"
        )
    return found


def _sizes(files: list[Path]) -> list[tuple[str, int]]:
    return [(path.name, path.stat().st_size) for path in files]


# --- layouts --------------------------------------------------------------------------------------


class Folder:
    """A directory of pictures with a metadata.jsonl: `file_name`, caption, any other column.

    Paths in `file_name` and in the column of sources are relative to the directory. Rows come in
    the order of the file; pictures that no row names follow, as broken ones without a caption.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config, self.root = config, Path(config.path)
        path = self.root / METADATA
        if not path.is_file():
            raise DataError(
                f"source.path: expected a folder with {METADATA}, got '{config.path}': write one"
                ' line {"file_name": ..., "text": ...} for each picture'
            )
        text = path.read_text(encoding="utf-8")
        self.rows = [self._row(line) for line in text.splitlines() if line.strip()]
        named = {one for row in self.rows for one in self._names(row)}
        names = (p.relative_to(self.root).as_posix() for p in images.files_below(self.root))
        self.rows += [{"file_name": name} for name in names if name not in named]
        self.units = -(-len(self.rows) // config.unit_rows)
        self.fingerprint = _digest(text, len(self.rows))

    @staticmethod
    def _row(line: str) -> dict[str, Any] | None:
        try:
            row = json.loads(line)
        except ValueError:
            return None
        return row if isinstance(row, dict) else None

    def _names(self, row: Mapping[str, Any] | None) -> list[str]:
        """Files that a row refers to, as written."""
        given = (row or {}).get(self.config.columns.sources) or ()
        sources = list(given) if isinstance(given, list | tuple) else [given]
        return [PurePosixPath(str(n)).as_posix() for n in [(row or {}).get("file_name"), *sources]]

    def read(self, unit: int) -> Iterator[Item]:
        names, size = self.config.columns, self.config.unit_rows
        for index in range(unit * size, min((unit + 1) * size, len(self.rows))):
            row = self.rows[index]
            if row is None:
                yield Broken(id=str(index), reason=f"no JSON object in {METADATA}")
                continue
            file = row.get("file_name")
            rest = {key: value for key, value in row.items() if key != "file_name"}
            full = {names.image: file, **rest}
            yield record_of(full, names, str(file), self.config.kind, self.root)


class Parquet:
    """Parquet files; a unit is a file."""

    def __init__(self, config: SourceConfig) -> None:
        self.config, self.files = config, _files(config)
        self.units = len(self.files)
        self.fingerprint = _digest(_sizes(self.files))

    def read(self, unit: int) -> Iterator[Item]:
        path = self.files[unit]
        whole = _load(str(path), "parquet", data_files=str(path), split="train", streaming=True)
        yield from _rows(whole, self.config, path.name)


class Tars:
    """WebDataset shards, .tar or .tar.gz; a unit is a shard.

    Members that share a name up to its first dot are one sample: `7.jpg` the picture, `7.txt` the
    caption, `7.json` columns, `7.sources.0.jpg` and so on the pictures an edit starts from. Other
    members are left behind.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config, self.files = config, _files(config)
        self.units = len(self.files)
        self.fingerprint = _digest(_sizes(self.files))

    def read(self, unit: int) -> Iterator[Item]:
        path, names = self.files[unit], self.config.columns
        for key, row, whole in samples(path, names):
            id = f"{path.name}/{key}"
            one = record_of(row, names, id, self.config.kind) if row else None
            if _FAULT in row:
                one = Broken(id=id, reason=row[_FAULT])
            if whole or isinstance(one, Record):
                assert one is not None
                yield one
            if not whole:
                yield Broken(id=id, reason="truncated shard")


class Datasets:
    """What `datasets.load_dataset` or `save_to_disk` names; of a stream, a unit is a file of it."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.data = _load(config.path, None, split=config.split, streaming=config.streaming)
        if config.streaming:
            self.units = self.data.num_shards
            self.fingerprint = _digest(config.path, config.split, self.units)
        else:
            self.units = -(-len(self.data) // config.unit_rows)
            self.fingerprint = _digest(self.data._fingerprint, len(self.data))

    def read(self, unit: int) -> Iterator[Item]:
        size, name = self.config.unit_rows, f"{self.config.split}/{unit}"
        if self.config.streaming:
            part = self.data.shard(num_shards=self.units, index=unit)
        else:
            part = self.data.select(range(unit * size, min((unit + 1) * size, len(self.data))))
        yield from _rows(part, self.config, name)


def _load(what: str, builder: str | None, **options: Any) -> Any:
    """A `datasets` set whose pictures stay encoded. Raises DataError."""
    import datasets

    try:
        if builder is None and (Path(what) / "state.json").is_file():
            loaded: Any = datasets.load_from_disk(what)
            loaded = loaded.to_iterable_dataset() if options["streaming"] else loaded
        else:
            loaded = datasets.load_dataset(builder or what, **options)
        return _undecoded(loaded)
    except Exception as error:  # the boundary to `datasets`, which raises many types
        raise DataError(f"cannot open '{what}': {type(error).__name__}: {error}") from error


def open_parquet(folder: Path) -> Any:
    """The rows of all parquet files below a folder, by number, pictures as bytes. Raises DataError.

    `datasets` keeps its own memory-mapped copy in its cache (HF_DATASETS_CACHE).
    """
    files = sorted(str(path) for path in folder.rglob("*.parquet"))
    if not files:
        raise DataError(f"expected parquet files below '{folder}', got none: run `rlhf data`")
    return _load(str(folder), "parquet", data_files=files, split="train")


def _undecoded(data: Any) -> Any:
    from datasets import Image, List

    for name, feature in (data.features or {}).items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            data = data.cast_column(name, List(Image(decode=False)))
    return data


def _rows(data: Any, config: SourceConfig, name: str) -> Iterator[Item]:
    number = 0
    rows = iter(data)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the boundary to `datasets`
            raise DataError(
                f"expected to read {name} to its end, got {type(error).__name__} after {number}"
                f" rows: {error}: write the file again or leave it out"
            ) from error
        yield record_of(row, config.columns, f"{name}#{number}", config.kind)
        number += 1


# --- tar ------------------------------------------------------------------------------------------


def samples(path: Path, names: Columns) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """(key, row, whole) of each sample in a tar. `whole` is False once, at the end of a cut file.

    Raises DataError if the file is no tar.
    """
    key, row = "", dict[str, Any]()
    try:
        for member, data in _members(path):
            head, _, extension = member.rpartition("/")[2].partition(".")
            this = f"{member.rpartition('/')[0]}/{head}".lstrip("/")
            if row and this != key:
                yield key, row, True
                row = {}
            key = this
            _add(row, extension, data, names)
    except (tarfile.ReadError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        if not key:
            raise DataError(f"expected a tar file, got {path}: {error}: write it again") from error
        yield key, row, False
        return
    if row:
        yield key, row, True


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Files of a tar in order. Raises tarfile.ReadError or EOFError where it was cut, also between
    two members: an archive ends with a block of zeros.
    """
    with open(path, "rb") as raw:
        file = gzip.open(raw) if path.suffix == ".gz" else raw
        with tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield member.name, content.read()
            file.seek(tar.offset)
            if file.read(512) != bytes(512) and tar.offset:
                raise tarfile.ReadError("no end-of-archive block")


def _add(row: dict[str, Any], extension: str, data: bytes, names: Columns) -> None:
    """Put one member of a sample into its row."""
    stem, _, suffix = extension.rpartition(".")
    if suffix.lower() == "json":
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        row.update(value if isinstance(value, dict) else {_FAULT: "no JSON object in .json"})
    elif f".{suffix.lower()}" in images.SUFFIXES:
        if stem.split(".")[0] == names.sources:
            row.setdefault(names.sources, []).append(data)
        else:
            row[stem or names.image] = data
    elif suffix == "txt":
        row[stem or names.caption or suffix] = data.decode("utf-8", errors="replace")
