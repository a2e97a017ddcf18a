"""One picture with its caption, as every data set is read and written.

On disk a record is a row of parquet with the columns of `FEATURES`, which `datasets` opens as
pictures and text: `datasets.load_dataset("parquet", data_files="runs/NAME/data/*.parquet")`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
from PIL import Image

from rewards import images
from rewards.errors import ImageError

Kind = Literal["general", "text", "knowledge", "structured"]
KINDS: tuple[str, ...] = get_args(Kind)


class Encoded:
    """A picture as its file had it; decoded once, when first looked at."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @cached_property
    def _decoded(self) -> tuple[Image.Image, int]:
        return images.decode(self.data)

    @property
    def pil(self) -> Image.Image:
        """The upright picture. Raises ImageError if it does not decode."""
        return self._decoded[0]

    @property
    def turned(self) -> int:
        """Degrees clockwise by which EXIF says the file lies: 0, 90, 180 or 270."""
        return self._decoded[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels, upright."""
        return self.pil.height, self.pil.width

    def __reduce__(self) -> tuple[type[Encoded], tuple[bytes]]:
        return Encoded, (self.data,)  # between processes without the pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A picture, what it shows, and for an edit the pictures that it was made from."""

    id: str  # where it came from
    picture: Encoded
    caption: str  # of an edit, its instruction
    kind: Kind = "general"
    sources: tuple[Encoded, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)  # free ones, JSON values

    def decode(self) -> None:
        """Raise ImageError unless the picture and all its sources decode."""
        for one in (self.picture, *self.sources):
            _ = one.pil


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """What should have been a record; `reason` is one of a few, for counting."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a source hold what. Sources may be one picture or a list of them."""

    image: str = "image"
    caption: str | None = "text"  # None: pictures alone, all captions are empty
    id: str = "id"
    kind: str = "kind"
    sources: str = "sources"


def record_of(
    row: Mapping[str, Any], names: Columns, id: str, kind: str, root: Path | None = None
) -> Record | Broken:
    """The record in a row. Absent `id` and `kind` columns give the values passed here.

    A picture is bytes, a path (relative ones below `root`) or the {"bytes", "path"} of `datasets`.
    A column `columns` with a JSON object, as we write it, is taken apart.
    """
    id = str(row.get(names.id) or id)
    caption = row.get(names.caption) if names.caption else ""
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8", errors="replace")
    kind = row.get(names.kind) or kind
    try:
        picture = _encoded(row.get(names.image), root)
        given = row.get(names.sources) or ()
        parts = given if isinstance(given, list | tuple) else (given,)
        sources = tuple(_encoded(part, root) for part in parts)
    except ImageError as error:
        return Broken(id=id, reason=str(error))
    if not isinstance(caption, str) or (names.caption and not caption.strip()):
        return Broken(id=id, reason="empty caption")
    if kind not in KINDS:
        return Broken(id=id, reason="unknown caption kind")
    return Record(
        id=id,
        picture=picture,
        caption=caption.strip(),
        kind=kind,  # type: ignore[arg-type]
        sources=sources,
        columns=_free(row, names),
    )


def _encoded(value: Any, root: Path | None) -> Encoded:
    """Raises ImageError with a countable reason."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return Encoded(value)
    if not isinstance(value, str) or not value:
        raise ImageError("no picture")
    try:
        return Encoded((root / value if root else Path(value)).read_bytes())
    except OSError as error:
        raise ImageError("no picture file") from error


_OURS = ("height", "width", "n_sources", "columns", "scores")  # written anew with a record


def _free(row: Mapping[str, Any], names: Columns) -> dict[str, Any]:
    known = {names.image, names.caption, names.id, names.kind, names.sources, *_OURS}
    free = {key: value for key, value in row.items() if key not in known}
    packed = row.get("columns")
    if isinstance(packed, str):
        free |= json.loads(packed)
    return {key: value for key, value in free.items() if _plain(value)}


def _plain(value: Any) -> bool:
    """Whether JSON can hold it; bytes, pictures and dates of foreign sets are left behind."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# --- on disk --------------------------------------------------------------------------------------


def schema() -> pa.Schema:
    """Columns of a written set, with what `datasets` needs to show pictures as pictures."""
    from datasets import Features, Image, List, Value

    text, number = Value("string"), Value("int32")
    return Features(
        {
            "id": text,
            "image": Image(),
            "height": number,  # of the picture, upright
            "width": number,
            "text": text,
            "kind": text,
            "sources": List(Image()),
            "n_sources": number,
            "columns": text,  # the free columns as one JSON object
            "scores": text,  # operator name -> score, as one JSON object
        }
    ).arrow_schema


def row_of(record: Record, scores: Mapping[str, float]) -> dict[str, Any]:
    """A row of `schema`; pictures keep the bytes of their files."""
    height, width = record.picture.size
    return {
        "id": record.id,
        "image": {"bytes": record.picture.data, "path": None},
        "height": height,
        "width": width,
        "text": record.caption,
        "kind": record.kind,
        "sources": [{"bytes": one.data, "path": None} for one in record.sources],
        "n_sources": len(record.sources),
        "columns": json.dumps(dict(record.columns), ensure_ascii=False, sort_keys=True),
        "scores": json.dumps(dict(scores), sort_keys=True),
    }


def records(rows: Iterable[Mapping[str, Any]]) -> Iterable[Record]:
    """The records of rows that `row_of` wrote. Raises ImageError for a row that is none."""
    for number, row in enumerate(rows):
        one = record_of(row, Columns(), str(number), "general")
        if isinstance(one, Broken):
            raise ImageError(f"row {number}: expected a record, got {one.reason}: prepare it again")
        yield one
