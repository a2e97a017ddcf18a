"""The models that ship with the package, by name."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parent / "assets"


def resolve(model: str) -> str:
    """Directory of an embedded model, or `model` itself when it is not one of their names."""
    found = ROOT / model
    return str(found) if "/" not in model and (found / "model_index.json").is_file() else model


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of every file below a folder."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode())
        total.update(path.read_bytes())
    return total.hexdigest()
