"""What is Stable Diffusion 3's own: its text encoders, sizes, schedule and adapters."""

import json
import shutil

import pytest
import torch

from rlhf.alignment import DIAGNOSED, AlignmentLearner
from rlhf.bare import captured
from rlhf.errors import ConfigError
from rlhf.models.tiny_sd3 import random_sd3_pipeline
from rlhf.policies.config import Lora, PolicyConfig
from rlhf.policies.families import describe, load_policy
from rlhf.policies.qwen_image21 import QwenImage21Policy
from rlhf.policies.sd3 import StableDiffusion3Policy
from rlhf.rollout import RolloutWorker
from rlhf.sampling import Sampler, sample
from rlhf.types import Advantages
from tests.rlhf.tiny import alignment, drawn, make_policy, picture, request, sampler, stock_pipeline

TEXT, SIZE = "a red circle above a blue square", (64, 96)
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def policy(tiny_sd3):
    return make_policy(tiny_sd3)


def gap(policy, pipeline, guidance=3.0, text=TEXT):
    """Between our samples and the stock pipeline's."""
    made_by = Sampler(steps=3, guidance=guidance, height=SIZE[0], width=SIZE[1])
    got = sample(policy, made_by, text, seeds=(5,)).x0_GNC[0]
    want, _ = drawn(pipeline, policy, text, 5, SIZE, guidance, steps=3)
    return float((got - want).abs().max())


def test_the_class_in_the_folder_decides(tiny_base, tiny_sd3):
    assert type(make_policy(tiny_base)) is QwenImage21Policy
    assert type(make_policy(tiny_sd3)) is StableDiffusion3Policy
    assert describe(str(tiny_sd3)).family is StableDiffusion3Policy
    assert describe("scenes").family is QwenImage21Policy


@pytest.mark.parametrize("tokens", [256, 16, 0])
def test_text_is_as_long_as_the_stock_pipelines(tiny_sd3, tokens):
    pipeline = stock_pipeline(tiny_sd3, **(NO_T5 if tokens == 0 else {}))
    policy = load_policy(PolicyConfig(model=str(tiny_sd3), train="none", t5_tokens=tokens))
    assert (policy.pipeline.text_encoder_3 is None) == (tokens == 0)
    condition = policy.encode(TEXT)
    assert condition.embeds_PLD.shape == (1, 77 + tokens, 64) and condition.pooled_PE is not None
    assert condition.pooled_PE.shape == (1, 64) and not condition.image_slots_L.any()
    assert gap(policy, pipeline) <= 1e-5


def test_a_folder_without_t5_opens(tmp_path):
    random_sd3_pipeline(t5=False).save_pretrained(tmp_path / "no-t5")
    policy = load_policy(PolicyConfig(model=str(tmp_path / "no-t5"), train="none", t5_tokens=8))
    assert policy.encode(TEXT).layout[0] == 77 + 8  # zeros, as the stock pipeline has it
    assert gap(policy, stock_pipeline(tmp_path / "no-t5", **NO_T5)) <= 1e-5


def test_a_folder_without_a_clip_is_refused(tiny_sd3, tmp_path):
    folder = shutil.copytree(tiny_sd3, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": [None, None]}))
    with pytest.raises(ConfigError, match="could not open.*text_encoder"):
        load_policy(PolicyConfig(model=str(folder)))


def test_the_pooled_vector_and_the_sequence_are_both_looked_at(policy):
    first, second = policy.encode("a red circle"), policy.encode("a blue square")
    x = torch.randn((1, 64, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():

        def v(embeds, pooled):
            made = type(first)(
                embeds_PLD=embeds.embeds_PLD,
                pooled_PE=pooled.pooled_PE,
                image_slots_L=first.image_slots_L,
            )
            return policy.velocity(x, torch.full((1,), 0.5), made, size=(64, 64))

        both = v(first, first)
        assert (both - v(second, first)).abs().max() > 1e-4
        assert (both - v(first, second)).abs().max() > 1e-4


def test_adapters_are_on_the_attention_of_picture_and_text(tiny_sd3, policy):
    """All of them at all layers, but for the output of the text in the last, which has none."""
    ends = {n.split(".attn.")[1].split(".lora_")[0] for n in policy.slots.parameters}
    assert ends == set(StableDiffusion3Policy.LINEARS)
    assert len(policy.slots.parameters) == 2 * (2 * 8 - 1)
    lora = Lora(rank=2, alpha=2, targets=("ff.net.2",))
    other = load_policy(PolicyConfig(model=str(tiny_sd3), lora=lora))
    assert all(".ff.net.2.lora_" in n for n in other.slots.parameters)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.5])
def test_the_schedule_is_the_schedulers(tmp_path, tiny_sd3, shift):
    folder = shutil.copytree(tiny_sd3, tmp_path / "other")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": shift}))
    base = describe(str(folder))
    scheduler = stock_pipeline(folder).scheduler
    scheduler.set_timesteps(7)
    ours = torch.tensor(base.family.grid(7, (64, 64), base.parts))
    assert (ours - scheduler.sigmas).abs().max() <= 1e-6


@pytest.mark.parametrize("key", ["use_dynamic_shifting", "shift_terminal", "use_karras_sigmas"])
def test_a_schedule_that_is_not_ours_is_refused(tiny_sd3, key):
    base = describe(str(tiny_sd3))
    other = {**base.parts, "scheduler": {**base.parts["scheduler"], key: 0.1}}
    with pytest.raises(ConfigError, match=key):
        base.family.grid(7, (64, 64), other)


@pytest.mark.parametrize(
    "size, words",
    [
        ((64, 72), "multiples of 16, got 64x72: write 64x64"),
        ((0, 64), "multiples of 16"),
        ((64, 528), "at most 512, got 64x528"),
    ],
)
def test_an_impossible_size_is_refused(policy, size, words):
    with pytest.raises(ConfigError, match=words):
        policy.latent_shape(size)


def test_edits_are_refused(policy):
    with pytest.raises(ConfigError, match="without source pictures"):
        policy.encode("make it red", [picture(0, 64, 64)])


def test_an_iteration_runs_the_rows_it_needs(tiny_sd3):
    """Both branches at each step, each trained transition once, nothing for text; and three fields
    of some samples for the log.
    """
    learner = AlignmentLearner(make_policy(tiny_sd3), alignment("grpo", updates_per_rollout=1))
    worker = RolloutWorker(make_policy(tiny_sd3))
    handover, asked = (
        learner.publish("behaviour"),
        request(1, sampler("grpo"), ("trajectory",), size=6),
    )
    worker.bind(handover)
    with captured(worker.policy.transformer) as sampled:
        got = [worker.rollout(ref, asked) for ref in asked.refs(handover.version)]
    value, live = torch.randn(2, 6), torch.ones(2, 6, dtype=torch.bool)
    with captured(learner.policy.transformer) as trained:
        learner.update(got, Advantages(value_PG=value, live_PG=live))
    steps, (start, stop) = asked.sampler.steps, asked.sampler.window
    assert [len(call["hidden_states"]) for call in sampled] == [6] * (2 * 2 * steps)
    rows = [len(call["hidden_states"]) for call in trained]
    assert rows == [6 * (stop - start)] * 2 + [DIAGNOSED] * 3


def test_impossible_lengths_and_adapters_are_refused():
    with pytest.raises(ConfigError, match="t5_tokens: expected 0 to 512"):
        PolicyConfig(t5_tokens=600).check()
    with pytest.raises(ConfigError, match="lora.targets: expected at least one"):
        Lora(targets=()).check()
