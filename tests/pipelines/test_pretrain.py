"""The transformer stage: one process against two under torchrun, and the ways to save memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import pretrain
from pipelines.data.loader import Batches, Draws, Encoder, Noising, split_draw, token_counts
from pipelines.pretrain import Config
from rlhf import checkpoint, config
from rlhf.errors import ConfigError
from rlhf.flow import flow_matching
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy

ROOT = Path(__file__).parents[2]
LAUNCH = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipelines.cli"]
SMALL = [
    "examples=60",
    "shown=2",
    "batch=4",
    "copies=2",
    "learner.lr=1e-3",
    "learner.warmup_steps=0",
]
SMALL += ["pace.steps=2", "pace.micro_batches=2", "pace.save_every=2", "pace.ema=0.9"]


def arguments(base, folder, *more):
    return [f"start={base}", f"runs={folder}", "name=tiny", *SMALL, *more]


def under_torchrun(*argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *argv],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("trained, mode", [("full", "fsdp"), ("lora", "ddp")])
def test_two_ranks_under_torchrun_train_what_one_process_does(tiny_base, tmp_path, trained, mode):
    more = [f"train={trained}", f"learner.parallel={mode}"]
    alone = pretrain.run(config.load(Config, None, arguments(tiny_base, tmp_path / "one", *more)))
    text = under_torchrun("pretrain", *arguments(tiny_base, tmp_path / "two", *more), "--json")
    both = json.loads(text)["metrics"]["heldout/flow"]["value"]
    assert both == pytest.approx(alone["metrics"]["heldout/flow"]["value"], rel=1e-5)
    runs = [tmp_path / name / "tiny" for name in ("one", "two")]
    mine, theirs = (checkpoint.load(run).tensors for run in runs)
    for part in ("slots/train", "slots/ema"):
        assert mine[part].keys() == theirs[part].keys()
        for name, tensor in mine[part].items():
            torch.testing.assert_close(theirs[part][name], tensor, rtol=1e-5, atol=1e-6)
    made = (
        "lora/pytorch_lora_weights"
        if trained == "lora"
        else "model/transformer/diffusion_pytorch_model"
    )
    files = [load_file(run / f"{made}.safetensors") for run in runs]
    assert files[0].keys() == files[1].keys() and (runs[1] / "samples/step_000002.png").is_file()


@pytest.fixture(scope="module")
def policies(tiny_base):
    """The same full policy with and without its activations kept."""
    return [
        load_policy(PolicyConfig(model=str(tiny_base), train="full", checkpointing=on))
        for on in (False, True)
    ]


@pytest.fixture(scope="module")
def batches(policies):
    """The first batch of four examples, whole and in halves, encoded by one policy."""
    one = Config(start="tiny", batch=4, copies=2)
    encoder = Encoder(policies[0], None)
    draws = Draws(one.spans(), one.ladder, 60, 3, token_counts(encoder))
    make = Batches(draws, encoder, Noising(seed=0, copies=2, dropout=0.1, shift=None))
    return make(draws(1)), [make(half) for half in split_draw(draws(1), 2)]


def gradient(policy, batches):
    policy.transformer.zero_grad()
    for one in batches:
        (flow_matching(policy, one) / len(batches)).backward()
    return {n: p.grad.clone() for n, p in policy.slots.parameters.items() if p.grad is not None}


def assert_close(mine, theirs):
    assert mine.keys() == theirs.keys() and len(mine) > 10
    scale = max(float(t.abs().max()) for t in theirs.values())
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6 * scale)


def test_recomputed_activations_give_the_same_gradient(policies, batches):
    assert policies[1].transformer.gradient_checkpointing
    whole, _ = batches
    assert_close(gradient(policies[1], [whole]), gradient(policies[0], [whole]))


def test_parts_of_a_batch_have_its_gradient(policies, batches):
    whole, halves = batches
    assert [half.rows for half in halves] == [4, 4]
    assert_close(gradient(policies[0], halves), gradient(policies[0], [whole]))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "expected vae=DIR and condition=DIR, or start=DIR"),
        ({"start": "scenes", "vae": "a", "condition": "b"}, "leave out vae and condition"),
        ({"vae": "a", "condition": "b", "train": "lora"}, "train=lora: expected weights to adapt"),
    ],
    ids=str,
)
def test_impossible_stages_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Config(**changes).check()
