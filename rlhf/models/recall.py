"""A side task that keeps the condition encoder's features readable."""

# What the stock classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

IGNORED = -100  # label of a position without loss


class Recall:
    """Linear heads that read the current and the two preceding tokens off the features.

    A decoder trained on the next token alone may forget, in its last layer, what the present one
    was: measured at the embedded size, a colour word moved its feature by 6% of its norm. The
    transformer reads these very features (before the final norm), so they must say what was said.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, reach: int = 3) -> None:
        text = model.config.text_config
        heads = [torch.nn.Linear(text.hidden_size, text.vocab_size) for _ in range(reach)]
        self.heads = torch.nn.ModuleList(heads)
        self._features: Tensor | None = None
        self._hook = model.model.language_model.norm.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._features = args[0]

    def __call__(self, labels: Tensor) -> Tensor:
        """Mean cross-entropy over the heads, for the features of the last forward pass."""
        assert self._features is not None
        rows = F.rms_norm(self._features, self._features.shape[-1:])
        losses = []
        for back, head in enumerate(self.heads):
            wanted = F.pad(labels, (back, 0), value=IGNORED)[:, : labels.shape[1]]
            wanted = wanted.masked_fill(labels == IGNORED, IGNORED)
            scores = head(rows).flatten(0, 1)
            losses.append(F.cross_entropy(scores, wanted.flatten(), ignore_index=IGNORED))
        return torch.stack(losses).mean()

    def close(self) -> None:
        self._hook.remove()
