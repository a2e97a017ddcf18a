"""What stands on two towers and answers: logits over the levels 1..L of a scale.

The answer is read as an expectation, E = sum_l l p_l, as arXiv:2606.27608 reads the score tokens of
its judges. `MlpHead` stands on the pooled features of pictures (after LAION's aesthetic predictor,
with the non-linearity that one lacks), on the prompt's words in their places, and on what the words
pick of the features; it gives the mean and spread of a normal score. `RegionHead` answers for each
patch of a source picture whether an instruction touches it, `FaceHead` is an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rewards.errors import RewardConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """`text`, `source` and `image`: whether the head sees the prompt, the source picture and the
    picture itself.
    """

    kind: Literal["mlp", "region", "face"] = "mlp"
    text: bool = True
    source: bool = False
    image: bool = True
    width: int = 256
    depth: int = 2
    levels: int = 5

    def check(self) -> None:
        if self.levels < 2 or self.depth < 1 or self.width % 32:
            raise RewardConfigError(
                f"head: expected at least 2 levels, 1 layer and a width in multiples of 32, got"
                f" {self.levels}, {self.depth} and {self.width}"
            )
        if not (self.image or self.source):
            raise RewardConfigError("head: expected it to see the picture or its source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a head must know of its towers: widths of patches, of pooled features and of words, and
    the longest text.
    """

    image_width: int
    pooled_width: int
    text_width: int
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What towers made of a batch of samples; None is what no head asked for."""

    image: Float[Tensor, "b n d"]
    pooled: Float[Tensor, "b f"]
    source: Float[Tensor, "b n d"] | None = None
    pooled_source: Float[Tensor, "b f"] | None = None
    text: Float[Tensor, "b l e"] | None = None
    words: Bool[Tensor, "b l"] | None = None  # which text tokens are there

    def rows(self, index: Tensor) -> Tokens:
        """The tokens of some samples."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Tokens(**{k: None if v is None else v[index] for k, v in parts.items()})  # type: ignore[arg-type]


class Attention(nn.Module):
    """Queries look at a memory, with heads of 32; written out, which is faster than the fused
    kernel for short sequences on a CPU.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "b q w"],
        memory: Float[Tensor, "b m w"],
        there: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b q w"]:
        q = self.q(x).unflatten(-1, (self.heads, 32)).transpose(1, 2)
        k, v = self.kv(memory).unflatten(-1, (2, self.heads, 32)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / 32**0.5
        if there is not None:
            scores = scores.masked_fill(~there[:, None, None], -1e9)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Queries look at each other, at the memory, and think."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.own, self.other = Attention(width), Attention(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.think = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(
        self, x: Tensor, memory: Tensor, there: Tensor | None, seen: Tensor | None = None
    ) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y, there)
        x = x + self.other(self.norms[1](x), memory, seen)
        return x + self.think(self.norms[2](x))


def normal_levels(numbers: Float[Tensor, "b 2"], levels: int) -> Float[Tensor, "b l"]:
    """Logits -(l - m)^2 / (2 s^2) of a normal score cut to levels: m the middle of the scale plus
    half its length times the first number, s = 0.3 + softplus(second).

    Within the scale E is nearly m, so that losses on E keep a gradient. Free logits lose it once
    all of their mass is on one level.
    """
    half = (levels - 1) / 2
    mean = 1 + half * (1 + numbers[:, :1])
    spread = 0.3 + F.softplus(numbers[:, 1:])
    level = torch.arange(1.0, levels + 1, device=numbers.device)
    return -((level - mean) / spread).square() / 2


class Pick(nn.Module):
    """What words pick of features: LayerNorm(q(x) * k(y))."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(features, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "b f"], y: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        return self.norm(self.q(x) * self.k(y))


