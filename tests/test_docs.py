"""The pages in docs/ are run: files they show are written, their Python and commands executed, at
toy size.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines.cli import main
from rlhf.models.tiny import random_pipeline

DOCS = Path(__file__).parents[1] / "docs"
SMALL = [
    "iterations=1",
    "group_size=2",
    "rollout.steps=2",
    "loss.updates_per_rollout=1",
    "evaluation.steps=2",
    "evaluation.per_prompt=1",
    "cluster.kind=local",
    "cluster.learner_threads=1",
]
PAGES = (
    "own_reward.md",
    "panel.md",
    "own_prompts.md",
    "own_base.md",
    "sd3.md",
    "data.md",
    "codecs.md",
    "pretraining.md",
    "distillation.md",
    "serving.md",
    "reward_data.md",
    "reward_models.md",
    "reward_benchmark.md",
    "algorithms.md",
)


def test_every_trap_of_rewards_names_tests_that_exist() -> None:
    """The table of docs/reward_models.md; `::name` alone is of the file before it."""
    rows = re.findall(r"^\| (T\d+) .*?\| (.*) \|$", (DOCS / "reward_models.md").read_text(), re.M)
    assert [name for name, _ in rows] == [f"T{i}" for i in range(1, 22)]
    file = ""
    for trap, cell in rows:
        named = re.findall(r"`([\w/]*?(?:test_\w+\.py)?)::(\w+)`", cell)
        assert named or "the same" in cell, trap
        for given, test in named:
            file = given or file
            path = DOCS.parent / (file if "/" in file else f"tests/rewards/{file}")
            assert f"def {test}(" in path.read_text(), f"{trap}: {path} has no {test}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_pipeline().save_pretrained("tiny")
    blocks = re.findall(r"```(\w+)\n(.*?)```", (DOCS / page).read_text(), flags=re.S)
    ran = 0
    for language, text in blocks:
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            Path(first.removeprefix("# file: ")).write_text(rest)
        elif first == "# run":
            exec(compile(rest, page, "exec"), {})
            ran += 1
        elif language == "bash":
            words = shlex.split(text)
            assert words[0] == "rlhf"
            ran += 1
            if words[1] != "align":
                assert main(words[1:]) == 0
                continue
            given = {w.split("=")[0] for w in words}
            extra = [s for s in SMALL if s.split("=")[0] not in given]
            extra += [] if "policy.model" in given else ["policy.model=tiny"]
            if "prompts.source" not in given:
                extra += [
                    "prompts.count=4",
                    "prompts_per_iteration=2",
                    "evaluation.prompts.count=2",
                ]
            assert main([*words[1:], *extra]) == 0
            name = next(w for w in words if w.startswith("name=")).removeprefix("name=")
            assert (tmp_path / "runs" / name / "report.html").is_file()
    assert ran >= 1


def test_every_trap_is_listed_and_the_tests_it_names_exist() -> None:
    page = (DOCS / "traps.md").read_text()
    rows = re.findall(r"^\| ([TQS]\d+) \| (.*)$", page, flags=re.M)
    names = [
        f"{kind}{i}" for kind, last in (("T", 30), ("Q", 9), ("S", 8)) for i in range(1, last + 1)
    ]
    assert [name for name, _ in rows] == names
    for name, row in rows:
        nodes = re.findall(r"`(tests/\S+)::(\w+)`", row)
        assert nodes, f"{name} names no test"
        for path, test in nodes:
            assert f"def {test}(" in (DOCS.parent / path).read_text(), f"{name}: {path}::{test}"
