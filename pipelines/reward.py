"""`rlhf reward train`: reward models from judgements of people.

One run trains the heads of one judge or of several, on two towers that they share (or, of family
`vlm`, a vision-language model through LoRA); see `rewards.training` for data, losses and heads. At
the end every judge is a folder under `<run>/judges` that `judges: [...]` of an alignment run, `rlhf
reward evaluate` and `rlhf reward serve` take as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.data import recall
from rewards.backbones.towers import CONFIG, Shape, new_towers, open_towers, save_towers
from rewards.benchmark.calibration import fit_temperature
from rewards.errors import DataError
from rewards.trained import KINDS, SHIPPED, TowersJudge, TowersModel, kind_of, save_judge
from rewards.training.collate import collate
from rewards.training.fitting import fit_calibration
from rewards.training.heads import HeadConfig
from rewards.training.objective import Objective, RewardLoss
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable
from rewards.types import JudgeCard
from rlhf.assets import digest
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run
from rlhf.training import train as train_loop


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """`judges`: which are trained, each on the rows of its axis. `towers`: what they stand on, a
    folder or hub id, "scenes" for those that ship, or "" for fresh ones of the shape `new`.
    `trained`: all of the towers, low-rank changes of them, or the heads alone. `batch`: prompts per
    step, with all of their judgements.
    """

    name: str = "judges"
    runs: str = "runs"
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    data: str = "runs/judgements"
    judges: tuple[str, ...] = ("fidelity",)
    towers: str = "scenes"
    trained: Literal["full", "heads"] = "heads"
    new: Shape = field(default_factory=Shape)
    floor: float = 4.2  # rms in grey levels of the autoencoder's round trip, for consistency
    heads: dict[str, HeadConfig] = field(default_factory=dict)  # in place of a judge's own
    loss: RewardLoss = field(default_factory=RewardLoss)
    recall: recall.Recall = field(default_factory=recall.Recall)
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
        if not self.towers and self.trained != "full":
            raise ConfigError(
                f"trained={self.trained}: fresh towers know nothing: write trained=full, or name"
                " trained towers"
            )

    def wanted(self) -> dict[str, HeadConfig]:
        """All heads of the judges, each once."""
        out: dict[str, HeadConfig] = {}
        for judge in self.judges:
            own = kind_of(judge).HEADS if judge in KINDS else {judge: HeadConfig()}
            out |= {name: self.heads.get(name, config) for name, config in own.items()}
        return out


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
        first = (step - 1) * size
        out = []
        for i in range(first, first + size):
            epoch, place = divmod(i, len(self))
            order = np.random.default_rng([seed, 41, epoch]).permutation(len(self))
            out.append(self[int(order[place])])
        return out


def no_leak(train: Groups, dev: Groups) -> None:
    """Raise DataError where a prompt's judgements are in both splits."""
    shared = sorted(set(train.groups) & set(dev.groups))
    if shared:
        raise DataError(
            f"expected prompts in one split each, got {len(shared)} in train and dev, such as"
            f" {shared[0]!r}: split again with rewards.training.splits"
        )


