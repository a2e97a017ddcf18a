"""Image-text similarity by the two towers of a CLIP model (arXiv:2103.00020) from a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipelines.data.records import Record
from rewards import images
from rewards.compat import ensure_torchvision
from rlhf.errors import ConfigError


class Similarity:
    """Cosine of picture and caption, -1 to 1; None for an edit, whose caption is an instruction.

    `folder` is what `open_clip` calls local-dir: open_clip_config.json and its weights. Captions
    are cut at the model's context length, 77 tokens for most. Raises ConfigError.
    """

    def __init__(self, folder: str) -> None:
        ensure_torchvision()
        import open_clip

        name = f"local-dir:{Path(folder).absolute()}"
        try:
            made: Any = open_clip.create_model_from_pretrained(name)
            self.tokenize = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"operators, similarity: no model in '{folder}': {error}") from error
        self.model, self.preprocess = made
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, record: Record) -> float | None:
        if record.sources:
            return None
        flat = images.to_pil(images.from_pil(record.picture.pil))
        picture = self.preprocess(flat)[None]
        image = self.model.encode_image(picture, normalize=True)
        text = self.model.encode_text(self.tokenize([record.caption]), normalize=True)
        return float((image * text).sum())
