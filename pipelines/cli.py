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

Declaring a program, in `programs.py`, takes its name, one line of help and examples. `positional`
names the field that a bare argument sets (`rlhf report runs/a` is `rlhf report run=runs/a`).
Modules are imported when chosen, so `rlhf --help` loads no library. Programs raise; only this file
prints errors and ends the process:

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
import json
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.programs import PROGRAMS, Program

VERSION = "0.1.0"


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
