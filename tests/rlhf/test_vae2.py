"""The autoencoder of arXiv:2605.13565: its counts, its shortcuts, its place in the pipeline."""

import pytest
import torch
from torch import nn

from rewards import images
from rlhf.models.vae2 import AutoencoderVAE2, published, regroup
from tests.rlhf.tiny import picture

SMALL = dict(encoder_width=4, decoder_width=4, encoder_blocks=1, decoder_blocks=1)


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def silence(module):
    """Zero every convolution, so that only paths without weights are left."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)


@pytest.mark.parametrize("image_channels", [3, 4])
@pytest.mark.parametrize(
    "setting, encoder, decoder",
    [("f16c64", 76, 248), ("f16c128", 76, 248), ("f32c128", 77, 250), ("f32c192", 78, 250)],
)
def test_the_published_parameter_counts_in_millions(setting, encoder, decoder, image_channels):
    with torch.device("meta"):
        vae = published(setting, image_channels)
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert [round(count / 1e6) for count in counts] == [encoder, decoder]
    assert not any("ttention" in type(m).__name__ for m in vae.modules())


@pytest.mark.parametrize("setting, cells", [("f16c64", 4), ("f16c128", 4), ("f32c192", 2)])
@pytest.mark.parametrize("shortcut", ["global", "per-level", "none"])
def test_shapes_of_latents_and_pictures_with_and_without_a_frame(setting, cells, shortcut):
    vae = published(setting, shortcut=shortcut, mirror=shortcut == "global", **SMALL)
    x = draw(2, 4, 64, 96)
    latents = vae.encode(x).latent_dist.mode()
    assert latents.shape == (2, vae.config.z_dim, cells, cells * 3 // 2)
    again = vae.decode(latents).sample
    assert again.shape == x.shape and again.abs().max() <= 1
    framed = vae.encode(x.unsqueeze(2), return_dict=False)[0].mode()
    assert torch.equal(framed[:, :, 0], latents)
    assert torch.equal(vae.decode(framed, return_dict=False)[0][:, :, 0], again)
    assert torch.equal(vae(x).sample, again)


def test_level_shortcuts_are_those_of_the_stock_class():
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage21 as stock

    x = draw(1, 8, 4, 4)
    theirs = stock.QwenImage21AvgDown3D(8, 16, 1, 2)(x.unsqueeze(2))[:, :, 0]
    torch.testing.assert_close(regroup(nn.functional.pixel_unshuffle(x, 2), 16), theirs)
    theirs = stock.QwenImage21DupUp3D(8, 4, 1, 2)(x.unsqueeze(2), first_chunk=True)[:, :, 0]
    torch.testing.assert_close(nn.functional.pixel_shuffle(regroup(x, 16), 2), theirs)


def test_the_global_shortcut_brings_the_colours_of_a_cell_to_the_deepest_map():
    vae = published("f16c64", **SMALL | {"encoder_width": 96})
    silence(vae.encoder)
    seen = []
    vae.encoder.mid.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = draw(1, 4, 32, 32)
    vae.encode(x)
    assert seen[0].shape == (1, 768, 2, 2)
    assert torch.equal(seen[0][0, :, 1, 0], x[0, :3, 16:, :16].flatten())


def test_the_mirror_repeats_latents_into_colours_and_leaves_alpha_alone():
    vae = published("f16c64", mirror=True, **SMALL)
    silence(vae.decoder)
    z = draw(1, 64, 1, 1)
    x = vae.decode_raw(z)
    expected = z[0, :, 0, 0].repeat_interleave(12).view(3, 16, 16)
    assert torch.equal(x[0, :3], expected) and x[0, 3].abs().max() == 0


def test_raw_pictures_keep_the_gradient_that_the_clamp_kills():
    vae = published("f16c64", **SMALL)
    nn.init.constant_(vae.decoder.conv_out.bias, 3.0)
    nn.init.zeros_(vae.decoder.conv_out.weight)
    for decoded, slope in (
        (vae.decode(draw(1, 64, 2, 2)).sample, 0.0),
        (vae.decode_raw(draw(1, 64, 2, 2)), 1.0),
    ):
        vae.zero_grad()
        decoded.mean().backward()
        assert float(vae.decoder.conv_out.bias.grad.sum()) == pytest.approx(slope)


def test_checkpointing_computes_again_and_changes_nothing():
    torch.manual_seed(0)
    vae, runs, slopes = published("f16c64", **SMALL), [], []
    vae.decoder.levels[4].register_forward_pre_hook(lambda *_: runs.append(1))
    for again in (False, True):
        if again:
            vae.enable_gradient_checkpointing()
        vae.zero_grad()
        vae(draw(1, 4, 32, 32)).sample.pow(2).mean().backward()
        slopes.append([p.grad.clone() for p in vae.parameters()])
    assert len(runs) == 1 + 2 and all(map(torch.equal, *slopes))


def test_saving_and_loading_keeps_weights_and_configuration(tmp_path):
    torch.manual_seed(1)
    vae = published("f32c128", latents_mean=[0.5] * 128, shortcut="per-level", **SMALL).eval()
    vae.save_pretrained(tmp_path)
    again = AutoencoderVAE2.from_pretrained(tmp_path)
    saved, read = (
        {k: v for k, v in m.config.items() if not k.startswith("_")} for m in (vae, again)
    )
    assert saved == read
    assert again.config.latents_mean[0] == 0.5 and again.config.latents_std == [1.0] * 128
    x = draw(1, 4, 64, 64)
    assert torch.equal(again(x).sample, vae(x).sample)


def test_it_stands_in_for_the_stock_autoencoder_of_the_pipeline(tiny_base, tmp_path):
    from diffusers import QwenImage21Pipeline

    torch.manual_seed(2)
    vae = published("f16c64", latents_std=[2.0] * 64, **SMALL)
    pipeline = QwenImage21Pipeline.from_pretrained(tiny_base, vae=vae)
    pipeline.save_pretrained(tmp_path / "with")
    pipeline = QwenImage21Pipeline.from_pretrained(tmp_path / "with")
    assert isinstance(pipeline.vae, AutoencoderVAE2)
    pipeline.set_progress_bar_config(disable=True)
    common = dict(
        num_inference_steps=2, height=64, width=96, output_type="np", prompt="a red circle"
    )
    assert pipeline(**common).images.shape == (1, 64, 96, 4)
    source = images.to_pil(picture(3, 64, 96))
    assert pipeline(image=[source], output_resolution=64, **common).images.shape == (1, 64, 96, 4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: AutoencoderVAE2(factor=8), "factor 16 or 32"),
        (lambda: AutoencoderVAE2(image_channels=1), "image_channels"),
        (lambda: published("f16c64", **SMALL).encode(draw(1, 4, 40, 64)), "multiples of 16"),
        (lambda: published("f16c64", **SMALL).encode(draw(1, 4, 2, 64, 64)), "one frame"),
        (
            lambda: published("f16c64", **SMALL | {"encoder_width": 5}).encode(draw(1, 4, 64, 64)),
            "divides the other",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
