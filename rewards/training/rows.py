"""A row of a table, and a picture in one, as the records of `schema`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from rewards import images
from rewards.errors import DataError, ImageError
from rewards.training.schema import Judgement, Kind

NEEDED = ("kind", "axis", "prompt", "images", "ratings")
DEFAULTS: Mapping[str, Any] = {
    "category": "general",
    "sources": (),
    "group": "",
    "annotator": "",
    "confidence": 1.0,
    "low": 1.0,
    "high": 5.0,
}


def judgement_of(row: Mapping[str, Any], base: Path = Path()) -> Judgement:
    """A row of either form as a judgement; paths of pictures are relative to `base`.

    Raises:
        DataError: a column that is missing or of another type.
        ImageError: a picture that does not open.
    """
    known: dict[str, Any] = {name: row.get(name) for name in NEEDED}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise DataError(f"expected {', '.join(NEEDED)}, got no {', '.join(missing)}: add it")
    known |= {n: d if row.get(n) is None else row[n] for n, d in DEFAULTS.items()}
    for name in ("images", "sources", "ratings"):
        if isinstance(known[name], str | bytes) or not isinstance(known[name], Sequence):
            raise DataError(f"{name}: expected a list, got {known[name]!r:.80}: put it in brackets")
    if known["kind"] not in get_args(Kind):
        raise DataError(f"kind: expected point, pair or rank, got {known['kind']!r}")
    for name in ("axis", "prompt", "category", "group", "annotator"):
        if not isinstance(known[name], str):
            raise DataError(f"{name}: expected text, got {known[name]!r}: put it in quotes")
    try:
        for name in ("confidence", "low", "high"):
            known[name] = float(known[name])
        known["ratings"] = tuple(float(rating) for rating in known["ratings"])
    except (TypeError, ValueError) as error:
        raise DataError(f"expected numbers, got {error}: correct the row") from error
    for name in ("images", "sources"):
        known[name] = tuple(picture(value, base) for value in known[name])
    free = {n: v for n, v in row.items() if n not in known and v is not None and n != "split"}
    return Judgement(**known, columns=free)


def picture(value: object, base: Path = Path()) -> images.Picture:
    """Encoded bytes, a path from `base`, or what `datasets` makes of them, as pixels, upright.

    Raises:
        ImageError: none of these, or no picture.
    """
    if isinstance(value, Mapping):  # how `datasets` keeps an undecoded picture
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _decoded(value)
    if isinstance(value, str):
        try:
            data = (base / value).read_bytes()
        except OSError as error:
            raise ImageError(f"expected a picture at {base / value}, got {error}") from error
        return _decoded(data)
    if isinstance(value, Image.Image):
        return images.from_pil(value)
    raise ImageError(f"expected encoded bytes or a path, got {type(value).__name__}")


@lru_cache(maxsize=1024)
def _decoded(data: bytes) -> images.Picture:
    """Pixels, read-only: the judgements of a prompt repeat its pictures on every axis."""
    pixels = images.from_pil(images.decode(data)[0])
    pixels.flags.writeable = False
    return pixels
