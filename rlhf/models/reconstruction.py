"""What an autoencoder keeps of a picture, and what a linear code of the same size would keep.

`open_codec` takes any autoencoder of pictures that diffusers knows, so that ours can stand beside
others. A linear code is PCA of patches: the best linear autoencoder of its patch size and number of
values, for the pictures it is fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf import assets
from rlhf.errors import ConfigError
from rlhf.models import autoencoder as ae

ALPHA = ("AutoencoderKLQwenImage21", "AutoencoderVAE2")  # may want a fourth channel, opaque
FRAMED = ("AutoencoderKLQwenImage21", "AutoencoderKLQwenImage", "AutoencoderKLWan")
KNOWN = (*FRAMED, "AutoencoderVAE2", "AutoencoderKL", "AutoencoderDC", "AutoencoderTiny")
_PROBE = 128  # px of the square that says how many latents there are


def psnr(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Decibels per picture, for pictures in [-1, 1]."""
    return -10 * torch.log10(((a - b) ** 2).flatten(1).mean(1).clamp_min(1e-10) / 4)


@torch.no_grad()
def reconstruct(
    vae: ae.Autoencoder, rows: Float[Tensor, "b 4 h w"], batch: int = 64
) -> Float[Tensor, "b 4 h w"]:
    """Round trip of RGBA pictures in [-1, 1] through the posterior mode, clamped."""
    device = vae.device
    parts = [
        ae.decode_raw(vae, ae.encode_mode(vae, part.to(device))).to(rows.device)
        for part in rows.split(batch)
    ]
    return torch.cat(parts).clamp(-1, 1)


# --- any autoencoder ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """`round_trip` is of RGB pictures in [-1, 1] whose sides are multiples of `factor`, through the
    posterior mode. `channels` values stand for each square of `factor` px.
    """

    kind: str  # name of its class
    factor: int
    channels: int
    round_trip: Callable[[Tensor], Tensor]


def find_codec(path: str) -> Path:
    """The folder of an autoencoder: itself, `vae` in a pipeline or in a run of `rlhf vae`, or that
    of an embedded model. Nothing is loaded.

    Raises:
        ConfigError: no such folder, no autoencoder of pictures in it, or no weights.
    """
    root = Path(assets.resolve(path))
    folder = root / "vae" if (root / "vae" / "config.json").is_file() else root
    try:
        kind = ae.class_name(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"expected the folder of an autoencoder, of a pipeline, or runs/<name> of rlhf vae, got"
            f" '{path}': {type(error).__name__}: write one with a config.json"
        ) from error
    if kind not in KNOWN:
        raise ConfigError(
            f"expected an autoencoder of pictures, one of {', '.join(KNOWN)}, got a {kind} at"
            f" '{path}': name another folder"
        )
    if not any(p.suffix in (".safetensors", ".bin") for p in folder.iterdir()):
        raise ConfigError(f"expected weights beside {folder / 'config.json'}, got none")
    return folder


def open_codec(folder: Path, device: torch.device | str = "cpu") -> Codec:
    """Load what `find_codec` found, in float32.

    Raises:
        ConfigError: an autoencoder that does not map RGB pictures to pictures of their size.
    """
    vae: Any = ae.load_any(folder)  # stock classes declare more than they give
    vae = vae.float().to(device).requires_grad_(False)
    kind, config = type(vae).__name__, dict(vae.config)
    default = config.get("in_channels") or config.get("input_channels") or 3
    inputs = config.get("image_channels") or default // (config.get("patch_size") or 1) ** 2
    if inputs != 3 and not (inputs == 4 and kind in ALPHA):
        raise ConfigError(
            f"expected an autoencoder of RGB pictures, got {inputs} channels: {folder}"
        )

    def encode(rgb: Tensor) -> Tensor:
        x = torch.cat([rgb, torch.ones_like(rgb[:, :1])], dim=1) if inputs == 4 else rgb
        found = vae.encode(x.unsqueeze(2) if kind in FRAMED else x)
        if hasattr(found, "latent_dist"):
            return found.latent_dist.mode()
        return found.latent if hasattr(found, "latent") else found.latents

    @torch.no_grad()
    def round_trip(rgb: Tensor) -> Tensor:
        again = vae.decode(encode(rgb.to(device))).sample
        again = again[:, :, 0] if kind in FRAMED else again
        return again[:, :3].clamp(-1, 1).to(rgb.device)

    with torch.no_grad():
        latents = encode(torch.zeros(1, 3, _PROBE, _PROBE, device=device))
    factor = _PROBE // latents.shape[-1]
    return Codec(kind=kind, factor=factor, channels=latents.shape[1], round_trip=round_trip)


# --- linear codes ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCode:
    """`basis` (d, k) and `mean` (d,) of patches of `patch` px; k values stand for each."""

    patch: int
    mean: Float[Tensor, " d"]
    basis: Float[Tensor, "d k"]

    def round_trip(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The nearest pictures that the code can say, not clamped."""
        rows = ae.patches(pictures, self.patch) - self.mean
        size = pictures.shape[-2], pictures.shape[-1]
        return ae.assemble(rows @ self.basis @ self.basis.T + self.mean, size, self.patch)


class PatchStatistics:
    """First and second moments of patches, added up over batches of pictures."""

    def __init__(self, patch: int, channels: int = 3) -> None:
        self.patch, self.count = patch, 0
        d = channels * patch**2
        self._total = torch.zeros(d, dtype=torch.float64)
        self._second = torch.zeros(d, d, dtype=torch.float64)

    def add(self, pictures: Float[Tensor, "b c h w"]) -> None:
        """Count the patches of a batch."""
        rows = ae.patches(pictures, self.patch)
        self.count += len(rows)
        self._total += rows.sum(0)
        self._second += rows.T @ rows

    def code(self, k: int) -> LinearCode:
        """PCA to `k` values (at most one per pixel value). Raises ValueError without a patch."""
        if not self.count:
            raise ValueError("expected patches to fit to, got none: add pictures first")
        mean = self._total / self.count
        basis, _ = ae.leading(self._second / self.count - torch.outer(mean, mean), k)
        return LinearCode(patch=self.patch, mean=mean.float(), basis=basis.float())


def pca_psnr(
    train_rows: Float[Tensor, "n 4 h w"], test_rows: Float[Tensor, "m 4 h w"]
) -> Float[Tensor, " m"]:
    """PSNR per picture (RGB) of PCA-64 of patches, fitted on one set and read on another."""
    known = PatchStatistics(ae.PATCH)
    for part in train_rows.split(64):
        known.add(part[:, :3])
    return psnr(known.code(ae.LATENTS).round_trip(test_rows[:, :3]), test_rows[:, :3])
