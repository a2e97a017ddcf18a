"""The programs of `rlhf`: their names, one line of help, examples, and where they are.

A program is declared here by its name; what its module must offer is said in `cli.py`. Modules are
imported when they are chosen, so this file loads no library.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Program:
    """One line of the command table; see `pipelines.cli`."""

    name: str  # "align", or "bench step" for a verb
    help: str
    examples: tuple[str, ...]
    positional: str | None = None
    resumable: bool = False
    module: str | None = None  # in this folder; by default the first word of the name
    general: bool = False  # of verbs: whose are configurations that name no verb

    @property
    def folder(self) -> str:
        """First folder of its configurations."""
        return self.name.split()[0]

    @property
    def verb(self) -> str | None:
        return self.name.split()[1] if " " in self.name else None

    def attribute(self, name: str) -> Any:
        """`Config`, `run`, `plan` or `summarise` of the program, None if it has no such thing."""
        module = importlib.import_module(f"pipelines.{self.module or self.folder}")
        if self.verb:
            forms = {"Config": f"{self.verb.title()}Config", "run": self.verb}
            name = forms.get(name, f"{name}_{self.verb}")
        return getattr(module, name, None)


PROGRAMS = (
    Program(
        "align",
        "train a policy on the scores of judges",
        (
            "rlhf align --config align/scenes",
            "rlhf align --config align/scenes learner.lr=1e-4 --dry-run",
            "rlhf align --resume runs/scenes",
        ),
        resumable=True,
    ),
    Program(
        "curate",
        "keep the prompts whose pictures differ in reward",
        (
            "rlhf curate --config curate/scenes",
            "rlhf align --config align/scenes prompts.source=runs/curated/kept.jsonl",
            "rlhf curate --resume runs/curated threshold=0.2",
        ),
        resumable=True,
    ),
    Program(
        "submit",
        "run a command as a job of a Ray cluster",
        ("rlhf submit 'align --config align/scenes runs=/shared/runs' address=http://head:8265",),
        positional="command",
    ),
    Program(
        "generate",
        "make pictures from prompts",
        ('rlhf generate prompt="a red circle" model=scenes', "rlhf generate model=runs/scenes"),
        positional="prompt",
    ),
    Program(
        "evaluate",
        "measure a model or run on held-out prompts",
        (
            "rlhf evaluate runs/scenes",
            "rlhf evaluate runs/scenes --json",
            "rlhf evaluate runs/fewstep teacher=scenes baseline=scenes judges='[scenes/fidelity]'",
        ),
        positional="model",
    ),
    Program(
        "evaluate codec",
        "measure an autoencoder beside others and PCA",
        (
            "rlhf evaluate codec scenes",
            "rlhf evaluate codec runs/vae others='[scenes, models/flux/vae]' --config codec",
        ),
        positional="model",
        module="codecs",
    ),
    Program(
        "reward collect",
        "make judgements of scenes: pictures, ratings and ranks",
        ("rlhf reward collect --config reward/collect", "rlhf reward collect --dry-run"),
        module="reward_collect",
    ),
    Program(
        "reward towers",
        "teach small image and text towers to see the scenes world",
        ("rlhf reward towers --config reward/towers", "rlhf reward towers --resume runs/towers"),
        resumable=True,
        module="reward_towers",
    ),
    Program(
        "reward train",
        "train reward models on judgements",
        (
            "rlhf reward train --config reward/fidelity",
            "rlhf reward train --config reward/scenes data=runs/judgements",
            "rlhf reward train --resume runs/judges",
        ),
        resumable=True,
        general=True,
    ),
    Program(
        "reward evaluate",
        "measure judges: accuracy, calibration, canaries, biases",
        (
            "rlhf reward evaluate judges='[oracle/fidelity]' data=judgements",
            "rlhf reward evaluate --config reward/evaluate --dry-run",
        ),
        module="reward_evaluate",
    ),
    Program(
        "report",
        "write report.html and plots of a run",
        ("rlhf report runs/scenes",),
        positional="run",
    ),
    Program(
        "export",
        "write the weights of a run where stock diffusers reads them",
        ("rlhf export runs/scenes out=my-lora",),
        positional="run",
    ),
    Program("assets", "list the models that are shipped", ("rlhf assets", "rlhf assets --json")),
    Program(
        "bench step",
        "time one iteration against the forwards and backwards it needs",
        ("rlhf bench step --config bench/step", "rlhf bench step --config bench/step --json"),
    ),
    Program("bench scaling", "time rollouts with one worker and several", ("rlhf bench scaling",)),
    Program(
        "reward serve",
        "serve judges over HTTP",
        (
            "rlhf reward serve --config reward/serve",
            "rlhf reward serve 'judges={fidelity: oracle/fidelity}' port=8001",
        ),
        module="reward_serve",
    ),
    Program(
        "data",
        "filter a data set for pretraining",
        (
            "rlhf data --config data/stage1 source.path='shards/*.tar'",
            "rlhf data --config data/stage1 --dry-run",
            "rlhf data --resume runs/stage1",
        ),
        resumable=True,
        module="prepare",
    ),
    Program(
        "reward calibrate",
        "weigh judges by category on a frozen policy's own pictures",
        (
            "rlhf reward calibrate --config reward/calibrate",
            "rlhf align --config align/scenes weights_from=runs/calibrate/weights.yaml",
        ),
        module="reward_calibrate",
    ),
    Program(
        "distill fewstep",
        "distil a guided teacher into a student of a few steps without guidance",
        (
            "rlhf distill fewstep --config distill/fewstep",
            "rlhf distill fewstep --config distill/fewstep_dmd",
            "rlhf distill fewstep --resume runs/fewstep",
        ),
        resumable=True,
    ),
    Program(
        "distill opd",
        "distil guided teachers on the student's own trajectories",
        ("rlhf distill opd --config distill/opd", "rlhf distill opd --resume runs/opd"),
        resumable=True,
    ),
    Program(
        "vae",
        "train the image codec of the scenes base",
        ("rlhf vae --config vae/scenes",),
        resumable=True,
    ),
    Program(
        "pretrain",
        "train a condition encoder, or a transformer through phases and stages",
        ("rlhf pretrain --config pretrain/scenes",),
        resumable=True,
    ),
)
