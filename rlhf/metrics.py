"""metrics.jsonl: one row per iteration, on disk when `log` returns, mirrored to TensorBoard.

A row is a flat mapping of names to numbers with an integer `step`. NaN and infinities are written
as null, which JSON can carry and readers see as None: absent, never 0. A process killed while
writing leaves at most one unfinished last line, which readers skip and the next writer cuts off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.files import atomic_write_text, write_all

Row = dict[str, Any]
FILE = "metrics.jsonl"


def read_rows(path: Path) -> list[Row]:
    """Rows of a metrics file, oldest first; none if it does not exist. An unfinished last line is
    skipped.

    Raises CheckpointError if a finished line is not a JSON object.
    """
    if not path.is_file():
        return []
    *lines, _unfinished = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CheckpointError(
                f"expected a JSON object on line {number} of {path}, got {line[:60]!r}: "
                f"remove that line, or restore the file"
            ) from error
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace a metrics file by these rows, whole or not at all."""
    atomic_write_text(path, "".join(_line(row) for row in rows))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def _number(name: str, value: Any) -> Any:
    """A JSON value for one cell; one-element tensors and numpy scalars become numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"expected a number for metric '{name}', got {type(value).__name__}: reduce it first"
    )


class MetricsLog:
    """Appends rows to `folder/metrics.jsonl` and scalars to `folder/tensorboard/`.

    Steps must increase from row to row, so no iteration can be counted twice; a resumed run
    supersedes the rows past its checkpoint first (`Run.supersede`). Usable as a context manager.
    """

    def __init__(self, folder: Path, tensorboard: bool = True) -> None:
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self.path)
        self.last_step: int | None = rows[-1]["step"] if rows else None
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._handle).st_size
        self._size = self.path.read_bytes().rfind(b"\n") + 1  # end of the last finished line
        if self._size < size:
            os.ftruncate(self._handle, self._size)
        self._writer = _writer(folder / "tensorboard", self.last_step) if tensorboard else None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is on the disk when this returns. Raises ValueError, TypeError,
        OSError.
        """
        clean = {name: _number(name, value) for name, value in row.items()}
        step = clean.get("step")
        if type(step) is not int or (self.last_step is not None and step <= self.last_step):
            raise ValueError(
                f"expected an integer step after {self.last_step} in a row of {self.path}, got "
                f"{step!r}: "
                f"log each iteration once, and supersede rows before repeating steps"
            )
        data = _line(clean).encode()
        try:
            write_all(self._handle, data)
        except OSError:
            os.ftruncate(self._handle, self._size)  # no half row, even on a full disk
            raise
        self._size += len(data)
        self.last_step = step
        if self._writer is not None:
            for name, value in clean.items():
                if isinstance(value, int | float) and name != "step":
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """Release the files. Calling it again does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _writer(folder: Path, last_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a second to import: only writers pay it

    purge = (
        None if last_step is None else last_step + 1
    )  # TensorBoard hides events past a resume point
    return SummaryWriter(str(folder), purge_step=purge)
