"""What an autoencoder keeps of a picture, and what a linear code of the same size would keep."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.models import autoencoder as ae


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


def pca_psnr(
    train_rows: Float[Tensor, "n 4 h w"], test_rows: Float[Tensor, "m 4 h w"]
) -> Float[Tensor, " m"]:
    """PSNR per picture (RGB) of PCA-64 of patches, fitted on one set and read on another."""
    mean, basis, _ = ae.principal_components(ae.patches(train_rows))
    rows = ae.patches(test_rows)
    error = rows - ((rows - mean) @ basis @ basis.T + mean)
    colour = error.view(len(test_rows), -1, 4, ae.PATCH**2)[:, :, :3]
    return -10 * torch.log10((colour**2).flatten(1).mean(1).clamp_min(1e-10) / 4)
