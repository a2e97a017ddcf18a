"""Stock `AutoencoderKLQwenImage21` at embedded size, started from the principal components of
patches.

A convolutional 16x autoencoder trained from scratch spends its first hours on what a linear code
has for free. The stock class can hold that code exactly when the input is patchified by 16:
residual branches start at zero, a constant channel makes the RMS norm linear, and silu(u) -
silu(-u) = u carries a signed value through the SiLU. Training then starts at the quality of PCA and
improves on it with context and nonlinearity, at usual rates: the stream between the norms is scaled
up, so that a residual branch's first steps of Adam are small beside what it carries.
"""

# What the stock classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage21
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import _patchify, _unpatchify
from jaxtyping import Float
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.models.vae2 import AutoencoderVAE2

Autoencoder = AutoencoderKLQwenImage21 | AutoencoderVAE2
LATENTS = 64
PATCH = 16
WHITENING = (
    0.5  # latent k has standard deviation (sd_k / sd_0) ** (1 - WHITENING) before normalisation
)
_SIGNAL = 0.03  # size of the coded signal beside the constant channel
_CONSTANT = 100.0  # the constant channel; large beside a step of Adam in a residual branch


def tiny_autoencoder(width: int = 136) -> AutoencoderKLQwenImage21:
    """A f16c64 RGBA autoencoder; `width` must exceed 2 * 64 so that the linear start fits."""
    return AutoencoderKLQwenImage21(
        base_dim=width,
        decoder_base_dim=width,
        z_dim=LATENTS,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=4 * PATCH**2,
        out_channels=4 * PATCH**2,
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
    )


def class_name(folder: Path | str) -> str | None:
    """The class that the config.json of a folder names. Raises OSError or ValueError if none."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config.get("_class_name") if isinstance(config, dict) else None


def load_any(folder: Path | str) -> diffusers.ModelMixin:
    """An autoencoder of ours or of diffusers, of the class its config names, for evaluation."""
    name = class_name(folder) or ""
    own = name == AutoencoderVAE2.__name__
    return (AutoencoderVAE2 if own else getattr(diffusers, name)).from_pretrained(folder).eval()


def load_autoencoder(folder: Path | str) -> Autoencoder:
    """What `rlhf vae` wrote, for evaluation. Raises ConfigError for another autoencoder."""
    vae = load_any(folder)
    if not isinstance(vae, Autoencoder):
        raise ConfigError(
            f"expected what rlhf vae writes at {folder}, got {type(vae).__name__}:"
            " write runs/<name>/vae"
        )
    return vae


def encode_mode(vae: Autoencoder, rgba: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b c y x"]:
    """Posterior mode of pictures in [-1, 1], as the encoder gives it (not normalised)."""
    return vae.encode(rgba.unsqueeze(2)).latent_dist.mode()[:, :, 0]


def decode_raw(vae: Autoencoder, latents: Float[Tensor, "b c y x"]) -> Float[Tensor, "b 4 h w"]:
    """Pictures around [-1, 1] without the clamp of `vae.decode`, which kills gradients outside."""
    if isinstance(vae, AutoencoderVAE2):
        return vae.decode_raw(latents)
    decoded = vae.decoder(vae.post_quant_conv(latents.unsqueeze(2)), first_chunk=True)
    return _unpatchify(decoded, vae.config.patch_size or 1)[:, :, 0]


def patches(pictures: Float[Tensor, "b c h w"], patch: int = PATCH) -> Float[Tensor, "n d"]:
    """All square patches as rows, in the channel order of the stock patchify."""
    rows = _patchify(pictures.unsqueeze(2), patch)[:, :, 0]
    return rows.permute(0, 2, 3, 1).reshape(-1, rows.shape[1])


def assemble(
    rows: Float[Tensor, "n d"], size: tuple[int, int], patch: int = PATCH
) -> Float[Tensor, "b c h w"]:
    """Pictures of (height, width) from the rows that `patches` made of them."""
    y, x = (side // patch for side in size)
    maps = rows.view(-1, y, x, rows.shape[1]).permute(0, 3, 1, 2)
    return _unpatchify(maps.unsqueeze(2), patch)[:, :, 0]


def leading(covariance: Float[Tensor, "d d"], k: int) -> tuple[Tensor, Tensor]:
    """The `k` eigenvectors (d, k) of largest eigenvalue, and their square roots (k,)."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
    return vectors, values.clamp_min(1e-12).sqrt()


