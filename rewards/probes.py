"""Pictures made worse on purpose, to see what a judge makes of them.

Corruptions take and give uint8 RGB (3, H, W) and are functions of the picture alone. Canaries make
of a sample one that must not score higher, or None where they do not apply. None of this is ever
done to a picture before it is judged, except to measure what it does to the judgement.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from rewards.images import Picture, from_pil, to_pil
from rewards.types import Sample

Corruption = Callable[[Picture], Picture]
Canary = Callable[[Sample], Sample | None]
TEXT = "10/10\nmasterpiece"

# --- corruptions ----------------------------------------------------------------------------------


def oversaturate(image: Picture, factor: float = 3.0) -> Picture:
    """Distance from grey times `factor`."""
    return from_pil(ImageEnhance.Color(to_pil(image)).enhance(factor))


def sharpen(image: Picture, amount: float = 4.0) -> Picture:
    """Unsharp mask: picture + amount (picture - picture blurred by 1 px)."""
    blurred = ImageFilter.UnsharpMask(radius=1, percent=round(100 * amount), threshold=0)
    return from_pil(to_pil(image).filter(blurred))


def grid(image: Picture, period: int = 8, depth: int = 48) -> Picture:
    """Every `period`-th row and column moved by `depth` grey levels, away from its own end of the
    range.
    """
    height, width = image.shape[1:]
    on = (np.arange(height)[:, None] % period == 0) | (np.arange(width)[None] % period == 0)
    moved = np.where(image < 128, image.astype(int) + depth, image.astype(int) - depth)
    return np.where(on, moved, image).astype(np.uint8)


def blank(image: Picture) -> Picture:
    """The mean colour everywhere."""
    mean = image.reshape(3, -1).mean(1).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(mean[:, None, None], image.shape))


def text_overlay(image: Picture, text: str = TEXT) -> Picture:
    """`text` in Pillow's own font, white on black, as wide as nine tenths of the picture."""
    font = ImageFont.load_default()
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font)
    label = Image.new("L", (round(right - left) + 4, round(bottom - top) + 4), 0)
    ImageDraw.Draw(label).text((2 - left, 2 - top), text, fill=255, font=font)
    picture = to_pil(image)
    width = max(1, round(0.9 * picture.width))
    height = min(picture.height, max(1, round(width * label.height / label.width)))
    label = label.resize((width, height), Image.Resampling.BILINEAR)
    corner = ((picture.width - width) // 2, (picture.height - height) // 2)
    picture.paste(label.convert("RGB"), corner)
    return from_pil(picture)


def jpeg(image: Picture, quality: int = 75) -> Picture:
    """There and back through JPEG."""
    buffer = BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=quality)
    with Image.open(buffer) as again:
        return from_pil(again)


def blur(image: Picture, radius: float = 2.0) -> Picture:
    """Gaussian, `radius` its standard deviation in pixels."""
    return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(radius)))


def down_up(image: Picture, factor: float = 0.5) -> Picture:
    """Scaled down by `factor` and back up, bicubic."""
    picture = to_pil(image)
    small = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    resample = Image.Resampling.BICUBIC
    return from_pil(picture.resize(small, resample).resize(picture.size, resample))


