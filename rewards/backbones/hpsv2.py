"""HPSv2 and HPSv2.1 (arXiv 2306.09341) through open_clip.

The score is the cosine of picture and prompt, without the model's logit scale: about 0.20 to 0.37
for a good checkpoint. **Scores compare pictures of one prompt only**; versions 2 and 2.1 have
different scales.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from rewards.backbones.limits import digest_of, limit_flags
from rewards.errors import JudgeError, RewardConfigError
from rewards.images import to_pil
from rewards.types import JudgeCard, Sample, Score, failed

FILES: dict[str, str] = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
HUB = "xswu/HPSv2"
ARCHITECTURE = "ViT-H-14"
STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # CLIP's
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _file_of(checkpoint: str | os.PathLike[str], version: str) -> Path:
    path = Path(checkpoint)
    if path.is_file():
        return path
    wanted = FILES[version]
    if path.is_dir() and (path / wanted).is_file():
        return path / wanted
    if path.is_dir() or not _HUB_ID.fullmatch(str(checkpoint)) or path.suffix in (".pt", ".bin"):
        raise RewardConfigError(
            f"expected a checkpoint of HPS{version}, a folder with {wanted} or a hub id such as"
            f" {HUB!r}, got {str(checkpoint)!r}: write the path of the file"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(checkpoint), wanted))
    except Exception as error:  # the boundary to the hub, whose client raises many types
        raise RewardConfigError(
            f"expected {wanted} on the hub under {str(checkpoint)!r}, got {type(error).__name__}:"
            f" {error}: download it once and write its path"
        ) from error


def _weights_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, {"state_dict": ...} or plain, without the prefix of a parallel run."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise RewardConfigError(
            f"expected a file of weights at {path}, got {type(error).__name__}:"
            f" {str(error).splitlines()[0] if str(error) else 'no content'}: download it again"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise RewardConfigError(
            f"expected tensors by name, or {{'state_dict': ...}} of them, in {path}, got"
            f" {type(found).__name__}: give the published checkpoint"
        )
    return {str(name).removeprefix("module."): tensor for name, tensor in found.items()}


def _bind(model: torch.nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    unequal = sorted(
        k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape
    )
    if missing or unknown or unequal:
        raise RewardConfigError(
            f"expected the weights of {what}, got a checkpoint with {len(missing)} missing"
            f" {missing[:3]}, {len(unknown)} unknown {unknown[:3]} and {len(unequal)} keys of"
            f" another shape {unequal[:3]}: name the architecture it was trained with"
        )
    model.load_state_dict(dict(weights))


def letterbox(image: UInt8[Any, "3 _ _"], side: int) -> Float[Tensor, "3 s s"]:
    """A picture as the published code makes it: scaled in floating point, so that what a bicubic
    filter overshoots is kept, laid centrally on black, in CLIP's statistics.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image)).float() / 255
    scale = side / max(image.shape[1:])
    if scale != 1.0:
        height, width = (round(length * scale) for length in image.shape[1:])
        pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
    height, width = pixels.shape[1:]
    top, left = (side - height) // 2, (side - width) // 2
    pixels = F.pad(pixels, (left, side - width - left, top, side - height - top))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    return (pixels - mean) / std


class HpsJudge:
    """The cosine of `architecture`, an open_clip model, with the weights of `checkpoint`: a file
    ({"state_dict": ...}, plain or safetensors), a folder that holds the published one, or a hub id.

    A prompt of more than `card.text_tokens` tokens and a picture longer than `card.pixels` are
    flagged. Pictures are scaled to fit and laid centrally on black, as in training; each picture
    goes through the network once, each prompt once per batch.

    Raises:
        RewardConfigError: no such file or version, or weights of another architecture.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        version: str = "v2.1",
        architecture: str = ARCHITECTURE,
        device: str = "cpu",
        batch: int = 16,
    ) -> None:
        import open_clip

        if version not in FILES or batch < 1:
            raise RewardConfigError(
                f"expected a version among {list(FILES)} and batch >= 1, got {version!r}, {batch}"
            )
        path = _file_of(checkpoint, version)
        model = open_clip.create_model(architecture, load_weights=False, precision="fp32")
        _bind(model, _weights_of(path), architecture)
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._tokenizer: Any = open_clip.get_tokenizer(architecture)
        self._device, self._batch = device, batch
        size = self._model.visual.image_size
        self._side: int = max(size) if isinstance(size, tuple) else size
        self.card = JudgeCard(
            name=f"hps{version}",
            revision=digest_of(path),
            preprocessing=f"longest-{self._side}-bicubic-float-black",
            low=-1.0,
            high=1.0,
            text_tokens=self._tokenizer.context_length,
            pixels=self._side,
        )

    @torch.inference_mode()
    def cosines(
        self, images: Sequence[UInt8[Any, "3 _ _"]], prompts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """cos(picture i, prompt i) in [-1, 1]; pictures of any sizes."""
        pixels = torch.stack([letterbox(image, self._side) for image in images])
        unique = list(dict.fromkeys(prompts))
        text = self._model.encode_text(self._tokenizer(unique).to(self._device), normalize=True)
        picture = self._model.encode_image(pixels.to(self._device), normalize=True)
        rows = [unique.index(prompt) for prompt in prompts]
        return (picture.float() * text.float()[rows]).sum(-1).cpu()

    def _score(self, sample: Sample, value: float) -> Score:
        if not math.isfinite(value):
            return failed("the model's features are not finite")
        tokens = len(self._tokenizer.encode(sample.prompt)) + 2  # start and end
        flags = limit_flags(self.card, tokens=tokens, side=max(sample.image.shape[1:]))
        return Score(value=value, flags=flags)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, comparable among pictures of one prompt."""
        out: list[Score] = []
        for start in range(0, len(samples), self._batch):
            part = samples[start : start + self._batch]
            values = self.cosines([s.image for s in part], [s.prompt for s in part]).tolist()
            out += [self._score(*pair) for pair in zip(part, values, strict=True)]
        return out


def _package() -> Callable[..., list[float]]:
    try:
        return importlib.import_module("hpsv2").score
    except (ImportError, FileNotFoundError) as error:
        raise RewardConfigError(
            f"expected a working package hpsv2, got {type(error).__name__}: {error}: set up its own"
            " environment (docs/hpsv2.md), or use hpsv2:<checkpoint>, which needs no package"
        ) from error


def hpsv2_package(images, prompts, sources=(), **columns) -> list[float]:
    """HPSv2.1 by the published package, as a plain reward function: uint8 (B, 3, H, W) and B
    prompts -> B numbers; comparable for one prompt only.

    Raises:
        RewardConfigError: the package is missing, or lacks its vocabulary or its weights.
        JudgeError: it returned another number of scores.
    """
    score, out = _package(), [math.nan] * len(prompts)
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, other in enumerate(prompts) if other == prompt]
        try:
            values = list(score([to_pil(images[i]) for i in rows], prompt, hps_version="v2.1"))
        except FileNotFoundError as error:
            raise RewardConfigError(
                f"expected hpsv2 with its vocabulary and the weights that it downloads, got"
                f" {type(error).__name__}: {error}: see docs/hpsv2.md"
            ) from error
        if len(values) != len(rows):
            raise JudgeError(f"hpsv2: expected {len(rows)} scores, got {len(values)}")
        for i, value in zip(rows, values, strict=True):
            out[i] = float(value)
    return out
