"""open_clip's image and text tower, opened to their tokens.

A folder in open_clip's layout (open_clip_config.json, weights, tokenizer), or a hub id, gives the
two towers; judges put heads on the tokens or on the pooled features. Pictures are letterboxed to
the tower's size, never cropped. While nothing is trained, tokens of a picture are kept, so the
judges of a panel that share towers pay for them once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rewards.backbones import trunk as _small_resnet  # noqa: F401  (registers it in timm)
from rewards.errors import RewardConfigError
from rewards.images import letterbox
from rewards.training.heads import Sizes

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
STATISTICS = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
KEPT = 2048  # pictures whose tokens are remembered
Picture = UInt8[np.ndarray, "3 _ _"]


def identifier(source: str) -> str:
    """open_clip's name of a folder or hub id. Raises RewardConfigError for what is neither."""
    if source.startswith(("hf-hub:", "local-dir:")):
        return source
    if (Path(source) / CONFIG).is_file():
        return f"local-dir:{source}"
    if Path(source).exists() or source.count("/") != 1:
        raise RewardConfigError(
            f"towers: expected a folder with {CONFIG} or a hub id such as"
            f" laion/CLIP-ViT-B-32-laion2B-s34B-b79K, got '{source}'"
        )
    return f"hf-hub:{source}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of fresh towers; the default is that of the embedded judges. The image tower is a
    convolutional model of timm whose map number `stage`, counted from 0, gives the tokens; or, with
    trunk="", a vision transformer of `patch`, `width` and `layers`.
    """

    trunk: str = "small_resnet"
    stage: int = 2
    embed: int = 152  # pooled features: one for each value of `rewards.scenes.aspects`
    side: int = 64
    patch: int = 16
    width: int = 192
    layers: int = 4
    text_width: int = 96
    text_layers: int = 2
    context: int = 48
    words: int = 400

    def open_clip(self) -> dict[str, Any]:
        """open_clip's `model_cfg`. Text is read in both directions, and padding is not pooled."""
        vision: dict[str, Any] = {
            "image_size": self.side,
            "layers": self.layers,
            "width": self.width,
            "head_width": 32,
            "patch_size": self.patch,
            "mlp_ratio": 3.0,
        }
        if self.trunk:
            vision = {"image_size": self.side, "timm_model_name": self.trunk}
            own = self.trunk == "small_resnet"  # whose own head pools and projects
            vision |= {"timm_pool": "" if own else "avg", "timm_proj": "" if own else "linear"}
        text = {
            "context_length": self.context,
            "vocab_size": self.words,
            "width": self.text_width,
            "heads": self.text_width // 32,
            "layers": self.text_layers,
            "mlp_ratio": 3.0,
            "hf_tokenizer_name": "tokenizer",
            "pool_type": "eos",
            "eos_id": 1,
            "no_causal_mask": True,
        }
        return {"embed_dim": self.embed, "vision_cfg": vision, "text_cfg": text}


