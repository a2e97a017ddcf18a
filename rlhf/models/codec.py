"""The objective of an autoencoder: a weighted sum of `codec_losses`, each loaded only if it counts.

    l1 |x - x'| + mse (x - x')^2 + perceptual + alignment (margins of the step) + kl + gan

Qwen-Image-VAE-2.0 (arXiv:2605.13565) has l1, perceptual and alignment; its weights are not
published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf import noise
from rlhf.errors import ConfigError
from rlhf.models import autoencoder as ae
from rlhf.models import codec_losses as losses
from rlhf.models.vision import Vision, load_vision, lpips_weights, vgg_features
from rlhf.training import equal_parts

_POSTERIOR = 14  # what a draw of this objective is keyed with


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecLoss:
    """Weights, 0 for a loss that is off, and what the losses look through.

    `vision` is the frozen encoder to align to (`rlhf.models.vision.load_vision`), after its block
    `layer` (null: the middle one). `trunk` is a file of VGG-16 for the perceptual loss and
    `calibration` its LPIPS weights; without, all blocks of `vision` are compared.
    """

    l1: float = 1.0
    mse: float = 1.0
    perceptual: float = 0.0
    alignment: float = 0.0
    kl: float = 0.0
    gan: float = 0.0
    margins: losses.Margins = field(default_factory=losses.Margins)
    vision: str = "scenes"
    layer: int | None = None
    trunk: str | None = None
    calibration: str | None = None

    def check(self) -> None:
        for name in ("l1", "mse", "perceptual", "alignment", "kl", "gan"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"loss.{name}: expected a weight of 0 or more, got {getattr(self, name)}"
                )
        if not self.l1 + self.mse:
            raise ConfigError("loss: expected l1 or mse above 0, got neither: write loss.l1=1")
        if self.calibration and not self.trunk:
            raise ConfigError(
                f"loss.calibration: expected loss.trunk beside it, got '{self.calibration}' alone:"
                " LPIPS weights belong to a VGG-16"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecBatch:
    """Pictures of one size, RGBA in [-1, 1], the step 1.. they are for, and which part of it."""

    rgba: Float[Tensor, "b 4 h w"]
    step: int
    part: int = 0


def split_batch(batch: CodecBatch, parts: int) -> list[CodecBatch]:
    """Consecutive pictures in equal parts. Raises ConfigError if they do not divide."""
    rows = enumerate(equal_parts(batch.rgba, parts))
    return [CodecBatch(rgba=rgba, step=batch.step, part=i) for i, rgba in rows]


class CodecObjective:
    """Maps a `CodecBatch` to the loss; `parameters` are what it trains beside the autoencoder.

    With `kl` above 0 the decoder sees samples of the posterior, keyed by (seed, step, part), else
    its mode. The discriminator learns in the same step, from its own hinge loss: Adam does not mind
    the scale of that, but the clipping of gradients is shared.
    """

    def __init__(self, vae: ae.Autoencoder, config: CodecLoss, steps: int, seed: int) -> None:
        self.vae, self.config, self.steps, self.seed = vae, config, steps, seed
        looks = config.alignment or (config.perceptual and not config.trunk)
        self.vision: Vision | None = load_vision(config.vision, vae.device) if looks else None
        trunk = config.trunk if config.perceptual else None
        self.trunk = vgg_features(trunk, vae.device) if trunk else None
        self.calibration = lpips_weights(config.calibration) if config.calibration else None
        self.extra = nn.ModuleDict()
        if config.alignment and self.vision:
            side = self.vision.multiple
            black = torch.zeros(1, 3, side, side, device=vae.device)
            seen = self.vision.features(black, (1, 1), config.layer)
            self.extra["alignment"] = nn.Linear(vae.config["z_dim"], seen.shape[-1], bias=False)
        if config.gan:
            self.extra["discriminator"] = losses.patch_discriminator()
        self.extra.to(vae.device)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.extra.named_parameters())

    def __call__(self, batch: CodecBatch) -> tuple[Tensor, dict[str, float]]:
        x, config = batch.rgba.to(self.vae.device), self.config
        posterior = self.vae.encode(x.unsqueeze(2), return_dict=False)[0]
        z = posterior.mode()
        terms: dict[str, tuple[float, Tensor]] = {}
        if config.alignment:
            terms["alignment"] = config.alignment, self._alignment(x, z[:, :, 0], batch.step)
        if config.kl:
            terms["kl"] = config.kl, losses.kl(posterior.mean, posterior.logvar)
            draw = noise.generator(self.seed, _POSTERIOR, batch.step, batch.part)
            z = z + posterior.std * torch.randn(z.shape, generator=draw).to(z.device)
        again = ae.decode_raw(self.vae, z[:, :, 0])
        error = again - x
        terms["l1"] = config.l1, error.abs().mean()
        terms["mse"] = config.mse, error.pow(2).mean()
        if config.perceptual:
            terms["perceptual"] = config.perceptual, self._perceptual(x[:, :3], again[:, :3])
        if config.gan:
            generator, discriminator = self._adversary(x[:, :3], again[:, :3])
            terms |= {"gan": (config.gan, generator), "discriminator": (1.0, discriminator)}
        total = _total(weight * value for weight, value in terms.values() if weight)
        return total, {f"loss/{k}": float(v.detach()) for k, (w, v) in terms.items() if w}

    def _alignment(self, x: Tensor, z: Tensor, step: int) -> Tensor:
        assert self.vision is not None
        with torch.no_grad():
            f = self.vision.features(x[:, :3], (z.shape[2], z.shape[3]), self.config.layer)
        projected = self.extra["alignment"](z.flatten(2).mT)
        return losses.alignment(projected, f, self.config.margins.at(step, self.steps))

    def _perceptual(self, x: Tensor, again: Tensor) -> Tensor:
        maps = self.trunk
        if maps is None:
            assert self.vision is not None
            maps = self.vision.maps
        with torch.no_grad():
            wanted = maps(x)
        return losses.perceptual(maps(again), wanted, self.calibration).mean()

    def _adversary(self, x: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's loss, through a discriminator held still, and the discriminator's."""
        module = self.extra["discriminator"]
        still = {name: p.detach() for name, p in module.named_parameters()}
        generator = losses.hinge_generator(torch.func.functional_call(module, still, (again,)))
        return generator, losses.hinge_discriminator(module(x), module(again.detach()))


def _total(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
