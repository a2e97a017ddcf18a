"""`rlhf evaluate codec PATH`: what an autoencoder keeps of pictures, beside others and beside PCA.

For each set of pictures (`pipelines.data.picture_sets`) and each autoencoder:

psnr, ssim    of the reconstruction, rounded to 8 bits as it is shown (arXiv numbers often are not)
lpips         arXiv:1801.03924, with the weights of VGG-16 and of LPIPS given by path
frechet       between originals and reconstructions, in the space of `features`: only with Inception
              is it what tables call FID; biased by n, so compare within a set
<kind>/strict_ratio, word_ratio, letter_ratio
              of scenes: what the oracle reads right in the original, the share it still does; word
              and letter are the spelling of signs alone

PCA (`pca64-f16`: 64 values for each patch of 16 px) has the size of an autoencoder in the table and
is fitted to pictures that it is not read on. Means over pictures have 95% intervals. Who spends
more values per pixel should keep more: `values_per_pixel` stands beside every row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pipelines.data.picture_sets import Pictures, PictureSet, open_set
from rewards import images
from rlhf.errors import ConfigError, DataError
from rlhf.files import atomic_write_text, json_text
from rlhf.models.codec_losses import perceptual
from rlhf.models.measures import ssim
from rlhf.models.reconstruction import Codec, PatchStatistics, find_codec, open_codec, psnr
from rlhf.models.vision import Vision, load_vision, lpips_weights, vgg_features
from rlhf.round_trips import Metrics, Tally, figures, keep_reading, read
from rlhf.run import Run, report

SHOWN = 8  # pictures of a sheet
GAIN = 4  # of the differences in it
NO_TRUTH = "not defined: nobody knows what these pictures say"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecConfig:
    """`model` and `others`: folders of autoencoders, pipelines or runs of `rlhf vae`, or scenes.
    `sets`: scenes/SIZE, photos, folders, or any of these with settings (`PictureSet`).

    `features` is what `rlhf.models.vision.load_vision` opens: scenes, DINOv2 or CLIP by path.
    `trunk` is a file of VGG-16, `calibration` its LPIPS weights; without them there is no lpips.
    """

    model: str = "scenes"
    others: tuple[str, ...] = ()
    sets: tuple[str | PictureSet, ...] = ("scenes/64", "scenes/128")
    n: int = 256  # pictures of a set, at most
    fit: int = 1000  # pictures that PCA is fitted to, at most
    features: str = "scenes"
    trunk: str | None = None
    calibration: str | None = None
    seed: int = 1000
    rows: int = 16  # pictures in one call
    threads: int = 1
    device: str = "cpu"
    out: str | None = None  # folder; of a run its evaluations, else evaluations/<model>
    id: str = "codec"  # name of the file and of the folder of sheets

    def check(self) -> None:
        if self.n < 2 or min(self.fit, self.rows, self.threads) < 1:
            raise ConfigError(
                f"expected n >= 2 and fit, rows and threads >= 1, got n={self.n} fit={self.fit}"
                f" rows={self.rows} threads={self.threads}"
            )
        if bool(self.trunk) != bool(self.calibration):
            raise ConfigError(
                "lpips: expected trunk (VGG-16) and calibration (LPIPS weights), got one of them:"
                " write both, or neither"
            )
        for path in filter(None, (self.trunk, self.calibration)):
            if not Path(path).is_file():
                raise ConfigError(f"lpips: expected a file of weights, got '{path}': write a path")
        names = [one.path for one in self.picture_sets()]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"sets: expected one or more, each once, got {names}")

    def picture_sets(self) -> list[PictureSet]:
        """`sets` with their settings. Raises ConfigError."""
        made = [PictureSet(path=one) if isinstance(one, str) else one for one in self.sets]
        for one in made:
            one.check()
        return made


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Coder:
    """One row of a table. `again` makes pictures in [-1, 1] from (pictures in [-1, 1], halves)."""

    name: str
    factor: int
    channels: int
    again: Callable[[Tensor, np.ndarray], Tensor]

    def about(self) -> dict[str, Any]:
        """Its size, for the result."""
        rate = self.channels / self.factor**2
        return {"factor": self.factor, "channels": self.channels, "values_per_pixel": rate}


def coder_of(name: str, codec: Codec) -> Coder:
    """An autoencoder, which does not care for halves."""
    return Coder(
        name=name,
        factor=codec.factor,
        channels=codec.channels,
        again=lambda rgb, halves: codec.round_trip(rgb),
    )


def fit_linear(
    pictures: Pictures, coders: Sequence[Coder], config: CodecConfig, multiple: int
) -> tuple[list[Coder], int]:
    """PCA of the size of each autoencoder, and the number of pictures behind all of it. What is
    read on one half is fitted to the other.

    Raises:
        DataError: fewer than two pictures that can be read.
    """
    sizes = sorted({(one.factor, min(one.channels, 3 * one.factor**2)) for one in coders})
    known = {f: (PatchStatistics(f), PatchStatistics(f)) for f in {f for f, _ in sizes}}
    seen = 0
    for batch in pictures.fitting(config.rows, multiple, config.fit):
        rgb, seen = images.to_float(batch.pictures), seen + len(batch.pictures)
        for half in set(batch.halves.tolist()):
            for pair in known.values():
                pair[1 - half].add(rgb[batch.halves == half])
    if not all(first.count for first, _ in known.values()):
        raise DataError(
            f"expected at least two pictures that can be read, got {seen}; skipped:"
            f" {dict(pictures.skipped)}"
        )
    made = []
    for factor, k in sizes:
        codes = [one.code(k) if one.count else None for one in known[factor]]

        def again(rgb: Tensor, halves: np.ndarray, codes=codes) -> Tensor:
            out = torch.empty_like(rgb)
            for half in set(halves.tolist()):
                out[halves == half] = codes[half].round_trip(rgb[halves == half])
            return out.clamp(-1, 1)

        made.append(Coder(name=f"pca{k}-f{factor}", factor=factor, channels=k, again=again))
    return made, seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Eyes:
    """What looks at pictures beside the pixels."""

    vision: Vision
    lpips: Callable[[Tensor, Tensor], Tensor] | None
    device: str

    def pooled(self, rgb: Tensor) -> Tensor:
        """A row of features for each picture."""
        return self.vision.pooled(rgb.to(self.device)).cpu()


def open_eyes(config: CodecConfig) -> Eyes:
    """Load the feature space, and LPIPS where its weights are given. Raises ConfigError."""
    vision, lpips = load_vision(config.features, config.device), None
    if config.trunk and config.calibration:
        maps = vgg_features(config.trunk, config.device)
        weights = lpips_weights(config.calibration)
        lpips = lambda a, b: perceptual(maps(a), maps(b), weights)  # noqa: E731
    return Eyes(vision=vision, lpips=lpips, device=config.device)


@torch.no_grad()
def measure(
    pictures: Pictures, coders: Sequence[Coder], eyes: Eyes, rows: int, multiple: int
) -> dict[str, Tally]:
    """One time through a set: the tallies of the originals (under '') and of each autoencoder.

    Raises:
        ImageError: reconstructed pixels that are not finite.
    """
    out = {name: Tally() for name in ("", *(coder.name for coder in coders))}
    for batch in pictures.batches(rows, multiple):
        before = images.to_float(batch.pictures)
        out[""].see(batch.pictures, eyes.pooled(before), SHOWN)
        first = read(batch.specs, batch.pictures) if batch.specs else None
        for coder in coders:
            tally, made = out[coder.name], images.to_uint8(coder.again(before, batch.halves))
            again = images.to_float(made)
            tally.add("psnr", psnr(again, before))
            tally.add("ssim", ssim(again, before))
            if eyes.lpips:
                tally.add("lpips", eyes.lpips(again.to(eyes.device), before.to(eyes.device)))
            if first and batch.specs:
                keep_reading(tally, batch.kinds, first, read(batch.specs, made.numpy()))
            tally.see(made.numpy(), eyes.pooled(again), SHOWN)
    return out


def sheet(tallies: Mapping[str, Tally], path: Path) -> None:
    """Originals, then of each autoencoder reconstructions and differences times `GAIN`: pixels as
    they are, of larger pictures the middle square that all have.
    """
    side = min(min(picture.shape[1:]) for picture in tallies[""].shown)

    def middle(picture: np.ndarray) -> np.ndarray:
        top, left = ((have - side) // 2 for have in picture.shape[1:])
        return picture[:, top : top + side, left : left + side]

    before = [middle(picture) for picture in tallies[""].shown]
    rows = [before]
    for coder, tally in tallies.items():
        if coder:
            after = [middle(picture) for picture in tally.shown]
            gaps = (np.abs(a.astype(int) - b) for a, b in zip(after, before, strict=True))
            rows += [after, [np.minimum(GAIN * gap, 255).astype(np.uint8) for gap in gaps]]
    images.save_png(path, images.contact_sheet(rows))


# --- the program ----------------------------------------------------------------------------------


def labels(paths: Sequence[str]) -> dict[str, Path]:
    """A short name for each autoencoder, and its folder. Raises ConfigError, loading nothing."""
    out: dict[str, Path] = {}
    for path in paths:
        folder = find_codec(path)
        root = Path(path).resolve()
        name = root.parent.name if root.name == "vae" else root.name
        if folder in out.values():
            raise ConfigError(f"expected each autoencoder once, got '{path}' again: leave it out")
        out[name if name not in out else f"{name}-{len(out) + 1}"] = folder
    return out


def measured(
    config: CodecConfig, name: str, pictures: Pictures, coders: Sequence[Coder], eyes: Eyes
) -> tuple[Metrics, dict[str, Any], list[Coder]]:
    """Figures of one set, what there is to say about it, and the linear codes it was read with."""
    multiple = math.lcm(*(one.factor for one in coders))
    linear, fitted = fit_linear(pictures, coders, config, multiple)
    tallies = measure(pictures, [*coders, *linear], eyes, config.rows, multiple)
    path = destination(config).with_suffix("") / f"{name.replace('/', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(tallies, path)
    originals = tallies.pop("")
    found = {coder: figures(tally, originals) for coder, tally in tallies.items()}
    heads = list(dict.fromkeys(key for one in found.values() for key in one))
    about = {
        "pictures": sum(map(len, originals.features)),
        "skipped": dict(pictures.skipped),
        "pca_fitted_to": fitted,
        "figures": heads,
        "text": "read by the oracle" if any("/" in head for head in heads) else NO_TRUTH,
        "sheet": str(path),
    }
    named = {f"recon/{name}/{row}/{key}": v for row, one in found.items() for key, v in one.items()}
    return named, about, linear


def codec(config: CodecConfig) -> dict[str, Any]:
    """Measure, write figures and sheets, return the figures.

    Raises:
        ConfigError, DataError: an autoencoder or a set is not there; before anything is computed.
    """
    began = time.monotonic()
    torch.set_num_threads(config.threads)
    console = Console(stderr=True)
    folders = labels((config.model, *config.others))
    sets = {
        one.path.strip("/"): open_set(one, config.n, config.seed) for one in config.picture_sets()
    }
    codecs = {name: open_codec(folder, config.device) for name, folder in folders.items()}
    coders = [coder_of(name, one) for name, one in codecs.items()]
    eyes = open_eyes(config)
    metrics: Metrics = {}
    about: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, pictures in sets.items():
        found, about[name], linear = measured(config, name, pictures, coders, eyes)
        metrics |= found
        rows |= {one.name: one.about() for one in (*coders, *linear)}
        console.print(f"{name}: {about[name]['pictures']} pictures", highlight=False)
    for name, one in codecs.items():
        rows[name] |= {"path": str(folders[name]), "class": one.kind}
    result = report(
        "evaluate codec",
        time.monotonic() - began,
        metrics,
        model=config.model,
        autoencoders=rows,
        sets=about,
        features=config.features,
        sheet_rows=f"originals; then of {', '.join(rows)}: pictures, differences x {GAIN}",
        settings={key: getattr(config, key) for key in ("n", "fit", "seed")},
    )
    target = destination(config)
    atomic_write_text(target, json_text(result))
    console.print(f"written: {target}", highlight=False)
    return result


def destination(config: CodecConfig) -> Path:
    """The JSON file of this evaluation; sheets go to the folder of the same name."""
    root = Path(config.model)
    if config.out is None and (root / "config.yaml").is_file():
        return Run.open(root).evaluations / f"{config.id}.json"
    name = next(iter(labels([config.model])))
    return Path(config.out or Path("evaluations") / name) / f"{config.id}.json"


def plan_codec(config: CodecConfig) -> str:
    """Where the autoencoders were found, and on how many pictures, for --dry-run."""
    lines = [f"{name}: {folder}" for name, folder in labels((config.model, *config.others)).items()]
    for one in config.picture_sets():
        open_set(one, config.n, config.seed)
        lines.append(f"{one.path}: up to {one.n or config.n} pictures")
    return "\n".join(lines)


def summarise_codec(result: Mapping[str, Any]) -> str:
    """A table for each set, a row for each autoencoder: means with half their 95% interval."""
    rows, metrics = result["autoencoders"], result["metrics"]
    parts = []
    for name, about in result["sets"].items():
        skipped = sum(about["skipped"].values())
        heads = about["figures"]
        table = [["", "values/px", *heads]]
        for row, known in rows.items():
            found = [metrics.get(f"recon/{name}/{row}/{head}") for head in heads]
            table.append([row, f"{known['values_per_pixel']:.4g}", *map(_cell, found)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in table]
        parts.append(
            f"{name}: {about['pictures']} pictures, {skipped} skipped {about['skipped'] or ''}\n"
            + "\n".join(line.rstrip() for line in lines)
            + (f"\ntext: {about['text']}" if about["text"] == NO_TRUTH else "")
        )
    foot = f"frechet in the space of {result['features']}; {result['seconds']:.0f} seconds"
    return "\n\n".join([*parts, foot])


def _cell(metric: Mapping[str, float] | None) -> str:
    if metric is None:
        return "-"
    text = f"{metric['value']:.4g}"
    return f"{text} ±{(metric['high'] - metric['low']) / 2:.2g}" if "low" in metric else text
