"""`rlhf vae`: the f16c64 autoencoder of the scenes base, without discriminator and without KL.

Loss: mean |x - x'| + mean (x - x')^2 on RGBA pictures in [-1, 1]. The embedded default starts at
the principal components of patches (`rlhf.models.autoencoder.spectral_init`) and trains the decoder
on a frozen encoder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage21
from torch import Tensor

from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rewards import images
from rlhf import noise
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.models import autoencoder as ae
from rlhf.models.reconstruction import pca_psnr, psnr, reconstruct
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`trained` names the half that learns. `pictures` are rendered once and reused in shuffled
    order.
    """

    name: str = "vae"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1
    size: int = 64
    width: int = 136
    start: Literal["spectral", "random"] = "spectral"
    trained: Literal["decoder", "all"] = "decoder"
    pictures: int = 8000
    batch: int = 32
    pace: Pace = field(default_factory=lambda: Pace(steps=2000, save_every=250, ema=0.995))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=1e-4, warmup_steps=100, total_steps=2000)
    )

    def check(self) -> None:
        if self.size % 32 or not 64 <= self.size <= 256:
            raise ConfigError(
                f"size: expected a multiple of 32 from 64 to 256, got {self.size}: write 64"
            )
        if self.pictures < self.batch:
            raise ConfigError(
                f"pictures: expected at least one batch of {self.batch}, got {self.pictures}"
            )


@torch.no_grad()
def write_statistics(vae: AutoencoderKLQwenImage21, rows: Tensor) -> None:
    """Latent mean per channel, and one scale for all channels, into the config the pipeline reads.

    One scale keeps the spectrum of the latents (large coefficients stay large), so that the flow
    loss spends itself where pixels are.
    """
    latents = torch.cat([ae.encode_mode(vae, part) for part in rows.split(64)])
    mean = latents.mean((0, 2, 3))
    scale = float(latents.std((0, 2, 3)).pow(2).mean().sqrt())
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=[scale] * len(mean))


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Train and write `<run>/vae`, a directory that `AutoencoderKLQwenImage21.from_pretrained`
    opens. Ranks but the first return an empty result.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with session() as ranks:
        return _train(config, open_run(config, "vae", resume, ranks), ranks)


def _train(config: Config, home: Run, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    shown = pictures(mixture(config.pictures, config.seed + 1, "train", PICTURES), config.size)
    held = rgba(pictures(mixture(256, config.seed + 2, "heldout", PICTURES), config.size))
    sample = rgba(shown[:4000])
    vae = ae.tiny_autoencoder(config.width)
    if config.start == "spectral":
        ae.spectral_init(vae, sample)
    write_statistics(vae, sample)
    parts = ("decoder", "post_quant_conv") if config.trained == "decoder" else ("",)
    vae.requires_grad_(False)
    trainable = {n: p for n, p in vae.named_parameters() if n.startswith(parts)}
    for parameter in trainable.values():
        parameter.requires_grad_(True)

    def batch_of(step: int) -> Tensor:
        rows = noise.generator(config.seed, 11, step)
        index = torch.randint(len(shown), (config.batch,), generator=rows)
        return rgba(shown[index.numpy()])

    def objective(x: Tensor) -> tuple[Tensor, dict[str, float]]:
        error = ae.decode_raw(vae, ae.encode_mode(vae, x)) - x
        return error.abs().mean() + error.pow(2).mean(), {}

    def preview(step: int, average: Average | None) -> dict[str, float]:
        kept = {n: p.detach().clone() for n, p in trainable.items()}
        if average is not None:
            average.copy_to(trainable)
        again = reconstruct(vae, held)
        _sheet(home, step, held, again)
        for name, value in kept.items():
            trainable[name].data.copy_(value)
        return {"recon/psnr": float(psnr(again[:, :3], held[:, :3]).mean())}

    average = train(
        home,
        Learner(trainable, config.learner, ranks),
        batch_of,
        objective,
        config.pace,
        preview=preview,
    )
    if average is not None and ranks.is_first:
        average.copy_to(trainable)
    return _finish(config, home, vae, sample, held, began) if ranks.is_first else {}


def _finish(
    config: Config,
    home: Run,
    vae: AutoencoderKLQwenImage21,
    sample: Tensor,
    held: Tensor,
    began: float,
) -> dict[str, Any]:
    """Write the trained codec and its figures on held-out pictures."""
    if config.trained == "all":
        write_statistics(vae, sample)
    vae.save_pretrained(home.root / "vae")
    value = psnr(reconstruct(vae, held)[:, :3], held[:, :3])
    metrics = {
        "recon/psnr": {"value": float(value.mean()), "n": len(held)},
        "recon/psnr_pca64": {"value": float(pca_psnr(sample, held).mean()), "n": len(held)},
    }
    return home.write_result(time.monotonic() - began, metrics)


def _sheet(home: Run, step: int, before: Tensor, after: Tensor) -> None:
    rows = [images.to_uint8(part[:12, :3]) for part in (before, after)]
    strip = np.concatenate([np.concatenate(list(row.numpy()), axis=2) for row in rows], axis=1)
    images.save_png(home.samples / f"step_{step:06d}.png", strip)
