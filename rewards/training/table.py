"""Judgements on disk, in two forms.

    <folder>/train-00000-of-00002.parquet   one row per judgement; pictures as PNG bytes
    <folder>/labels.jsonl                   one object per line; pictures as paths from the file

Both have the columns kind, axis, prompt, images and ratings, and may have category, sources, group,
annotator, confidence, low and high (see `schema.Judgement`). What else is there reaches
`Judgement.columns` under its name. A .jsonl file has all splits: a line's own `split`, else the one
that `splits.split_of` gives its group.
"""

from __future__ import annotations

import json
import os
import uuid
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards import images
from rewards.errors import DataError, ImageError
from rewards.training.rows import DEFAULTS, NEEDED, judgement_of
from rewards.training.schema import Judgement
from rewards.training.splits import split_of

SPLITS = ("train", "dev", "test")
_TYPES = {
    "images": pa.list_(pa.binary()),
    "sources": pa.list_(pa.binary()),
    "ratings": pa.list_(pa.float64()),
    **{name: pa.string() for name in ("kind", "axis", "prompt", "category", "group", "annotator")},
    **{name: pa.float64() for name in ("confidence", "low", "high")},
}
_ROW_GROUP = 256


def write_judgements(
    folder: str | os.PathLike[str],
    split: str,
    rows: Iterable[Judgement],
    *,
    rows_per_file: int = 4096,
) -> list[Path]:
    """Write a split as parquet files and return them; what `folder` held of it is replaced.

    `columns` of the judgements become columns. Their types are those of the first rows; a row may
    lack one, and has no other. Memory is that of a few hundred rows.

    Raises:
        DataError: no rows, or free columns whose names or types change from row to row.
    """
    _check_split(split)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark = f".{split}.tmp-{uuid.uuid4().hex[:8]}"
    parts: list[Path] = []
    try:
        schema: pa.Schema | None = None
        for batch in _chunks(_chunks(rows, _ROW_GROUP), max(1, rows_per_file // _ROW_GROUP)):
            parts.append(folder / f"{mark}-{len(parts):05d}")
            schema = _write(parts[-1], batch, schema)
        if not parts:
            raise DataError(f"{split}: expected judgements to write, got none: leave the split out")
        for old in _shards(folder, split):
            old.unlink()
        names = [folder / f"{split}-{i:05d}-of-{len(parts):05d}.parquet" for i in range(len(parts))]
        for part, name in zip(parts, names, strict=True):
            os.replace(part, name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return names


def load_judgements(
    source: str | os.PathLike[str], split: str, axis: str | None = None, limit: int | None = None
) -> list[Judgement]:
    """The first `limit` judgements of a split, pictures decoded. For a set that fits in memory; for
    others `JudgementTable`, which also says what a source may be.

    Raises:
        DataError: see `JudgementTable`.
    """
    table = JudgementTable(source, split, axis)
    return [table[i] for i in range(len(table) if limit is None else min(limit, len(table)))]


class JudgementTable:
    """A split as a sequence of judgements. Pictures of a row are decoded when it is asked for.

    `source` is a folder of parquet files, a .jsonl file, or what `datasets.load_dataset` opens.

    Raises:
        DataError: nothing there, an incomplete set of files, missing columns, or no row of `axis`;
            on access, a row that is no judgement, with its file and number from 1.
    """

    def __init__(self, source: str | os.PathLike[str], split: str, axis: str | None = None) -> None:
        _check_split(split)
        self.source, self.split = str(source), split
        lines = Path(source).suffix == ".jsonl"
        self._rows: _Rows = _Lines(Path(source), split) if lines else _Columns(self.source, split)
        self._index = np.arange(len(self._rows))
        if axis is not None:
            axes = self._rows.column("axis")
            self._index = np.flatnonzero(np.array(axes, dtype=object) == axis)
            if not len(self._index):
                raise DataError(
                    f"{self.source}: expected {split} rows of axis {axis!r}, got axes"
                    f" {sorted(set(map(str, axes)))}: name one of them"
                )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Judgement:
        position = int(self._index[i])
        row, place = self._rows.row(position)
        try:
            return judgement_of(row, self._rows.base)
        except (DataError, ImageError) as error:
            raise DataError(f"{place}: {error}") from error

    def __iter__(self) -> Iterator[Judgement]:
        return (self[i] for i in range(len(self)))

    def column(self, name: str) -> list[Any]:
        """One column of all rows without opening a picture, as judgements would have it.

        Raises:
            DataError: no such column.
        """
        values = self._rows.column(name)
        if name == "group":
            prompts = self._rows.column("prompt")
            values = [v or p for v, p in zip(values, prompts, strict=True)]
        return [values[i] for i in self._index]


class _Rows(Protocol):
    base: Path

    def __len__(self) -> int: ...
    def row(self, i: int) -> tuple[Mapping[str, Any], str]: ...
    def column(self, name: str) -> list[Any]: ...


class _Columns:
    """Rows that `datasets` opens; it keeps a memory-mapped copy in its cache."""

    def __init__(self, source: str, split: str) -> None:
        import datasets

        self.base = Path(source)
        files = _shards(self.base, split) if self.base.is_dir() else []
        if self.base.is_dir():
            _check_files(self.base, split, files)
        try:
            if files:
                paths = [str(path) for path in files]
                self._data: Any = datasets.load_dataset("parquet", data_files=paths, split="train")
            else:
                self._data = datasets.load_dataset(source, split=split)
        except Exception as error:  # the boundary to `datasets`, which raises many types
            raise DataError(
                f"cannot open '{source}': {type(error).__name__}: {error}: name a folder of"
                " parquet files, a .jsonl file or a data set of the hub"
            ) from error
        absent = [name for name in NEEDED if name not in self._data.column_names]
        if absent:
            raise DataError(
                f"'{source}': expected columns {', '.join(NEEDED)}, got no {', '.join(absent)}: see"
                " docs/reward_data.md, or use a reader of rewards.training.readers"
            )
        self._files = files
        self._ends = list(accumulate(pq.read_metadata(path).num_rows for path in files))

    def __len__(self) -> int:
        return len(self._data)

    def row(self, i: int) -> tuple[Mapping[str, Any], str]:
        file = bisect_right(self._ends, i)
        first = self._ends[file - 1] if file else 0
        name = str(self._files[file]) if self._files else str(self.base)
        return self._data[i], f"{name} row {i - first + 1}"

    def column(self, name: str) -> list[Any]:
        if name not in self._data.column_names:
            if name in DEFAULTS:
                return [DEFAULTS[name]] * len(self)
            raise DataError(f"expected one of {self._data.column_names}, got {name!r}")
        values = self._data.data.column(name).to_pylist()
        return [DEFAULTS.get(name) if v is None else v for v in values]


class _Lines:
    """The lines of a .jsonl file that belong to a split."""

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.base = path, path.parent
        self._rows: list[tuple[int, dict[str, Any]]] = []
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"expected a .jsonl file in UTF-8 at '{path}', got {error}") from error
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = self._parse(line, number)
                named = row.get("split") or split_of(row.get("group") or row.get("prompt") or "")
                if named == split:
                    self._rows.append((number, row))
        if not self._rows:
            raise DataError(
                f"'{path}': expected lines of split {split}, got none: add some, or name the split"
                ' of lines with "split"'
            )

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path} row {number}: expected JSON, got {error}") from error
        where = f"{self.path} row {number}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        if row.get("split") not in (None, *SPLITS):
            raise DataError(f"{where}: expected a split of {SPLITS}, got {row['split']!r}")
        for name in ("group", "prompt"):
            if not isinstance(row.get(name, ""), str):
                raise DataError(f"{where}: {name}: expected text, got {row[name]!r}")
        return row

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> tuple[Mapping[str, Any], str]:
        number, row = self._rows[i]
        return row, f"{self.path} row {number}"

    def column(self, name: str) -> list[Any]:
        if name not in (*NEEDED, *DEFAULTS) and not any(name in row for _, row in self._rows):
            raise DataError(f"'{self.path}': expected a column that some line has, got {name!r}")
        values = [row.get(name) for _, row in self._rows]
        return [DEFAULTS.get(name) if v is None else v for v in values]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")


def _shards(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(f"{split}-*.parquet"))


def _check_files(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Some files, and if they say of how many, all of these and no others."""
    if not files:
        raise DataError(
            f"expected {split}-*.parquet in '{folder}', got none: write the split first"
        )
    stated = {path.stem.partition("-of-")[2] for path in files}
    if stated != {""} and stated != {f"{len(files):05d}"}:
        raise DataError(
            f"expected all files of the split {split} in '{folder}', got"
            f" {[path.name for path in files][:8]}: write or copy the split again"
        )


def _chunks(items: Iterable[Any], size: int) -> Iterator[Iterator[Any]]:
    """Consecutive runs of at most `size`, each to be read before the next."""
    iterator = iter(items)
    for first in iterator:

        def run(first: Any = first) -> Iterator[Any]:
            yield first
            for _, item in zip(range(size - 1), iterator, strict=False):
                yield item

        yield run()


def _write(path: Path, groups: Iterable[Iterable[Judgement]], schema: Any) -> Any:
    """One file of row groups. Returns its schema, that of the first rows where none is given."""
    writer: pq.ParquetWriter | None = None
    try:
        for group in groups:
            rows = [_row(judgement) for judgement in group]
            schema = schema or _schema(rows)
            extra = sorted({name for row in rows for name in row} - set(schema.names))
            if extra:
                raise DataError(
                    f"expected the free columns of the first rows, {schema.names[len(_TYPES) :]},"
                    f" got {extra} as well: give every judgement the same"
                )
            try:
                table = pa.Table.from_pylist(rows, schema=schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"expected free columns of the types of the first rows, got {error}: make them"
                    " the same in all judgements"
                ) from error
            writer = writer or pq.ParquetWriter(path, schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    return schema


def _schema(rows: Sequence[Mapping[str, Any]]) -> pa.Schema:
    free = dict.fromkeys(name for row in rows for name in row if name not in _TYPES)
    fields = [pa.field(name, kind) for name, kind in _TYPES.items()]
    for name in free:
        try:
            kind = pa.array([row.get(name) for row in rows]).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(f"column {name!r}: expected values of one type, got {error}") from error
        fields.append(pa.field(name, pa.string() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def _row(judgement: Judgement) -> dict[str, Any]:
    clash = set(judgement.columns) & {*_TYPES, "split"}
    if clash:
        raise DataError(f"expected free columns of other names, got {sorted(clash)}: rename them")
    row = {name: getattr(judgement, name) for name in _TYPES}
    row |= {name: [_png(p) for p in row[name]] for name in ("images", "sources")}
    return {**judgement.columns, **row, "ratings": list(judgement.ratings)}


def _png(picture: images.Picture) -> bytes:
    buffer = BytesIO()
    images.to_pil(picture).save(buffer, format="PNG")
    return buffer.getvalue()
