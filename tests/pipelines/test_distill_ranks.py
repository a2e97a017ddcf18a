"""`rlhf distill` in two processes against one: the same weights, figures and files."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from pipelines import distill
from rlhf import checkpoint
from rlhf.distributed import Ranks
from rlhf.errors import ConfigError
from rlhf.run import Run
from tests.pipelines.test_distill import few
from tests.rlhf.ranks import launch_programs
from tests.rlhf.tiny import prompt_file, same

METHODS = ("segments", "dmd")
pytestmark = pytest.mark.slow


def config_of(base, folder, method, *more):
    """Two bundles a step, of which each of two ranks computes one. All read one file of prompts."""
    folder.mkdir(parents=True)
    prompts = prompt_file(folder.parents[1])
    short = ["grid=even-2", "pace.steps=2", "pace.save_every=1", "pace.ema=0.9", "noises=1"]
    small = ["pace.micro_batches=2", "learner.lr=1e-3", "matching.ratio=2", f"method={method}"]
    shared = [f"prompts.source={prompts}", f"shown.source={prompts}"]
    return few(base, folder, *short, *small, *shared, *more)


@pytest.fixture(scope="module")
def runs(tiny_base, tmp_path_factory):
    """Runs by name: of one process, of two, and of two that stopped after the first step."""
    root, programs, found = tmp_path_factory.mktemp("ranks"), [], {}
    for method in METHODS:
        two = config_of(tiny_base, root / "two" / method, method)
        programs.append(partial(distill.fewstep, two))
        one = config_of(tiny_base, root / "one" / method, method)
        distill.fewstep(one)
        for name, made in (("one", one), ("two", two)):
            found[name, method] = Run(root / name / method / "runs" / made.name)
    again = config_of(tiny_base, root / "again" / "dmd", "dmd")
    first = replace(again, pace=replace(again.pace, steps=1))
    found["again", "dmd"] = run = Run(root / "again" / "dmd" / "runs" / again.name)
    programs.append(partial(distill.fewstep, first))
    programs.append(partial(distill.fewstep, again, resume=run.root))
    launch_programs(programs)
    return found


def figures(run):
    return [{k: v for k, v in r.items() if not k.startswith("seconds/")} for r in run.rows()]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_what_one_process_does(runs, method):
    one, two = runs["one", method], runs["two", method]
    mine, theirs = (checkpoint.load(run.root) for run in (two, one))
    assert mine.tensors.keys() == theirs.tensors.keys()
    assert {"slots/train", "slots/ema"} <= mine.tensors.keys()
    assert ("slots/fake" in mine.tensors) == (method == "dmd")
    for part, tensors in theirs.tensors.items():
        assert mine.tensors[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(mine.tensors[part][name], tensor, rtol=1e-4, atol=1e-6)
    assert len(figures(two)) == 2
    for got, want in zip(figures(two), figures(one), strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert {p.name for p in (two.root / "model").iterdir()} == {
        p.name for p in (one.root / "model").iterdir()
    }
    said = [run.read_json("result.json")["teachers_unchanged"] for run in (one, two)]
    assert said == [True, True]


def test_two_ranks_sample_the_trajectories_of_one(runs):
    one, two = (runs[name, "segments"].root / "trajectories" for name in ("one", "two"))
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir()) and len(names) > 2
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_two_ranks_that_stopped_continue_bit_for_bit(runs):
    again, whole = (checkpoint.load(runs[name, "dmd"].root) for name in ("again", "two"))
    assert all(same(dict(again.tensors[p]), dict(whole.tensors[p])) for p in whole.tensors)
    assert again.meta == whole.meta and figures(runs["again", "dmd"]) == figures(runs["two", "dmd"])


def test_fewer_bundles_than_ranks_are_refused_before_anything_is_written(tiny_base, tmp_path):
    config = config_of(tiny_base, tmp_path / "few" / "segments", "segments", "pace.micro_batches=1")
    with pytest.raises(ConfigError, match="write pace.micro_batches=2"):
        distill._fewstep(config, None, Ranks(world=2))
    assert not (tmp_path / "few" / "segments" / "runs").exists()
