"""What frozen encoders said of pictures and captions, kept on disk or in memory.

    <folder>/<encoder>/<digest>.safetensors    what was asked for at once, written and renamed

An entry is found by a hash of what was encoded, in a directory named after a hash of the encoder's
weights and preprocessing, so another encoder never sees it. Every tensor has its checksum in the
file's header and is checked when read; a damaged file is counted and its values computed again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlhf.errors import CheckpointError
from rlhf.files import atomic_write_bytes, sweep
from rlhf.weights import checksum

Value = Mapping[str, Tensor]
Compute = Callable[[list[int]], Sequence[Value | None]]

_ABANDONED_S = 3600.0  # no write takes as long


def content(*parts: str | bytes | np.ndarray) -> str:
    """Hash of a picture, a caption or both: equal only for equal parts in the same order."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            head, data = f"{part.dtype}{part.shape}", np.ascontiguousarray(part).tobytes()
        else:
            head, data = type(part).__name__, part.encode() if isinstance(part, str) else part
        total.update(f"{head}:{len(data)};".encode())
        total.update(data)
    return total.hexdigest()


def encoder_hash(modules: Mapping[str, torch.nn.Module], preprocessing: Mapping[str, Any]) -> str:
    """Hash of weights (names, shapes, bytes) and of settings (JSON) that decide what comes out."""
    sums = {name: checksum(module.state_dict()) for name, module in modules.items()}
    text = json.dumps([sums, preprocessing], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(slots=True)
class Traffic:
    """What a cache did: values found and computed, and files found damaged and removed."""

    found: int = 0
    computed: int = 0
    damaged: int = 0


class TensorCache:
    """Named tensors by content hash. Several processes may fill one folder."""

    def __init__(self, folder: Path | str, encoder: str, per_file: int = 256) -> None:
        self.folder, self.per_file = Path(folder) / encoder, per_file
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder, older_than_s=_ABANDONED_S)
        self.traffic = Traffic()
        self._places: dict[str, Path] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._list(path)

    def _list(self, path: Path) -> None:
        """Remember which entries a file holds; one whose header is damaged is removed."""
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
        except (SafetensorError, OSError):
            self._drop(path)
            return
        self._places |= {name.partition("/")[0]: path for name in names}

    def fetch(self, keys: Sequence[str], compute: Compute) -> list[Value | None]:
        """The values of keys, in order. `compute` gets the positions of those that are not here and
        returns theirs, None for what has none and is not kept; a key that occurs twice is computed
        once.

        Raises:
            CheckpointError: `compute` returned another number of values.
        """
        values = {key: self._read(key) for key in dict.fromkeys(keys)}
        missing = [key for key, value in values.items() if value is None]
        self.traffic.found += len(values) - len(missing)
        for start in range(0, len(missing), self.per_file):
            part = missing[start : start + self.per_file]
            made = compute([keys.index(key) for key in part])
            if len(made) != len(part):
                raise CheckpointError(
                    f"expected {len(part)} values to cache, got {len(made)}: return one per index"
                )
            new = {
                k: {n: t.detach().cpu() for n, t in v.items()}
                for k, v in zip(part, made, strict=True)
                if v is not None
            }
            if new:
                self._write(new)
            values |= new
            self.traffic.computed += len(new)
        return [values[key] for key in keys]

    def _read(self, key: str) -> Value | None:
        """An entry, or None if it is absent or damaged."""
        path = self._places.get(key)
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                sums = file.metadata()
                wanted = [name for name in sums if name.partition("/")[0] == key]
                found = {name: file.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError):
            found, sums = {}, {}
        if found and all(_crc(tensor) == sums[name] for name, tensor in found.items()):
            return {name.partition("/")[2]: tensor for name, tensor in found.items()}
        self._drop(path)
        return None

    def _drop(self, path: Path) -> None:
        """Remove a damaged file; all that it held will be computed again."""
        self.traffic.damaged += 1
        path.unlink(missing_ok=True)
        self._places = {key: place for key, place in self._places.items() if place != path}

    def _write(self, values: Mapping[str, Value]) -> None:
        flat = {f"{k}/{n}": t.contiguous() for k, v in values.items() for n, t in v.items()}
        sums = {name: _crc(tensor) for name, tensor in flat.items()}
        path = self.folder / f"{content(*sorted(flat))}.safetensors"
        atomic_write_bytes(path, save(flat, metadata=sums))
        self._places |= {key: path for key in values}


def _crc(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.tobytes()):08x}"


class MemoryCache:
    """The same in this process alone; the oldest of more than `most` values are dropped."""

    def __init__(self, most: int = 65536) -> None:
        self.most, self.traffic = most, Traffic()
        self._values: OrderedDict[str, Value] = OrderedDict()

    def fetch(self, keys: Sequence[str], compute: Compute) -> list[Value | None]:
        """See `TensorCache.fetch`."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._values]
        made = compute([keys.index(key) for key in missing])
        new = {k: v for k, v in zip(missing, made, strict=True) if v is not None}
        self.traffic.found += len(set(keys)) - len(missing)
        self.traffic.computed += len(new)
        found = [new[key] if key in new else self._values.get(key) for key in keys]
        self._values |= new
        while len(self._values) > self.most:
            self._values.popitem(last=False)
        return found
