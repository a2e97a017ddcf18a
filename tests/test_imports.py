"""Rooms import in one direction, rewards <- rlhf <- pipelines, and Ray lives in one folder."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("rewards", "rlhf", "pipelines")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
MAY_COMBINE = {"cli", "flywheel"}  # programs that may import or run other programs


def imported(source: str, package: str) -> set[str]:
    """Dotted modules that a file of `package` imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            head = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            found |= {head} | {f"{head}.{alias.name}" for alias in node.names}
    return found


def faults(path: Path, source: str) -> list[str]:
    """What a file at `path` (from the root) imports against the rules."""
    modules = imported(source, ".".join(path.parent.parts))
    room = path.parts[0]
    higher = ROOMS[ROOMS.index(room) + 1 :]
    wrong = [m for m in modules if m.split(".")[0] in higher]
    if path.parts[:2] != ("rlhf", "cluster"):
        wrong += [m for m in modules if m.split(".")[0] == "ray"]
    if room == "pipelines" and len(path.parts) == 2 and path.stem not in MAY_COMBINE:
        programs = {p.stem for p in (ROOT / "pipelines").glob("*.py")} - {"__init__"}
        wrong += [m for m in modules if m.startswith("pipelines.") and m.split(".")[1] in programs]
    return sorted(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path):
    assert faults(path.relative_to(ROOT), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path, source, wrong",
    [
        ("rewards/a.py", "def f():\n    from rlhf.run import Run", ["rlhf.run", "rlhf.run.Run"]),
        ("rewards/a.py", "import pipelines.cli", ["pipelines.cli"]),
        ("rlhf/a.py", "from pipelines import cli", ["pipelines", "pipelines.cli"]),
        ("rlhf/loop.py", "import ray", ["ray"]),
        ("rlhf/cluster/ray.py", "import ray", []),
        ("rlhf/losses/a.py", "from .. import schedule\nfrom rewards import types", []),
        ("pipelines/align.py", "from . import cli", ["pipelines.cli"]),
        ("pipelines/align.py", "from rlhf import run\nimport pipelines", []),
        ("pipelines/cli.py", "from pipelines import report", []),
    ],
)
def test_the_rule_sees_forbidden_imports(path, source, wrong):
    assert faults(Path(path), source) == wrong


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in FILES}
    assert [str(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_the_command_line_loads_no_library():
    code = (
        "import sys, pipelines.cli as cli\n"
        "cli.overview(); [cli.parser_of(p).format_help() for p in cli.PROGRAMS]\n"
        "print(sorted({'torch', 'numpy', 'rlhf', 'rewards', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"
