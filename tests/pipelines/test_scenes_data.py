"""The caption mixture, and prompts as long as arXiv:2605.10730 allows."""

import pytest
import torch

from pipelines import pretrain
from pipelines.data.scenes import check_shares, mixture
from rewards.scenes.captions import CAPTIONS
from rlhf import noise
from rlhf.config import build
from rlhf.errors import ConfigError
from rlhf.flow import Batch, Part, flow_matching
from rlhf.learner import Learner, LearnerConfig
from rlhf.sampling import Sampler, sample
from tests.rlhf.tiny import make_policy, same, snapshot

SHARES = {"rich": 0.3, "text": 0.1, "knowledge": 0.2, "structured": 0.2}


def test_captions_come_in_their_shares_and_pictures_do_not_depend_on_them():
    plain, mixed = mixture(400, 1), mixture(400, 1, captions=SHARES)
    assert [e.target for e in plain] == [e.target for e in mixed]
    structured = sum(e.caption.startswith("{") for e in mixed)
    knowledge = sum(" . " in e.caption for e in mixed)
    same_words = sum(a.caption == b.caption for a, b in zip(plain, mixed, strict=True))
    assert 55 < structured < 105 and 45 < knowledge < 105 and 50 < same_words < 135
    assert all(not e.caption.startswith("{") for e in plain)


def test_one_share_more_leaves_the_captions_of_the_first():
    """So a base that was trained on rich captions alone can be made again."""
    first = [e.caption for e in mixture(200, 2, captions={"rich": 0.3})]
    more = [e.caption for e in mixture(200, 2, captions=SHARES)]
    rich = ("a clean picture", "a portrait of", "a sign with", "keep everything else")
    chosen = [i for i, c in enumerate(first) if any(words in c for words in rich)]
    assert len(chosen) > 30 and all(more[i] == first[i] for i in chosen)


@pytest.mark.parametrize("shares", [{"poem": 0.1}, {"terse": 0.1}, {"rich": 0.7, "text": 0.4}])
def test_other_shares_are_refused(shares):
    with pytest.raises(ConfigError, match="captions: expected shares of rich, text"):
        check_shares(shares)
    settings = {"stage": "condition", "captions": shares}
    with pytest.raises(ConfigError, match="captions"):
        build(pretrain.Config, settings)
    assert "terse" in CAPTIONS


def test_a_prompt_of_a_thousand_tokens_encodes_trains_and_draws(tiny_base):
    policy = make_policy(tiny_base, train="full")
    tokenizer = policy.pipeline.processor.tokenizer
    prompt = " and ".join(["a red circle left of a blue square on white"] * 120)
    ids = tokenizer(prompt)["input_ids"][:1000]
    prompt = tokenizer.decode(ids)
    assert len(tokenizer(prompt)["input_ids"]) == 1000
    limit = policy.pipeline.text_encoder.config.text_config.max_position_embeddings
    condition = policy.encode(prompt)
    assert 1000 <= condition.embeds_PLD.shape[1] <= limit
    assert torch.isfinite(condition.embeds_PLD).all()
    other = policy.encode(prompt + " x")
    assert other.embeds_PLD.shape[1] > condition.embeds_PLD.shape[1]

    draw = noise.initial_noise(0, (1, 16, 64))
    part = Part(
        latents=torch.zeros(1, 16, 64), condition=condition, noise=draw, sigma=torch.tensor([0.6])
    )
    batch = Batch(parts=(part,), size=(64, 64))
    before = snapshot(policy)
    learner = Learner(policy.slots.parameters, LearnerConfig(lr=1e-3))
    outcome = learner.step([batch], lambda b: (flow_matching(policy, b), {}))
    assert outcome.grad_norm > 0 and not outcome.skipped
    assert not same(before, snapshot(policy))

    got = sample(policy, Sampler(steps=2, guidance=2.0, height=64, width=64), prompt, seeds=(1,))
    assert got.pixels.shape == (1, 3, 64, 64)
    cut_short = tokenizer.decode(ids[:500])
    short = sample(
        policy, Sampler(steps=2, guidance=2.0, height=64, width=64), cut_short, seeds=(1,)
    )
    assert not torch.equal(got.x0_GNC, short.x0_GNC)
