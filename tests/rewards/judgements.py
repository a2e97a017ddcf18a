"""Judgements in the form that `rlhf reward collect` writes: few, and of known truth."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rewards import images, probes
from rewards.scenes import world
from rewards.scenes.oracle import measure
from rewards.scenes.render import render

WORSE = {"blur": probes.blur, "noise": probes.noise, "blank": probes.blank}


def png(picture: np.ndarray) -> bytes:
    buffer = BytesIO()
    images.to_pil(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def records(axis: str, count: int, start: int, sd: float = 0.1, category: str = "objects") -> list:
    """All pairs of a render and its corruptions, `count` prompts; annotators add normal noise of
    `sd` to the gold of each picture.
    """
    out, rows = [], np.random.default_rng(start)
    for seed in range(start, start + count):
        spec = world.draw(category, seed)
        edit = isinstance(spec, world.Edit)
        shown = {"render": render(spec.target if edit else spec)}
        shown |= {f"corrupted:{k}": worse(shown["render"]) for k, worse in WORSE.items()}
        gold = {k: measure(axis, p, spec).soft for k, p in shown.items()}
        names = list(shown)
        for i, first in enumerate(names):
            for second in names[i + 1 :]:
                pair = (first, second) if rows.random() < 0.5 else (second, first)
                said = [gold[name] + rows.normal(0, sd) for name in pair]
                out.append(
                    {
                        "kind": "pair",
                        "axis": axis,
                        "prompt": world.terse(spec),
                        "category": world.category_of(spec),
                        "images": [png(shown[name]) for name in pair],
                        "sources": [png(render(spec.source))] if edit else [],
                        "ratings": [float(said[0] > said[1])],
                        "group": f"{axis}-{category}-{seed}",
                        "annotator": "one",
                        "confidence": 1.0,
                        "gold": [gold[name] for name in pair],
                        "origin": list(pair),
                        "target": world.dump(spec),
                        "words": len(world.terse(spec).split()),
                    }
                )
    return out


def write(folder: Path, split: str, rows: list) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}-00000.parquet")
    return folder
