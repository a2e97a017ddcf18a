"""Two gloo processes against one: same weights, same checkpoints, one decision."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rlhf import checkpoint
from rlhf.distributed import ALONE, Ranks, from_environment, start
from rlhf.errors import ClusterError, ConfigError
from rlhf.learner import Diverged, Learner, LearnerConfig
from rlhf.metrics import read_rows
from rlhf.parallel import wrap
from rlhf.training import equal_parts
from tests.rlhf.ranks import Job, Net, batch_of, everything, killed, launch, same, trained

MODES = ("ddp", "fsdp")


@pytest.fixture(scope="module", params=MODES)
def two(request, tmp_path_factory):
    """Folder in which two processes of a mode have left their results."""
    folder = tmp_path_factory.mktemp(request.param)
    killed(Job(), folder / "from_one")
    launch(everything, folder, request.param)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    trained(Job(), folder / "straight", 6)
    return folder


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-7, msg=name)


def loaded(run, step=6):
    return checkpoint.load(run, step)


def rows(run):
    table = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds/")} for row in table]


# --- two ranks are one ----------------------------------------------------------------------------


@pytest.mark.parametrize("name, dead", [("steps", ()), ("dead", (3,))])
def test_two_ranks_take_the_steps_of_one(two, name, dead):
    """Also where a micro-batch has no gradient, and a weight is left out of every other step."""
    job = Job()
    outcomes = job.steps(1, 6, dead)
    assert_close(load_file(two / f"{name}.safetensors"), job.learner.weights())
    assert not same(job.learner.weights(), Job().learner.weights())
    assert any(o.grad_norm > job.learner.config.max_grad_norm for o in outcomes)
    for mine, theirs in zip(outcomes, json.loads((two / f"{name}.json").read_text()), strict=True):
        assert theirs["loss"] == pytest.approx(mine.loss, rel=1e-6)
        assert theirs["grad_norm"] == pytest.approx(mine.grad_norm, rel=1e-5)
        assert theirs["metrics"] == mine.metrics


def test_a_run_of_two_ranks_writes_what_one_writes(two, one):
    mine, theirs = loaded(two / "straight"), loaded(one / "straight")
    assert mine.tensors.keys() == theirs.tensors.keys()
    for part in theirs.tensors:
        assert_close(mine.tensors[part], theirs.tensors[part])
    assert mine.meta["learner"] == theirs.meta["learner"]
    for got, want in zip(rows(two / "straight"), rows(one / "straight"), strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_both(two):
    said = [json.loads((two / f"spoilt_{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1] == {"skipped": True, "steps": 2, "nonfinite": 1}


def test_gradients_that_are_not_finite_move_nothing_and_end_a_run_when_they_stay():
    job = Job(warmup_steps=10, nonfinite_limit=3)
    spoilt = lambda batch: (job.objective(batch)[0] * float("nan"), {})  # noqa: E731
    job.steps(1, 1)
    weights, rate = job.learner.weights(), job.learner.rate()
    for _ in range(2):
        assert job.learner.step([batch_of(2)], spoilt).skipped
    assert job.learner.rate() == rate and job.learner.state()[1] == {"steps": 1, "nonfinite": 2}
    assert same(weights, job.learner.weights())
    assert not job.steps(2, 2)[0].skipped and job.learner.state()[1]["nonfinite"] == 0
    with pytest.raises(Diverged, match="3 gradients in a row were not finite at step 2"):
        for _ in range(3):
            job.learner.step([batch_of(3)], spoilt)


# --- checkpoints ----------------------------------------------------------------------------------


def assert_identical(run, reference):
    mine, theirs = loaded(run), loaded(reference)
    assert all(same(mine.tensors[part], theirs.tensors[part]) for part in theirs.tensors)
    assert mine.meta == theirs.meta and rows(run) == rows(reference)


def test_two_killed_ranks_continue_bit_for_bit(two):
    assert_identical(two / "killed", two / "straight")


def test_sigterm_at_one_rank_stops_both_after_a_checkpoint_that_continues(two):
    for rank in (0, 1):
        assert "--resume" in (two / f"stopped_{rank}.txt").read_text()
    assert checkpoint.step_of(checkpoint.latest(two / "at_three")) == 3
    assert_identical(two / "stopped", two / "straight")


def test_two_ranks_continue_what_one_began_and_one_what_two_began(two, one, tmp_path):
    shutil.copytree(two / "at_three", tmp_path / "from_two")
    trained(Job(), tmp_path / "from_two", 6)
    for run in (two / "from_one", tmp_path / "from_two"):
        mine, theirs = loaded(run), loaded(one / "straight")
        for part in theirs.tensors:
            assert_close(mine.tensors[part], theirs.tensors[part])


def test_one_process_continues_bit_for_bit(one, tmp_path):
    """Rows too, means over steps before and after the checkpoint."""
    killed(Job(), tmp_path)
    trained(Job(), tmp_path, 6)
    assert_identical(tmp_path, one / "straight")


# --- what ranks say to each other -----------------------------------------------------------------


def test_ranks_agree_and_share(two):
    said = [json.loads((two / f"told_{rank}.json").read_text()) for rank in (0, 1)]
    for one in said:
        assert one["sum"] == {"a": 3.0} and one["mean"] == {"a": 1.5} and one["any"] is True
        assert "micro_batches=2" in one["idle"]
    assert [one["share"] for one in said] == [[0, 1, 2], [3, 4]]
    assert said[0]["failed"] == ["CheckpointError", "the disk is full"]
    assert said[1]["failed"][0] == "ClusterError" and "the disk is full" in said[1]["failed"][1]


def test_a_lost_rank_is_an_error_and_not_a_wait(two):
    assert "rank 0 of 2 lost another rank" in (two / "lost.txt").read_text()


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_shares_are_contiguous_and_make_the_whole(world):
    parts = [Ranks(rank=r, world=world).share(range(7)) for r in range(world)]
    assert [i for part in parts for i in part] == list(range(7))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- the environment ------------------------------------------------------------------------------

GIVEN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.fixture
def environment(monkeypatch):
    for name in GIVEN:
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(k, v) for k, v in values.items()]


def test_without_torchrun_a_process_is_alone(environment):
    assert from_environment() == start() == ALONE
    environment({**GIVEN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert from_environment() == ALONE


def test_torchruns_environment_is_read(environment):
    environment(GIVEN)
    ranks = from_environment()
    assert ranks == Ranks(rank=1, world=2, local_rank=1, backend="gloo") and not ranks.is_first


@pytest.mark.parametrize("name", GIVEN)
def test_a_half_set_environment_is_refused(environment, name):
    environment({k: v for k, v in GIVEN.items() if k != name})
    with pytest.raises(ConfigError, match=f"without {name}: start with torchrun"):
        from_environment()


@pytest.mark.parametrize(
    "changes, words",
    [({"RANK": "2"}, "WORLD_SIZE, got 1, 2, 2"), ({"RANK": "one"}, "expected integers")],
)
def test_an_environment_that_does_not_fit_is_refused(environment, changes, words):
    environment({**GIVEN, **changes})
    with pytest.raises(ConfigError, match=words):
        from_environment()


def test_ranks_that_do_not_come_are_an_error(environment):
    environment(GIVEN)
    with pytest.raises(ClusterError, match="could not join the others at 127.0.0.1:1 within 1 s"):
        start(seconds=1.0)


# --- refusals -------------------------------------------------------------------------------------


def test_sharding_a_part_of_a_module_is_refused():
    net, ranks = Net(), Ranks(world=2, backend="gloo")
    some = {n: p for n, p in net.named_parameters() if "first" in n}
    with pytest.raises(ConfigError, match="got 2 of 6 and 0 from elsewhere: write .*ddp"):
        wrap(some, "fsdp", ranks, net)
    with pytest.raises(ConfigError, match="names none: write .*ddp"):
        wrap(some, "fsdp", ranks, None)


def test_a_batch_that_does_not_divide_is_refused():
    assert [len(p) for p in equal_parts(torch.zeros(6), 3)] == [2, 2, 2]
    with pytest.raises(ConfigError, match="divisor of the batch of 6, got 4"):
        equal_parts(torch.zeros(6), 4)


def test_more_micro_batches_change_nothing_but_memory():
    net = {}
    for parts in (1, 2, 4):
        job = Job()
        learner = Learner(dict(job.net.named_parameters()), LearnerConfig(lr=0.01))

        def share(batch, job=job, parts=parts):
            loss, metrics = job.objective(batch)
            return loss / parts, metrics

        learner.step(equal_parts(torch.randn(8, 6, generator=torch.manual_seed(1)), parts), share)
        net[parts] = learner.weights()
    assert_close(net[2], net[1])
    assert_close(net[4], net[1])
