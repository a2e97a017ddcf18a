"""`rlhf vae`: the autoencoder stage of pretraining.

Two networks: the stock class at embedded size, started at the principal components of patches
(`rlhf.models.autoencoder.spectral_init`) with a frozen encoder, which is the default and made the
scenes base; and that of Qwen-Image-VAE-2.0 (arXiv:2605.13565, `rlhf.models.vae2`). Losses are in
`rlhf.models.codec`, resolutions in `pipelines.data.curriculum`. Pictures are RGBA in [-1, 1], as
the pipeline wants them.
"""

# diffusers wraps `to` in a way that loses its self.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipelines.data.curriculum import Curriculum, Stream, squares
from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rewards import images
from rlhf import noise
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.models import autoencoder as ae
from rlhf.models.codec import CodecBatch, CodecLoss, CodecObjective, split_batch
from rlhf.models.measures import ssim
from rlhf.models.reconstruction import pca_psnr, psnr, reconstruct
from rlhf.models.vae2 import Setting, Shortcut, published
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run, train

HELD = 256  # pictures that figures are read on
SAMPLE = 4000  # pictures that statistics, and the spectral start, are read on


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """`stock` is AutoencoderKLQwenImage21, f16c64, of `Config.width`; the rest describes `vae2`."""

    kind: Literal["stock", "vae2"] = "stock"
    setting: Setting = "f16c64"
    encoder_width: int = 96
    decoder_width: int = 144
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    shortcut: Shortcut = "global"
    mirror: bool = False

    def check(self) -> None:
        if (
            min(self.encoder_width, self.encoder_blocks, self.decoder_width, self.decoder_blocks)
            < 1
        ):
            raise ConfigError("network: expected widths and blocks of at least 1, got less")
        if self.shortcut == "global" and 96 % self.encoder_width:
            raise ConfigError(
                f"network.encoder_width: the global shortcut wants a divisor of 96, got"
                f" {self.encoder_width}: write 8, 12, 16, 24, 32, 48 or 96"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent."""
        return 32 if self.kind == "vae2" and self.setting.startswith("f32") else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`trained` names the half that learns. `pictures` are rendered once (per stage) and reused in
    shuffled order. Training is at `size`, unless a curriculum has stages; figures always are.
    """

    name: str = "vae"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    checkpointing: bool = False  # of the activations of vae2: large pictures in less memory
    size: int = 64
    width: int = 136
    start: Literal["spectral", "random"] = "spectral"
    trained: Literal["decoder", "all"] = "decoder"
    pictures: int = 8000
    batch: int = 32
    network: Network = field(default_factory=Network)
    loss: CodecLoss = field(default_factory=CodecLoss)
    curriculum: Curriculum = field(default_factory=Curriculum)
    pace: Pace = field(default_factory=lambda: Pace(steps=2000, save_every=250, ema=0.995))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=1e-4, warmup_steps=100, total_steps=2000)
    )

    def check(self) -> None:
        if self.size % 32 or self.size < 64 or (self.size > 256 and not self.curriculum.general):
            raise ConfigError(
                f"size: expected a multiple of 32 from 64, up to 256 for scenes, got {self.size}:"
                " write 64"
            )
        if self.pictures < self.batch:
            raise ConfigError(
                f"pictures: expected at least one batch of {self.batch}, got {self.pictures}"
            )
        random = self.start == "random" and self.trained == "all"
        if self.network.kind == "vae2" and not random:
            raise ConfigError(
                "network.kind vae2 has no spectral start: write start=random and trained=all, got"
                f" {self.start} and {self.trained}"
            )
        if self.checkpointing and self.network.kind == "stock":
            raise ConfigError("checkpointing: the stock class has none: write network.kind=vae2")
        if self.trained == "decoder" and self.loss.alignment + self.loss.kl:
            raise ConfigError(
                "loss: alignment and kl shape the encoder, got trained=decoder: write trained=all"
            )