def train(config: TrainConfig, resume: Path | None = None) -> dict[str, Any]:
    """Train, calibrate and write the judges; the run's result. Ranks but the first return {}."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    heads = list(config.wanted())
    groups = Groups(config.data, "train", heads)
    dev = Groups(config.data, "dev", [*heads, *config.judges])
    no_leak(groups, dev)
    with session(config.device) as ranks:
        return _train(config, groups, dev, open_run(config, "reward train", resume, ranks), ranks)


def _train(
    config: TrainConfig, groups: Groups, dev: Groups, home: Run, ranks: Ranks
) -> dict[str, Any]:
    began = time.monotonic()
    model = open_model(config, groups, home.root / "towers")
    objective = Objective(list(model.heads), config.loss)
    learned = learned_of(model) | {f"loss.{n}": p for n, p in objective.named_parameters()}
    words = recall.RecallObjective(model, config.recall) if config.recall.batch else None
    if words is not None:
        learned |= {f"recall.{n}": p for n, p in words.named_parameters()}
    held = [row for i in range(min(config.held, len(dev))) for row in dev[i]]

    def loss_of(batch: tuple[int, list[list[Judgement]]]) -> tuple[Tensor, Mapping[str, float]]:
        step, prompts = batch
        loss, metrics = objective(model, collate([row for group in prompts for row in group]))
        if words is not None:
            again = words(step, config.seed)
            loss = loss + config.recall.weight * again
            metrics["loss/recall"] = float(again.detach())
        return loss, metrics

    def preview(step: int, average: Average | None) -> dict[str, float]:
        with _in_place(learned, average):
            return agreement(judges_of(config, model), held)

    average = train_loop(
        home,
        Learner(learned, config.learner, ranks),
        lambda step: (step, groups.batch(step, config.batch, config.seed)),
        loss_of,
        config.pace,
        preview=preview,
        split=lambda batch, parts: [(batch[0], batch[1][i::parts]) for i in range(parts)],
    )
    if not ranks.is_first:
        return {}
    if average is not None:
        average.copy_to(learned)
    judges = finish(config, model, held, home)
    figures = agreement(judges, held)
    return home.write_result(
        time.monotonic() - began, {name: {"value": value} for name, value in figures.items()}
    )


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


def finish(
    config: TrainConfig, model: TowersModel, held: Sequence[Judgement], home: Run
) -> dict[str, TowersJudge]:
    """Calibrate the judges and write their folders, and the towers where they were trained."""
    folder = home.root / "judges"
    source = config.towers
    if config.trained == "full":
        save_towers(model.towers, folder / "towers")
        source = "../towers"
    elif config.towers == "scenes":
        source = str(SHIPPED / "towers")
    out = {}
    for axis, judge in judges_of(config, model).items():
        judge = calibrated(judge, held)
        save_judge(folder / axis, judge, source)
        judge.card = replace(judge.card, revision=digest(folder / axis)[:12])
        save_judge(folder / axis, judge, source)
        out[axis] = judge
    return out


def judges_of(config: TrainConfig, model: TowersModel) -> dict[str, TowersJudge]:
    """The judges on a model in training, each with the heads it needs."""
    out = {}
    model.towers.forget()
    for axis in config.judges:
        kind = kind_of(axis)
        names = list(kind.HEADS) or [axis]
        part = TowersModel.of(model.towers, {n: (model.configs[n], model.heads[n]) for n in names})
        card = JudgeCard(
            name=axis,
            revision="training",
            preprocessing=f"letterbox-{model.towers.side}",
            categories=kind.CATEGORIES,
            needs=kind.NEEDS,
            text_tokens=model.towers.context
            if any(c.text for c in part.configs.values())
            else None,
            pixels=model.towers.side,
        )
        out[axis] = kind(part, card, axis, {"floor": config.floor} if axis == "consistency" else {})
    return out


# --- models --------------------------------------------------------------------------------------


def open_model(config: TrainConfig, groups: Groups, folder: Path) -> TowersModel:
    """Towers with the heads of the judges, what is not trained frozen. Fresh towers go to `folder`;
    a resumed run finds them there.
    """
    if config.towers:
        source = str(SHIPPED / "towers") if config.towers == "scenes" else config.towers
        towers = open_towers(source, config.device)
    elif (folder / CONFIG).is_file():
        towers = open_towers(str(folder), config.device)
    else:
        texts = sorted(set(groups.table.column("prompt")))
        towers = new_towers(config.new.open_clip(), texts, folder)
    model = TowersModel(towers, config.wanted()).to(config.device)
    towers.requires_grad_(config.trained == "full")
    return model


def learned_of(model: TowersModel) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; those that no head reaches are left out."""
    unused = ("towers.clip.text_projection", "towers.clip.visual.proj", "towers.clip.logit_scale")
    named = model.named_parameters()
    return {n: p for n, p in named if p.requires_grad and not n.startswith(unused)}


# --- figures -------------------------------------------------------------------------------------


def values_of(judge: TowersJudge, rows: Sequence[Judgement]) -> list[list[float]]:
    """The raw values of a judge for the pictures of each row."""
    samples = [sample for row in rows for sample in row.samples()]
    raw = iter([score.parts["raw"] for score in judge.score(samples)])
    return [[next(raw) for _ in row.images] for row in rows]


def agreement(judges: Mapping[str, TowersJudge], held: Sequence[Judgement]) -> dict[str, float]:
    """`dev/<axis>/accuracy`: share of the annotators' comparisons, ties apart, that a judge orders
    as they do.
    """
    out = {}
    for axis, judge in judges.items():
        rows = [row for row in held if row.axis == axis and row.kind != "point"]
        right = [
            float((values[i] > values[j]) == (preference > 0.5))
            for row, values in zip(rows, values_of(judge, rows), strict=True)
            for i, j, preference in row.pairs()
            if preference != 0.5
        ]
        if right:
            out[f"dev/{axis}/accuracy"] = float(np.mean(right))
    return out


def calibrated(judge: TowersJudge, held: Sequence[Judgement]) -> TowersJudge:
    """The judge with a calibration fitted to ratings and a temperature fitted to comparisons."""
    points = [row for row in held if row.axis == judge.axis and row.kind == "point"]
    lists = [row for row in held if row.axis == judge.axis and row.kind != "point"]
    raw = np.array([values[0] for values in values_of(judge, points)])
    rating = np.array([(r.ratings[0] - r.low) / (r.high - r.low) for r in points])
    card = replace(judge.card, calibration=fit_calibration(raw, rating))
    gaps, labels = [], []
    for row, values in zip(lists, values_of(judge, lists), strict=True):
        value = [card.calibration(v) for v in values]
        for i, j, preference in row.pairs():
            gaps.append(value[i] - value[j])
            labels.append(preference)
    if gaps:
        temperature = fit_temperature(np.array(gaps), np.array(labels))
        card = replace(card, temperature=temperature)
    judge.card = card
    return judge
