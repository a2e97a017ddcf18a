"""Structural similarity and Frechet distance against slow or closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from rlhf.models.measures import frechet, ssim


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slow_ssim(a, b):
    """With scipy's Gaussian of the same radius, borders cut."""

    def blur(x):
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, both = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    top = (2 * mu_a * mu_b + 0.02**2) * (2 * both + 0.06**2)
    return (top / ((mu_a**2 + mu_b**2 + 0.02**2) * (var_a + var_b + 0.06**2))).mean()


def test_ssim_agrees_with_scipy():
    a, b = draw(2, 3, 20, 24).double(), draw(2, 3, 20, 24, seed=1).double()
    b = 0.6 * a + 0.4 * b
    slow = [
        np.mean([slow_ssim(a[i, c].numpy(), b[i, c].numpy()) for c in range(3)]) for i in (0, 1)
    ]
    assert ssim(a, b).tolist() == pytest.approx(slow, abs=1e-9)


def test_ssim_of_equal_and_of_flat_pictures():
    a = draw(1, 3, 16, 16)
    assert float(ssim(a, a)) == pytest.approx(1)
    light, dark = torch.full((1, 1, 11, 11), 0.5), torch.full((1, 1, 11, 11), -0.25)
    expected = (2 * 0.5 * -0.25 + 4e-4) / (0.25 + 0.0625 + 4e-4)
    assert float(ssim(light, dark)) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(draw(1, 3, 8, 16), draw(1, 3, 8, 16))


def test_frechet_is_the_formula():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(200, 5)), generator.normal(size=(300, 5)) * 1.5 + 0.3
    cov = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.real(sqrtm(cov[0] @ cov[1]))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * root)
    assert frechet(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_shifted_and_of_degenerate_sets():
    rows = draw(6, 20)  # fewer rows than features: the covariance is singular
    assert frechet(rows, rows) == pytest.approx(0, abs=1e-6)
    assert frechet(rows, rows + 0.5) == pytest.approx(20 * 0.25, rel=1e-5)
    with pytest.raises(ValueError, match="two rows"):
        frechet(rows[:1], rows)
