"""Which model a policy is of, and which of its weights are trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv:2106.09685) on linears of every block. `alpha` / `rank` scales them.

    `targets`: ends of the names of these linears; None for those of the model family.
    """

    rank: int = 32
    alpha: int = 32
    targets: tuple[str, ...] | None = None

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(
                f"policy.lora.rank: expected at least 1, got {self.rank}: 32 is usual"
            )
        if self.targets == ():
            raise ConfigError("policy.lora.targets: expected at least one, got none: drop the key")


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """`model` is a directory or hub id, or `scenes`, the embedded base. `train`: LoRA adapters or
    all weights. `checkpointing` computes activations again in the backward pass instead of keeping
    them (arXiv:1604.06174). `t5_tokens`: text tokens of Stable Diffusion 3 from its T5, which is
    not loaded at 0; 256 is the stock pipeline's own.
    """

    model: str = "scenes"
    train: str = "lora"
    lora: Lora = field(default_factory=Lora)
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    t5_tokens: int = 256
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
        if not 0 <= self.t5_tokens <= 512:
            raise ConfigError(
                f"policy.t5_tokens: expected 0 to 512, got {self.t5_tokens}: 256 is usual"
            )
