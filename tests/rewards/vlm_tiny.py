"""The smallest Qwen3-VL, with the real processor, on disk and in memory."""

from pathlib import Path

import numpy as np
import torch

from rewards.backbones.vlm import VlmRewardModel, VlmSettings
from rewards.backbones.vlm_folder import open_base
from rewards.rubric import RUBRICS, Rubric
from rewards.types import Sample
from rlhf.models.tiny import make_processor, make_text_encoder, make_tokenizer

BRIEF = Rubric(axis="brief", text="How good? {prompt}")
BEFORE_AFTER = Rubric(axis="brief", text="How well edited? {prompt}", sources=True)


def write_base(folder: Path, max_side: int = 256) -> Path:
    """A random checkpoint as transformers writes it."""
    torch.manual_seed(0)
    words = [rubric.text for rubric in RUBRICS.values()]
    tokenizer = make_tokenizer(["a red circle", "Picture to judge: Score:", *words])
    make_text_encoder(tokenizer, hidden=64, layers=2).save_pretrained(folder)
    make_processor(tokenizer, max_side).save_pretrained(folder)
    return folder


def model_of(base: Path, rubric: Rubric = BRIEF, **settings) -> VlmRewardModel:
    return open_base(base, VlmSettings(rubric=rubric, **settings)).eval()


def sample(seed=0, prompt="a red circle", height=64, width=64, sources=(), **more) -> Sample:
    image = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return Sample(image=image, prompt=prompt, category="any", sources=tuple(sources), **more)