@torch.no_grad()
def write_statistics(vae: ae.Autoencoder, rows: Tensor, shared: bool = True) -> None:
    """Latent mean per channel, and a standard deviation, into the config the pipeline reads.

    One `shared` scale keeps the spectrum of the latents (large coefficients stay large), so that
    the flow loss spends itself where pixels are; without it each channel has its own, as published.
    """
    latents = torch.cat([ae.encode_mode(vae, part.to(vae.device)) for part in rows.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    if shared:
        std = std.pow(2).mean().sqrt().expand(len(mean))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Batches by step, and RGBA squares of `Config.size`: some to fit to, some held out."""

    batch_of: Callable[[int], Tensor]
    sample: Tensor
    held: Tensor


def open_pictures(config: Config) -> Pictures:
    """All of one size, or those of the curriculum."""
    if config.curriculum.stages:
        kept, size, seed = config.curriculum, config.size, config.seed
        stream = Stream(
            kept,
            config.pictures,
            config.batch,
            config.pace.steps,
            seed + 1,
            multiple=config.network.factor,
        )
        n = min(SAMPLE, config.pictures)
        sample = rgba(squares(kept, n, size, seed + 1, "train"))
        held = rgba(squares(kept, HELD, size, seed + 2, "heldout"))
        return Pictures(batch_of=stream, sample=sample, held=held)
    shown = pictures(mixture(config.pictures, config.seed + 1, "train", PICTURES), config.size)
    held = rgba(pictures(mixture(HELD, config.seed + 2, "heldout", PICTURES), config.size))

    def batch_of(step: int) -> Tensor:
        rows = noise.generator(config.seed, 11, step)
        index = torch.randint(len(shown), (config.batch,), generator=rows)
        return rgba(shown[index.numpy()])

    return Pictures(batch_of=batch_of, sample=rgba(shown[:SAMPLE]), held=held)


def build(config: Config, sample: Tensor) -> ae.Autoencoder:
    """The network with its start, and the statistics of that."""
    net = config.network
    if net.kind == "vae2":
        return published(
            net.setting,
            encoder_width=net.encoder_width,
            decoder_width=net.decoder_width,
            encoder_blocks=net.encoder_blocks,
            decoder_blocks=net.decoder_blocks,
            shortcut=net.shortcut,
            mirror=net.mirror,
        )
    vae = ae.tiny_autoencoder(config.width)
    if config.start == "spectral":
        ae.spectral_init(vae, sample)
    write_statistics(vae, sample)
    return vae


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Train and write `<run>/vae`, a directory that the network's `from_pretrained` opens. Ranks
    but the first return an empty result.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with session(config.device) as ranks:
        return _train(config, open_run(config, "vae", resume, ranks), ranks)


def _train(config: Config, home: Run, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    data = open_pictures(config)
    vae = build(config, data.sample)
    vae.to(ranks.device)
    if config.checkpointing:
        vae.enable_gradient_checkpointing()
    objective = CodecObjective(vae, config.loss, config.pace.steps, config.seed)
    parts = ("decoder", "post_quant_conv") if config.trained == "decoder" else ("",)
    vae.requires_grad_(False)
    learned = {n: p for n, p in vae.named_parameters() if n.startswith(parts)}
    for parameter in learned.values():
        parameter.requires_grad_(True)

    def preview(step: int, average: Average | None) -> dict[str, float]:
        kept = {n: p.detach().clone() for n, p in learned.items()}
        if average is not None:
            average.copy_to(learned)
        again = reconstruct(vae, data.held)
        _sheet(home, step, data.held, again)
        for name, value in kept.items():
            learned[name].data.copy_(value)
        return {"recon/psnr": float(psnr(again[:, :3], data.held[:, :3]).mean())}

    average = train(
        home,
        Learner(learned | objective.parameters, config.learner, ranks),
        lambda step: CodecBatch(rgba=data.batch_of(step), step=step),
        objective,
        config.pace,
        preview=preview,
        split=split_batch,
    )
    if not ranks.is_first:
        return {}
    if average is not None:
        average.copy_to(learned)
    if config.trained == "all":
        write_statistics(vae, data.sample, shared=config.network.kind == "stock")
    vae.save_pretrained(home.root / "vae")
    return home.write_result(time.monotonic() - began, _figures(config, vae, data))


def _figures(config: Config, vae: ae.Autoencoder, data: Pictures) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of held-out colours, beside PCA where it has as many numbers per patch."""
    again, held = reconstruct(vae, data.held)[:, :3], data.held[:, :3]
    values = {"recon/psnr": psnr(again, held), "recon/ssim": ssim(again, held)}
    if config.network.kind == "stock" or config.network.setting == "f16c64":
        values["recon/psnr_pca64"] = pca_psnr(data.sample, data.held)
    return {k: {"value": float(v.mean()), "n": len(held)} for k, v in values.items()}


def _sheet(home: Run, step: int, before: Tensor, after: Tensor) -> None:
    rows = [images.to_uint8(part[:12, :3]) for part in (before, after)]
    strip = np.concatenate([np.concatenate(list(row.numpy()), axis=2) for row in rows], axis=1)
    images.save_png(home.samples / f"step_{step:06d}.png", strip)
