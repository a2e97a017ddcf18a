"""Checkpoints: complete or not there.

    checkpoints/step_000012/
        <part>.safetensors     one file per part of the state, such as slots/train.safetensors
        meta.json              everything that is not a tensor
        complete.json          step, metric, and size and sha256 of every other file; written last

The directory is built under another name, forced to the disk and renamed, so a process killed or a
disk full at any moment leaves the checkpoints before it as they were. Reading checks every byte
against complete.json. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf.errors import CheckpointError
from rlhf.files import atomic_directory, json_text, sweep, write_durably

SEAL = "complete.json"


@dataclass(frozen=True, slots=True)
class State:
    """What a run needs to continue: tensors by part and name, and JSON for the rest.

    Tensors come back on the CPU with the same dtype, shape and bits. JSON turns tuples into lists.
    """

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    meta: Mapping[str, Any] = field(default_factory=dict)


def save(
    folder: Path,
    step: int,
    state: State,
    keep_last: int = 2,
    keep_best: int = 0,
    metric: float | int | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Write `folder/step_NNNNNN`, then remove checkpoints that are neither among the newest nor the
    best.

    `metric` ranks this checkpoint for `keep_best` (higher is better; None is never best). `files`
    are further files by relative path. Raises CheckpointError, with `folder` as it was, if anything
    fails.
    """
    if keep_last < 1:
        raise CheckpointError(
            f"expected keep_last >= 1, got {keep_last}: the newest checkpoint is always kept"
        )
    target = folder / f"step_{step:06d}"
    if (target / SEAL).is_file():
        raise CheckpointError(f"{target} exists: resume with a later step, or supersede it first")
    try:
        sweep(folder)
        if target.exists():
            shutil.rmtree(target)  # unsealed, so nobody can resume from it
        with atomic_directory(target) as part:
            for name, tensors in state.tensors.items():
                _write_tensors(part / f"{name}.safetensors", tensors)
            for name, data in {
                **(files or {}),
                "meta.json": json_text(state.meta).encode(),
            }.items():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                write_durably(part / name, data)
            seal = {"step": step, "metric": metric, "files": _inventory(part)}
            write_durably(part / SEAL, json_text(seal).encode())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target}: {error}. Nothing was left half-written and earlier "
            "checkpoints are "
            f"intact: free disk space or write elsewhere, then --resume"
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the state of step {step} cannot be stored: {error}") from error
    _prune(folder, keep_last, keep_best)
    return target


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file, on the disk. Tensors that share memory are stored apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        stored = tensor.detach().cpu().contiguous()
        pointer = stored.untyped_storage().data_ptr()
        if pointer in seen or stored.untyped_storage().nbytes() != stored.nbytes:
            stored = stored.clone()
        seen.add(stored.untyped_storage().data_ptr())
        plain[name] = stored
    save_file(plain, path)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _inventory(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in paths
    }


def sha256(path: Path) -> str:
    """Hex digest of a file. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _seal(path: Path) -> dict[str, Any]:
    """complete.json of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((path / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete checkpoint ({error}): remove that directory to use the one "
            "before it"
        ) from error


def completed(folder: Path) -> list[Path]:
    """Complete checkpoints in a run or checkpoints directory, oldest first."""
    inner = folder / "checkpoints"
    base = inner if inner.is_dir() else folder
    found = [p for p in base.glob("step_*") if (p / SEAL).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def latest(folder: Path) -> Path | None:
    """Newest complete checkpoint of a run or checkpoints directory, or None."""
    found = completed(folder)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """Iteration a checkpoint was written after. Raises CheckpointError."""
    return _seal(path)["step"]


def locate(path: Path, step: int | None = None) -> Path:
    """The one meant by a checkpoint, run or checkpoints directory. Raises CheckpointError."""
    if (path / SEAL).is_file() and step is None:
        return path
    found = {int(p.name.removeprefix("step_")): p for p in completed(path)}
    if not found:
        raise CheckpointError(f"expected a complete checkpoint under {path}, found none")
    if step is not None and step not in found:
        raise CheckpointError(f"{path} has no checkpoint of step {step}: it has {sorted(found)}")
    return found[max(found) if step is None else step]


def load(path: Path, step: int | None = None) -> State:
    """Read and verify a checkpoint, given itself or its run (newest unless `step` says). Raises
    CheckpointError.
    """
    source = locate(path, step)
    listed = _seal(source)["files"]
    for name, facts in listed.items():
        _verify(source / name, facts, source)
    names = [name for name in listed if name.endswith(".safetensors")]
    try:
        tensors = {name.removesuffix(".safetensors"): load_file(source / name) for name in names}
        meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"could not read {source}: {error}") from error
    return State(tensors, meta)


def _verify(path: Path, facts: Mapping[str, Any], source: Path) -> None:
    """Raise CheckpointError unless the file has the size and digest that were sealed."""
    advice = f"remove {source} to continue from the checkpoint before it, or restore the file"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {advice}")
    if path.stat().st_size != facts["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: expected {facts['bytes']} bytes, got {path.stat().st_size}: "
            f"{advice}"
        )
    if sha256(path) != facts["sha256"]:
        raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {SEAL}: {advice}")


def _prune(folder: Path, keep_last: int, keep_best: int) -> None:
    """Remove complete checkpoints outside the newest `keep_last` and best `keep_best` (ties: the
    later).
    """
    found = completed(folder)
    ranked = [(_seal(p)["metric"], p) for p in found]
    best = sorted(((m, p.name, p) for m, p in ranked if m is not None), reverse=True)[:keep_best]
    keep = {*found[-keep_last:], *(p for _, _, p in best)}
    for path in found:
        if path not in keep:
            gone = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:8]}")
            os.rename(path, gone)  # never half a checkpoint under its own name
            shutil.rmtree(gone, ignore_errors=True)
