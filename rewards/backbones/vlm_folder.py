"""A trained vision-language judge as a folder: card.json, adapter.safetensors, README.md.

The base model is not copied: card.json names it, as a hub id, a path, or a path from the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path

import torch

from rewards.backbones.vlm import VlmJudge, VlmRewardModel, VlmSettings, add_lora
from rewards.errors import RewardConfigError
from rewards.rubric import Rubric
from rewards.types import JudgeCard, card_of

FAMILY, CARD, ADAPTER = "vlm", "card.json", "adapter.safetensors"


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
    tensors = get_peft_model_state_dict(model.model, adapter_name="default")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def save(model: VlmRewardModel, folder: Path, *, base: str, card: JudgeCard, readme: str) -> None:
    """Write a judge beside its place and move it there whole.

    `base` is what `open_base` opens, from `folder` if it is a relative path that exists from there.

    Raises:
        RewardConfigError: the folder exists.
    """
    from safetensors.torch import save_file

    if folder.exists():
        raise RewardConfigError(f"expected no folder at {folder}, got one: name another")
    tensors, settings = _adapter(model), model.settings
    lora = model.model.peft_config["default"] if tensors else None
    facts = {
        "family": FAMILY,
        "base": base,
        "settings": asdict(settings),
        "lora": {"rank": lora.r, "alpha": lora.lora_alpha} if lora else None,
        "card": asdict(card),
    }
    part = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        if tensors:
            save_file(tensors, part / ADAPTER)
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        (part / CARD).write_text(text + "\n", encoding="utf-8")
        (part / "README.md").write_text(readme, encoding="utf-8")
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _facts(folder: Path) -> tuple[str, VlmSettings, dict[str, int] | None, JudgeCard]:
    try:
        facts = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if facts["family"] != FAMILY:
            raise ValueError(f"family {facts['family']!r}")
        settings = facts["settings"]
        rubric = Rubric(**settings.pop("rubric"))
        return (
            facts["base"],
            VlmSettings(rubric=rubric, **settings),
            facts["lora"],
            card_of(facts["card"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    base, settings, lora, card = _facts(folder)
    model = open_base(folder / base if (folder / base).is_dir() else base, settings)
    if lora is None:
        return model.eval(), card
    add_lora(model, lora["rank"], lora["alpha"])
    wanted = _adapter(model)
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise RewardConfigError(
            f"expected adapters in {folder / ADAPTER}, got {type(error).__name__}: {error}"
        ) from error
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in wanted.items()}:
        raise RewardConfigError(
            f"expected {len(wanted)} adapters of rank {lora['rank']} for {base!r} in"
            f" {folder / ADAPTER}, got {len(tensors)} that do not fit: name the base it was trained"
            " on"
        )
    set_peft_model_state_dict(model.model, tensors, adapter_name="default")
    return model.eval().requires_grad_(False), card


def load_vlm_judge(folder: str | os.PathLike[str], device: str = "cpu", batch: int = 8) -> VlmJudge:
    """The judge of a folder. Raises RewardConfigError."""
    model, card = load(Path(folder))
    return VlmJudge(model, card, device=device, batch=batch)
