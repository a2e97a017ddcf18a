"""`rlhf reward train`: reward models from judgements of people.

One run trains the heads of one judge or of several, on two towers that they share (or, of family
`vlm`, a vision-language model through LoRA); see `rewards.training` for data, losses and heads. At
the end every judge is a folder under `<run>/judges` that `judges: [...]` of an alignment run, `rlhf
reward evaluate` and `rlhf reward serve` take as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.data import recall
from rewards.errors import DataError
from rewards.trained import KINDS, kind_of
from rewards.training.collate import collate
from rewards.training.heads import HeadConfig
from rewards.training.objective import REGION, Objective, RewardLoss
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.reward_model import Models, NewTowers, VlmConfig, agreement, finish, open_models
from rlhf.run import Run
from rlhf.training import Average, Pace, open_run, train as train_loop


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
    family: Literal["towers", "vlm"] = "towers"
    towers: str = "scenes"
    trained: Literal["full", "lora", "heads"] = "heads"
    rank: int = 8
    new: NewTowers = field(default_factory=NewTowers)
    vlm: VlmConfig = field(default_factory=VlmConfig)
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
        if min(self.batch, self.held, self.rank) < 1:
            raise ConfigError("batch, held and rank: expected at least 1")
        if not self.towers and self.trained != "full":
            raise ConfigError(
                f"trained={self.trained}: fresh towers know nothing: write trained=full, or name"
                " trained towers"
            )
        if self.family == "vlm" and len(self.judges) > 1:
            raise ConfigError("family vlm: expected one judge a run, each has a rubric of its own")

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
    axes = list(config.wanted())
    groups, dev = (Groups(config.data, split, axes) for split in ("train", "dev"))
    no_leak(groups, dev)
    with session(config.device) as ranks:
        return _train(config, groups, dev, open_run(config, "reward train", resume, ranks), ranks)


def _train(
    config: TrainConfig, groups: Groups, dev: Groups, home: Run, ranks: Ranks
) -> dict[str, Any]:
    began = time.monotonic()
    models = open_models(config, texts_of(groups), home.root / "towers")
    objective = Objective(axes_of(config), config.loss)
    words = recall.RecallObjective(models.model, config.recall) if config.recall.batch else None
    learned = models.trained() | {f"loss.{n}": p for n, p in objective.named_parameters()}
    if words is not None:
        learned |= {f"recall.{n}": p for n, p in words.named_parameters()}
    held = [dev[i] for i in range(min(config.held, len(dev)))]

    def loss_of(batch: tuple[int, list[list[Judgement]]]) -> tuple[Tensor, Mapping[str, float]]:
        step, prompts = batch
        rows = [judgement for group in prompts for judgement in group]
        loss, metrics = objective(models.model, collate(rows))
        if words is not None:
            again = words(step, config.seed)
            loss, metrics["loss/recall"] = loss + config.recall.weight * again, float(again.detach())
        return loss, metrics

    def preview(step: int, average: Average | None) -> dict[str, float]:
        with in_place(learned, average):
            return agreement(models.model, held)

    models.model.train()
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
    figures = finish(config, models, held, home.root / "judges")
    return home.write_result(time.monotonic() - began, figures)
