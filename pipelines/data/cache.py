"""What a frozen encoder said, kept on disk: latents of pictures, conditions of captions.

    <folder>/<encoder>/<digest>.safetensors    some hundred values each, written once and renamed

An entry is found by a hash of what was encoded, in a directory named after a hash of the encoder's
weights and preprocessing, so another encoder never sees it. Every tensor has its checksum in the
file's header and is checked when read; a damaged file is counted and its values computed again.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipelines.data.scenes import rgba
from rlhf.errors import CheckpointError
from rlhf.files import atomic_write_bytes, sweep
from rlhf.policies.base import Condition
from rlhf.policies.qwen_image21 import LATENT_PX, QwenImage21Policy
from rlhf.weights import checksum

Value = Mapping[str, Tensor]


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

    def fetch(
        self, keys: Sequence[str], compute: Callable[[list[int]], Sequence[Value]]
    ) -> list[dict[str, Tensor]]:
        """The values of keys, in order. `compute` gets the positions of those that are not here and
        returns theirs; a key that occurs twice is computed once.

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
            }
            self._write(new)
            values |= new
            self.traffic.computed += len(part)
        return [dict(values[key] or {}) for key in keys]

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
        sweep(self.folder)
        flat = {f"{k}/{n}": t.contiguous() for k, v in values.items() for n, t in v.items()}
        sums = {name: _crc(tensor) for name, tensor in flat.items()}
        path = self.folder / f"{content(*sorted(flat))}.safetensors"
        atomic_write_bytes(path, save(flat, metadata=sums))
        self._places |= {key: path for key in values}


def _crc(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.tobytes()):08x}"


# --- the two caches of a policy -------------------------------------------------------------------


def latent_cache(policy: QwenImage21Policy, folder: Path | str) -> TensorCache:
    """The cache of this policy's autoencoder."""
    vae = policy.pipeline.vae
    settings = {"of": "latents", "dtype": str(policy.dtype), "config": dict(vae.config)}
    return TensorCache(folder, encoder_hash({"vae": vae}, settings))


@torch.no_grad()
def latents(
    policy: QwenImage21Policy, pictures: Sequence[np.ndarray], cache: TensorCache
) -> list[Tensor]:
    """Normalised packed latents (N, C) of uint8 RGB (3, H, W) pictures, H and W multiples of 32."""

    def compute(index: list[int]) -> list[Value]:
        return [{"latent": _encode(policy, pictures[i])} for i in index]

    found = cache.fetch([content(p) for p in pictures], compute)
    return [value["latent"] for value in found]


def _encode(policy: QwenImage21Policy, picture: np.ndarray) -> Tensor:
    policy.latent_shape((picture.shape[1], picture.shape[2]))
    rows = rgba(picture[None]).to(policy.device, policy.dtype)
    coded = policy.pipeline.vae.encode(rows.unsqueeze(2))
    return policy.pack(coded.latent_dist.mode()[:, :, 0])[0]  # type: ignore[union-attr]


def condition_cache(policy: QwenImage21Policy, folder: Path | str) -> TensorCache:
    """The cache of this policy's condition encoder, and of its autoencoder for source pictures."""
    pipeline = policy.pipeline
    modules = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    processor = pipeline.processor
    settings = {
        "of": "conditions",
        "dtype": str(policy.dtype),
        "vae": dict(pipeline.vae.config),
        "tokenizer": processor.tokenizer.backend_tokenizer.to_str(),
        "pictures": processor.image_processor.to_dict(),
    }
    return TensorCache(folder, encoder_hash(modules, settings))


@torch.no_grad()
def conditions(
    policy: QwenImage21Policy,
    captions: Sequence[str],
    sources: Sequence[Sequence[np.ndarray]],
    cache: TensorCache,
) -> list[Condition]:
    """One condition per caption and its source pictures (uint8 RGB (3, H, W), none for a plain
    prompt), each of its own exact length.
    """

    def compute(index: list[int]) -> list[Value]:
        made = (policy.encode_variants([captions[i]], sources[i])[0] for i in index)
        return [_tensors(one) for one in made]

    keys = [content(text, *given) for text, given in zip(captions, sources, strict=True)]
    return [
        _condition(value, given)
        for value, given in zip(cache.fetch(keys, compute), sources, strict=True)
    ]


def _tensors(condition: Condition) -> Value:
    out = {"embeds": condition.embeds_PLD, "slots": condition.image_slots_L}
    return out | ({} if condition.sources_PMC is None else {"sources": condition.sources_PMC})


def _condition(value: Value, sources: Sequence[np.ndarray]) -> Condition:
    return Condition(
        embeds_PLD=value["embeds"],
        image_slots_L=value["slots"],
        sources_PMC=value.get("sources"),
        source_shapes=tuple(
            (1, one.shape[1] // LATENT_PX, one.shape[2] // LATENT_PX) for one in sources
        ),
    )
