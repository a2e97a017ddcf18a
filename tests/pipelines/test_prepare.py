"""`rlhf data`: what is kept and counted, and that a killed run ends as an unkilled one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipelines import prepare
from pipelines.cli import main
from pipelines.data.operators import OperatorConfig
from pipelines.data.sift import Entry, Sifter, Tally, decide, unit_folder
from rlhf.cluster.dataflow import flow
from rlhf.config import build, load, save_yaml
from rlhf.errors import ClusterError, ConfigError, DataError
from tests.pipelines.pictures import folder, png, shards

ROOT = Path(__file__).parents[2]
OPERATORS = [
    {"use": "files", "low": 1},
    {"use": "same_file"},
    {"use": "min_side", "low": 32},
    {"use": "same_look", "distance": 2},
    {"use": "entropy", "low": 3},
    {"use": "safety", "low": 0.5},
    {"use": "balance", "column": "category", "cap": 7},
]


def config(tmp_path, path=None, **changes):
    source = changes.pop("source", {"path": f"{path or tmp_path / 'shards'}/*.tar"})
    known = {"name": "a", "runs": str(tmp_path / "runs"), "max_broken": 0.2, "batch": 4}
    known |= {"source": source, "operators": OPERATORS}
    return build(prepare.Config, known | changes)


def rows(run):
    files = sorted(str(p) for p in (run / "data").glob("*.parquet"))
    return [
        row for f in files for row in datasets.Dataset.from_parquet(f, cache_dir=str(run / "cache"))
    ]


def written(run):
    return {p.name: p.read_bytes() for p in sorted((run / "data").iterdir())}


def outcome(run):
    """All that must not depend on kills and workers."""
    result = json.loads((run / "result.json").read_text())
    return written(run), {key: result[key] for key in ("metrics", "operators", "broken")}


def test_a_set_is_filtered_in_order_and_counted(tmp_path):
    shards(tmp_path / "shards")  # 24 pictures: 0, 5, 10, 15, 20 alike, 3, 10, 17 small
    result = prepare.run(config(tmp_path))
    assert result["broken"] == {"broken picture": 1, "empty caption": 1}
    removed = {row["operator"]: (row["seen"], row["removed"]) for row in result["operators"]}
    assert removed["files"] == (23, 1)  # 13; 8 had no caption and was no record
    assert removed["same_file"] == (22, 3)  # 5, 15, 20 are 0 again; 10 is smaller
    assert removed["min_side"] == (19, 3)
    assert removed["same_look"] == (16, 0) and removed["entropy"] == (16, 0)
    assert removed["safety"] == (16, 0)
    assert removed["balance"] == (16, 2)  # 8 of each category, 7 may stay
    kept = rows(tmp_path / "runs/a")
    assert len(kept) == result["metrics"]["data/kept"]["value"] == 14
    numbers = [int(row["id"].split("/")[1]) for row in kept]
    assert numbers == sorted(numbers) and not {3, 5, 8, 10, 13, 15, 17, 20} & set(numbers)
    assert kept[0]["image"].size == (64, 48) and kept[0]["text"] == "number 0 of many"
    assert json.loads(kept[0]["columns"]) == {"category": "a"}
    assert json.loads(kept[0]["scores"]).keys() == {"files", "min_side", "entropy"}
    assert not (tmp_path / "runs/a/work").exists()
    text = prepare.summarise(result)
    assert "off: no scorer" in text and "14 of 24 kept, 2 broken" in text


def test_what_a_set_wide_operator_removes_does_not_depend_on_later_ones():
    """A duplicate claims its place before a later operator removes it, as when applied in turn."""
    first, then = build(OperatorConfig, {"use": "same_file"}), build(OperatorConfig, OPERATORS[2])
    entries = (
        Entry(until=1, row=None, keys=("x",)),
        Entry(until=2, row=0, keys=("x",)),
        Entry(until=2, row=1, keys=("y",)),
    )
    got = decide([first, then], [Tally(broken={}, entries=entries)])
    assert (got.kept, got.seen, got.removed) == (((1,),), (3, 2), (1, 1))
    early = (Entry(until=0, row=None, keys=()), *entries[1:])
    got = decide(
        [then, first], [Tally(broken={}, entries=early[:1]), Tally(broken={}, entries=early[1:])]
    )
    assert (got.kept, got.seen, got.removed) == (((), (0, 1)), (3, 2), (1, 0))
    last = build(OperatorConfig, {"use": "entropy", "low": 3})
    pair = (Entry(until=2, row=None, keys=("x",)), Entry(until=3, row=0, keys=("x",)))
    got = decide([then, first, last], [Tally(broken={}, entries=pair)])
    assert (got.kept, got.seen, got.removed) == (((),), (2, 2, 1), (0, 1, 1))


DEADLY = [
    *OPERATORS[:2],
    {"use": "safety", "low": 0.5, "scorer": "tests.pipelines.pictures:deadly"},
]


def test_a_run_killed_in_a_unit_ends_as_an_unkilled_one(tmp_path, monkeypatch):
    """A real SIGKILL in the third of four shards, in a process of its own."""
    shards(tmp_path / "shards")
    settings = {"operators": DEADLY, "name": "killed"}
    made = config(tmp_path, **settings)
    save_yaml(made, tmp_path / "killed.yaml")
    flag = tmp_path / "flag"
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "data",
        "--config",
        str(tmp_path / "killed.yaml"),
    ]
    env = os.environ | {"DEADLY": str(flag), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = tmp_path / "runs/killed"
    left = sorted(p.name for p in (run / "work").iterdir())
    assert [n for n in left if not n.startswith(".")] == ["000000", "000001"]
    assert any(n.startswith(".000002.tmp") for n in left) and not (run / "result.json").exists()
    monkeypatch.setenv("DEADLY", str(flag))  # it is there now: nobody dies
    untouched = (run / "work/000001/rows.parquet").stat().st_mtime_ns
    sizes = []
    resumed = load(prepare.Config, run / "config.yaml", [], "data")
    original = prepare.write_kept

    def watch(work, index, kept, target):
        sizes.append((work / "000001/rows.parquet").stat().st_mtime_ns)
        original(work, index, kept, target)

    monkeypatch.setattr(prepare, "write_kept", watch)
    prepare.run(resumed, resume=run)
    assert set(sizes) == {untouched}  # finished units were not done again
    prepare.run(config(tmp_path, **(settings | {"name": "whole"})))
    assert outcome(run) == outcome(tmp_path / "runs/whole")
    assert prepare.run(resumed, resume=run)["metrics"] == outcome(run)[1]["metrics"]


def test_a_run_that_ends_while_writing_the_set_continues(tmp_path, monkeypatch):
    shards(tmp_path / "shards")
    made, original, calls = config(tmp_path), prepare.write_kept, []

    def fails_once(work, index, kept, target):
        calls.append(index)
        if len(calls) == 2:
            target.with_name(f".{target.name}.tmp-0").write_bytes(b"half")
            raise OSError("no space left")
        original(work, index, kept, target)

    monkeypatch.setattr(prepare, "write_kept", fails_once)
    with pytest.raises(OSError):
        prepare.run(made)
    run = tmp_path / "runs/a"
    assert len(written(run)) == 2 and not (run / "result.json").exists()
    prepare.run(made, resume=run)
    assert calls == [0, 1, 1, 2, 3]
    monkeypatch.undo()
    prepare.run(config(tmp_path, name="b"))
    assert outcome(run) == outcome(tmp_path / "runs/b")


class DiesOnce(Sifter):
    """Takes its process with it in the middle of unit 1, the first time."""

    def __init__(self, mark: Path, *args: Any) -> None:
        super().__init__(*args)
        self.mark = mark

    def unit(self, index: int) -> Tally:
        if index == 1 and not self.mark.exists():
            self.mark.touch()
            unit_folder(self.work, index).with_name(f".{index:06d}.half").mkdir()
            os._exit(1)
        return super().unit(index)


class Busy:
    def __init__(self, work: Callable[..., Any]) -> None:
        self.work = work

    def go(self, number: int) -> Any:
        return self.work(number)


@pytest.mark.ray
def test_two_workers_keep_what_one_keeps(tmp_path, ray_head):
    shards(tmp_path / "shards")
    prepare.run(config(tmp_path))
    prepare.run(config(tmp_path, name="two", workers=2))
    assert outcome(tmp_path / "runs/two") == outcome(tmp_path / "runs/a")


@pytest.mark.ray
def test_a_worker_that_dies_costs_nothing_but_time(tmp_path, ray_head, monkeypatch):
    shards(tmp_path / "shards")
    prepare.run(config(tmp_path))
    monkeypatch.setattr(prepare, "Sifter", partial(DiesOnce, tmp_path / "died"))
    prepare.run(config(tmp_path, name="two", workers=2))
    assert (tmp_path / "died").exists()
    assert outcome(tmp_path / "runs/two") == outcome(tmp_path / "runs/a")


def test_a_finished_unit_is_not_done_again(tmp_path, monkeypatch):
    shards(tmp_path / "shards")
    made = config(tmp_path)
    sifter = Sifter(made.sifting(), tmp_path)
    first = sifter.unit(0)
    monkeypatch.setattr(sifter, "_sift", lambda items: pytest.fail("read again"))
    assert sifter.unit(0) == first


@pytest.mark.ray
def test_what_a_worker_raises_arrives_as_it_is(tmp_path, ray_head):
    shards(tmp_path / "shards")
    first = sorted((tmp_path / "shards").glob("*.tar"))[0]
    first.write_bytes(first.read_bytes()[:700])
    messages = []
    for workers in (0, 1):
        with pytest.raises(DataError) as caught:
            prepare.run(config(tmp_path, name=f"w{workers}", workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("work", "timeout", "words"),
    [
        (time.sleep, 5.0, "within 5 s, got none"),
        (divmod, 60.0, "a worker failed"),
        (os._exit, 8.0, "within 8 s, got none"),
    ],
)
def test_a_silent_or_broken_worker_is_an_error(ray_head, work, timeout, words):
    with pytest.raises(ClusterError, match=words):
        list(flow(partial(Busy, work), "go", [600, 601], workers=1, timeout=timeout))


def test_the_set_that_was_written_can_be_filtered_again(tmp_path):
    shards(tmp_path / "shards")
    prepare.run(config(tmp_path))
    again = {"path": f"{tmp_path}/runs/a/data/*.parquet", "layout": "parquet"}
    last = [{"use": "balance", "column": "category", "cap": 2}]
    result = prepare.run(config(tmp_path, name="b", source=again, operators=last))
    assert result["metrics"]["data/kept"]["value"] == 4 and result["broken"] == {}


def test_too_many_broken_records_stop_the_run_with_their_reasons(tmp_path):
    data = [(f"{i}.png", png(i)[: 300 if i < 4 else None], {"text": "x"}) for i in range(20)]
    path = folder(tmp_path / "f", data)
    source = {"path": str(path), "layout": "folder", "unit_rows": 6}
    for operators in (OPERATORS[:1], OPERATORS[1:2]):  # found by the operator, or on the way
        name = operators[0]["use"]
        made = config(tmp_path, source=source, operators=operators, max_broken=0.1, name=name)
        with pytest.raises(
            DataError, match="at most 10% broken records, got 4 of 20: 4 broken pic"
        ):
            prepare.run(made)
        allowed = config(tmp_path, source=source, operators=operators, max_broken=0.2, name=name)
        result = prepare.run(allowed, resume=tmp_path / "runs" / name)
        assert result["broken"] == {"broken picture": 4}
        assert result["metrics"]["data/kept"]["value"] == 16


def test_a_scorer_that_breaks_down_is_counted_and_keeps_nothing(tmp_path):
    captions = ["fine", "none of it", "nan"]
    path = folder(
        tmp_path / "f", [(f"{i}.png", png(i), {"text": c}) for i, c in enumerate(captions)]
    )
    judged = [{"use": "aesthetic", "low": 0.5, "scorer": "tests.pipelines.pictures:unsure"}]
    source = {"path": str(path), "layout": "folder"}
    result = prepare.run(config(tmp_path, source=source, operators=judged, max_broken=0.5))
    assert result["broken"] == {"aesthetic gave no score": 1}
    assert [row["text"] for row in rows(tmp_path / "runs/a")] == captions[:2]


def test_other_files_or_settings_are_refused_on_resume(tmp_path):
    shards(tmp_path / "shards")
    prepare.run(config(tmp_path))
    run = tmp_path / "runs/a"
    with pytest.raises(DataError, match="begun with"):
        prepare.run(config(tmp_path, seed=1), resume=run)
    (tmp_path / "shards/000.tar").unlink()
    with pytest.raises(DataError, match="begun with"):
        prepare.run(config(tmp_path), resume=run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"operators": [{"use": "same_file"}] * 2}, "expected each once"),
        ({"max_broken": 2}, "share of 0 to 1"),
        ({"batch": 0}, "batch >= 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changes)


def test_the_command_prints_a_plan_and_json(tmp_path, capsys):
    shards(tmp_path / "shards", count=1)
    words = ["data", "--config", "data/stage1", f"source.path={tmp_path}/shards/*.tar"]
    words += [f"runs={tmp_path}/runs", "max_broken=0.5"]
    assert main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "1 units of webdataset" in out and "off: no scorer" in out
    assert not (tmp_path / "runs").exists()
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["program"] == "data" and result["metrics"]["removed/min_side"]["value"] == 6
