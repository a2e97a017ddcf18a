"""What the rest of the library knows of a policy.

A policy is a velocity field over packed latents (B, N, C), a condition encoder and a decoder. One
call has one layout: the exact text length, the size of the picture and the source pictures are the
same for every row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rlhf.policies.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """The frozen encoder's reading of P prompts of one layout, and their packed source latents."""

    embeds_PLD: Float[Tensor, "p l d"]
    image_slots_L: Bool[Tensor, " l"]  # True where the text holds a slot of a source picture
    pooled_PE: Float[Tensor, "p e"] | None = None  # a vector for the whole prompt, of SD3
    sources_PMC: Float[Tensor, "p m c"] | None = None
    source_shapes: tuple[tuple[int, int, int], ...] = ()

    @property
    def layout(self) -> tuple[int, tuple[tuple[int, int, int], ...]]:
        """What must agree within one call."""
        return self.embeds_PLD.shape[1], self.source_shapes


def stack(conditions: Sequence[Condition]) -> Condition:
    """Conditions of one layout as one; the same condition again and again stays one."""
    first = conditions[0]
    if all(c is first for c in conditions):
        return first
    pooled = [c.pooled_PE for c in conditions if c.pooled_PE is not None]
    sources = [c.sources_PMC for c in conditions if c.sources_PMC is not None]
    return Condition(
        embeds_PLD=torch.cat([c.embeds_PLD for c in conditions]),
        image_slots_L=first.image_slots_L,
        pooled_PE=torch.cat(pooled) if pooled else None,
        sources_PMC=torch.cat(sources) if sources else None,
        source_shapes=first.source_shapes,
    )


class Prefix:
    """What of the condition is the same at every step, opaque outside the policy that made it. It
    is empty where there is no such thing.
    """


@runtime_checkable
class Policy(Protocol):
    """See `rlhf.policies.pipeline` for what the implementations share."""

    slots: Slots

    def encode(self, text: str, sources: Sequence[np.ndarray] = ()) -> Condition:
        """Condition of one prompt; cached, since the encoder is frozen."""
        ...

    @abstractmethod
    def prefix(self, condition: Condition, slot: str = "train", *, once: bool = False) -> Prefix:
        """Computed under a slot's weights, with gradient where grad is enabled. `once`: for a
        single call of `velocity`, which may do it on the way.
        """
        ...

    @abstractmethod
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
        """v(x, sigma | condition), float32 (B, N, C). B is a multiple of the P prompts, siblings
        adjacent.
        """
        ...

    @abstractmethod
    def decode(self, x0_GNC: Tensor, size: tuple[int, int]) -> UInt8[Tensor, "g 3 h w"]:
        """Pictures of packed latents, quantised once."""
        ...

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """(N, C) of a picture of (height, width). Raises ConfigError for a size the model cannot
        make.
        """
        ...

    def sigmas(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        """The stock pipeline's noise levels, steps + 1 values from 1 to 0."""
        ...

    def export(self, folder: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the weights of a slot where stock diffusers loads them."""
        ...
