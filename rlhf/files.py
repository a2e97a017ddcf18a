"""Writing files so that a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_all(handle: int, data: bytes) -> None:
    """Write every byte to an open descriptor and force it to the disk. Raises OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write and fsync a file in place. For files inside an `atomic_directory`. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_all(handle, data)
    finally:
        os.close(handle)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; on OSError the old file is untouched and nothing is left over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        write_durably(part, data)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """`atomic_write_bytes` in UTF-8."""
    atomic_write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """Readable JSON that any reader can parse: NaN and infinities raise ValueError."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path` that becomes `path` when the block ends well.

    `path` must not exist. When the block raises, the directory is removed and `path` never appears.
    A killed process can leave a `.tmp-` directory behind; `sweep` removes those.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    part.mkdir()
    try:
        yield part
        for folder in sorted(p for p in part.rglob("*") if p.is_dir()):
            sync_directory(folder)
        sync_directory(part)
        os.rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync_directory(path.parent)


def _changed(path: Path) -> float:
    """Time of the last change; a file that has been renamed meanwhile is new."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


def sweep(folder: Path, older_than_s: float = 0.0) -> int:
    """Remove what killed writers left in `folder`, of that age in seconds; return how many entries
    went. With an age it can be called beside others that write there.
    """
    found = list(folder.glob(".*.tmp-*")) if folder.is_dir() else []
    latest = time.time() - older_than_s
    leftovers = [p for p in found if not older_than_s or _changed(p) < latest]
    for item in leftovers:
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)
    return len(leftovers)
