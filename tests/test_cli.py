import inspect
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from pipelines import cli
from rewards.errors import JudgeError
from rlhf.errors import CheckpointError, ConfigError, Interrupted, PromptError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Config:
    run: str = ""
    n: int = 2


def run(config: Config, resume: Path | None = None) -> dict:
    print("noise of the program")
    n = {"before": 0.25, "after": 0.5, "gain": 0.25, "low": 0.125, "high": 0.375, "n": config.n}
    return {
        "program": "toy",
        "seconds": 1.5,
        "metrics": {"gain": n, "loss": {"value": 1.0}},
        "resume": str(resume),
    }


@pytest.fixture
def toy(monkeypatch):
    """A program as a module would be, declared like the others."""
    module = ModuleType("pipelines.toy")
    module.Config, module.run, module.plan = Config, run, lambda config: f"{config.n} steps"
    module.StepConfig, module.step = Config, lambda config: {"program": "toy step", "metrics": {}}
    monkeypatch.setitem(sys.modules, "pipelines.toy", module)
    toy = cli.Program("toy", "a toy", ("rlhf toy",), positional="run", resumable=True)
    verb = cli.Program("toy step", "a verb", ("rlhf toy step",))
    monkeypatch.setattr(cli, "PROGRAMS", (*cli.PROGRAMS, toy, verb))
    return module


def test_metrics_are_printed_as_a_table(toy, capsys):
    assert cli.main(["toy", "n=64"]) == 0
    out = capsys.readouterr().out
    assert "gain     0.25 -> 0.5 (+0.25)  95% [0.125, 0.375]  n=64" in out
    assert "loss     1" in out and "seconds  1.5" in out


def test_json_is_the_only_thing_on_stdout(toy, capsys):
    cli.main(["toy", "--json", "n=3"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["metrics"]["gain"]["n"] == 3
    assert captured.err == "noise of the program\n"


def test_dry_run_prints_the_resolved_config_and_the_plan_and_starts_nothing(toy, capsys):
    cli.main(["toy", "n=7", "--dry-run"])
    assert capsys.readouterr().out == "run: ''\nn: 7\n\n7 steps\n"
    cli.main(["toy", "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out) == {"config": {"run": "", "n": 2}, "plan": "2 steps"}


def test_a_bare_argument_sets_the_positional_field(toy, capsys):
    cli.main(["toy", "runs/a b", "--dry-run", "n=7", "--json"])
    assert json.loads(capsys.readouterr().out)["config"] == {"run": "runs/a b", "n": 7}


def test_a_verb_uses_its_own_names(toy, capsys):
    cli.main(["toy", "step", "--json"])
    assert json.loads(capsys.readouterr().out)["program"] == "toy step"


def test_resume_reads_the_configuration_of_the_run(toy, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("n: 9\n")
    cli.main(["toy", "--resume", str(tmp_path), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["resume"] == str(tmp_path) and result["metrics"]["gain"]["n"] == 9


@pytest.mark.parametrize(
    "error, code",
    [
        (CheckpointError("disk is full"), 1),
        (JudgeError("judge is down"), 1),
        (FileNotFoundError("no such file"), 1),
        (ConfigError("wrong flag"), 2),
        (PromptError("no prompts"), 2),
        (Interrupted("stopped at step 3"), 3),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda x: type(x).__name__,
)
def test_errors_become_one_paragraph_and_an_exit_code(toy, capsys, error, code):
    def fail(config):
        raise error

    toy.run = fail
    with pytest.raises(SystemExit) as ended:
        cli.main(["toy"])
    err = capsys.readouterr().err
    assert ended.value.code == code
    assert str(error) in err and "Traceback" not in err and err.count("\n") == 1


def test_debug_shows_the_traceback(toy, capsys):
    def fail(config):
        raise CheckpointError("disk is full")

    toy.run = fail
    with pytest.raises(SystemExit):
        cli.main(["toy", "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_keeps_its_traceback(toy):
    def fail(config):
        raise ZeroDivisionError

    toy.run = fail
    with pytest.raises(ZeroDivisionError):
        cli.main(["toy"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["tyo"], "did you mean `rlhf toy`"),
        (["zzz"], "write one of: align"),
        (["bench"], "needs a verb, write one of: bench step"),
        ([], ""),
        (["toy", "a", "b"], "expected key=value, got 'b'"),
        (["toy", "--wrong"], "unrecognized arguments: --wrong"),
        (["toy", "m=3"], "there is no key 'm'"),
        (["toy", "n=x"], "'n' expects int, got 'x'"),
        (["toy", "--config", "nowhere"], "no configuration is called 'nowhere'"),
        (["toy", "--resume", "a", "--config", "b"], "write --config or --resume"),
        (["toy", "--resume", "nowhere"], "nowhere/config.yaml"),
    ],
)
def test_wrong_usage_ends_with_2(toy, capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("program", cli.PROGRAMS, ids=lambda p: p.name)
def test_help_shows_the_options_and_examples(program, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*program.name.split(), "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--dry-run" in out
    assert all(example in out for example in program.examples)
    assert ("--resume" in out) == program.resumable


@pytest.mark.parametrize("program", cli.PROGRAMS, ids=lambda p: p.name)
def test_a_declared_program_keeps_the_convention(program):
    fields = program.attribute("Config").__dataclass_fields__
    assert program.positional is None or program.positional in fields
    parameters = inspect.signature(program.attribute("run")).parameters
    assert ("resume" in parameters) == program.resumable


def test_help_answers_at_once():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert all(program.name in done.stdout for program in cli.PROGRAMS)
    assert time.perf_counter() - start < 0.5


def test_version_is_the_one_of_the_package():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == cli.VERSION
    assert project["scripts"] == {"rlhf": "pipelines.cli:main"}
