"""What the policies of stock diffusers pipelines share: freezing, adapters, slots, conditions read
once, export.

A family is a subclass: it names its pipeline class and linears, and implements the rest of
`Policy`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn

from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.base import Condition, Policy
from rlhf.policies.config import PolicyConfig
from rlhf.policies.slots import Slots

Parts = Mapping[str, Mapping[str, Any]]  # part, or "pipeline" for the whole -> its configuration
REMEMBERED = 128  # conditions: more than an iteration's, far fewer than a set of prompts has


class PipelinePolicy(Policy):
    """The policy of a stock pipeline. Everything but the chosen weights is frozen."""

    PIPELINE: ClassVar[type[DiffusionPipeline]]
    LINEARS: ClassVar[tuple[str, ...]]  # what LoRA adapts unless told otherwise
    READS: ClassVar[tuple[str, ...]] = ("scheduler",)  # parts that `tokens` and `grid` look at
    EDITS: ClassVar[bool] = True  # whether prompts may have source pictures

    def __init__(self, pipeline: Any, config: PolicyConfig | None = None) -> None:
        self.config = config or PolicyConfig(train="none")
        self.pipeline = pipeline
        self.device = torch.device(self.config.device)
        self.dtype = getattr(torch, self.config.dtype)
        pipeline.to(self.device, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        self.transformer = pipeline.transformer
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self._choose_trainable()
        if self.device.type == "cpu":
            self._suit_cpu()
        if self.config.checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.slots = Slots(self.transformer)
        self._conditions: dict[tuple[object, ...], Condition] = {}

    @classmethod
    def open(cls, config: PolicyConfig, path: str) -> PipelinePolicy:
        """The policy of a directory or hub id. Raises ConfigError if it cannot be opened."""
        try:
            index: Any = cls.PIPELINE.load_config(path)
            left_out = cls.left_out(config, index)
            pipeline = cls.PIPELINE.from_pretrained(path, dtype=torch.float32, **left_out)
        except (OSError, ValueError) as error:  # nothing there, or a part is missing
            raise ConfigError(f"policy.model: could not open '{config.model}': {error}") from error
        return cls(pipeline, config)

    @classmethod
    def left_out(cls, config: PolicyConfig, index: Mapping[str, Any]) -> dict[str, None]:
        """Parts of the pipeline that are not loaded, each as None. `index`: model_index.json."""
        return {}

    @classmethod
    @abstractmethod
    def tokens(cls, size: tuple[int, int], parts: Parts) -> int:
        """N of the packed latents of a picture of (height, width), known before weights are.

        Raises ConfigError for a size that the model cannot make.
        """

    @classmethod
    @abstractmethod
    def grid(cls, steps: int, size: tuple[int, int], parts: Parts) -> tuple[float, ...]:
        """The stock pipeline's noise levels, known before weights are.

        Raises ConfigError for such a size, and for a kind of grid that is not implemented.
        """

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """See `Policy.latent_shape`."""
        return self.tokens(size, self.parts), self.transformer.config.in_channels

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        """See `Policy.sigmas`."""
        return self.grid(steps, size, self.parts)

    @property
    def parts(self) -> Parts:
        """Configurations of the pipeline's parts, and its own."""
        components = self.pipeline.components.items()
        own = {"pipeline": self.pipeline.config}
        return own | {name: part.config for name, part in components if hasattr(part, "config")}

    def _choose_trainable(self) -> None:
        if self.config.train == "full":
            self.transformer.requires_grad_(True)
        elif self.config.train == "lora":
            lora = self.config.lora
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                self.transformer.add_adapter(
                    LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=self._targets())
                )
        for parameter in self.transformer.parameters():
            if parameter.requires_grad:
                parameter.data = (
                    parameter.data.float()
                )  # masters: a small step must not be rounded away

    def _suit_cpu(self) -> None:  # noqa: B027
        """Put operations in place that a CPU computes faster, where the family has some."""

    def _targets(self) -> list[str]:
        targets = self.config.lora.targets
        return list(self.LINEARS if targets is None else targets)

    def encode(self, text: str, sources: Sequence[np.ndarray] = ()) -> Condition:
        """Condition of one prompt and its source pictures (uint8 RGB (3, H, W)); those of the
        prompts that were used last are remembered.
        """
        key = (text, *((s.shape, s.tobytes()) for s in sources))
        found = self._conditions.pop(key, None) or self.encode_variants([text], sources)[0]
        self._conditions[key] = found  # the last one that was used
        if len(self._conditions) > REMEMBERED:
            del self._conditions[next(iter(self._conditions))]
        return found

    @abstractmethod
    def encode_variants(
        self, texts: Sequence[str], sources: Sequence[np.ndarray] = ()
    ) -> list[Condition]:
        """Conditions of several prompts about the same source pictures."""

    def forget(self) -> None:
        """Drop the cached conditions."""
        self._conditions.clear()

    def merged(self, slot: str = "train") -> dict[str, Tensor]:
        """The weights of a slot as the stock transformer names them, LoRA in its place: W + B A
        alpha / rank (arXiv:2106.09685).
        """
        held = {**self.transformer.state_dict(), **self.slots.tensors(slot)}
        scale, made = self.config.lora.alpha / self.config.lora.rank, {}
        for name, tensor in held.items():
            if ".lora_" not in name:
                linear = name.removesuffix(".base_layer.weight")
                low = [held.get(f"{linear}.lora_{part}.default.weight") for part in "BA"]
                if low[0] is not None and low[1] is not None:
                    tensor = tensor + scale * (low[0] @ low[1]).to(tensor.dtype)
                made[name.replace(".base_layer", "")] = tensor.detach()
        return made

    @torch.no_grad()
    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Put what another policy `merged` in place of the weights, under LoRA if there is some.
        Raises CheckpointError for those of another architecture.
        """
        mine = {
            name.replace(".base_layer", ""): tensor
            for name, tensor in self.transformer.state_dict().items()
            if ".lora_" not in name
        }
        for name in sorted(mine.keys() | weights.keys()):
            own, other = (
                t.shape if t is not None else None for t in (mine.get(name), weights.get(name))
            )
            if own != other:
                raise CheckpointError(
                    f"expected weights of {self.config.model}'s architecture, got {name} of"
                    f" {other} instead of {own}: name a run of the same base"
                )
            mine[name].copy_(weights[name])

    def export(self, folder: str, tensors: Mapping[str, Tensor]) -> None:
        """LoRA as `pytorch_lora_weights.safetensors` for `load_lora_weights`; full weights as a
        transformer.
        """
        if self.config.train == "lora":
            layers: dict[str, Any] = {
                n.replace(".default", ""): t.contiguous() for n, t in tensors.items()
            }
            metadata = {"r": self.config.lora.rank, "lora_alpha": self.config.lora.alpha}
            self.pipeline.save_lora_weights(
                folder,
                transformer_lora_layers=layers,
                transformer_lora_adapter_metadata=metadata | {"target_modules": self._targets()},
            )
        else:
            weights = {**self.transformer.state_dict(), **tensors}
            with torch.device("meta"):
                shell = type(self.transformer).from_config(self.transformer.config)
            shell.load_state_dict(weights, assign=True)
            shell.to(self.dtype).save_pretrained(folder)


def repeat(t: Tensor, copies: int) -> Tensor:
    """Rows repeated `copies` times, siblings adjacent; a view where there is one row."""
    return t.expand(copies, *t.shape[1:]) if len(t) == 1 else t.repeat_interleave(copies, dim=0)


def check_multiple(size: tuple[int, int], px: int) -> None:
    """Raise ConfigError unless (height, width) are multiples of `px`, and write the nearest."""
    height, width = size
    if height % px or width % px or min(height, width) < px:
        right = "x".join(str(max(1, round(side / px)) * px) for side in size)
        raise ConfigError(
            f"expected a height and width that are multiples of {px}, got {height}x{width}:"
            f" write {right}"
        )
