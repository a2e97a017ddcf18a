"""A trained judge on disk, of any family: card.json, README.md and one file of weights.

card.json   {"family": ..., "card": the JudgeCard, "golden": see `rewards.golden`, and what the
             family needs to open it}
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import golden
from rewards.errors import RewardConfigError
from rewards.judge import Judge
from rewards.types import JudgeCard

CARD, README = "card.json", "README.md"


def write_folder(
    folder: Path,
    about: Mapping[str, Any],
    card: JudgeCard,
    weights: Mapping[str, Mapping[str, Tensor]],
    readme: str,
    reopen: Callable[[Path], Judge] | None,
) -> None:
    """Write a judge beside its place and move it there whole. `weights` are tensors by file and
    name; `reopen` gives the judge that a folder will give, whose golden scores go into the card
    (None for one that answers otherwise on other machines).

    Raises:
        RewardConfigError: the folder exists.
        JudgeError: the judge does not answer.
    """
    if folder.exists():
        raise RewardConfigError(f"expected no folder at {folder}, got one: name another")
    facts = {**about, "card": asdict(card)}
    part = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        for file, tensors in weights.items():
            whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            save_file(whole, part / file)
        (part / README).write_text(readme, encoding="utf-8")
        if reopen is not None:
            facts["golden"] = golden.measure(reopen(part))
        text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False)
        (part / CARD).write_text(text + "\n", encoding="utf-8")
        os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def read_card(folder: Path) -> dict[str, Any]:
    """card.json of a judge's folder. Raises RewardConfigError for one that is missing or broken."""
    try:
        about = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if not {"card", "family"} <= set(about):
            raise ValueError(f"it holds {sorted(about)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RewardConfigError(
            f"expected a judge's folder with {CARD} at '{folder}', got {type(error).__name__}:"
            f" {error}: train one with `rlhf reward train`"
        ) from error
    return about


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file. Raises RewardConfigError for one that is missing or cut."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RewardConfigError(
            f"expected weights in '{path}', got {type(error).__name__}: {error}: write it again"
        ) from error
