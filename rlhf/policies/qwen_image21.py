"""Qwen-Image-2.1 as a policy: the stock pipeline's parts, called one layout at a time.

Text and source tokens are modulated at t = 0 and attend causally, so their keys and values are the
same for every step and every member of a group: `prefix` computes them once per prompt, `velocity`
expands them over the rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import QwenImage21Pipeline
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from jaxtyping import UInt8
from peft import LoraConfig
from torch import Tensor

from rewards import images
from rlhf.assets import resolve
from rlhf.errors import ConfigError
from rlhf.policies import on_cpu
from rlhf.policies.base import Condition, Prefix
from rlhf.policies.slots import Slots
from rlhf.schedule import model_time, qwen_image21_sigmas

PIPELINE = "QwenImage21Pipeline"
LATENT_PX = 16
CELL_PX = 32  # one slot of the condition encoder covers 2x2 latents
LINEARS = ("to_q", "to_k", "to_v", "to_out.0", "proj", "gate_layer", "img_mlp.out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv:2106.09685) on the linears of every block. `alpha` / `rank` scales
    them.
    """

    rank: int = 32
    alpha: int = 32
    targets: tuple[str, ...] = LINEARS

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"policy.lora.rank: expected at least 1, got {self.rank}: 32 is usual"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """`model` is a directory or hub id, or `scenes`, the embedded base. `train`: LoRA adapters or
    all weights. `checkpointing` computes activations again in the backward pass instead of keeping
    them (arXiv:1604.06174).
    """

    model: str = "scenes"
    train: str = "lora"
    lora: Lora = field(default_factory=Lora)
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        if self.train not in ("lora", "full", "none"):
            raise ConfigError(f"policy.train: expected lora, full or none, got '{self.train}'")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"policy.dtype: expected float32 or bfloat16, got '{self.dtype}'")
        if self.train == "full" and self.dtype != "float32":
            raise ConfigError(
                f"policy.dtype: full weights are trained in float32, got {self.dtype}: write"
                " policy.dtype=float32, or policy.train=lora"
            )


