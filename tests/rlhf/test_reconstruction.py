"""Autoencoders of every known class behind one round trip, and linear codes against slow forms."""

import json

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    UNet2DModel,
)

from rlhf.errors import ConfigError
from rlhf.models import autoencoder as ae
from rlhf.models.reconstruction import PatchStatistics, find_codec, open_codec, pca_psnr, psnr
from rlhf.models.vae2 import AutoencoderVAE2


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def kl(**changes):
    three = dict(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
    )
    return AutoencoderKL(block_out_channels=(8,) * 3, norm_num_groups=4, **(three | changes))


MADE = {
    "AutoencoderKL": (kl, 4, 4),
    "AutoencoderTiny": (
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4
        ),
        8,
        4,
    ),
    "AutoencoderDC": (
        lambda: AutoencoderDC(
            latent_channels=8,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16, 16),
            decoder_block_out_channels=(8, 16, 16),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (), ()),
            decoder_qkv_multiscales=((), (), ()),
        ),
        4,
        8,
    ),
    "AutoencoderKLQwenImage": (
        lambda: AutoencoderKLQwenImage(
            base_dim=8, z_dim=6, dim_mult=[1, 2, 2], num_res_blocks=1,
            temperal_downsample=[False, True],
        ),
        4,
        6,
    ),
    "AutoencoderKLQwenImage21": (lambda: ae.tiny_autoencoder(16), 16, 64),
    "AutoencoderVAE2": (
        lambda: AutoencoderVAE2(
            z_dim=8, encoder_width=4, decoder_width=4, encoder_blocks=1, decoder_blocks=1,
            image_channels=3, shortcut="none",
        ),
        16,
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE)
def test_every_known_class_makes_pictures_of_pictures(kind, tmp_path):
    make, factor, channels = MADE[kind]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "pipeline" / "vae")
    assert find_codec(str(tmp_path / "pipeline")) == tmp_path / "pipeline" / "vae"
    codec = open_codec(find_codec(str(tmp_path / "pipeline" / "vae")))
    assert (codec.kind, codec.factor, codec.channels) == (kind, factor, channels)
    rgb = draw(2, 3, 48, 32)
    again = codec.round_trip(rgb)
    assert again.shape == rgb.shape and again.abs().max() <= 1
    # rows do not know each other; convolutions of other batches round otherwise (AVX2: 1.7e-5)
    assert torch.allclose(codec.round_trip(rgb[1:]), again[1:], atol=1e-4)


def test_an_embedded_model_is_opened_as_the_pipeline_does():
    from rlhf.models.reconstruction import reconstruct

    folder, rgb = find_codec("scenes"), draw(1, 3, 64, 64)
    rgba = torch.cat([rgb, torch.ones(1, 1, 64, 64)], 1)
    expected = reconstruct(ae.load_autoencoder(folder).float(), rgba)[:, :3]
    torch.testing.assert_close(open_codec(folder).round_trip(rgb), expected, atol=1e-5, rtol=0)


def test_what_is_no_autoencoder_of_pictures_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        find_codec(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="JSONDecodeError"):
        find_codec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": UNet2DModel.__name__}))
    with pytest.raises(ConfigError, match="got a UNet2DModel at"):
        find_codec(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="expected weights beside"):
        find_codec(str(tmp_path))
    kl(in_channels=4, out_channels=4).save_pretrained(tmp_path / "four")
    with pytest.raises(ConfigError, match="RGB pictures, got 4 channels"):
        open_codec(find_codec(str(tmp_path / "four")))


@pytest.mark.parametrize("patch, channels", [(16, 4), (8, 3)])
def test_pictures_come_back_from_their_patches(patch, channels):
    x = draw(2, channels, 32, 48)
    assert torch.equal(ae.assemble(ae.patches(x, patch), (32, 48), patch), x)


def test_statistics_added_up_give_the_principal_components():
    x = draw(24, 3, 16, 24).cumsum(3) / 12
    known = PatchStatistics(8)
    for part in x.split(7):
        known.add(part)
    code = known.code(5)
    mean, basis, _ = ae.principal_components(ae.patches(x, 8), 5)
    assert known.count == 24 * 6 and code.basis.shape == (192, 5)
    torch.testing.assert_close(code.mean, mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(code.basis @ code.basis.T, basis @ basis.T, atol=1e-4, rtol=0)
    assert torch.allclose(known.code(192).round_trip(x), x, atol=1e-4)  # all there is
    with pytest.raises(ValueError, match="expected patches"):
        PatchStatistics(8).code(5)


def test_pca_psnr_is_that_of_the_colours_alone():
    train, test = (
        torch.cat([draw(90, 3, 16, 16, seed=s), torch.ones(90, 1, 16, 16)], 1) for s in (1, 2)
    )
    mean, basis, _ = ae.principal_components(ae.patches(train))
    rows = ae.patches(test) - mean
    again = ae.assemble(rows @ basis @ basis.T + mean, (16, 16))
    torch.testing.assert_close(
        pca_psnr(train, test), psnr(again[:, :3], test[:, :3]), atol=1e-2, rtol=0
    )
