"""Runs of tiny models, as `rlhf align` and `rlhf pretrain` leave them."""

from dataclasses import replace

import pytest

from rlhf.alignment import AlignmentLearner
from rlhf.plan import Config
from rlhf.policies.families import load_policy
from rlhf.run import Run
from rlhf.sampling import Sampler
from tests.rlhf.tiny import policy_config, shake


def make_run(base, root, name, train="lora", steps=(2, 4)):
    """A run with a checkpoint of random train weights at each of `steps`."""
    sampler = Sampler(steps=2, guidance=2.0, height=64, width=96)
    config = replace(Config(), name=name, policy=policy_config(base, train), rollout=sampler)
    run = Run.create(root, name, config, "align")
    learner = AlignmentLearner(load_policy(config.policy), config.recipe().alignment)
    for step in steps:
        shake(learner.policy, seed=step)
        learner.save(run.checkpoints, step, len(steps), 0, None)
    return run


@pytest.fixture(scope="session")
def tiny_run(tiny_base, tmp_path_factory):
    return make_run(tiny_base, tmp_path_factory.mktemp("runs"), "tiny")
