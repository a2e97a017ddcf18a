"""What benchmarks/algorithms.py makes of runs: made-up rows."""

import json

import pytest

from benchmarks import algorithms
from benchmarks.algorithms import GUIDED, UNGUIDED, curve, reached
from rlhf import config
from rlhf.metrics import write_rows
from rlhf.plan import Config
from rlhf.run import Run


def made(root, name, guided, seconds=2.0):
    """Four iterations of eight pictures, measured before and after every second one."""
    run = Run(root / name)
    run.root.mkdir(parents=True)
    rows = [{"step": i + 1, "samples": 8, "seconds/total": seconds} for i in range(4)]
    for k, value in enumerate(guided[1:]):
        rows[2 * k + 1] |= {GUIDED: value, UNGUIDED: value / 2}
    write_rows(run.root / "metrics.jsonl", rows)
    before, after = guided[0], guided[-1]
    metric = {"before": before, "after": after, "gain": after - before, "low": 0.0, "high": 1.0}
    other = {name: value / 2 for name, value in metric.items()}
    (run.root / "result.json").write_text(
        json.dumps({"metrics": {GUIDED: metric | {"n": 4}, UNGUIDED: other | {"n": 4}}})
    )
    return run


def test_a_curve_is_the_mean_of_seeds_by_pictures_and_seconds(tmp_path):
    one = curve([made(tmp_path, "a", [0.4, 0.5, 0.6]), made(tmp_path, "b", [0.4, 0.7, 0.8], 4.0)])
    assert list(one.pictures) == [0, 16, 32] and list(one.seconds) == [0, 6, 12]
    assert list(one.guided) == pytest.approx([0.4, 0.6, 0.7])
    assert list(one.unguided) == pytest.approx([0.2, 0.3, 0.35])
    assert reached(one, 0.1) == pytest.approx(8)  # half-way to the first evaluation
    assert reached(one, 0.25) == pytest.approx(24)
    assert reached(one, 0.31) is None


def test_arms_are_read_at_the_time_of_the_quickest(tmp_path):
    done = {
        "quick": [made(tmp_path, "q", [0.4, 0.4, 0.4], 1.0)],
        "slow": [made(tmp_path, "s", [0.4, 0.8, 0.9], 4.0)],
    }
    lines = algorithms.table(done).splitlines()
    assert "guided at 4 s" in lines[0]
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[1] == "slow" and cells[2] == "1" and cells[5] == "16"
    assert cells[6] == "+0.200" and cells[7] == "+0.100" and cells[8] == "4"
    assert lines[2].endswith("| - |")
    algorithms.draw(done, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_every_arm_is_a_configuration_that_can_run():
    for base, *own in algorithms.ARMS.values():
        config.load(Config, base, [*algorithms.COMMON, *own], "align")
