"""A policy is opened with exactly the weights that were asked for."""

import pytest
import torch

from rlhf import checkpoint
from rlhf.errors import CheckpointError, ConfigError
from rlhf.plan import Config
from rlhf.policies.open import Opening, open_policy
from rlhf.run import Run
from tests.pipelines.conftest import make_run
from tests.rlhf.tiny import noises, same


@pytest.fixture(scope="module")
def run(any_base, tmp_path_factory):
    return make_run(any_base, tmp_path_factory.mktemp("runs"), "a")


def test_a_base_opens_without_anything_to_train(any_base):
    opened = open_policy(Opening(model=str(any_base)))
    assert opened.policy.slots.parameters == {}
    assert (opened.name, opened.slot) == (any_base.name, "train")
    assert opened.run is None and opened.step is None


@pytest.mark.parametrize("step", [None, 2])
def test_a_run_opens_at_its_newest_or_a_named_checkpoint(run, step):
    opened = open_policy(Opening(model=str(run.root), checkpoint=step))
    assert opened.step == (step or 4) and opened.run == run
    stored = checkpoint.load(run.root, opened.step).tensors["slots/train"]
    assert same(opened.policy.slots.tensors("train"), dict(stored))
    assert opened.sampler["guidance"] == 2.0


def test_the_reference_of_a_run_is_its_base(run, any_base):
    reference = open_policy(Opening(model=str(run.root), slot="reference")).policy
    base = open_policy(Opening(model=str(any_base))).policy
    trained = open_policy(Opening(model=str(run.root))).policy
    condition = base.encode("HI")
    x = noises(base, range(2))
    call = dict(sigma_B=torch.full((2,), 0.5), condition=condition, size=(64, 64))
    torch.testing.assert_close(reference.velocity(x, **call), base.velocity(x, **call))
    assert not torch.allclose(trained.velocity(x, **call), base.velocity(x, **call), atol=1e-3)


@pytest.mark.parametrize("changes", [{"checkpoint": 3}, {"slot": "ema"}])
def test_what_a_run_does_not_have_is_named(run, changes):
    with pytest.raises((CheckpointError, ConfigError), match=r"\[2, 4\]|train"):
        open_policy(Opening(model=str(run.root), **changes))


def test_a_base_has_neither_slots_nor_checkpoints(any_base):
    for changes in ({"slot": "ema"}, {"checkpoint": 1}):
        with pytest.raises(ConfigError, match="no run"):
            open_policy(Opening(model=str(any_base), **changes))


def test_a_run_that_made_a_model_opens_that_model(any_base, tmp_path):
    run = Run.create(tmp_path, "pretrained", Config(), "pretrain")
    (run.root / "config.yaml").write_text("name: pretrained\n")
    with pytest.raises(ConfigError, match="names no policy"):
        open_policy(Opening(model=str(run.root)))
    (run.root / "model").symlink_to(any_base, target_is_directory=True)
    opened = open_policy(Opening(model=str(run.root)))
    assert (opened.name, opened.run) == ("pretrained", run)
