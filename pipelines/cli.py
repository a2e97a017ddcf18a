"""`rlhf <program>`: one command over the programs in this folder.

A program is a module `pipelines/<program>.py` with

    Config                  a frozen dataclass, filled by `rlhf.config.load` from --config and
                            key=value
    run(config) -> result   does the work; the result is JSON, as `rlhf.run.report` makes it:
                            {"program", "seconds", "metrics": {...}, ...}; {} prints nothing

and, where it has a use for them,

    run(config, resume=Path)    if declared `resumable`: continue that run (config: its config.yaml)
    plan(config) -> str         what --dry-run prints below the resolved configuration
    summarise(result) -> str    what is printed without --json; by default a table of the metrics

A program with verbs (`bench step`) has, for each, `StepConfig`, `step`, `plan_step`,
`summarise_step`, and its configurations are `configs/bench/step.yaml` and
`configs/bench/step_<name>.yaml`. Without verbs they are `configs/<program>/<name>.yaml`, and so are
those of the verb that is declared `general`.

Declaring a program takes its name, one line of help and examples. `positional` names the field that
a bare argument sets (`rlhf report runs/a` is `rlhf report run=runs/a`). Modules are imported when
chosen, so `rlhf --help` loads no library. Programs raise; only this file prints errors and ends the
process:

    0    done
    1    failed while running (AlignError, RewardError, OSError)
    2    the usage, configuration or prompt set is wrong
    3    stopped by a signal after a checkpoint; `--resume RUN` continues
    130  interrupted from the keyboard, nothing to resume

Other exceptions are faults of this package and keep their traceback. With --json the result is the
one object on stdout and everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Program:
    """One line of the command table; see the module's docstring."""

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
            "rlhf distill fewstep --config distill/fewstep_dmd start=runs/fewstep",
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


def overview() -> str:
    """The text of `rlhf --help`."""
    width = max(len(p.name) for p in PROGRAMS)
    lines = [f"  {p.name:<{width}}  {p.help}" for p in PROGRAMS]
    return "\n".join(
        [
            "usage: rlhf PROGRAM [--config NAME] [key.sub=value ...]",
            "",
            "RL alignment of flow-matching image models.",
            "",
            *lines,
            "",
            "rlhf PROGRAM --help shows the options and examples of one program.",
        ]
    )


def config_program(name: str) -> Program | None:
    """The program that the configuration `folder/stem` belongs to, None if no program claims it."""
    folder, _, stem = name.partition("/")
    for verb in (stem.split("_")[0], None):  # `evaluate codec` before `evaluate`
        for program in PROGRAMS:
            if program.folder == folder and program.verb == verb:
                return program
    return next((p for p in PROGRAMS if p.folder == folder and p.general), None)


