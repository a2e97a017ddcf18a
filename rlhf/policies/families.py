"""Which policy a model is of: the one whose pipeline class its model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin

from rlhf.assets import resolve
from rlhf.errors import ConfigError
from rlhf.policies.config import PolicyConfig
from rlhf.policies.pipeline import Parts, PipelinePolicy
from rlhf.policies.qwen_image21 import QwenImage21Policy
from rlhf.policies.sd3 import StableDiffusion3Policy
from rlhf.prompts import source_sizes
from rlhf.types import Prompt

FAMILIES: Mapping[str, type[PipelinePolicy]] = {
    kind.PIPELINE.__name__: kind for kind in (QwenImage21Policy, StableDiffusion3Policy)
}


class _Model(ConfigMixin):
    """Reads the configuration of a network of whatever class."""

    config_name = "config.json"


def locate_base(model: str) -> str:
    """Directory or hub id of a base, not looked into. Raises ConfigError for what is neither."""
    path = resolve(model)
    if not (Path(path) / "model_index.json").is_file() and (
        Path(path).exists() or path.count("/") != 1 or path.startswith((".", "/"))
    ):
        raise ConfigError(
            "policy.model: expected a directory with model_index.json, a hub id or 'scenes', got"
            f" '{model}'"
        )
    return path


def family_of(model: str) -> type[PipelinePolicy]:
    """The family of a model. Of a hub id, its model_index.json is fetched.

    Raises:
        ConfigError: nothing there, or a model of another pipeline class.
    """
    return _read_index(model)[0]


def _read_index(model: str) -> tuple[type[PipelinePolicy], Mapping[str, Any]]:
    path = locate_base(model)
    try:
        index: Any = DiffusionPipeline.load_config(path)
    except OSError as error:
        raise ConfigError(f"policy.model: could not open '{model}': {error}") from error
    found = index.get("_class_name")
    if found not in FAMILIES:
        raise ConfigError(
            f"policy.model: expected a {' or a '.join(FAMILIES)}, got a {found} in {path}: name"
            " another base"
        )
    return FAMILIES[found], index


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a model says of itself before its weights are read."""

    family: type[PipelinePolicy]
    parts: Parts  # those of `family.READS`, and the pipeline's own
    levels: tuple[float, ...]  # those it was distilled to, written in its index; else none

    @property
    def own_grid(self) -> bool:
        """Whether it samples at noise levels of its own, and at no others."""
        return bool(self.levels)


def describe(model: str) -> Description:
    """The description of a model. Raises ConfigError, as `family_of` does."""
    (family, index), path = _read_index(model), locate_base(model)
    parts: dict[str, Mapping[str, Any]] = {"pipeline": index}
    for name in family.READS:
        reader = FlowMatchEulerDiscreteScheduler if name == "scheduler" else _Model
        try:
            found: Any = reader.load_config(path, subfolder=name)
        except OSError as error:
            raise ConfigError(f"policy.model: could not open '{model}': {error}") from error
        parts[name] = found
    levels = tuple(index.get("sample_sigmas") or ())
    return Description(family=family, parts=parts, levels=levels)


def check_pictures(
    base: Description, prompts: Sequence[Prompt], usual: tuple[int, int], where: str
) -> list[tuple[int, int]]:
    """Sizes (height, width) of the pictures of prompts; `usual`, that of `where`, first.

    Raises:
        ConfigError: a size, of a picture or of what it edits, that the model cannot take; edits for
            a model that makes pictures from text alone.
    """
    edit = next((p for p in prompts if p.sources), None)
    if edit is not None and not base.family.EDITS:
        raise ConfigError(
            f"{edit.id}: expected a prompt without source pictures for a"
            f" {base.family.PIPELINE.__name__}, got an edit: use a Qwen-Image-2.1 base"
        )
    sizes = {usual: where} | {p.size: f"size of {p.id}" for p in prompts[::-1] if p.size}
    for size, named in (sizes | source_sizes(prompts)).items():
        try:
            base.family.tokens(size, base.parts)
        except ConfigError as error:
            raise ConfigError(f"{named}: {error}") from None
    return list(sizes)


def load_policy(config: PolicyConfig) -> PipelinePolicy:
    """Open a checkpoint directory, hub id or embedded model. Raises ConfigError if it is none."""
    return family_of(config.model).open(config, locate_base(config.model))
