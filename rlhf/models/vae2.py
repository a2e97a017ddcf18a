"""The autoencoder of Qwen-Image-VAE-2.0 (arXiv:2605.13565): convolutions only, a light encoder and
a heavy decoder, and a skip that hands the pixels to the deep layers.

Stated there: no attention, widths 96 and 144, five levels at 16x and six at 32x, 64 to 192 latent
channels. Ours: blocks per level and multipliers, the layout that gives its eight parameter counts;
and that the skip joins the deepest map before the middle blocks. It has no weights: the colours of
a cell of f x f pixels become channels, and groups of channels are averaged down to the width of the
deepest level. At full width and 16x nothing is averaged, 3 * 16^2 = 8 * 96.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Shortcut = Literal["global", "per-level", "none"]
Setting = Literal["f16c64", "f16c128", "f32c128", "f32c192"]
MULTIPLIERS = {16: (1, 2, 4, 8, 8), 32: (1, 1, 2, 4, 8, 8)}
COLOURS = 3  # channels that the global shortcut carries; alpha takes the long way


def regroup(x: Float[Tensor, "b n h w"], channels: int) -> Float[Tensor, "b m h w"]:
    """Mean over groups of adjacent channels, or repetition of each, to `channels` of them.

    Raises ValueError if neither number divides the other.
    """
    n = x.shape[1]
    if n % channels == 0:
        return x.unflatten(1, (channels, -1)).mean(2)
    if channels % n == 0:
        return x.repeat_interleave(channels // n, dim=1)
    raise ValueError(
        f"expected channel counts of which one divides the other, got {n} and {channels}: choose a"
        " width that divides 96, or another shortcut"
    )


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over the channels of a map, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        unit = F.normalize(x.float(), dim=1).to(x.dtype)
        return unit * x.shape[1] ** 0.5 * self.gamma


class Block(nn.Module):
    """x + (RMS norm, SiLU, 3x3 convolution) twice."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = RMSNorm(outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


def _blocks(inner: int, outer: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(inner if i == 0 else outer, outer) for i in range(count)))


class Down(nn.Module):
    """A level of the encoder; `halve` ends it with a convolution of stride 2."""

    def __init__(self, inner: int, outer: int, count: int, halve: bool, skip: bool) -> None:
        super().__init__()
        self.outer, self.halves, self.skip = outer, halve, skip
        self.blocks = _blocks(inner, outer, count)
        self.resample = nn.Conv2d(outer, outer, 3, stride=2) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x)
        h = self.resample(F.pad(h, (0, 1, 0, 1)) if self.halves else h)
        if not self.skip:
            return h
        return h + regroup(F.pixel_unshuffle(x, 2) if self.halves else x, self.outer)


class Up(nn.Module):
    """A level of the decoder; `double` ends it with nearest neighbours and a convolution."""

    def __init__(self, inner: int, outer: int, count: int, double: bool, skip: bool) -> None:
        super().__init__()
        self.outer, self.doubles, self.skip = outer, double, skip and double
        self.blocks = _blocks(inner, outer, count)
        self.resample = nn.Conv2d(outer, outer, 3, padding=1) if double else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(x)
        h = self.resample(F.interpolate(h, scale_factor=2.0) if self.doubles else h)
        return h + F.pixel_shuffle(regroup(x, 4 * self.outer), 2) if self.skip else h


def _stepped(owner: nn.Module, level: nn.Module, h: Tensor) -> Tensor:
    """`level(h)`; its activations are computed again in the backward if the owner says so."""
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(level, h, use_reentrant=False)
    return level(h)


