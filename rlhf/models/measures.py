"""How alike pictures are, and sets of pictures: structural similarity and Frechet distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_WINDOW, _SIGMA = 11, 1.5


def ssim(a: Float[Tensor, "b c h w"], b: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al. 2004), 1 for equal pictures, for pictures in [-1, 1].

    Gaussian window of 11 px and sigma 1.5 over complete windows only, C1 = (0.01 L)^2 and
    C2 = (0.03 L)^2 with L = 2, mean over windows and channels. Raises ValueError below 11 px.
    """
    if min(a.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"expected pictures of at least {_WINDOW} px a side, got {tuple(a.shape[-2:])}"
        )
    axis = torch.arange(_WINDOW, dtype=a.dtype, device=a.device) - _WINDOW // 2
    bell = torch.exp(-(axis**2) / (2 * _SIGMA**2))
    bell = bell / bell.sum()

    def blur(x: Tensor) -> Tensor:
        flat = F.conv2d(x.flatten(0, 1).unsqueeze(1), bell.view(1, 1, 1, -1))
        return F.conv2d(flat, bell.view(1, 1, -1, 1))

    c1, c2 = 0.02**2, 0.06**2
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2
    both = blur(a * b) - mu_a * mu_b
    light = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    value = light * (2 * both + c2) / (var_a + var_b + c2)
    return value.mean((1, 2, 3)).view(a.shape[:2]).mean(1)


def frechet(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of rows of features (arXiv:1706.08500), float64.

    Biased upwards for few rows: compare only at equal n. Raises ValueError below two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"expected at least two rows in each set, got {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(rows.T)) for rows in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).pow(2).sum() + cov_a.trace() + cov_b.trace() - 2 * shared
    return float(gap.clamp_min(0))
