"""`rlhf reward train`: reward models from judgements of people.

One run trains the heads of one judge or of several, on two towers that they share (or, of family
`vlm`, a vision-language model through LoRA); see `rewards.training` for data, losses and heads. At
the end every judge is a folder under `<run>/judges` that `judges: [...]` of an alignment run, `rlhf
reward evaluate` and `rlhf reward serve` take as it is.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rewards import panel
from rewards.benchmark.calibration import fit_temperature
from rewards.errors import DataError
from rewards.judge import Judge
from rewards.training.collate import collate
from rewards.training.families import (
    Family,
    TowersFamily,
    TowersTrained,
    VlmConfig,
    VlmFamily,
    heads_of,
    raw_of,
)
from rewards.training.fitting import fit_calibration
from rewards.training.heads import HeadConfig
from rewards.training.objective import Objective, RewardLoss
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.files import atomic_directory
from rlhf.learner import Learner, LearnerConfig
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run
from rlhf.training import train as train_loop

NOISE_GROUPS = 32  # prompts on whose pictures a judge's noise is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """`judges`: which are trained, each on the rows of its axis. `towers`: what they stand on, a
    folder or hub id, or "scenes" for those that ship; `trained`: what of them. `batch`: prompts per
    step, with all of their judgements.
    """

    name: str = "judges"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    data: str = "runs/judgements"
    judges: tuple[str, ...] = ("fidelity",)
    family: Literal["towers", "vlm"] = "towers"
    towers: str = "scenes"
    trained: TowersTrained = "heads"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the towers and heads that are written
    vlm: VlmConfig = field(default_factory=VlmConfig)
    floor: float = 4.2  # rms in grey levels of the autoencoder's round trip, for consistency
    heads: dict[str, HeadConfig] = field(default_factory=dict)  # in place of a judge's own
    loss: RewardLoss = field(default_factory=RewardLoss)
    batch: int = 16
    held: int = 200  # prompts of the dev split that curves and calibration are read on
    pace: Pace = field(default_factory=lambda: Pace(steps=500, save_every=250))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=5e-4, weight_decay=0.01, warmup_steps=50)
    )

    def check(self) -> None:
        if not self.judges or len(set(self.judges)) < len(self.judges):
            raise ConfigError(f"judges: expected one or more, each once, got {list(self.judges)}")
        if min(self.batch, self.held) < 1:
            raise ConfigError(
                f"batch and held: expected at least 1, got {self.batch} and {self.held}"
            )
        if self.family == "vlm" and len(self.judges) > 1:
            raise ConfigError(f"family vlm: expected one judge a run, got {list(self.judges)}")
        if self.family == "towers" and not self.towers:
            raise ConfigError(
                "towers: expected a folder or hub id, got nothing: make small ones with"
                " `rlhf reward towers`, or write towers=scenes"
            )


class Groups:
    """Judgements of the wanted axes by prompt; a step's prompts are a function of the step."""

    def __init__(self, source: str, split: str, axes: Sequence[str]) -> None:
        self.table = JudgementTable(source, split)
        rows: dict[str, list[int]] = {}
        wanted = set(axes)
        columns = zip(self.table.column("axis"), self.table.column("group"), strict=True)
        for i, (axis, group) in enumerate(columns):
            if axis in wanted:
                rows.setdefault(group, []).append(i)
        if not rows:
            raise DataError(
                f"'{source}': expected {split} rows of {sorted(wanted)}, got none: name judges that"
                " the data set is about"
            )
        self.groups = list(rows)
        self._rows = list(rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> list[Judgement]:
        return [self.table[k] for k in self._rows[i]]

    def batch(self, step: int, size: int, seed: int) -> list[list[Judgement]]:
        """The prompts of a step, counted from 1: epochs in an order of their own."""
        size = min(size, len(self))
        places = [divmod(i, len(self)) for i in range((step - 1) * size, step * size)]
        orders = {
            epoch: np.random.default_rng([seed, 41, epoch]).permutation(len(self))
            for epoch in {epoch for epoch, _ in places}
        }
        return [self[int(orders[epoch][place])] for epoch, place in places]


def no_leak(train: Groups, dev: Groups) -> None:
    """Raise DataError where a prompt's judgements are in both splits."""
    shared = sorted(set(train.groups) & set(dev.groups))
    if shared:
        raise DataError(
            f"expected prompts in one split each, got {len(shared)} in train and dev, such as"
            f" {shared[0]!r}: split again with rewards.training.splits"
        )


def open_family(config: TrainConfig) -> Family:
    """What is trained, with its weights where a run starts."""
    if config.family == "vlm":
        return VlmFamily(config.judges[0], config.vlm, config.device)
    return TowersFamily(
        config.judges,
        config.towers,
        trained=config.trained,
        heads=config.heads,
        floor=config.floor,
        device=config.device,
    )


def axes_of(config: TrainConfig) -> list[str]:
    """The axes whose rows train something."""
    if config.family == "vlm":
        return list(config.judges)
    return list(heads_of(config.judges, config.heads))


def train(config: TrainConfig, resume: Path | None = None) -> dict[str, Any]:
    """Train, calibrate and write the judges; the run's result. Ranks but the first return {}."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    axes = axes_of(config)
    groups = Groups(config.data, "train", axes)
    dev = Groups(config.data, "dev", [*axes, *config.judges])
    no_leak(groups, dev)
    with session(config.device) as ranks:
        return _train(config, groups, dev, open_run(config, "reward train", resume, ranks), ranks)


def _train(
    config: TrainConfig, groups: Groups, dev: Groups, home: Run, ranks: Ranks
) -> dict[str, Any]:
    began = time.monotonic()
    family = open_family(config)
    objective = Objective(family.heads, config.loss).to(config.device)
    learned = family.learned() | {f"loss.{n}": p for n, p in objective.named_parameters()}
    held = [row for i in range(min(config.held, len(dev))) for row in dev[i]]

    def loss_of(prompts: list[list[Judgement]]) -> tuple[Tensor, Mapping[str, float]]:
        return objective(family, collate([row for group in prompts for row in group]))

    def preview(step: int, average: Average | None) -> dict[str, float]:
        family.train(False)
        with _in_place(learned, average):
            found = agreement(family.judges(), held)
        family.train(True)
        return found

    family.train(True)
    average = train_loop(
        home,
        Learner(learned, config.learner, ranks),
        lambda step: groups.batch(step, config.batch, config.seed),
        loss_of,
        config.pace,
        preview=preview,
        split=lambda batch, parts: [batch[i::parts] for i in range(parts)],
    )
    if not ranks.is_first:
        return {}
    if average is not None:
        average.copy_to(learned)
    family.train(False)
    if isinstance(family, TowersFamily):
        family.round(getattr(torch, config.dtype))
    judges = {axis: calibrated(judge, held) for axis, judge in family.judges().items()}
    figures = {name: {"value": value} for name, value in agreement(judges, held).items()}
    write(config, family, judges, figures, home)
    return home.write_result(time.monotonic() - began, figures)


@contextmanager
def _in_place(learned: Mapping[str, Tensor], average: Average | None) -> Iterator[None]:
    """The averaged weights inside the block."""
    kept = {n: p.detach().clone() for n, p in learned.items()} if average is not None else {}
    if average is not None:
        average.copy_to(learned)
    try:
        yield
    finally:
        for name, value in kept.items():
            learned[name].data.copy_(value)


def write(
    config: TrainConfig,
    family: Family,
    judges: Mapping[str, Any],
    figures: Mapping[str, Mapping[str, float]],
    home: Run,
) -> None:
    """The judges' folders under `<run>/judges`, all of them or none, named by their weights."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in family.learned().values())
    revision = hashlib.sha256(weights).hexdigest()[:12]
    for judge in judges.values():
        judge.card = replace(judge.card, revision=revision)
    folder = home.root / "judges"
    if folder.is_dir():
        shutil.rmtree(folder)
    with atomic_directory(folder) as part:
        family.save(part, judges, readme(config, figures))


def readme(config: TrainConfig, figures: Mapping[str, Mapping[str, float]]) -> str:
    """The card that people read."""
    rows = [f"| {name} | {metric['value']:.3f} |" for name, metric in figures.items()]
    return "\n".join(
        [
            f"# {', '.join(config.judges)}",
            "",
            f"Trained by `rlhf reward train` ({config.pace.steps} steps of {config.batch} prompts,"
            f" seed {config.seed}) on the judgements in `{Path(config.data).name}`; calibrated on"
            " their dev split. Agreement with annotators there:",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
        ]
    )


# --- figures -------------------------------------------------------------------------------------


def values_of(judge: Judge, rows: Sequence[Judgement]) -> list[list[float]]:
    """The raw values of a judge for the pictures of each row, NaN where it failed."""
    samples = [sample for row in rows for sample in row.samples()]
    raw = iter(raw_of(judge, samples))
    return [[math.nan if (v := next(raw)) is None else v for _ in row.images] for row in rows]


def agreement(judges: Mapping[str, Judge], held: Sequence[Judgement]) -> dict[str, float]:
    """`dev/<axis>/accuracy`: share of the annotators' comparisons, ties apart, that a judge orders
    as they do; what it failed on counts as wrong.
    """
    out = {}
    for axis, judge in judges.items():
        rows = [row for row in held if row.axis == axis and row.kind != "point"]
        right = [
            float((values[i] > values[j]) if preference > 0.5 else (values[i] < values[j]))
            for row, values in zip(rows, values_of(judge, rows), strict=True)
            for i, j, preference in row.pairs()
            if preference != 0.5
        ]
        if right:
            out[f"dev/{axis}/accuracy"] = float(np.mean(right))
    return out


def calibrated(judge: Any, held: Sequence[Judgement]) -> Any:
    """The judge with a calibration fitted to ratings, a temperature fitted to comparisons, and the
    noise of its scores.
    """
    rows = [row for row in held if row.axis == judge.card.name]
    points = [row for row in rows if row.kind == "point"]
    lists = [row for row in rows if row.kind != "point"]
    raw = np.array([values[0] for values in values_of(judge, points)])
    rating = np.array([(r.ratings[0] - r.low) / (r.high - r.low) for r in points])
    there = np.isfinite(raw) if len(raw) else np.zeros(0, bool)
    card = replace(judge.card, calibration=fit_calibration(raw[there], rating[there]))
    gaps, labels = [], []
    for row, values in zip(lists, values_of(judge, lists), strict=True):
        value = [card.calibration(v) for v in values]
        for i, j, preference in row.pairs():
            if math.isfinite(value[i] - value[j]):
                gaps.append(value[i] - value[j])
                labels.append(preference)
    if gaps:
        temperature = fit_temperature(np.array(gaps), np.array(labels))
        card = replace(card, temperature=temperature)
    judge.card = card
    judge.card = replace(card, noise_floor=noise_of(judge, lists[:NOISE_GROUPS]))
    return judge


def noise_of(judge: Judge, lists: Sequence[Judgement]) -> float:
    """Spread of a judge's scores inside a prompt under changes that nobody sees (`panel.noise`),
    over the prompts for which it never failed; 0 without any.
    """
    tables = []
    for row in lists:
        pixels = np.stack(row.images)
        columns = [row.images, *panel.harmless(pixels).values()]
        scores = [judge.score(replace(row, images=tuple(c)).samples()) for c in columns]
        values = [[s.value for s in column] for column in scores]
        if all(v is not None for column in values for v in column):
            tables.append(np.array(values, float).T)
    return panel.noise(tables) or 0.0


def plan_train(config: TrainConfig) -> str:
    """What is trained on how much."""
    seen = config.batch * config.pace.steps
    what = config.vlm.base if config.family == "vlm" else f"towers '{config.towers}'"
    return (
        f"{', '.join(config.judges)} on {what}; {config.pace.steps} steps of {config.batch} prompts"
        f" = {seen} prompts' judgements from '{config.data}'"
    )