def tokens_of(size: tuple[int, int]) -> int:
    """Latent tokens of a picture of (height, width). Raises ConfigError for a size the model cannot
    make.
    """
    height, width = size
    if height % CELL_PX or width % CELL_PX or min(height, width) < CELL_PX:
        right = "x".join(str(max(1, round(side / CELL_PX)) * CELL_PX) for side in size)
        raise ConfigError(
            f"expected a height and width that are multiples of {CELL_PX}, got {height}x{width}:"
            f" write {right}"
        )
    return (height // LATENT_PX) * (width // LATENT_PX)


class KVPrefix(Prefix):
    """A key-value cache of P prompts, expanded over rows on use."""

    def __init__(self, cache: QwenImage21KVCache, prompts: int) -> None:
        self.cache, self.prompts = cache, prompts

    def expanded(self, rows: int) -> QwenImage21KVCache:
        copies = rows // self.prompts
        if copies == 1:
            return self.cache
        out = QwenImage21KVCache(len(self.cache.layer_caches))
        for mine, theirs in zip(out.layer_caches, self.cache.layer_caches, strict=True):
            k, v = theirs.get()
            mine.k, mine.v = (_repeat(t, copies) for t in (k, v))
        return out


def _repeat(t: Tensor, copies: int) -> Tensor:
    """Rows repeated `copies` times, siblings adjacent; a view where there is one row."""
    return t.expand(copies, *t.shape[1:]) if len(t) == 1 else t.repeat_interleave(copies, dim=0)


def _elsewhere(condition: Condition) -> Condition:
    """A condition of no tokens after which a target has the same positions.

    With a cache the transformer still takes in the condition's tokens and then drops them. Text
    advances the position by one a token, a picture by its longer side whatever its area: one of
    no width stands for all of them.
    """
    text = len(condition.image_slots_L) - int(condition.image_slots_L.sum())
    extent = text + sum(max(height, width) for _, height, width in condition.source_shapes)
    return Condition(
        embeds_PLD=condition.embeds_PLD[:, :0],
        image_slots_L=condition.image_slots_L[:0],
        source_shapes=((1, extent, 0),),
    )


class QwenImage21Policy:
    """The policy of a `QwenImage21Pipeline`. Everything but the chosen weights is frozen."""

    def __init__(self, pipeline: QwenImage21Pipeline, config: PolicyConfig | None = None) -> None:
        self.config = config or PolicyConfig(train="none")
        self.pipeline = pipeline
        self.device = torch.device(self.config.device)
        self.dtype = getattr(torch, self.config.dtype)
        pipeline.to(self.device, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        self.transformer = pipeline.transformer
        for part in (pipeline.vae, pipeline.text_encoder, self.transformer):
            part.requires_grad_(False).eval()
        self._choose_trainable()
        if self.device.type == "cpu":
            on_cpu.suit(self.transformer)
        if self.config.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.slots = Slots(self.transformer)
        self._conditions: dict[tuple[object, ...], Condition] = {}

    def _choose_trainable(self) -> None:
        if self.config.train == "full":
            self.transformer.requires_grad_(True)
        elif self.config.train == "lora":
            lora = self.config.lora
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.transformer.add_adapter(
                    LoraConfig(
                        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)
                    )
                )
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = (
                    parameter.data.float()
                )  # masters: a small step must not be rounded away

    # --- conditions
    # ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, text: str, sources: Sequence[np.ndarray] = ()) -> Condition:
        """Condition of one prompt and its source pictures (uint8 RGB (3, H, W))."""
        key = (text, *((s.shape, s.tobytes()) for s in sources))
        if key not in self._conditions:
            self._conditions[key] = self.encode_variants([text], sources)[0]
        return self._conditions[key]

    @torch.no_grad()
    def encode_variants(
        self, texts: Sequence[str], sources: Sequence[np.ndarray] = ()
    ) -> list[Condition]:
        """Conditions of several prompts about the same source pictures, each of its own exact
        length.
        """
        pictures: list[Any] = [images.to_pil(s).convert("RGBA") for s in sources]
        embeds, mask, slots = self.pipeline.encode_prompt(list(texts), image=pictures or None)
        lengths = [embeds.shape[1]] * len(texts) if mask is None else mask.sum(1).tolist()
        latents, shapes = self._encode_sources(sources)
        return [
            Condition(
                embeds_PLD=row[None, :n].float(),
                image_slots_L=slot[:n],
                sources_PMC=latents,
                source_shapes=shapes,
            )
            for row, slot, n in zip(embeds, slots, lengths, strict=True)
        ]

    def forget(self) -> None:
        """Drop the cached conditions."""
        self._conditions.clear()

    def _encode_sources(self, sources: Sequence[np.ndarray]):
        packed, shapes = [], []
        for source in sources:
            size = (source.shape[1], source.shape[2])
            self.latent_shape(size)
            rgb = images.to_float(torch.from_numpy(source)[None])
            rgba = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1).to(self.device, self.dtype)
            packed.append(
                self.pack(self.pipeline.vae.encode(rgba.unsqueeze(2)).latent_dist.mode()[:, :, 0])
            )
            shapes.append((1, size[0] // LATENT_PX, size[1] // LATENT_PX))
        return (torch.cat(packed, dim=1) if packed else None), tuple(shapes)

    # --- the velocity field
    # ----------------------------------------------------------------------------------

    def prefix(self, condition: Condition, slot: str = "train") -> KVPrefix:
        """Keys and values of the condition tokens; the smallest target rides along unused."""
        prompts = len(condition.embeds_PLD)
        target = condition.embeds_PLD.new_zeros(prompts, 4, self.transformer.config.in_channels)
        cache = on_cpu.KeysOnly(len(self.transformer.transformer_blocks))
        self._call(slot, target, target.new_zeros(prompts), condition, (1, 2, 2), cache, "extract")
        return KVPrefix(cache, prompts)

    def velocity(
        self,
        x_BNC: Tensor,
        sigma_B: Tensor,
        condition: Condition,
        *,
        size: tuple[int, int],
        prefix: Prefix | None = None,
        slot: str = "train",
    ) -> Tensor:
        """See `Policy.velocity`. Without a prefix the whole sequence is computed (same numbers in
        float32).
        """
        shape = (1, size[0] // LATENT_PX, size[1] // LATENT_PX)
        time = model_time(sigma_B.to(self.device), self.dtype)
        if isinstance(prefix, KVPrefix):
            cache, seen = prefix.expanded(len(x_BNC)), _elsewhere(condition)
            out = self._call(slot, x_BNC, time, seen, shape, cache, "cached")
        else:
            out = self._call(slot, x_BNC, time, condition, shape, None, None)
        return out[:, -x_BNC.shape[1] :].float().to(x_BNC.device)

    def _call(self, slot, x_BNC, time_B, condition, shape, cache, mode) -> Tensor:
        rows, copies = len(x_BNC), len(x_BNC) // len(condition.embeds_PLD)
        tokens = x_BNC.to(self.device, self.dtype)
        if condition.sources_PMC is not None:
            tokens = torch.cat(
                [_repeat(condition.sources_PMC, copies).to(tokens.dtype), tokens], dim=1
            )
        slots = torch.cat(
            [condition.image_slots_L, condition.image_slots_L.new_ones(shape[1] * shape[2] // 4)]
        )
        return self.slots.call(
            slot,
            hidden_states=tokens,
            encoder_hidden_states=_repeat(condition.embeds_PLD, copies).to(self.dtype),
            timestep=time_B.expand(rows),
            img_shapes=[[*condition.source_shapes, shape]] * rows,
            img_mask=slots.expand(rows, -1),
            kv_cache=cache,
            kv_cache_mode=mode,
            return_dict=False,
        )[0]

    # --- latents and pictures
    # --------------------------------------------------------------------------------

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        return tokens_of(size), self.transformer.config.in_channels

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        tokens, _ = self.latent_shape(size)
        return qwen_image21_sigmas(steps, tokens, self.pipeline.scheduler.config)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipeline.vae.config
        mean, std = (
            torch.tensor(v, device=like.device).view(1, 1, -1)
            for v in (config.latents_mean, config.latents_std)
        )
        return mean, std

    def pack(self, latents_BCYX: Tensor) -> Tensor:
        """Encoder output to normalised packed latents (B, N, C), float32."""
        packed = latents_BCYX.float().flatten(2).transpose(1, 2)
        mean, std = self._statistics(packed)
        return (packed - mean) / std

    @torch.no_grad()
    def decode(self, x0_GNC: Tensor, size: tuple[int, int]) -> UInt8[Tensor, "g 3 h w"]:
        mean, std = self._statistics(x0_GNC)
        grid = (x0_GNC.float() * std + mean).transpose(1, 2)
        grid = grid.unflatten(2, (1, size[0] // LATENT_PX, size[1] // LATENT_PX))
        decoded = self.pipeline.vae.decode(grid.to(self.device, self.dtype), return_dict=False)[0][
            :, :3, 0
        ]
        return images.to_uint8(decoded.float()).cpu()

    def export(self, folder: str, tensors: Mapping[str, Tensor]) -> None:
        """LoRA as `pytorch_lora_weights.safetensors` for `load_lora_weights`; full weights as a
        transformer.
        """
        if self.config.train == "lora":
            layers: dict[str, Any] = {
                n.replace(".default", ""): t.contiguous() for n, t in tensors.items()
            }
            metadata = {"r": self.config.lora.rank, "lora_alpha": self.config.lora.alpha}
            QwenImage21Pipeline.save_lora_weights(
                folder,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=metadata
                | {"target_modules": list(self.config.lora.targets)},
            )
        else:
            weights = {**self.transformer.state_dict(), **tensors}
            with torch.device("meta"):
                shell = type(self.transformer).from_config(self.transformer.config)
            shell.load_state_dict(weights, assign=True)
            shell.to(self.dtype).save_pretrained(folder)


def locate_base(model: str) -> str:
    """Directory or hub id of a base, looked at but not opened.

    Raises:
        ConfigError: nothing there, or a directory of another pipeline class.
    """
    path = resolve(model)
    index = Path(path) / "model_index.json"
    if index.is_file():
        found = json.loads(index.read_text()).get("_class_name")
        if found != PIPELINE:
            raise ConfigError(
                f"policy.model: expected a {PIPELINE}, got a {found} in {path}: name another base"
            )
    elif Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/")):
        raise ConfigError(
            "policy.model: expected a directory with model_index.json, a hub id or 'scenes', got"
            f" '{model}'"
        )
    return path


def load_policy(config: PolicyConfig) -> QwenImage21Policy:
    """Open a checkpoint directory, hub id or embedded model. Raises ConfigError if it is none."""
    path = locate_base(config.model)
    try:
        pipeline = QwenImage21Pipeline.from_pretrained(path, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(f"policy.model: could not open '{config.model}': {error}") from error
    return QwenImage21Policy(pipeline, config)
