"""`rlhf evaluate codec`: which figures there are, whom they are fair to, and what is refused."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from pipelines import codecs
from pipelines.cli import config_program
from pipelines.data.picture_sets import Batch, PictureSet, open_set
from pipelines.data.records import Columns
from pipelines.data.sources import SourceConfig
from rewards import images
from rlhf.config import load
from rlhf.errors import ConfigError, DataError
from rlhf.models.reconstruction import open_codec, psnr
from rlhf.round_trips import Reading, Tally, keep_reading
from tests.pipelines.pictures import encoded, pixels, png, tar


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An autoencoder of another family: 4 px per latent, 2 channels, random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "kl"
    AutoencoderKL(
        block_out_channels=(8,) * 3,
        norm_num_groups=4,
        latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def mine(tmp_path):
    """Five whole pictures of three shapes, one cut off, one too small."""
    folder = tmp_path / "mine"
    folder.mkdir()
    sizes = [(48, 64), (48, 64), (70, 33), (200, 300), (48, 64)]
    for i, (height, width) in enumerate(sizes):
        (folder / f"{i}.png").write_bytes(png(i, height, width))
    (folder / "cut.png").write_bytes(png(7)[:300])
    (folder / "small.png").write_bytes(png(8, 12, 64))
    return folder


def test_autoencoders_stand_side_by_side_on_any_set(other, mine, tmp_path):
    config = codecs.CodecConfig(
        others=(str(other),),
        sets=("scenes/64", PictureSet(path=str(mine), largest=96)),
        n=12,
        fit=24,
        out=str(tmp_path / "out"),
    )
    result = codecs.codec(config)
    assert json.loads((tmp_path / "out" / "codec.json").read_text()) == result
    rates = {name: row["values_per_pixel"] for name, row in result["autoencoders"].items()}
    assert rates == {"scenes": 0.25, "kl": 0.125, "pca64-f16": 0.25, "pca2-f4": 0.125}
    own, metrics = str(mine).strip("/"), result["metrics"]
    for row in rates:
        for figure in ("psnr", "ssim", "frechet"):
            assert metrics[f"recon/scenes/64/{row}/{figure}"]["n"] == 12
            assert metrics[f"recon/{own}/{row}/{figure}"]["n"] == 5
        one = metrics[f"recon/scenes/64/{row}/psnr"]
        assert one["low"] < one["value"] < one["high"]
        assert metrics[f"recon/scenes/64/{row}/text/letter_ratio"]["n"] >= 1
    assert metrics["recon/scenes/64/scenes/psnr"]["value"] > 25
    assert metrics["recon/scenes/64/scenes/objects/strict_ratio"]["value"] == 1
    assert metrics["recon/scenes/64/kl/text/word_ratio"]["value"] == 0
    assert not any("ratio" in name or "lpips" in name for name in metrics if own in name)
    about = result["sets"][own]
    assert about["text"] == codecs.NO_TRUTH
    assert about["skipped"] == {
        "expected a whole picture": 1,
        "expected a side of at least 16 px": 1,
    }
    assert images.load_image(about["sheet"]).shape == (3, 9 * 34 + 2, 5 * 34 + 2)
    text = codecs.summarise_codec(result)
    assert f"{own}: 5 pictures, 2 skipped" in text and "pca2-f4" in text and "±" in text


def test_figures_are_those_of_the_pixels_shown(mine, tmp_path):
    config = codecs.CodecConfig(sets=(str(mine),), out=str(tmp_path), rows=2)
    found = codecs.codec(config)["metrics"][f"recon/{str(mine).strip('/')}/scenes/psnr"]
    codec, by_hand = open_codec(next(iter(codecs.labels(["scenes"]).values()))), []
    for i in range(5):
        picture = images.to_float(images.within(Image.open(mine / f"{i}.png"), 256, 16)[None])
        again = images.to_float(images.to_uint8(codec.round_trip(picture)))
        by_hand.append(float(psnr(again, picture)))
    assert found["value"] == pytest.approx(np.mean(by_hand), abs=1e-3)


def test_lpips_is_there_where_its_weights_are(tmp_path):
    from torchvision.models import vgg16

    torch.manual_seed(0)
    trunk = {f"features.{k}": v for k, v in vgg16(weights=None).features.state_dict().items()}
    save_file(trunk, tmp_path / "vgg.safetensors")
    widths = (64, 128, 256, 512, 512)
    rows = {f"lin{i}.model.1.weight": torch.ones(1, w, 1, 1) for i, w in enumerate(widths)}
    save_file(rows, tmp_path / "lin.safetensors")
    files = {"trunk": "vgg", "calibration": "lin"}
    paths = {key: str(tmp_path / f"{name}.safetensors") for key, name in files.items()}
    config = codecs.CodecConfig(sets=("scenes/64",), n=2, fit=8, out=str(tmp_path), **paths)
    config.check()
    metrics = codecs.codec(config)["metrics"]
    found = metrics["recon/scenes/64/scenes/lpips"]
    assert found["n"] == 2 and 0 < found["value"] and found["low"] < found["high"]


class Two:
    """Two pictures of one patch, one in each half."""

    skipped = Counter()
    pictures = np.stack([pixels(s, 16, 16).transpose(2, 0, 1) for s in (1, 2)])

    def batches(self, rows, multiple):
        yield Batch(pictures=self.pictures, halves=np.array([0, 1]))

    def fitting(self, rows, multiple, most):
        return self.batches(rows, multiple)


def test_pca_sees_no_picture_it_is_read_on():
    """All that the code of one picture can say is the mean: the other picture, not its own."""
    coder = codecs.Coder(name="any", factor=16, channels=64, again=lambda rgb, halves: rgb)
    (linear,), seen = codecs.fit_linear(Two(), [coder, coder], codecs.CodecConfig(), 16)
    assert (linear.name, linear.channels, seen) == ("pca64-f16", 64, 2)
    rgb = images.to_float(Two.pictures)
    again = linear.again(rgb, np.array([0, 1]))
    assert psnr(again, rgb).max() < 15  # its own code would lose nothing
    assert psnr(linear.again(rgb, np.array([1, 0])), rgb).min() > 50


def test_only_what_read_right_before_can_be_lost():
    right, wrong = np.ones(4, bool), np.zeros(4, bool)
    some = np.array([True, True, False, True])
    tally = Tally()
    first = Reading(strict=np.array([True, False, True]), letters={0: right, 1: some, 2: wrong})
    then = Reading(strict=np.array([True, True, False]), letters={0: some, 1: right, 2: right})
    keep_reading(tally, ["text", "text", "objects"], first, then)
    assert dict(tally.values) == {
        "text/strict_ratio": [1.0],
        "objects/strict_ratio": [0.0],
        "text/word_ratio": [0.0],
        "text/letter_ratio": [0.75, 1.0],
    }


def test_a_data_set_needs_no_captions_and_counts_what_is_broken(tmp_path):
    members = [(f"{i}.png", png(i)) for i in range(4)] + [("4.png", png(4)[:200])]
    shard = tar(tmp_path / "a.tar", members)
    square = PictureSet(
        path="shards", largest=40, crop="square", data=SourceConfig(path=str(shard))
    )
    pictures = open_set(square, 256, 0)
    (batch,) = pictures.batches(8, 16)
    assert batch.pictures.shape == (4, 3, 32, 32) and batch.halves.tolist() == [0, 1, 0, 1]
    assert dict(pictures.skipped) == {"expected a whole picture": 1}
    first = next(pictures.fitting(8, 16, 1))
    assert np.array_equal(first.pictures, batch.pictures[:2])
    assert SourceConfig().columns == Columns(caption="text")


def test_photos_are_those_beside_scikit_image(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "skimage", raising=False)
    data = tmp_path / "skimage" / "data"
    data.mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("chelsea.png", "page.png", "camera.png"):
        (data / name).write_bytes(encoded(pixels(1)[..., 0] if name == "camera.png" else pixels(2)))
    (batch,) = open_set(PictureSet(path="photos"), 256, 0).batches(8, 16)
    assert len(batch.pictures) == 2


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": "nowhere"}, ConfigError, "expected the folder of an autoencoder"),
        ({"others": ("scenes",)}, ConfigError, "each autoencoder once"),
        ({"sets": ("nowhere",)}, DataError, "which does not exist"),
        ({"sets": (".empty",)}, DataError, "at least two pictures"),
        ({"sets": ("photos",)}, ConfigError, "pip install scikit-image"),
        ({"sets": ("scenes/65",)}, ConfigError, "multiple of 32"),
        ({"sets": ()}, ConfigError, "one or more"),
        ({"sets": ("scenes/64", "scenes/64")}, ConfigError, "each once"),
        ({"trunk": "vgg.pth"}, ConfigError, "got one of them"),
        ({"trunk": "a", "calibration": "b"}, ConfigError, "file of weights, got 'a'"),
        ({"n": 1}, ConfigError, "n >= 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    changes, error, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".empty").mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(codecs, "open_codec", None)
    monkeypatch.setattr(codecs, "load_vision", None)
    config = codecs.CodecConfig(**changes)
    with pytest.raises(error, match=message):
        config.check()
        codecs.codec(config)


def test_a_set_that_nothing_can_be_read_of_is_refused_with_reasons(mine, tmp_path):
    config = codecs.CodecConfig(sets=(PictureSet(path=str(mine), largest=15),), out=str(tmp_path))
    with pytest.raises(DataError, match="got 0; skipped: .*at least 16 px': 6"):
        codecs.codec(config)


def test_configurations_of_codecs_are_theirs(tmp_path):
    assert config_program("evaluate/codec_imagenet").name == "evaluate codec"
    assert config_program("evaluate/codec").name == "evaluate codec"
    assert config_program("evaluate/scenes").name == "evaluate"
    (tmp_path / "a.yaml").write_text("sets: [scenes/64, {path: b, larges: 3}]")
    with pytest.raises(ConfigError, match=r"sets\[1\].larges.*largest"):
        load(codecs.CodecConfig, tmp_path / "a.yaml", [], "evaluate")
