"""Frozen encoders: the positions of their features, the stock preprocessing, and refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rewards import images
from rlhf.errors import ConfigError
from rlhf.models import vision
from tests.rlhf.tiny import picture


def rgb(*seeds, height=64, width=96):
    return images.to_float(np.stack([picture(seed, height, width) for seed in seeds]))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=56)
    folder = tmp_path_factory.mktemp("models") / "dino"
    Dinov2Model(Dinov2Config(**shape, patch_size=14)).save_pretrained(folder)
    return folder


def test_dinov2_gives_a_map_per_block_without_the_class_token(dino):
    from transformers import AutoModel

    eyes, x = vision.load_vision(str(dino)), torch.rand(2, 3, 56, 70) * 2 - 1
    maps = eyes.maps(x)
    assert [m.shape for m in maps] == [(2, 24, 4, 5)] * 4
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (eyes.mean, eyes.std))
    model = AutoModel.from_pretrained(dino).eval()
    hidden = model((x / 2 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    assert torch.allclose(maps[1][1, :, 2, 3], hidden[2][1, 1 + 2 * 5 + 3], atol=1e-5)
    assert torch.equal(eyes.features(x, (4, 5)), maps[1].flatten(2).mT)
    assert torch.equal(eyes.features(x, (4, 5), layer=4), maps[3].flatten(2).mT)


def test_clip_takes_pictures_of_any_size(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    eyes, x = vision.load_vision(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1
    assert [m.shape for m in eyes.maps(rgb(1))] == [(1, 16, 8, 12)] * 2
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (eyes.mean, eyes.std))
    hidden = model((x / 2 + 0.5 - mean) / std, output_hidden_states=True).hidden_states
    assert torch.allclose(eyes.pooled(x), hidden[2][:, 1:].mean(1), atol=1e-5)
    assert eyes.mean[0] == pytest.approx(0.4814, abs=1e-3)


@pytest.mark.parametrize("grid", [(4, 6), (2, 3), (8, 12)])
def test_features_come_at_the_positions_of_the_latents(dino, grid):
    eyes = vision.load_vision(str(dino))
    assert eyes.features(rgb(1), grid).shape == (1, grid[0] * grid[1], 24)


def test_the_tower_sees_what_the_image_processor_would_show_it(tiny_base):
    from transformers import AutoImageProcessor

    pictures = [picture(seed, 64, 96) for seed in (1, 2)]
    processor = AutoImageProcessor.from_pretrained(tiny_base, subfolder="processor")
    theirs = processor([images.to_pil(p) for p in pictures], return_tensors="pt")["pixel_values"]
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std)
    )
    x = (images.to_float(np.stack(pictures)) / 2 + 0.5 - mean) / std
    torch.testing.assert_close(vision.to_patches(x, 16, 2), theirs, atol=1e-5, rtol=0)


def test_maps_of_the_tower_are_in_reading_order():
    """A change of one 16 px patch moves the first map most at the cell of that patch."""
    eyes, x = vision.load_vision("scenes"), rgb(1)
    changed = x.clone()
    changed[:, :, 16:32, 48:64] = -changed[:, :, 16:32, 48:64]
    before, after = eyes.maps(x)[0], eyes.maps(changed)[0]
    assert before.shape == (1, 64, 4, 6)
    moved = (after - before).norm(dim=1)[0]
    assert divmod(int(moved.argmax()), 6) == (1, 3)


def test_weights_are_frozen_and_pictures_keep_their_gradient(dino):
    for source in ("scenes", str(dino)):
        x = rgb(3).requires_grad_(True)
        vision.load_vision(source).pooled(x).sum().backward()
        assert x.grad is not None and float(x.grad.abs().max()) > 0


def test_a_picture_is_resized_to_whole_patches(dino):
    assert vision.load_vision(str(dino)).maps(rgb(1, height=64, width=64))[0].shape[-2:] == (5, 5)
    assert vision.load_vision("scenes").maps(rgb(1, height=48, width=80))[0].shape[-2:] == (4, 4)


def test_another_kind_of_model_or_layer_is_refused(dino, tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected one of dinov2"):
        vision.load_vision(str(tmp_path))
    with pytest.raises(ConfigError, match="expected 1 to 4, got 5"):
        vision.load_vision(str(dino)).features(rgb(1), (4, 6), layer=5)


def test_vgg_is_that_of_torchvision(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    theirs = vgg16(weights=None).features.eval()
    save_file(
        {f"features.{k}": v for k, v in theirs.state_dict().items()}, tmp_path / "v.safetensors"
    )
    x = rgb(1, height=32, width=32)
    maps = vision.vgg_features(str(tmp_path / "v.safetensors"))(x)
    scaled = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
        [0.458, 0.448, 0.450]
    ).view(1, 3, 1, 1)
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512]
    torch.testing.assert_close(maps[-1], theirs[:30](scaled))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="got 1 of its 26 tensors"):
        vision.vgg_features(str(tmp_path / "bad.safetensors"))


def test_lpips_weights_are_read_by_layer(tmp_path):
    rows = {f"lin{i}.model.1.weight": torch.full((1, 2 + i, 1, 1), float(i)) for i in range(5)}
    save_file(rows, tmp_path / "lin.safetensors")
    weights = vision.lpips_weights(str(tmp_path / "lin.safetensors"))
    assert [w.tolist() for w in weights[:2]] == [[0.0, 0.0], [1.0, 1.0, 1.0]]
