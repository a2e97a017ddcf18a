"""Speed of the scenes world and how its oracle behaves on worn pictures.

    python -m benchmarks.scenes                        # figures
    python -m benchmarks.scenes --out sheets           # and contact sheets
    python -m benchmarks.scenes --samples DIR          # axis correlations over the samples of a run

`--samples` is a folder of NAME.png beside NAME.json, the spec as `world.dump` writes it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from rewards import images
from rewards.scenes import oracle, world
from rewards.scenes.render import render_batch

KINDS = [
    ("objects", 1),
    ("objects", 2),
    ("objects", 3),
    ("portraits", 1),
    ("text", 1),
    ("edits", 1),
]
Specs = Sequence["world.Spec | world.Edit"]


def shown(specs: Specs) -> list[world.Spec]:
    """What each spec's right picture shows: an edit's target."""
    return [spec.target if isinstance(spec, world.Edit) else spec for spec in specs]


def worn(pictures, rng, *, noise=0.0, blur=0.0, colour=1.0, shift=0, tint=0.0) -> np.ndarray:
    """uint8 (B, 3, H, W), worn: blur in pixels, noise and tint in levels, sideways shift."""
    x = pictures.astype(np.float32)
    x = gaussian_filter(x, (0, 0, blur, blur)) if blur else x
    grey = x.mean(1, keepdims=True)
    x = grey + colour * (x - grey) + tint * rng.normal(0, 1, (len(x), 3, 1, 1))
    x = np.roll(x, shift, 3) + noise * rng.normal(0, 1, x.shape)
    return np.clip(np.round(x), 0, 255).astype(np.uint8)


WEAR: dict[str, dict] = {
    "truth": {},
    "autoencoder-like": {"blur": 0.8, "noise": 6, "tint": 5},
    "noise 16": {"noise": 16},
    "noise 48": {"noise": 48},
    "blur 2": {"blur": 2},
    "blur 4": {"blur": 4},
    "grey by half": {"colour": 0.5},
    "shift 2": {"shift": 2},
    "shift 6": {"shift": 6},
}


def axis_correlations(pictures: Sequence[np.ndarray], specs: Specs) -> dict[str, float]:
    """Spearman rank correlation of each two axes' soft readings over the samples that have both.

    Args:
        pictures: uint8 (3, H, W), any sizes from 64.
        specs: the spec or edit of each.

    Returns:
        "axis/axis" -> correlation in [-1, 1], for pairs with at least eight samples that vary.
    """
    names = list(oracle.AXES)
    rows = []
    for picture, spec in zip(pictures, specs, strict=True):
        readings = [oracle.measure(name, picture, spec) for name in names]
        rows.append([np.nan if r is None else r.soft for r in readings])
    values, out = np.array(rows), {}
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            both = values[~np.isnan(values[:, [i, j]]).any(1)][:, [i, j]]
            if len(both) >= 8 and both.std(0).min() > 1e-9:
                out[f"{one}/{names[j]}"] = float(spearmanr(both[:, 0], both[:, 1]).statistic)
    return out


def mixed_wear(category: str, level: int, count: int, seed: int = 0):
    """Pictures and specs, each worn in its own way; a quarter show a source or another spec."""
    rng, pictures, specs = np.random.default_rng(seed), [], []
    for k in range(count):
        spec = world.draw(category, k, level=level)
        from_, kind = shown([spec])[0], rng.integers(8)
        if isinstance(spec, world.Edit) and kind < 3:
            from_ = spec.source
        elif kind < 2:
            from_ = shown([world.draw(category, count + k, level=level)])[0]
        how = {
            "noise": float(rng.choice([0, 0, 10, 30])),
            "blur": float(rng.choice([0, 0, 1, 2.5])),
            "colour": float(rng.choice([1, 1, 0.6, 1.4])),
            "shift": int(rng.choice([0, 0, 0, 2, 4])),
        }
        pictures.append(worn(render_batch([from_]), rng, **how)[0])
        specs.append(spec)
    return pictures, specs


def per_second(work: Callable[[], object], count: int) -> float:
    """Pictures per second of processor time, the best of three after a first."""
    work()
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return count / min(times)


def _table(count: int) -> None:
    print(f"\nfidelity, strict / soft over {count} pictures")
    print(f"{'':18}" + "".join(f"{c[:7]} {n}".rjust(14) for c, n in KINDS))
    every = {(c, n): [world.draw(c, seed, level=n) for seed in range(count)] for c, n in KINDS}
    for name in [*WEAR, "other specs"]:
        cells = []
        for specs in every.values():
            pictures = render_batch(shown(specs))
            if name == "other specs":
                pictures = np.roll(pictures, 1, 0)
            else:
                pictures = worn(pictures, np.random.default_rng(0), **WEAR[name])
            readings = oracle.fidelity_batch(pictures, specs)
            strict, soft = (
                np.mean([r.strict for r in readings]),
                np.mean([r.soft for r in readings]),
            )
            cells.append(f"{strict:.2f} / {soft:.2f}".rjust(14))
        print(f"{name:18}" + "".join(cells))


def _speeds(count: int) -> None:
    print("pictures per second of one core at 64 px")
    for category, level in KINDS:
        specs = [world.draw(category, seed, level=level) for seed in range(count)]
        pictures = render_batch(shown(specs))
        drawn = per_second(lambda s=specs: render_batch(shown(s)), count)
        read = per_second(lambda p=pictures, s=specs: oracle.fidelity_batch(p, s), count)
        every = per_second(
            lambda p=pictures, s=specs: [
                oracle.measure(a, *x) for a in oracle.AXES for x in zip(p, s, strict=True)
            ],
            count,
        )
        print(
            f"  {category} {level}: render {drawn:.0f}, fidelity {read:.0f}, all axes {every:.0f}"
        )


def _sheets(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for category, level in KINDS:
        specs = [world.draw(category, seed, level=level) for seed in range(10)]
        truth, rng = render_batch(shown(specs)), np.random.default_rng(0)
        rows = [list(worn(truth, rng, **how)) for how in WEAR.values()]
        if category == "edits":
            rows.insert(0, list(render_batch([spec.source for spec in specs])))
        images.save_png(out / f"{category}-{level}.png", images.contact_sheet(rows))
        print(f"{out}/{category}-{level}.png: " + "; ".join(world.terse(spec) for spec in specs))


def _correlations(samples: Path | None, count: int) -> None:
    print("\nSpearman rank correlations between axes")
    if samples is None:
        sets = {f"{c} {n}, mixed wear": mixed_wear(c, n, count) for c, n in KINDS[1:]}
    else:
        files = sorted(
            path for path in samples.glob("*.png") if path.with_suffix(".json").is_file()
        )
        specs = [world.parse(path.with_suffix(".json").read_text()) for path in files]
        sets = {str(samples): ([images.load_image(path) for path in files], specs)}
    for name, pair in sets.items():
        found = axis_correlations(*pair)
        print(f"  {name}: " + (", ".join(f"{k} {v:+.2f}" for k, v in found.items()) or "too few"))


def main() -> None:
    """Print the figures; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=256, help="pictures per kind")
    parser.add_argument("--samples", type=Path, help="folder of NAME.png and NAME.json")
    parser.add_argument("--out", type=Path, help="folder for contact sheets")
    asked = parser.parse_args()
    if asked.samples is None:
        _speeds(asked.count)
        _table(asked.count)
    _correlations(asked.samples, asked.count)
    if asked.out is not None:
        _sheets(asked.out)


if __name__ == "__main__":
    main()
