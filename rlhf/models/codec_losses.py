"""What an autoencoder is trained to keep, as functions of tensors.

    perceptual  sum_l mean_yx sum_c w_lc (a_lc / |a_l| - b_lc / |b_l|)^2        arXiv:1801.03924
    m_cos       mean_p ReLU(1 - cos(z'_p, f_p) - margin)                        arXiv:2501.01423
    m_dms       mean_pq ReLU(|cos(z'_p, z'_q) - cos(f_p, f_q)| - margin)        arXiv:2501.01423
    kl          mean (mu^2 + var - 1 - log var) / 2, nats per latent value      arXiv:1312.6114
    hinge       mean ReLU(1 - real) + mean ReLU(1 + fake), and - mean fake      arXiv:1705.02894

Qwen-Image-VAE-2.0 (arXiv:2605.13565) trains on |x - x'|, perceptual and m_cos + m_dms, whose
margins loosen during training; it removed KL and discriminator. How far and how fast they loosen is
not published: `Margins` goes from 0 to the constant margins of arXiv:2501.01423.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rlhf.errors import ConfigError

Map = Float[Tensor, "b _ _ _"]  # channels and size differ from layer to layer
PAIRED = 1024  # positions of a picture that enter m_dms, whose cost is their square


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """(strict, loose) of both alignment losses; from one to the other in the first `share` of the
    steps, linearly. Cosines, dimensionless.
    """

    cosine: tuple[float, float] = (0.0, 0.5)
    distance: tuple[float, float] = (0.0, 0.25)
    share: float = 0.5

    def check(self) -> None:
        for name, (strict, loose) in (("cosine", self.cosine), ("distance", self.distance)):
            if not 0 <= strict <= loose <= 2:
                raise ConfigError(
                    f"margins.{name}: expected 0 <= strict <= loose <= 2, got [{strict}, {loose}]:"
                    " margins loosen, write the smaller one first"
                )
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"margins.share: expected a share of the steps above 0 up to 1, got {self.share}"
            )

    def at(self, step: int, steps: int) -> tuple[float, float]:
        """Margins (cosine, distance) of step 1..`steps`."""
        done = min(1.0, (step - 1) / max(1.0, self.share * steps))
        cosine, distance = (a + (b - a) * done for a, b in (self.cosine, self.distance))
        return cosine, distance


def perceptual(
    a: Sequence[Map], b: Sequence[Map], weights: Sequence[Float[Tensor, " _"]] | None = None
) -> Float[Tensor, " b"]:
    """Distance of feature maps, layer by layer, with unit vectors over channels, per picture.

    Without `weights` (LPIPS has learned ones, per layer and channel) each layer counts as
    mean (2 - 2 cos), 0 to 4.
    """
    total = torch.zeros(len(a[0]), device=a[0].device)
    for layer, (one, two) in enumerate(zip(a, b, strict=True)):
        gap = (F.normalize(one, dim=1, eps=1e-10) - F.normalize(two, dim=1, eps=1e-10)) ** 2
        if weights is not None:
            gap = gap * weights[layer].to(gap)[:, None, None]
        total = total + gap.sum(1).mean((1, 2))
    return total


def margin_cosine(
    z: Float[Tensor, "b p d"], f: Float[Tensor, "b p d"], margin: float
) -> Float[Tensor, ""]:
    """How far each projected latent points away from its feature, beyond `margin`; 0 to 2."""
    return F.relu(1 - F.cosine_similarity(z, f, dim=-1) - margin).mean()


def margin_distance(
    z: Float[Tensor, "b p d"], f: Float[Tensor, "b p e"], margin: float
) -> Float[Tensor, ""]:
    """How far the similarities inside a picture differ between latents and features, beyond
    `margin`; 0 to 2. Of more than 1024 positions as many, evenly spaced, are compared.
    """
    if z.shape[1] > PAIRED:
        kept = torch.linspace(0, z.shape[1] - 1, PAIRED, device=z.device).round().long()
        z, f = z[:, kept], f[:, kept]
    z, f = F.normalize(z, dim=-1), F.normalize(f, dim=-1)
    return F.relu((z @ z.mT - f @ f.mT).abs() - margin).mean()


def alignment(
    z: Float[Tensor, "b p d"], f: Float[Tensor, "b p d"], margins: tuple[float, float]
) -> Float[Tensor, ""]:
    """m_cos + m_dms with unit weights, at margins (cosine, distance)."""
    return margin_cosine(z, f, margins[0]) + margin_distance(z, f, margins[1])


def kl(mean: Float[Tensor, "*dims"], logvar: Float[Tensor, "*dims"]) -> Float[Tensor, ""]:
    """KL of the posterior to a standard normal, nats per latent value."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


def hinge_discriminator(
    real: Float[Tensor, "*dims"], fake: Float[Tensor, "*dims"]
) -> Float[Tensor, ""]:
    """What the discriminator minimises, from its scores of pictures and of reconstructions."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Float[Tensor, "*dims"]) -> Float[Tensor, ""]:
    """What the autoencoder minimises against it."""
    return -fake.mean()


def patch_discriminator(width: int = 32, halvings: int = 3) -> nn.Sequential:
    """PatchGAN (arXiv:1611.07004): RGB pictures to a map of scores, one per 2^halvings pixels."""
    layers: list[nn.Module] = []
    channels = 3
    for level in range(halvings):
        outer = width * 2**level
        layers += [nn.Conv2d(channels, outer, 4, stride=2, padding=1)]
        layers += [nn.GroupNorm(1, outer)] if level else []
        layers += [nn.LeakyReLU(0.2)]
        channels = outer
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))
