"""A step of `rlhf pretrain` against the forward and backward that it needs.

    python -m benchmarks.pretrain --config pretrain/ladder --out benchmarks/results/pretrain.json

Real: the optimiser's step with its batch, made in a thread a step ahead. Bare: forward and backward
of the same batch, made beforehand. The two are measured in turn, stage by stage; efficiency is the
median of their ratios. `wait` is the share of the real time spent waiting for the batch: cold, when
every example is encoded for the first time, and warm, from the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipelines.data.loader import Ahead, Draw
from pipelines.data.stages import Span
from pipelines.pretrain import Config, Trainer
from rlhf import config as configs
from rlhf.distributed import ALONE
from rlhf.files import atomic_write_text, json_text
from rlhf.flow import Batch
from rlhf.policies.qwen_image21 import tokens_of
from rlhf.run import machine


def real(trainer: Trainer, ahead: Ahead[Batch], step: int) -> tuple[float, float, Draw]:
    """Seconds of a step, those of them waited, and its draw."""
    began, waited = time.perf_counter(), ahead.waited
    draw = trainer.draws(step)
    trainer.learner.step([draw], lambda d: (trainer.loss(ahead.get(d)), {}))
    return time.perf_counter() - began, ahead.waited - waited, draw


def bare(trainer: Trainer, batch: Batch) -> float:
    """Seconds of forward and backward."""
    trainer.learner.optimiser.zero_grad(set_to_none=True)
    began = time.perf_counter()
    trainer.loss(batch).backward()
    return time.perf_counter() - began


def measure(trainer: Trainer, ahead: Ahead[Batch], span: Span, repeats: int) -> dict[str, Any]:
    """Figures of a stage: its first steps cold, then the same again."""
    steps = range(span.first, min(span.last, span.first + repeats - 1) + 1)
    times: dict[str, list[float]] = defaultdict(list)
    sizes: dict[tuple[int, int], list[float]] = defaultdict(list)
    if len(steps) < 3:
        return {"skipped": f"a stage of {len(steps)} steps is too short to time"}
    for state in ("cold", "warm"):
        for step in steps:
            seconds, waited, draw = real(trainer, ahead, step)
            batch = trainer.batches(draw)
            times[state].append(seconds)
            times[f"{state} wait"].append(waited)
            if state == "warm" and step > steps[0]:  # the first was not asked for ahead
                times["real"].append(seconds - waited)
                times["bare"].append(bare(trainer, batch))
                times["ratio"].append(times["bare"][-1] / seconds)
                sizes[batch.size].append(batch.rows * tokens_of(batch.size) / seconds)
    return {
        "efficiency": statistics.median(times["ratio"]),
        "bare_seconds": statistics.median(times["bare"]),
        "real_seconds": statistics.median(times["warm"]),
        "wait_cold": sum(times["cold wait"]) / sum(times["cold"]),
        "wait_warm": sum(times["warm wait"][1:]) / sum(times["warm"][1:]),
        "tokens_per_second": {
            f"{h}x{w}": statistics.median(rates) for (h, w), rates in sorted(sizes.items())
        },
        "n": len(times["ratio"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="pretrain/ladder")
    parser.add_argument("--repeats", type=int, default=24, help="steps of a stage")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.repeats < 3:
        parser.error(f"--repeats: expected at least 3, got {options.repeats}")
    config = configs.load(Config, options.config, options.overrides, "pretrain")
    torch.set_num_threads(config.threads)
    pace = replace(config.pace, micro_batches=1)
    trainer = Trainer(replace(config, pace=pace), ALONE)
    stages = {}
    with trainer.ahead() as ahead:
        for span in trainer.spans:
            stages[span.name] = found = measure(trainer, ahead, span, options.repeats)
            print(span.name, json.dumps(found), flush=True)
    result = {"config": configs.to_dict(config), "machine": machine(), "stages": stages}
    if options.out:
        atomic_write_text(options.out, json_text(result))


if __name__ == "__main__":
    main()