def choose(argv: Sequence[str]) -> tuple[Program, list[str]]:
    """The program `argv` names and the arguments left for it. Raises SystemExit like argparse."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        print(f"rlhf {VERSION}")
        raise SystemExit(0)
    table = {p.name: p for p in PROGRAMS}
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in table:
            return table[name], list(argv[words:])
    verbs = [p.name for p in PROGRAMS if p.folder == argv[0]]
    if verbs:
        print(f"rlhf: `{argv[0]}` needs a verb, write one of: {', '.join(verbs)}", file=sys.stderr)
    else:
        near = difflib.get_close_matches(argv[0], list(table), n=1)
        hint = f"did you mean `rlhf {near[0]}`?" if near else f"write one of: {', '.join(table)}"
        print(f"rlhf: there is no program `{argv[0]}`: {hint}", file=sys.stderr)
    raise SystemExit(2)


def parser_of(program: Program) -> argparse.ArgumentParser:
    """The options of one program. Built from its declaration alone, so --help imports nothing."""
    parser = argparse.ArgumentParser(
        prog=f"rlhf {program.name}",
        description=program.help[0].upper() + program.help[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in program.examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    bare = f"{program.positional.upper()} sets {program.positional}; " if program.positional else ""
    metavar = "KEY=VALUE"
    add("items", nargs="*", metavar=metavar, help=f"{bare}key.sub=value sets any field")
    add("--config", metavar="NAME", help=f"{program.folder}/NAME, NAME, or a path to a YAML file")
    add("--dry-run", action="store_true", help="print the resolved configuration and stop")
    add("--json", action="store_true", help="print one JSON object on stdout")
    add("--debug", action="store_true", help="show the traceback of an error")
    if program.resumable:
        add("--resume", metavar="RUN", help="continue a run from its last complete checkpoint")
    return parser


def overrides_of(program: Program, items: Sequence[str]) -> list[str]:
    """Overrides as `key=value`, with the bare argument under its name. Raises SystemExit."""
    bare = [item for item in items if not _is_override(item)]
    if len(bare) > (1 if program.positional else 0):
        print(
            f"rlhf {program.name}: expected key=value, got '{bare[-1]}': see rlhf {program.name} "
            "-h",
            file=sys.stderr,
        )
        raise SystemExit(2)
    named = [f"{program.positional}={json.dumps(item)}" for item in bare]
    return named + [item for item in items if _is_override(item)]


def _is_override(item: str) -> bool:
    key, equals, _ = item.partition("=")
    return bool(equals) and " " not in key


def execute(program: Program, options: argparse.Namespace) -> dict[str, Any]:
    """Load the configuration and run, or only plan. Raises what the program raises."""
    from rlhf import config as config_module
    from rlhf.errors import ConfigError

    resume = getattr(options, "resume", None)
    if resume and options.config:
        raise ConfigError("write --config or --resume: a resumed run has its own config.yaml")
    source = str(Path(resume) / "config.yaml") if resume else options.config
    overrides = overrides_of(program, options.items)
    config = config_module.load(program.attribute("Config"), source, overrides, program.folder)
    if options.dry_run:
        plan = program.attribute("plan")
        text = plan(config) if plan else ""
        return {"config": config_module.to_dict(config), "plan": text}
    run: Callable[..., Mapping[str, Any]] = program.attribute("run")
    return dict(run(config, resume=Path(resume)) if resume else run(config))


def show(program: Program, options: argparse.Namespace, result: Mapping[str, Any]) -> str:
    """The text to print for a result."""
    if options.json:
        return json.dumps(result, allow_nan=False, ensure_ascii=False)
    if options.dry_run:
        import yaml

        return f"{yaml.safe_dump(result['config'], sort_keys=False)}\n{result['plan']}".rstrip()
    summarise = program.attribute("summarise")
    return summarise(result) if summarise else table(result)


def table(result: Mapping[str, Any]) -> str:
    """Metrics of a result, one per line: value or before -> after, 95% interval, count."""
    metrics = result.get("metrics", {})
    width = max(map(len, [*metrics, "seconds"]))
    lines = []
    for name, metric in metrics.items():
        if "value" in metric:
            text = f"{metric['value']:.4g}"
        else:
            text = f"{metric['before']:.4g} -> {metric['after']:.4g} ({metric['gain']:+.4g})"
        if "low" in metric:
            text += f"  95% [{metric['low']:.4g}, {metric['high']:.4g}]"
        if "n" in metric:
            text += f"  n={metric['n']}"
        lines.append(f"{name:<{width}}  {text}")
    if "seconds" in result:
        lines.append(f"{'seconds':<{width}}  {result['seconds']:.1f}")
    return "\n".join(lines)


@contextlib.contextmanager
def _errors(program: Program, debug: bool) -> Iterator[None]:
    """Turn the errors a user can act on into one paragraph and an exit code; others pass."""
    from rewards.errors import RewardConfigError, RewardError
    from rlhf.errors import ConfigError, Interrupted, PromptError

    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (RewardError, OSError) as error:
        if debug:
            traceback.print_exc()
        else:
            text = f"rlhf {program.name}: {error}"
            print(
                textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False),
                file=sys.stderr,
            )
        wrong = isinstance(error, ConfigError | PromptError | RewardConfigError)
        raise SystemExit(3 if isinstance(error, Interrupted) else 2 if wrong else 1) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns 0; every other ending raises SystemExit with its code."""
    program, rest = choose(sys.argv[1:] if argv is None else argv)
    options = parser_of(program).parse_intermixed_args(rest)
    with _errors(program, options.debug):
        aside = contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext()
        with aside:
            result = execute(program, options)
        if result:  # ranks but the first have none
            print(show(program, options, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
