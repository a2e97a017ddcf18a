"""Small data sets on disk, whole and damaged, and scorers of their pictures."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.data.records import Encoded, Record


def pixels(seed=0, height=48, width=64):
    """Coloured cells of 8 px with a little noise, uint8 (H, W, 3): no two seeds look alike."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (-(-height // 8), -(-width // 8), 3))
    whole = np.kron(cells, np.ones((8, 8, 1)))[:height, :width]
    return np.clip(whole + rng.integers(-6, 7, whole.shape), 0, 255).astype(np.uint8)


def encoded(array, format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


def png(seed=0, height=48, width=64) -> bytes:
    return encoded(pixels(seed, height, width))


def turned(degrees: int) -> bytes:
    """A JPEG whose EXIF orientation says it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = {0: 1, 180: 3, 90: 6, 270: 8}[degrees]
    return encoded(pixels(1), "JPEG", exif=exif)


def record(data=None, caption="a picture of cells", id="r", **columns) -> Record:
    sources = tuple(Encoded(s) for s in columns.pop("sources", ()))
    return Record(
        id=id, picture=Encoded(data or png()), caption=caption, sources=sources, columns=columns
    )


def folder(path: Path, rows) -> Path:
    """An image folder of (file name, bytes or None, metadata row or None)."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, data, row in rows:
        if data is not None:
            (path / name).write_bytes(data)
        if row is not None:
            lines.append(json.dumps({"file_name": name, **row}))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def tar(path: Path, members, cut=None) -> Path:
    """A tar of (name, bytes); `cut` keeps so many bytes of it."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    if cut is not None:
        path.write_bytes(path.read_bytes()[:cut])
    return path


def shards(path: Path, count=4, size=6) -> Path:
    """Tars with pictures that are alike across shards (every fifth), small ones and broken ones."""
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        members = []
        for i in range(size):
            n = shard * size + i
            data = png(0 if n % 5 == 0 else n, height=16 if n % 7 == 3 else 48)
            caption = b"" if n == 8 else f"number {n} of many".encode()
            members += [
                (f"{n:04d}.png", data[:200] if n == 13 else data),
                (f"{n:04d}.txt", caption),
                (f"{n:04d}.json", json.dumps({"category": "ab"[n % 2]}).encode()),
            ]
        tar(path / f"{shard:03d}.tar", members)
    return path


# --- scorers --------------------------------------------------------------------------------------


def redness(images, prompts, sources):
    return [float(picture[0].mean()) / 255 for picture in images]


def unsure(images, prompts, sources):
    """Does not apply to some, breaks down on others."""
    return [None if "none" in p else float("nan") if "nan" in p else 1.0 for p in prompts]


def deadly(images, prompts, sources):
    """Ends the process, as a power cut would, at picture 15 if the file of DEADLY is not there."""
    flag = Path(os.environ["DEADLY"])
    if any("number 15" in p for p in prompts) and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(prompts)
