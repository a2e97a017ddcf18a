import io
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import images
from rewards.errors import ImageError, JudgeError, RewardConfigError, RewardError

CHW = np.random.default_rng(0).integers(0, 256, (3, 5, 7), dtype=np.uint8)


def test_pil_round_trip_keeps_channels_and_axes():
    pil = images.to_pil(CHW)
    assert pil.size == (7, 5) and pil.mode == "RGB"
    assert pil.getpixel((6, 0)) == tuple(CHW[:, 0, 6])
    np.testing.assert_array_equal(images.from_pil(pil), CHW)


def test_from_pil_takes_grey_and_lays_alpha_on_white():
    assert images.from_pil(Image.new("L", (2, 2), 7)).tolist() == [[[7, 7], [7, 7]]] * 3
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert images.from_pil(clear).ravel().tolist() == [255, 255, 255]
    half = images.from_pil(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).ravel()
    assert half[0] == 255 and 120 <= half[1] <= 135


def test_all_bytes_survive_the_float_round_trip():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, 1)
    floats = images.to_float(every)
    assert floats.dtype == torch.float32 and floats.min() == -1 and floats.max() == 1
    np.testing.assert_array_equal(images.to_uint8(floats).numpy(), every)


def test_to_uint8_rounds_clamps_and_refuses_nan():
    values = torch.tensor([-3.0, 3.0, 0.0039, 0.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert images.to_uint8(values)[0, 0].flatten().tolist() == [0, 255, 128, 128]
    with pytest.raises(ImageError, match="finite"):
        images.to_uint8(values.clone().fill_(float("nan")))


@pytest.mark.parametrize("wrong", [CHW.transpose(1, 2, 0), CHW.astype(np.float32), CHW[None]])
def test_other_layouts_are_refused(wrong):
    with pytest.raises(ImageError, match="uint8 RGB"):
        images.to_pil(wrong)


def test_contact_sheet_lays_out_rows():
    flat = images.contact_sheet([CHW] * 5, columns=2, gap=1)
    assert flat.size == (2 * 8 + 1, 3 * 6 + 1)
    assert flat.getpixel((1, 1)) == tuple(CHW[:, 0, 0])
    assert flat.getpixel((9, 13)) == (255, 255, 255)  # the sixth place is empty
    assert images.contact_sheet([[CHW, CHW, CHW], [CHW]], gap=0).size == (21, 10)
    mixed = images.contact_sheet([CHW[:, :2], CHW[:, :, :3], CHW], columns=2, gap=0)
    assert mixed.size == (2 * 7, 2 * 5)  # cells of the largest
    assert mixed.getpixel((0, 1)) == tuple(CHW[:, 1, 0])
    assert mixed.getpixel((0, 2)) == mixed.getpixel((10, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="uint8 RGB"):
        images.contact_sheet([CHW, CHW.astype(float)])
    with pytest.raises(ImageError, match="none"):
        images.contact_sheet([])


def test_the_size_of_a_file_is_height_by_width(tmp_path):
    path = images.save_png(tmp_path / "a.png", CHW)
    assert images.size_of(path) == CHW.shape[1:] == (5, 7)
    (tmp_path / "b.png").write_text("no picture")
    for name in ("b.png", "gone.png"):
        with pytest.raises(ImageError, match=f"expected a picture file at .*{name}"):
            images.size_of(tmp_path / name)


def test_png_is_lossless_and_leaves_nothing_beside_it(tmp_path):
    path = images.save_png(tmp_path / "a.png", CHW)
    np.testing.assert_array_equal(images.load_image(path), CHW)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = images.save_png(tmp_path / "a.png", CHW)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        images.save_png(path, 255 - CHW)
    np.testing.assert_array_equal(images.load_image(path), CHW)
    assert os.listdir(tmp_path) == ["a.png"]


def test_load_image_names_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    noise = np.random.default_rng(1).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    images.save_png(tmp_path / "cut.png", noise)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name in ("absent.png", "text.png", "cut.png"):
        with pytest.raises(ImageError, match=name):
            images.load_image(tmp_path / name)


@pytest.mark.parametrize("error", [ImageError, JudgeError, RewardConfigError])
def test_errors_survive_pickling(error):
    back = pickle.loads(pickle.dumps(error("what, got, do")))
    assert type(back) is error and str(back) == "what, got, do" and isinstance(back, RewardError)


def test_decode_gives_the_picture_upright_and_says_how_it_lay():
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    image, turned = images.decode(buffer.getvalue())
    assert image.size == (4, 8) and turned == 90


@pytest.mark.parametrize("keep", [0, 10, 60])
def test_decode_refuses_parts_of_a_picture(keep):
    buffer = io.BytesIO()
    images.to_pil(CHW).save(buffer, "PNG")
    assert images.decode(buffer.getvalue())[1] == 0
    with pytest.raises(ImageError, match="whole picture"):
        images.decode(buffer.getvalue()[:keep])


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    np.testing.assert_array_equal(images.grey(deep), [[0, 128, 255]])


def test_a_crop_keeps_the_corner_it_is_told_to():
    wide = Image.new("RGB", (40, 20))
    wide.paste((255, 255, 255), (0, 0, 20, 20))  # the left half is white
    assert images.crop_to(wide, (10, 10), (0.5, 0.0))[0, :, :9].min() > 240
    assert images.crop_to(wide, (10, 10), (0.5, 1.0))[0, :, 1:].max() < 15
    tall = wide.rotate(-90, expand=True)  # the upper half is white
    assert images.crop_to(tall, (10, 10), (0.0, 0.5))[0, :9].min() > 240
    assert images.crop_to(wide, (10, 10))[0].mean(0)[[0, 9]].tolist() == [255, 0]


def test_within_takes_whole_cells_of_the_middle_and_never_enlarges():
    ramp = np.arange(50, dtype=np.uint8)[None, None].repeat(3, 0).repeat(37, 1)
    cut = images.within(images.to_pil(ramp), 64, 16)
    assert cut.shape == (3, 32, 48) and cut[0, 0].tolist() == list(range(1, 49))
    assert images.within(images.to_pil(ramp), 25, 4).shape == (3, 16, 24)  # of 18 x 25
    with pytest.raises(ImageError, match="at least 16 px"):
        images.within(images.to_pil(ramp), 20, 16)
