"""Training data drawn from the scenes world: pictures, captions and edits as tensors.

Everything is a function of (seed, index), so a resumed program sees what an unkilled one would have
seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rewards.scenes.captions import CAPTIONS
from rewards.scenes.render import render, render_batch
from rewards.scenes.world import Edit, Spec, Split, draw
from rlhf.errors import ConfigError

MIXTURE: Mapping[str, float] = {
    "objects/1": 0.08,
    "objects/2": 0.27,
    "objects/3": 0.13,
    "portraits": 0.16,
    "text": 0.18,
    "edits": 0.18,
}

PICTURES: Mapping[str, float] = {  # for an autoencoder, which sees pictures alone
    "objects/1": 0.1,
    "objects/2": 0.25,
    "objects/3": 0.15,
    "portraits": 0.3,
    "text": 0.2,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A caption, the picture it asks for, and for an edit what it starts from (uint8 RGB)."""

    kind: str
    caption: str
    target: Spec
    source: Spec | None = None

    def picture(self, size: int) -> np.ndarray:
        return render(self.target, size)

    def source_picture(self, size: int) -> np.ndarray | None:
        return None if self.source is None else render(self.source, size)


def check_shares(captions: Mapping[str, float]) -> None:
    """Raise ConfigError unless these are shares of known captions that leave 0 or more to terse."""
    unknown = sorted(set(captions) - (set(CAPTIONS) - {"terse"}))
    if unknown or min(captions.values(), default=0) < 0 or sum(captions.values()) > 1 + 1e-9:
        kinds = ", ".join(name for name in CAPTIONS if name != "terse")
        raise ConfigError(
            f"captions: expected shares of {kinds} that add up to at most 1 (the rest is terse),"
            f" got {dict(captions)}"
        )


def check_mixture(weights: Mapping[str, float]) -> None:
    """Raise ConfigError unless these are shares of known kinds of examples."""
    kinds, shares = set(MIXTURE), weights.values()
    if not set(weights) <= kinds or min(shares, default=0) < 0 or sum(shares) <= 0:
        raise ConfigError(
            f"mixture: expected shares >= 0 of {', '.join(sorted(kinds))}, got {dict(weights)}"
        )


def example(
    kind: str, seed: int, split: Split = "train", captions: Mapping[str, float] | None = None
) -> Example:
    """Number `seed` of one kind of the mixture, such as `objects/2`, with one of its captions.

    `captions` are the shares of those of `rewards.scenes.captions`; the rest is terse.
    """
    category, _, level = kind.partition("/")
    spec = draw(category, seed, split=split, level=int(level or 1))  # type: ignore[arg-type]
    draw_at, edge, name = np.random.default_rng([7, seed]).random(), 0.0, "terse"
    for candidate, share in (captions or {}).items():
        if edge <= draw_at < edge + share:
            name = candidate
        edge += share
    caption = CAPTIONS[name](spec)
    if isinstance(spec, Edit):
        return Example(kind=kind, caption=caption, target=spec.target, source=spec.source)
    return Example(kind=kind, caption=caption, target=spec)


def mixture(
    n: int,
    seed: int,
    split: Split = "train",
    weights: Mapping[str, float] = MIXTURE,
    captions: Mapping[str, float] | None = None,
) -> list[Example]:
    """`n` examples in the shares of `weights`, in a shuffled order; see `example` for captions."""
    rng = np.random.default_rng([seed, n])
    kinds, shares = list(weights), np.array(list(weights.values()))
    picked = rng.choice(len(kinds), size=n, p=shares / shares.sum())
    return [example(kinds[k], seed * 10_000_019 + i, split, captions) for i, k in enumerate(picked)]


def rgba(pictures: np.ndarray) -> Float[Tensor, "b 4 h w"]:
    """uint8 RGB (B, 3, H, W) to float RGBA in [-1, 1] with opaque alpha."""
    floats = torch.from_numpy(pictures).float() / 127.5 - 1
    return torch.cat([floats, torch.ones_like(floats[:, :1])], dim=1)


def pictures(examples: list[Example], size: int) -> np.ndarray:
    """Target pictures, uint8 RGB (B, 3, size, size)."""
    return render_batch([e.target for e in examples], size)
