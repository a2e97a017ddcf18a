"""Frozen eyes: feature maps of pictures, for alignment, perceptual distance and measures.

`load_vision` opens DINOv2 (what Qwen-Image-VAE-2.0 aligns to, arXiv:2605.13565) and its kin, or the
picture half of CLIP, through transformers, or the vision tower of a pipeline's own Qwen3-VL, so
that the embedded base needs no other model. `vgg_features` opens the trunk of LPIPS
(arXiv:1801.03924).
"""

# What the transformers classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf import assets
from rlhf.errors import ConfigError

CLIPS = ("clip", "clip_vision_model")
FAMILIES = ("dinov2", "dinov2_with_registers", "dinov3_vit", *CLIPS)
_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: pooling
_VGG_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # for [-1, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """A frozen encoder: `blocks` maps normalised pixels, whose sides are multiples of `multiple`,
    to the feature map after each of its blocks. `mean` and `std` are of pixels in [0, 1].
    """

    blocks: Callable[[Tensor], list[Tensor]]
    multiple: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def maps(self, rgb: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b d y x"]]:
        """Feature maps of pictures in [-1, 1], shallow first; with gradient to the pictures."""
        size = [self.multiple * max(1, round(side / self.multiple)) for side in rgb.shape[-2:]]
        if size != list(rgb.shape[-2:]):
            rgb = F.interpolate(rgb, size, mode="bicubic", antialias=True)
        mean, std = (rgb.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return self.blocks((rgb / 2 + 0.5 - mean) / std)

    def features(
        self, rgb: Float[Tensor, "b 3 h w"], grid: tuple[int, int], layer: int | None = None
    ) -> Float[Tensor, "b p d"]:
        """The map after block `layer` (from 1; by default the middle one) at the positions of a
        `grid` (rows, columns), in reading order.

        Raises:
            ConfigError: a layer the encoder does not have.
        """
        found = self.maps(rgb)
        chosen = max(1, len(found) // 2) if layer is None else layer
        if not 1 <= chosen <= len(found):
            raise ConfigError(
                f"layer: expected 1 to {len(found)}, got {chosen}: leave it out for the middle one"
            )
        here = found[chosen - 1]
        if here.shape[-2:] != grid:
            here = F.interpolate(here, grid, mode="bilinear", antialias=True)
        return here.flatten(2).mT

    def pooled(self, rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Mean over the last map: one row per picture, for a Frechet distance."""
        return self.maps(rgb)[-1].mean((2, 3))


def load_vision(source: str, device: torch.device | str = "cpu") -> Vision:
    """From a directory or hub id of DINOv2 or its kin, of CLIP, or of a pipeline with a Qwen3-VL,
    such as `scenes`.

    Raises:
        ConfigError: another kind of model.
    """
    where = assets.resolve(source)
    if (Path(where) / "model_index.json").is_file():
        return _tower(where, device)
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(where).model_type
    if kind not in FAMILIES:
        raise ConfigError(
            f"vision: expected one of {', '.join(FAMILIES)} or a pipeline directory, got"
            f" '{source}', a {kind}: write facebook/dinov2-large or scenes"
        )
    return _transformer(where, kind in CLIPS, device)


def _transformer(where: str, clip: bool, device: torch.device | str) -> Vision:
    from transformers import AutoModel, CLIPVisionModel
    from transformers.utils import constants

    family = CLIPVisionModel if clip else AutoModel
    model = family.from_pretrained(where, dtype=torch.float32).to(device)
    model.eval().requires_grad_(False)
    patch = int(model.config.patch_size)
    options = {"interpolate_pos_encoding": True} if clip else {}

    def blocks(pixels: Tensor) -> list[Tensor]:
        y, x = (side // patch for side in pixels.shape[-2:])
        seen = model(pixel_values=pixels, output_hidden_states=True, **options)
        tokens = [h[:, -y * x :] for h in seen.hidden_states[1:]]  # behind class, registers
        return [h.mT.unflatten(2, (y, x)) for h in tokens]

    name = "OPENAI_CLIP" if clip else "IMAGENET_DEFAULT"
    mean, std = (tuple(getattr(constants, f"{name}_{part}")) for part in ("MEAN", "STD"))
    return Vision(blocks=blocks, multiple=patch, mean=mean, std=std)


def to_patches(pixels: Float[Tensor, "b 3 h w"], patch: int, merge: int) -> Float[Tensor, "n d"]:
    """Rows of patches in the order of Qwen's image processor: windows of `merge` x `merge` patches
    stay together, and a picture is a film of two equal frames.
    """
    b, c, h, w = pixels.shape
    y, x = h // patch // merge, w // patch // merge
    cut = pixels.view(b, c, y, merge, patch, x, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return (
        cut.unsqueeze(6).expand(*cut.shape[:6], 2, patch, patch).reshape(b * y * x * merge**2, -1)
    )


def _tower(where: str, device: torch.device | str) -> Vision:
    from transformers import AutoImageProcessor, Qwen3VLForConditionalGeneration

    whole = Qwen3VLForConditionalGeneration.from_pretrained(
        where, subfolder="text_encoder", dtype=torch.float32
    )
    tower = whole.model.visual.to(device).eval().requires_grad_(False)
    processor = AutoImageProcessor.from_pretrained(where, subfolder="processor")
    patch, merge = tower.config.patch_size, tower.config.spatial_merge_size

    def blocks(pixels: Tensor) -> list[Tensor]:
        b, (y, x) = len(pixels), (side // patch for side in pixels.shape[-2:])
        sizes = torch.tensor([[1, y, x]] * b, device=pixels.device)
        rows = to_patches(pixels, patch, merge)
        hidden = tower(rows, grid_thw=sizes, output_hidden_states=True).hidden_states[1:]
        windows = (b, y // merge, x // merge, merge, merge, -1)
        return [h.view(windows).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, y, x) for h in hidden]

    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return Vision(blocks=blocks, multiple=patch * merge, mean=mean, std=std)


def _read(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def vgg_features(
    path: str, device: torch.device | str = "cpu"
) -> Callable[[Float[Tensor, "b 3 h w"]], list[Tensor]]:
    """Five feature maps of VGG-16 for pictures in [-1, 1]; `path` holds torchvision's weights.

    Raises:
        ConfigError: a file without them.
    """
    layers: list[nn.Module] = []
    inner = 3
    for outer in _VGG16:
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()] if outer else [nn.MaxPool2d(2)]
        inner = outer or inner
    trunk = nn.Sequential(*layers)
    known = {k.removeprefix("features."): v for k, v in _read(path).items() if "features." in k}
    if known.keys() != trunk.state_dict().keys():
        raise ConfigError(
            f"expected the weights of torchvision's vgg16 in {path}, got {len(known)} of its"
            f" {len(trunk.state_dict())} tensors: write the path of vgg16-397923af.pth"
        )
    trunk.load_state_dict(known)
    trunk.to(device).eval().requires_grad_(False)

    def maps(rgb: Tensor) -> list[Tensor]:
        shift, scale = (rgb.new_tensor(v).view(1, 3, 1, 1) for v in (_LPIPS_SHIFT, _LPIPS_SCALE))
        x, found = (rgb - shift) / scale, []
        for index, layer in enumerate(trunk):
            x = layer(x)
            if index in _VGG_TAPS:
                found.append(x)
        return found

    return maps


def lpips_weights(path: str) -> Sequence[Float[Tensor, " c"]]:
    """Learned weights per layer and channel, from a file of the `lpips` package."""
    tensors = _read(path)
    return [tensors[f"lin{layer}.model.1.weight"].flatten() for layer in range(len(_VGG_TAPS))]
