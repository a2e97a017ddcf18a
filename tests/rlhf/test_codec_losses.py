"""Losses of an autoencoder against values done by hand, and their gradients by differences."""

import math

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models import codec_losses as losses
from rlhf.models.codec_losses import Margins


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


ROWS = dict(z=draw(2, 5, 4, seed=1), f=draw(2, 5, 4, seed=2))


def test_perceptual_distance_by_hand():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]]).T.reshape(1, 2, 1, 2)
    b = torch.tensor([[3.0, -4.0], [2.0, 0.0]]).T.reshape(1, 2, 1, 2)
    assert float(losses.perceptual([a], [b])) == pytest.approx(1.6**2 / 2)
    half = torch.tensor([1.0, 0.5])
    assert float(losses.perceptual([a, a], [b, b], [half, half])) == pytest.approx(1.6**2 / 2)


def test_perceptual_gradient_is_finite_where_features_are_zero():
    a = torch.zeros(1, 2, 1, 1, requires_grad=True)
    losses.perceptual([a], [torch.ones(1, 2, 1, 1)]).sum().backward()
    assert a.grad is not None and bool(torch.isfinite(a.grad).all())


def test_alignment_by_hand():
    f = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    z = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    slant = math.sqrt(0.5)
    assert float(losses.margin_cosine(z, f, 0.1)) == pytest.approx((1 - slant - 0.1) / 2)
    assert float(losses.margin_distance(z, f, 0.1)) == pytest.approx((slant - 0.1) * 2 / 4)
    both = float(losses.alignment(z, f, (0.1, 0.2)))
    assert both == pytest.approx((1 - slant - 0.1) / 2 + (slant - 0.2) / 2)


def test_alignment_of_a_perfect_projection_is_zero_at_any_length():
    f = ROWS["f"].float()
    assert float(losses.alignment(3.0 * f, f, (0.0, 0.0))) == pytest.approx(0, abs=1e-6)


def test_looser_margins_never_raise_the_loss_and_end_at_zero():
    values = [float(losses.alignment(**ROWS, margins=(m, m))) for m in (0.0, 0.2, 0.5, 1.0, 2.0)]
    assert all(a > b for a, b in zip(values, values[1:], strict=False)) and values[-1] == 0


def test_many_positions_are_thinned_evenly(monkeypatch):
    z, f = draw(1, 12, 3, seed=3), draw(1, 12, 3, seed=4)
    monkeypatch.setattr(losses, "PAIRED", 4)
    kept = [0, 4, 7, 11]
    expected = losses.margin_distance(z[:, kept], f[:, kept], 0.0)
    assert float(losses.margin_distance(z, f, 0.0)) == float(expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.alignment(x, ROWS["f"], (0.1, 0.05)),
        lambda x: losses.perceptual([x[..., None].double()], [ROWS["f"][..., None]]).mean(),
        lambda x: losses.kl(x, ROWS["f"]) + losses.kl(ROWS["f"], x),
        lambda x: losses.hinge_discriminator(x, 0.5 * x) + losses.hinge_generator(x),
    ],
    ids=["alignment", "perceptual", "kl", "hinge"],
)
def test_gradients_agree_with_differences(loss):
    assert torch.autograd.gradcheck(loss, ROWS["z"].clone().requires_grad_(True))


def test_kl_is_that_of_normal_distributions():
    mean, logvar = draw(3, seed=5), draw(3, seed=6)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    theirs = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(losses.kl(mean, logvar), theirs)


def test_hinge_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert float(losses.hinge_discriminator(real, fake)) == pytest.approx(0.25 + 0.5)
    assert float(losses.hinge_generator(fake)) == pytest.approx(1.0)


def test_the_discriminator_scores_patches():
    torch.manual_seed(0)
    assert losses.patch_discriminator(8)(torch.randn(2, 3, 64, 32)).shape == (2, 1, 8, 4)


def test_margins_loosen_linearly_over_their_share_of_the_steps():
    margins = Margins(cosine=(0.0, 0.4), distance=(0.1, 0.2), share=0.5)
    assert margins.at(1, 8) == (0.0, 0.1)
    assert margins.at(3, 8) == pytest.approx((0.2, 0.15))
    assert margins.at(5, 8) == margins.at(8, 8) == pytest.approx((0.4, 0.2))


@pytest.mark.parametrize(
    "changes, message",
    [({"cosine": (0.5, 0.1)}, "margins loosen"), ({"share": 0.0}, "share of the steps")],
)
def test_margins_that_tighten_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Margins(**changes).check()