class MlpHead(nn.Module):
    """An MLP over u, y, q(u) * k(y) and, with a source, the product over both pictures v of
    LayerNorm(q_v(v) * k_v(y)): u a linear map of the pooled features of picture and source, y one
    of all words. That product holds what the words pick of one picture against what they pick of
    the other: the same place, what was there and what is there now.
    """

    PER_WORD = 32  # numbers that a word is brought to

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        width, pictures = config.width, config.image + config.source
        self.norm = nn.LayerNorm(sizes.pooled_width)
        self.image = nn.Linear(pictures * sizes.pooled_width, width)
        self.places = sizes.context if config.text else 0
        if self.places:
            self.word = nn.Linear(sizes.text_width, self.PER_WORD)
            self.text = nn.Linear(self.places * self.PER_WORD, width)
            self.picks, self.picked = nn.Linear(width, width), nn.Linear(width, width)
            if pictures == 2:
                self.pairs = nn.ModuleList(Pick(sizes.pooled_width, width) for _ in range(pictures))
        wide = (pictures + 2) * width if self.places else width
        inner = 3 * width // 2
        layers: list[nn.Module] = [nn.LayerNorm(wide), nn.Linear(wide, inner), nn.GELU()]
        for _ in range(config.depth - 1):
            layers += [nn.Linear(inner, inner), nn.GELU()]
        self.answer = nn.Sequential(*layers, nn.Linear(inner, 2))

    def forward(self, tokens: Tokens) -> Float[Tensor, "b l"]:
        seen = [tokens.pooled] if self.config.image else []
        if self.config.source:
            assert tokens.pooled_source is not None
            seen.append(tokens.pooled_source)
        seen = [self.norm(x) for x in seen]
        u = self.image(torch.cat(seen, -1))
        if not self.places:
            return normal_levels(self.answer(u), self.config.levels)
        assert tokens.text is not None and tokens.words is not None
        there = self.word(tokens.text) * tokens.words.unsqueeze(-1)
        y = self.text(F.pad(there, (0, 0, 0, self.places - there.shape[1])).flatten(1))
        parts = [u, y, self.picks(u) * self.picked(y)]
        if len(seen) == 2:
            first, second = (pick(x, y) for pick, x in zip(self.pairs, seen, strict=True))
            parts.append(first * second)
        return normal_levels(self.answer(torch.cat(parts, -1)), self.config.levels)


class RegionHead(nn.Module):
    """For each patch of the source, a logit that the instruction touches it. The output picture is
    not looked at: what it changed does not excuse it.
    """

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.image = nn.Sequential(
            nn.LayerNorm(sizes.image_width), nn.Linear(sizes.image_width, width)
        )
        self.text = nn.Linear(sizes.text_width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(config.depth))
        self.answer = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, tokens: Tokens) -> Float[Tensor, "b n"]:
        assert tokens.source is not None and tokens.text is not None
        x, memory = self.image(tokens.source), self.text(tokens.text)
        for layer in self.layers:
            x = layer(x, memory, None, tokens.words)
        return self.answer(x).squeeze(-1)


class FaceHead(nn.Module):
    """An embedding of whose face a picture shows, trained through an ordinal scale of the cosine:
    P(level <= k) = sigmoid(t_k - a cos), t rising.
    """

    def __init__(self, config: HeadConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.query = nn.Parameter(torch.randn(1, width) * 0.02)
        self.image = nn.Sequential(
            nn.LayerNorm(sizes.image_width), nn.Linear(sizes.image_width, width)
        )
        self.layers = nn.ModuleList(Layer(width) for _ in range(config.depth))
        self.vector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
        self.scale = nn.Parameter(torch.tensor(6.0))
        self.first = nn.Parameter(torch.tensor(-1.0))
        self.steps = nn.Parameter(torch.zeros(config.levels - 2))

    def embed(self, image: Float[Tensor, "b n d"]) -> Float[Tensor, "b 64"]:
        """Unit vectors."""
        x, memory = self.query.expand(len(image), -1, -1), self.image(image)
        for layer in self.layers:
            x = layer(x, memory, None)
        return F.normalize(self.vector(x[:, 0]), dim=-1)

    def forward(self, tokens: Tokens) -> Float[Tensor, "b l"]:
        assert tokens.source is not None
        cosine = (self.embed(tokens.image) * self.embed(tokens.source)).sum(-1)
        steps = F.softplus(self.steps).cumsum(0)
        borders = torch.cat([self.first.view(1), self.first + steps])
        below = torch.sigmoid(borders - self.scale * cosine.unsqueeze(-1))
        edges = F.pad(F.pad(below, (0, 1), value=1.0), (1, 0), value=0.0)
        return edges.diff(dim=-1).clamp_min(1e-6).log()


HEADS: dict[str, type[nn.Module]] = {
    "mlp": MlpHead,
    "region": RegionHead,
    "face": FaceHead,
}


def make_head(config: HeadConfig, sizes: Sizes) -> nn.Module:
    """A fresh head on towers of these sizes. Weights are drawn from torch's generator."""
    config.check()
    return HEADS[config.kind](config, sizes)
