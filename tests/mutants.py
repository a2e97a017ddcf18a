"""`make mutants`: break one line at a time and see the test that guards it go red.

tests/mutants.yaml is a list of {name, file, old, new, test}: in `file`, the text `old` (which
occurs once) is replaced by `new`, and the pytest node `test` must then fail. Runs in a temporary
copy of the working tree; names as arguments run only those. Ends with 1 if a mutant survives, a
patch no longer applies, or a named test fails on the unbroken tree or cannot be run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".yaml")
SECONDS = 600  # most that one test may take


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken line."""

    name: str
    file: str  # from the root of the tree
    old: str  # occurs exactly once in the file
    new: str
    test: str  # pytest node id that must go red


def read(path: Path = LIST) -> list[Mutant]:
    """The mutants of a file. Raises TypeError on missing or unknown keys."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Mutant(**{key: str(value) for key, value in entry.items()}) for entry in entries]


def mutate(mutant: Mutant, source: str) -> str:
    """`source` with the line broken. Raises ValueError if the patch does not apply."""
    count = source.count(mutant.old)
    if count != 1 or mutant.old == mutant.new:
        raise ValueError(
            f"{mutant.name}: expected `old` once in {mutant.file}, found it {count} times: "
            f"bring tests/mutants.yaml up to date"
        )
    return source.replace(mutant.old, mutant.new)


def copy_tree(target: Path) -> None:
    """Copy tracked and untracked files, without ignored ones, to `target`."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(tree: Path, nodes: list[str]) -> tuple[int, str]:
    """Exit code of pytest (0 green, 1 red, else it could not run) and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *nodes]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {SECONDS} s"
    return done.returncode, done.stdout + done.stderr


def judge(tree: Path, mutant: Mutant) -> tuple[str, str]:
    """'killed', 'survived' or 'broken', and the output that shows why."""
    path = tree / mutant.file
    source = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutate(mutant, source), encoding="utf-8")
        code, output = run_tests(tree, [mutant.test])
    except ValueError as error:
        return "broken", str(error)
    finally:
        path.write_text(source, encoding="utf-8")
    return {0: "survived", 1: "killed"}.get(code, "broken"), output


def main(names: list[str]) -> int:
    """Judge the named mutants, or all. Returns the exit code."""
    mutants = [m for m in read() if not names or m.name in names]
    if not mutants:
        print(f"no mutant is called {', '.join(names)}", file=sys.stderr)
        return 1
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_tree(Path(folder))
        code, output = run_tests(Path(folder), sorted({m.test for m in mutants}))
        if code != 0:
            print(f"{output}\nthe tests must be green before a line is broken", file=sys.stderr)
            return 1
        for mutant in mutants:
            start = time.perf_counter()
            verdict, output = judge(Path(folder), mutant)
            print(f"{verdict:<9} {mutant.name}  {time.perf_counter() - start:.0f} s", flush=True)
            if verdict != "killed":
                bad += 1
                print(output, file=sys.stderr)
    print(f"{len(mutants) - bad} of {len(mutants)} killed")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