def principal_components(
    rows: Float[Tensor, "n d"], k: int = LATENTS
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), basis (d, k) and standard deviations (k,), largest first."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    basis, deviations = leading(centred.T @ centred / len(rows), k)
    return mean, basis.to(rows.dtype), deviations.to(rows.dtype)


def _zero_residual_branches(vae: AutoencoderKLQwenImage21) -> None:
    for name, module in vae.named_modules():
        if name.endswith("conv2") or name.endswith(".proj"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def _zero(*convs: torch.nn.Module) -> None:
    for conv in convs:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)


def _signed(conv, rows: Float[Tensor, "k d"], offset: Float[Tensor, " k"]) -> None:
    """Centre tap gives +value and -value of each row, then 1; all times the constant."""
    k, centre = len(rows), conv.weight.shape[-1] // 2
    conv.weight.data[: 2 * k, :, centre, centre] = _CONSTANT * torch.cat([rows, -rows])
    conv.bias.data[: 2 * k] = _CONSTANT * torch.cat([offset, -offset])
    conv.bias.data[2 * k] = _CONSTANT


def _difference(conv, rows: Float[Tensor, "d k"], offset: Float[Tensor, " d"], gain: float) -> None:
    """Centre tap takes silu(+value) - silu(-value) back and maps it by `rows`."""
    d, k = rows.shape
    centre = conv.weight.shape[-1] // 2
    conv.weight.data[:d, : 2 * k, centre, centre] = torch.cat([rows, -rows], dim=1) / gain
    conv.bias.data[:d] = offset


@torch.no_grad()
def spectral_init(vae: AutoencoderKLQwenImage21, rgba: Float[Tensor, "b 4 h w"]) -> None:
    """Set the weights so that the autoencoder is PCA-64 of the patches of `rgba`, to within a few
    percent.

    Raises:
        ValueError: an autoencoder that does not patchify by 16 or is narrower than 129 channels.
    """
    width = vae.encoder.conv_in.weight.shape[0]
    if vae.config.patch_size != PATCH or width <= 2 * LATENTS:
        raise ValueError(
            f"expected patch_size 16 and a width above {2 * LATENTS}, got {vae.config.patch_size}"
            f" and {width}:"
            " the linear start needs both, train from random weights otherwise"
        )
    mean, basis, sd = principal_components(patches(rgba))
    scale = (sd / sd[0]) ** (1 - WHITENING) / sd  # latent = scale * coefficient
    small = _SIGNAL * (1 / (scale * sd).max())
    _zero_residual_branches(vae)
    enc, dec = vae.encoder, vae.decoder
    _zero(enc.conv_in, enc.conv_out, dec.conv_in, dec.conv_out, vae.quant_conv, vae.post_quant_conv)
    for conv, channels in ((vae.quant_conv, LATENTS), (vae.post_quant_conv, LATENTS)):
        conv.weight.data[:channels, :channels, 0, 0] = torch.eye(channels)
    vae.quant_conv.bias.data[LATENTS:] = -10.0  # log variance: the posterior is almost a point
    project = (basis * scale).T * small
    _signed(enc.conv_in, project, -(project @ mean))
    gain = math.sqrt(width) * float(small)
    eye = torch.eye(LATENTS)
    _difference(enc.conv_out, eye, torch.zeros(LATENTS), gain)
    _signed(dec.conv_in, eye * small, torch.zeros(LATENTS))
    _difference(dec.conv_out, basis / scale, mean, gain)
