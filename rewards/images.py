"""The one place where pictures change type: uint8 arrays, float tensors, PIL and files.

Everywhere else a picture is uint8 RGB, (3, H, W) or (B, 3, H, W). Floats are in [-1, 1].
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from rewards.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor

Picture = UInt8[np.ndarray, "3 h w"]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_ORIENTATION = 0x0112  # of EXIF
_DEGREES = {3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}


def _check(chw: object, dims: int) -> None:
    shape, dtype = getattr(chw, "shape", None), getattr(chw, "dtype", None)
    if (
        shape is None
        or len(shape) != dims
        or shape[-3] != 3
        or str(dtype) not in ("uint8", "torch.uint8")
    ):
        layout = "(3, H, W)" if dims == 3 else "(B, 3, H, W)"
        raise ImageError(
            f"expected uint8 RGB {layout}, got {dtype} {shape}: convert with rewards.images"
        )


def to_pil(chw) -> Image.Image:
    """uint8 (3, H, W) -> PIL RGB. Raises ImageError for another layout or dtype."""
    _check(chw, 3)
    return Image.fromarray(np.ascontiguousarray(np.asarray(chw).transpose(1, 2, 0)), "RGB")


def _rgb(image: Image.Image) -> Image.Image:
    """PIL of any mode -> RGB. Transparent parts are laid on white."""
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits, not scale them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def from_pil(image: Image.Image) -> Picture:
    """PIL of any mode -> uint8 (3, H, W). Transparent parts are laid on white."""
    return np.ascontiguousarray(np.asarray(_rgb(image), dtype=np.uint8).transpose(2, 0, 1))


def grey(image: Image.Image) -> UInt8[np.ndarray, "h w"]:
    """Luma (ITU-R BT.601) of a PIL picture of any mode, 0 to 255."""
    return np.asarray(_rgb(image).convert("L"), dtype=np.uint8)


def crop_to(
    image: Image.Image, size: tuple[int, int], corner: tuple[float, float] = (0.5, 0.5)
) -> Picture:
    """Scale a picture until it just covers (height, width) and cut what stands over: all of it
    below and to the right at `corner` (0, 0), above and to the left at (1, 1).
    """
    height, width = size
    centring = corner[1], corner[0]
    covered = ImageOps.fit(
        _rgb(image), (width, height), Image.Resampling.LANCZOS, centering=centring
    )
    return from_pil(covered)


def letterbox(chw: Picture, side: int) -> UInt8[np.ndarray, "3 _ _"]:
    """A picture as a square of `side` pixels: its longest side scaled to fit, the rest black on
    both ends. One of that size is returned as it is; whole multiples are averaged over area.
    """
    _, height, width = chw.shape
    if height == width == side:
        return chw
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    even = height % side == 0 and width % side == 0
    how = Image.Resampling.BOX if even else Image.Resampling.BICUBIC
    small = np.asarray(to_pil(chw).resize(size, how)).transpose(2, 0, 1)
    out = np.zeros((3, side, side), np.uint8)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    out[:, top : top + size[1], left : left + size[0]] = small
    return out


def within(image: Image.Image, largest: int, multiple: int) -> Picture:
    """A picture as it is, its middle in whole multiples of pixels; scaled down first if a side is
    longer than `largest`. Raises ImageError if a side is shorter than one multiple.
    """
    image = _rgb(image)
    scale = min(1.0, largest / max(image.size))
    if scale < 1:
        small = [max(1, round(side * scale)) for side in image.size]
        image = image.resize((small[0], small[1]), Image.Resampling.LANCZOS)
    width, height = (side // multiple * multiple for side in image.size)
    if not width or not height:
        raise ImageError(f"expected a side of at least {multiple} px")
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return from_pil(image.crop((left, top, left + width, top + height)))


def decode(data: bytes) -> tuple[Image.Image, int]:
    """An encoded picture -> (it upright, the degrees its EXIF orientation turned it by clockwise).

    Raises:
        ImageError: not a picture, or only a part of one.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            turned = _DEGREES.get(image.getexif().get(_ORIENTATION, 1), 0)
            return ImageOps.exif_transpose(image), turned
    except Exception as error:  # the boundary to Pillow's decoders, which raise many types
        raise ImageError(
            f"expected a whole picture, got {len(data)} bytes that do not decode "
            f"({type(error).__name__}: {error}): leave it out or write it again"
        ) from error


def to_float(bchw) -> Float[Tensor, "b 3 h w"]:
    """uint8 (B, 3, H, W), array or tensor -> float32 tensor, 0 -> -1 and 255 -> 1."""
    import torch

    _check(bchw, 4)
    return torch.as_tensor(bchw).to(torch.float32) / 127.5 - 1.0


def to_uint8(bchw: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Float tensor in [-1, 1] -> uint8 tensor, rounded and clamped; inverts `to_float`.

    Raises:
        ImageError: a value that is not finite.
    """
    import torch

    if not bool(torch.isfinite(bchw).all()):
        raise ImageError(
            "expected finite pixels, got NaN or infinity: the decoder or its latents broke down"
        )
    return ((bchw.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def contact_sheet(rows, columns: int = 8, gap: int = 2) -> Image.Image:
    """Pictures side by side on white, no captions.

    Args:
        rows: uint8 (3, H, W) pictures laid out `columns` to a row, or a list of such lists, one per
        row. columns: pictures per row for a flat list. gap: pixels between pictures. Pictures of
        several sizes stand in cells of the largest height and width.

    Raises:
        ImageError: no picture, or none of a picture's shape.
    """
    rows = list(rows)
    if rows and not isinstance(rows[0], Sequence):
        rows = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        raise ImageError("expected at least one picture, got none")
    for picture in pictures:
        _check(picture, 3)
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    across = max(len(row) for row in rows)
    size = (across * (width + gap) + gap, len(rows) * (height + gap) + gap)
    sheet = Image.new("RGB", size, (255, 255, 255))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(to_pil(picture), (gap + c * (width + gap), gap + r * (height + gap)))
    return sheet


def save_png(path: str | os.PathLike[str], chw) -> Path:
    """Write uint8 (3, H, W), or a PIL picture, as PNG, whole or not at all."""
    path = Path(path)
    image = chw if isinstance(chw, Image.Image) else to_pil(chw)
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getvalue())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def files_below(folder: str | os.PathLike[str], least: int = 0) -> list[Path]:
    """All picture files below a folder, sorted. Raises ImageError if fewer than `least`."""
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(found) < least:
        raise ImageError(
            f"expected at least {least} pictures below '{folder}', got {len(found)}: write a folder"
            f" of {', '.join(SUFFIXES)} files"
        )
    return found


def size_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) of a picture file, its pixels not read. Raises ImageError for no picture."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, UnidentifiedImageError) as error:
        raise ImageError(f"expected a picture file at {path}, got {error}") from error


def load_image(path: str | os.PathLike[str]) -> Picture:
    """A picture file -> uint8 RGB (3, H, W). Raises ImageError if it is missing or no picture."""
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except (FileNotFoundError, IsADirectoryError, UnidentifiedImageError) as error:
        raise ImageError(
            f"expected a picture file at {path}, got {type(error).__name__}: {error}"
        ) from error
    except OSError as error:
        raise ImageError(
            f"expected a whole picture at {path}, got {error}: write it again"
        ) from error
