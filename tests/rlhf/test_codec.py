"""The objective of an autoencoder: which terms count, what they move, and what stays frozen."""

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models import autoencoder as ae
from rlhf.models.codec import CodecBatch, CodecLoss, CodecObjective
from rlhf.models.codec_losses import Margins
from rlhf.models.reconstruction import reconstruct
from rlhf.models.vae2 import published

SMALL = dict(encoder_width=4, decoder_width=4, encoder_blocks=1, decoder_blocks=1)
OFF = dict(l1=0.0, mse=1e-9)


def network(seed=0):
    torch.manual_seed(seed)
    return published("f16c64", **SMALL)


def batch(step=1):
    x = torch.rand(2, 4, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return CodecBatch(rgba=x, step=step)


def objective(vae=None, **weights):
    return CodecObjective(vae or network(), CodecLoss(**weights), steps=10, seed=3)


def slope(module):
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [network, lambda: ae.tiny_autoencoder()])
def test_by_default_it_is_the_error_of_pixels(make):
    torch.manual_seed(0)
    vae, one = make(), batch()
    loss, parts = objective(vae)(one)
    error = ae.decode_raw(vae, ae.encode_mode(vae, one.rgba)) - one.rgba
    assert torch.equal(loss, error.abs().mean() + error.pow(2).mean())
    assert set(parts) == {"loss/l1", "loss/mse"} and objective(vae).parameters == {}


def test_every_loss_adds_its_weighted_part():
    weights = dict(l1=0.5, mse=2.0, perceptual=3.0, alignment=0.7, kl=0.1, gan=0.2)
    loss, parts = objective(**weights)(batch())
    parts = {name.removeprefix("loss/"): value for name, value in parts.items()}
    assert set(parts) == {*weights, "discriminator"}
    expected = sum(weight * parts[name] for name, weight in weights.items())
    assert float(loss.detach()) == pytest.approx(expected + parts["discriminator"], rel=1e-5)


def test_alignment_moves_encoder_and_projection_only_and_loosens():
    goal = objective(**OFF, alignment=1.0, margins=Margins(share=1.0))
    loss, parts = goal(batch())
    loss.backward()
    assert slope(goal.vae.encoder) > 1e-3 > slope(goal.vae.decoder)
    assert list(goal.parameters) == ["alignment.weight"] and slope(goal.extra) > 1e-3
    assert goal(batch(step=10))[1]["loss/alignment"] < parts["loss/alignment"]


def test_the_two_players_of_the_gan_do_not_move_each_other():
    goal = objective(**OFF, gan=1.0)
    x = batch().rgba[:, :3]
    again = (0.5 * x).requires_grad_(True)
    generator, discriminator = goal._adversary(x, again)
    generator.backward()
    assert again.grad is not None and float(again.grad.abs().sum()) > 0
    assert slope(goal.extra) == 0
    again.grad = None
    discriminator.backward()
    assert again.grad is None and slope(goal.extra) > 0


def test_with_kl_the_decoder_sees_draws_keyed_by_the_step():
    vae = network()
    values = [float(objective(vae, kl=1e-9)(batch(step))[0].detach()) for step in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_what_was_written_is_opened_as_its_own_class(tmp_path):
    x = batch().rgba
    for name, vae in (("a", network()), ("b", ae.tiny_autoencoder())):
        vae.save_pretrained(tmp_path / name)
        again = ae.load_autoencoder(tmp_path / name)
        assert type(again) is type(vae)
        assert torch.equal(reconstruct(again, x), reconstruct(vae.eval(), x))


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"kl": -1.0}, "loss.kl"),
        ({"l1": 0.0, "mse": 0.0}, "l1 or mse above 0"),
        ({"calibration": "lin.pth"}, "expected loss.trunk"),
    ],
)
def test_impossible_losses_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        CodecLoss(**weights).check()
