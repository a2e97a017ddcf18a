"""A side task that teaches towers to read: words of a caption are hidden, and a head that sees the
picture (of an edit, source and result) says which they were, as in ALBEF (arXiv:2107.07651).

Ratings alone teach a fresh pair of towers little for a long time; words are dense labels and cost
nothing, since the world writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.data.scenes import Example, mixture
from rewards.scenes.render import render
from rewards.trained import TowersModel
from rewards.training.heads import FusionHead, Tokens
from rlhf.errors import ConfigError

HIDDEN = 1  # the token that stands for a hidden word: <eot>, which never stands inside a text
SHARES: Mapping[str, float] = {
    "objects/1": 0.10,
    "objects/2": 0.22,
    "objects/3": 0.12,
    "portraits": 0.14,
    "text": 0.14,
    "edits": 0.28,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """`batch` captions a step (0 for none), of which `share` of the tokens are hidden."""

    batch: int = 0
    share: float = 0.4
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    def check(self) -> None:
        if self.batch < 0 or not 0 < self.share < 1:
            raise ConfigError(
                f"recall: expected a batch of 0 or more and a share in (0, 1), got {self.batch} and"
                f" {self.share}"
            )


class RecallObjective(nn.Module):
    """Mean cross-entropy of hidden tokens, by the heads that see pictures and text."""

    def __init__(self, model: TowersModel, config: Recall) -> None:
        super().__init__()
        self.config = config
        readers = {
            n: h for n, h in model.heads.items() if isinstance(h, FusionHead) and h.config.text
        }
        if not readers:
            raise ConfigError(
                "recall: expected a head that reads the prompt, such as fidelity or instruction"
            )
        words = model.towers.clip.token_embedding.num_embeddings
        width = {n: h.config.width for n, h in readers.items()}
        self.words = nn.ModuleDict({n: nn.Linear(width[n], words) for n in readers})
        self._model = [model]  # in a list: its parameters are not this module's

    def forward(self, step: int, seed: int) -> Tensor:
        found = mixture(self.config.batch, seed * 7919 + step, weights=self.config.shares)
        generator = torch.Generator().manual_seed(seed * 7919 + step)
        total = torch.zeros(())
        for name in self.words:
            edits = self._model[0].configs[name].source
            shown = [e for e in found if (e.source is not None) == edits]
            if shown:
                total = total + self._of(name, shown, generator)
        return total / len(self.words)

    def _of(self, name: str, shown: list[Example], generator: torch.Generator) -> Tensor:
        model = self._model[0]
        towers, head = model.towers, model.heads[name]
        assert isinstance(head, FusionHead)
        ids = towers.tokens([e.caption for e in shown])
        hidden = (torch.rand(ids.shape, generator=generator) < self.config.share) & (ids > HIDDEN)
        texts, words = towers.states(ids.masked_fill(hidden, HIDDEN))
        sources = [render(e.source) for e in shown if e.source is not None]
        tokens = Tokens(
            image=towers.image_tokens([render(e.target) for e in shown]),
            source=towers.image_tokens(sources) if sources else None,
            text=texts,
            words=words,
        )
        states = head.read(tokens)[:, head.QUERIES :]
        hidden = hidden[:, : states.shape[1]]
        wanted = ids[:, : states.shape[1]][hidden]
        return F.cross_entropy(self.words[name](states[hidden]).float(), wanted)