class Towers(nn.Module):
    """`see` and `text_tokens` for heads; `embed` for scores by cosine."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, clip: nn.Module, tokenizer: Any, source: str = "", stage: int | None = None
    ) -> None:
        super().__init__()
        self.clip: Any = clip
        self.tokenizer = tokenizer
        self.source, self.stage = source, stage
        self.side = _first(self.clip.visual.image_size)
        self.context: int = tokenizer.context_length
        for part in ("mean", "std"):
            values = torch.tensor(getattr(clip.visual, f"image_{part}")).view(3, 1, 1)
            self.register_buffer(part, values, persistent=False)
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())
        blank = np.zeros((3, self.side, self.side), np.uint8)
        with torch.no_grad():
            tokens, pooled = self._see([blank])
        self._widths = tokens.shape[-1], pooled.shape[-1]

    @property
    def sizes(self) -> Sizes:
        """What heads must know."""
        return Sizes(
            image_width=self._widths[0],
            pooled_width=self._widths[1],
            text_width=self.clip.token_embedding.embedding_dim,
            context=self.context,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.clip.parameters()).device

    # --- what goes in -----------------------------------------------------------------------------

    def pixels(self, images: Sequence[Picture]) -> Float[Tensor, "b 3 s s"]:
        """Pictures of any size as the image tower takes them."""
        same = np.stack([letterbox(image, self.side) for image in images])
        batch = torch.from_numpy(same).to(self.device, torch.float32) / 255
        return (batch - self.mean) / self.std

    def tokens(self, texts: Sequence[str]) -> Int[Tensor, "b c"]:
        """Token ids, cut and padded to the context length."""
        return self.tokenizer(list(texts)).to(self.device)

    def truncated(self, text: str) -> bool:
        """Whether a prompt is longer than the text tower reads (only the cheap test is exact)."""
        if len(text) + 2 <= self.context:  # at most a token a character
            return False
        longer = self.tokenizer([text], self.context + 1)
        return bool((longer[0] != 0).sum() > self.context)

    # --- what comes out ---------------------------------------------------------------------------

    def see(self, images: Sequence[Picture]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b f"]]:
        """The image tower's last tokens, in reading order, and its pooled features, which are what
        `embed` scales to length 1.
        """
        if torch.is_grad_enabled() or self.training:
            return self._see(images)
        keys = [_key_of_image(image) for image in images]
        new = {k: image for k, image in zip(keys, images, strict=True) if k not in self._kept}
        if new:
            self._kept.update(
                zip(new, zip(*self._see(list(new.values())), strict=True), strict=True)
            )
        found = [self._kept[key] for key in keys]
        for key in keys:
            self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def text_tokens(
        self, texts: Sequence[str]
    ) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"]]:
        """The text tower's last tokens, and which of them are there (the rest is padding)."""
        return self.states(self.tokens(texts))

    def states(self, ids: Int[Tensor, "b c"]) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"]]:
        """The same for token ids, as `tokens` gives them."""
        found = self.clip.forward_intermediates(
            text=ids, text_indices=1, normalize_intermediates=True, output_logits=False
        )
        used = ids != 0
        longest = max(1, int(used.sum(1).max()))
        return found["text_intermediates"][-1][:, :longest], used[:, :longest]

    def unreached(self) -> tuple[str, ...]:
        """Prefixes of the parameters that no head depends on."""
        return "clip.text_projection", "clip.logit_scale"

    def _see(self, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        visual, pixels = self.clip.visual, self.pixels(images)
        if self.stage is not None:
            last, maps = visual.trunk.forward_intermediates(pixels, indices=[self.stage])
            return maps[0].flatten(2).mT, visual.head(visual.trunk.forward_head(last))
        found = visual.forward_intermediates(
            pixels, indices=1, output_fmt="NLC", normalize_intermediates=True
        )
        return found["image_intermediates"][-1], found["image_features"]

    @torch.no_grad()
    def embed(self, images: Sequence[Picture], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit features (B, D) of pictures and of prompts; their product is CLIP's cosine."""
        pictures = self.clip.encode_image(self.pixels(images), normalize=True)
        return pictures, self.clip.encode_text(self.tokenizer(list(texts)), normalize=True)

    def train(self, mode: bool = True) -> Towers:
        """As any module's; at a change, drops what is remembered: weights changed or will."""
        if mode != self.training:
            self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Drop what is remembered; call it after weights changed in place."""
        self._kept.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Weights that move to another device or dtype leave no tokens behind."""
        self.forget()
        return super()._apply(fn, recurse)


def _first(size: Any) -> int:
    """A side in pixels, from a number or a pair of equal ones."""
    return int(size[0] if isinstance(size, tuple | list) else size)


def _key_of_image(image: Picture) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
    digest.update(repr(image.shape).encode())
    return digest.digest()


def open_towers(source: str, device: torch.device | str = "cpu") -> Towers:
    """Towers from a folder or hub id, in fp32.

    Raises:
        RewardConfigError: neither of the two, or towers of another make than heads can read.
    """
    name = identifier(source)
    clip = open_clip.create_model(name, precision="fp32", device=device)
    stage = _stage_of(source)
    image = clip.visual if stage is None else clip.visual.trunk  # type: ignore[union-attr]
    for part in (clip, image):
        if not hasattr(part, "forward_intermediates"):
            raise RewardConfigError(
                f"towers: expected towers with tokens, got {type(part).__name__} in '{source}':"
                " choose a ViT"
            )
    tokenizer = open_clip.get_tokenizer(name)
    return Towers(clip, tokenizer, source, stage).eval().to(device)


def _stage_of(source: str) -> int | None:
    """Which map of a convolutional trunk is read, as `new_towers` wrote it; None for others."""
    path = Path(source.removeprefix("local-dir:")) / CONFIG
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("tokens_of_stage")


def new_towers(shape: Shape, texts: Sequence[str], folder: Path) -> Towers:
    """Fresh towers with a byte-level BPE of `texts`, written to `folder` and opened. Weights are
    drawn from torch's generator.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = shape.open_clip()
    write_tokenizer(texts, shape.words, folder)
    head: dict[str, Any] = {"model_cfg": config, "preprocess_cfg": STATISTICS}
    if shape.trunk:
        head["tokens_of_stage"] = shape.stage
    (folder / CONFIG).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    clip = open_clip.CLIP(**config)
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, folder / WEIGHTS)
    return open_towers(str(folder))


def write_tokenizer(texts: Sequence[str], size: int, folder: Path) -> None:
    """A byte-level BPE trained on `texts`, as open_clip's HFTokenizer opens it: <pad> is 0, and
    <eot>, behind every text, is 1.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="$A <eot>", special_tokens=[("<eot>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "<eot>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)


def save_towers(towers: Towers, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write weights beside the configuration and tokenizer of the folder they were opened from."""
    origin = Path(towers.source.removeprefix("local-dir:"))
    folder.mkdir(parents=True, exist_ok=True)
    for file in (CONFIG, "tokenizer.json", "tokenizer_config.json"):
        if (origin / file).is_file() and origin != folder:
            shutil.copyfile(origin / file, folder / file)
    weights = {
        k: v.detach().to("cpu", dtype).contiguous() for k, v in towers.clip.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)