class Encoder(nn.Module):
    """Pictures to 2 * `latents` channels: mean and log variance."""

    def __init__(
        self, channels: int, widths: Sequence[int], blocks: int, latents: int, shortcut: Shortcut
    ) -> None:
        super().__init__()
        last, self.factor = len(widths) - 1, 2 ** (len(widths) - 1)
        self.shortcut = shortcut
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Down(widths[max(i - 1, 0)], w, blocks, i < last, shortcut == "per-level")
            for i, w in enumerate(widths)
        )
        self.mid = _blocks(widths[-1], widths[-1], 2)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.levels:
            h = _stepped(self, level, h)
        if self.shortcut == "global":
            h = h + regroup(F.pixel_unshuffle(x[:, :COLOURS], self.factor), h.shape[1])
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents to pictures; `mirror` repeats latent channels into the colours of their cell."""

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        latents: int,
        shortcut: Shortcut,
        mirror: bool,
    ) -> None:
        super().__init__()
        down = widths[::-1]
        last, self.factor = len(down) - 1, 2 ** (len(down) - 1)
        self.mirror, self.alpha = mirror, channels - COLOURS
        self.conv_in = nn.Conv2d(latents, down[0], 3, padding=1)
        self.mid = _blocks(down[0], down[0], 2)
        self.levels = nn.ModuleList(
            Up(down[max(i - 1, 0)], w, blocks, i < last, shortcut == "per-level")
            for i, w in enumerate(down)
        )
        self.norm_out = RMSNorm(down[-1])
        self.conv_out = nn.Conv2d(down[-1], channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.levels:
            h = _stepped(self, level, h)
        x = self.conv_out(F.silu(self.norm_out(h)))
        if not self.mirror:
            return x
        direct = F.pixel_shuffle(regroup(z, COLOURS * self.factor**2), self.factor)
        return x + F.pad(direct, (0, 0, 0, 0, 0, self.alpha))


class AutoencoderVAE2(ModelMixin, ConfigMixin):
    """Encoder, decoder and latent statistics with the calls `QwenImage21Pipeline` makes of its own.

    `factor` is 16 or 32 pixels per latent (that pipeline assumes 16), `z_dim` the latent channels,
    `image_channels` 4 for RGBA as the pipeline wants it or 3. Blocks are residual blocks per
    level. Pictures are in [-1, 1], (B, C, H, W) or with one frame (B, C, 1, H, W).
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        factor: int = 16,
        z_dim: int = 64,
        encoder_width: int = 96,
        decoder_width: int = 144,
        encoder_blocks: int = 2,
        decoder_blocks: int = 3,
        image_channels: int = 4,
        shortcut: Shortcut = "global",
        mirror: bool = False,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        if factor not in MULTIPLIERS:
            raise ValueError(f"expected factor {' or '.join(map(str, MULTIPLIERS))}, got {factor}")
        if image_channels < COLOURS:
            raise ValueError(f"expected image_channels 3 or 4, got {image_channels}")
        self.register_to_config(
            latents_mean=latents_mean or [0.0] * z_dim, latents_std=latents_std or [1.0] * z_dim
        )
        self.spatial_compression_ratio = factor
        enc, dec = ([w * m for m in MULTIPLIERS[factor]] for w in (encoder_width, decoder_width))
        self.encoder = Encoder(image_channels, enc, encoder_blocks, z_dim, shortcut)
        self.decoder = Decoder(image_channels, dec, decoder_blocks, z_dim, shortcut, mirror)

    def encode(
        self, x: Float[Tensor, "b c *frame h w"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Posterior over latents, laid out like the pictures. Raises ValueError on their size."""
        factor = self.spatial_compression_ratio
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(
                f"expected height and width in multiples of {factor}, got {tuple(x.shape[-2:])}:"
                " crop or pad the pictures"
            )
        moments = _framed(self.encoder, x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode_raw(self, z: Float[Tensor, "b z *frame y x"]) -> Float[Tensor, "b c *frame h w"]:
        """Pictures around [-1, 1] without the clamp, which would kill gradients outside."""
        return _framed(self.decoder, z)

    def decode(
        self, z: Float[Tensor, "b z *frame y x"], return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures in [-1, 1] from latents that are not normalised."""
        sample = self.decode_raw(z).clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Float[Tensor, "b c *frame h w"]) -> DecoderOutput:
        """Round trip through the posterior mode."""
        latents = self.encode(sample, return_dict=False)[0].mode()
        return DecoderOutput(sample=self.decode(latents, return_dict=False)[0])


def _framed(module: nn.Module, x: Tensor) -> Tensor:
    """`module` on maps, with or without an axis of one frame. Raises ValueError on more frames."""
    if x.ndim == 4:
        return module(x)
    if x.ndim != 5 or x.shape[2] != 1:
        raise ValueError(
            f"expected (B, C, H, W) or one frame (B, C, 1, H, W), got {tuple(x.shape)}: this is an"
            " autoencoder of pictures, pass frames as a batch"
        )
    return module(x[:, :, 0]).unsqueeze(2)


def published(setting: Setting, image_channels: int = 4, **changes) -> AutoencoderVAE2:
    """One of the four published configurations, by `f<factor>c<latent channels>`; `changes` are
    further arguments of the class, such as smaller widths.
    """
    factor, channels = map(int, setting[1:].split("c"))
    return AutoencoderVAE2(factor=factor, z_dim=channels, image_channels=image_channels, **changes)
