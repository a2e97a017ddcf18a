"""A trained vision-language judge as a folder, with adapter.safetensors (see `rewards.folder`).

The base model is not copied: card.json names it, as a hub id, a path, or a path from the folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rewards import golden
from rewards.backbones.vlm import VlmJudge, VlmRewardModel, VlmSettings, add_lora
from rewards.errors import RewardConfigError
from rewards.folder import CARD, read_card, read_weights, write_folder
from rewards.rubric import Rubric
from rewards.types import JudgeCard, card_of

FAMILY, ADAPTER = "vlm", "adapter.safetensors"


def open_base(base: str | os.PathLike[str], settings: VlmSettings) -> VlmRewardModel:
    """The untrained model of a folder or hub id, in float32; a diffusers folder with
    `text_encoder/` and `processor/` is one too.

    Raises:
        RewardConfigError: it is neither, or no such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = Path(base)
    pipeline = (place / "text_encoder").is_dir()
    model = place / "text_encoder" if pipeline else base
    processor = place / "processor" if pipeline else base
    try:
        return VlmRewardModel(
            AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32),
            AutoProcessor.from_pretrained(processor),
            settings,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RewardConfigError):
            raise
        raise RewardConfigError(
            f"expected a vision-language model at {str(base)!r}, got {type(error).__name__}:"
            f" {str(error).splitlines()[0]}: write a folder or a hub id"
        ) from error


def _adapter(model: VlmRewardModel) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    if not getattr(model.model, "_hf_peft_config_loaded", False):
        return {}
    return get_peft_model_state_dict(model.model, adapter_name="default")


def save(model: VlmRewardModel, folder: Path, *, base: str, card: JudgeCard, readme: str) -> None:
    """Write a judge. `base` is what `open_base` opens, from `folder` if it is a relative path that
    exists from there.

    One that thinks before it answers has no golden scores: a word that is as likely as another may
    come out otherwise elsewhere.

    Raises:
        RewardConfigError: the folder exists.
        JudgeError: the judge does not answer.
    """
    tensors, settings = _adapter(model), model.settings
    lora = model.model.peft_config["default"] if tensors else None
    about = {
        "family": FAMILY,
        "base": base,
        "settings": asdict(settings),
        "lora": {"rank": lora.r, "alpha": lora.lora_alpha} if lora else None,
    }

    def reopen(_: Path) -> VlmJudge:
        return VlmJudge(model, card, str(model.model.device))

    weights = {ADAPTER: tensors} if tensors else {}
    thinks = settings.rationale_tokens > 0
    write_folder(folder, about, card, weights, readme, None if thinks else reopen)


def _facts(
    folder: Path, about: dict[str, Any]
) -> tuple[str, VlmSettings, dict[str, int] | None, JudgeCard]:
    try:
        if about["family"] != FAMILY:
            raise ValueError(f"family {about['family']!r}")
        given = dict(about["settings"])
        settings = VlmSettings(rubric=Rubric(**given.pop("rubric")), **given)
        return about["base"], settings, about["lora"], card_of(about["card"])
    except (ValueError, KeyError, TypeError) as error:
        raise RewardConfigError(
            f"expected a judge of family {FAMILY!r} in {folder / CARD}, got"
            f" {type(error).__name__}: {error}: save it again"
        ) from error


def load(folder: Path) -> tuple[VlmRewardModel, JudgeCard]:
    """A saved model, in evaluation mode, and its card.

    Raises:
        RewardConfigError: a file is missing or of another judge.
    """
    from peft import set_peft_model_state_dict

    base, settings, lora, card = _facts(folder, read_card(folder))
    model = open_base(folder / base if (folder / base).is_dir() else base, settings)
    if lora is None:
        return model.eval(), card
    add_lora(model, lora["rank"], lora["alpha"])
    wanted, tensors = _adapter(model), read_weights(folder / ADAPTER)
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in wanted.items()}:
        raise RewardConfigError(
            f"expected {len(wanted)} adapters of rank {lora['rank']} for {base!r} in"
            f" {folder / ADAPTER}, got {len(tensors)} that do not fit: name the base it was trained"
            " on"
        )
    set_peft_model_state_dict(model.model, tensors, adapter_name="default")
    return model.eval().requires_grad_(False), card


def load_vlm_judge(folder: str | os.PathLike[str], device: str = "cpu", batch: int = 8) -> VlmJudge:
    """The judge of a folder. Raises RewardConfigError, also where its golden scores moved."""
    model, card = load(Path(folder))
    judge = VlmJudge(model, card, device=device, batch=batch)
    golden.check(judge, read_card(Path(folder)).get("golden"))
    return judge