def noise(image: Picture, sigma: float = 20.0) -> Picture:
    """Gaussian noise of `sigma` grey levels, drawn from a hash of the picture."""
    rows = np.random.default_rng(zlib.crc32(np.ascontiguousarray(image).tobytes()))
    return np.clip(np.round(image + rows.normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


def brightness(image: Picture, factor: float = 1.5) -> Picture:
    """All values times `factor`."""
    return np.clip(np.round(image * factor), 0, 255).astype(np.uint8)


CORRUPTIONS: Mapping[str, Corruption] = {
    "oversaturate": oversaturate,
    "sharpen": sharpen,
    "grid": grid,
    "blank": blank,
    "text": text_overlay,
    "jpeg": jpeg,
    "blur": blur,
    "down_up": down_up,
    "noise": noise,
    "brightness": brightness,
}

# --- canaries -------------------------------------------------------------------------------------


def _picture(corruption: Corruption) -> Canary:
    """A canary from a corruption; None where that changes nothing."""

    def canary(sample: Sample) -> Sample | None:
        image = corruption(sample.image)
        return None if np.array_equal(image, sample.image) else replace(sample, image=image)

    return canary


def source_copy(sample: Sample) -> Sample | None:
    """An edit that did nothing."""
    if not sample.sources:
        return None
    size = to_pil(sample.image).size
    source = from_pil(to_pil(sample.sources[0]).resize(size, Image.Resampling.BICUBIC))
    return None if np.array_equal(source, sample.image) else replace(sample, image=source)


def collage(sample: Sample) -> Sample | None:
    """Source and edit side by side, each half as wide."""
    if not sample.sources:
        return None
    both = Image.new("RGB", to_pil(sample.image).size)
    half = both.width // 2
    for place, one in enumerate((sample.sources[0], sample.image)):
        both.paste(
            to_pil(one).resize((half, both.height), Image.Resampling.BICUBIC), (place * half, 0)
        )
    return replace(sample, image=from_pil(both))


def swapped_prompt(sample: Sample, others: Sequence[Sample]) -> Sample | None:
    """The same picture under the prompt, and with the target, of the next of `others` that asks for
    something else in the same category.
    """
    names = [other.prompt for other in others]
    start = names.index(sample.prompt) if sample.prompt in names else 0
    for other in (*others[start:], *others[:start]):
        if other.category == sample.category and other.prompt != sample.prompt:
            return replace(sample, prompt=other.prompt, target=other.target)
    return None


CANARIES: Mapping[str, Canary] = {
    "oversaturated": _picture(oversaturate),
    "oversharpened": _picture(sharpen),
    "grid": _picture(grid),
    "blank": _picture(blank),
    "text_overlay": _picture(text_overlay),
    "source_copy": source_copy,
    "collage": collage,
}
RIGHTLY = {  # a source left alone is consistent, and no uglier than its edit
    "aesthetics": ("source_copy",),
    "consistency": ("source_copy",),
}


def canaries(samples: Sequence[Sample], axis: str = "") -> dict[str, Canary]:
    """All canaries that an axis, taken alone, may not like; the swapped prompt takes others' among
    `samples`.
    """
    found = {name: one for name, one in CANARIES.items() if name not in RIGHTLY.get(axis, ())}
    return found | {"swapped_prompt": lambda sample: swapped_prompt(sample, samples)}


# --- what a judge should not care for -------------------------------------------------------------


def saturation(image: Picture) -> float:
    """Mean over pixels of max - min over channels, in [0, 1]."""
    return float((image.max(0).astype(float) - image.min(0)).mean() / 255)


def sharpness(image: Picture) -> float:
    """Standard deviation of the Laplacian of the mean channel, in grey levels."""
    g = image.astype(float).mean(0)
    around = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:]
    return float((around - 4 * g[1:-1, 1:-1]).std()) if min(g.shape) > 2 else 0.0


def longer_prompt(sample: Sample) -> Sample:
    """The same request in more words; of scenes the rich caption of the target."""
    from rewards.scenes import world

    try:
        text = world.rich(world.parse(sample.target or ""))
    except ValueError:
        text = (
            f"A single picture of exactly what is described here and nothing else: {sample.prompt}"
        )
    return replace(sample, prompt=text)


MEASURES: Mapping[str, Callable[[Picture], float]] = {
    "saturation": saturation,
    "sharpness": sharpness,
}
CHANGES: Mapping[str, Callable[[Sample], Sample]] = {
    "jpeg": lambda sample: replace(sample, image=jpeg(sample.image, 90)),
    "resolution": lambda sample: replace(sample, image=down_up(sample.image, 0.75)),
    "longer_prompt": longer_prompt,
}
