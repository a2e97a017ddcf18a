import numpy as np
import pytest
import torch

from rewards.backbones.vlm import VlmJudge, add_lora
from rewards.errors import DataError
from rewards.training.rationales import Rationale, conversation, train_rationales
from tests.rewards.vlm_tiny import BEFORE_AFTER, model_of, sample, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("vlm") / "base")


def examples(count=4, words="a red circle.", score=4, **more) -> list[Rationale]:
    return [Rationale(sample=sample(i, **more), text=words, score=score) for i in range(count)]


def collated(model, *rationales):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    collate = DataCollatorForVisionLanguageModeling(model.processor, completion_only_loss=True)
    return collate([conversation(model, one) for one in rationales])


@pytest.mark.parametrize("edit", [False, True])
def test_what_is_learnt_is_what_will_be_asked(base, edit):
    """The learner's tokens are the judge's own up to the digit, and only the answer has a loss."""
    model = model_of(base, *[BEFORE_AFTER] * edit, rationale_tokens=8, pixels=48)
    sources = [sample(9).image] * edit
    (one,) = examples(1, sources=sources)
    batch = collated(model, one)
    asked = model.prepare([one.sample], [one.text])
    ids, given = batch["input_ids"][0].tolist(), asked.tensors["input_ids"][0].tolist()
    tokenizer = model.processor.tokenizer
    assert ids[: len(given)] == given
    assert ids[len(given)] == model.score_ids[3]
    assert tokenizer.decode(ids[len(given) + 1 :]) == "<|im_end|>\n"
    assert torch.equal(batch["pixel_values"], asked.tensors["pixel_values"])
    learnt = [i for i in batch["labels"][0].tolist() if i != -100]
    assert tokenizer.decode(learnt) == "a red circle.\nScore:4<|im_end|>\n"


def test_examples_that_could_not_be_read_back_are_refused(base, tmp_path):
    model = model_of(base, rationale_tokens=8)
    for words, score in (("", 4), (" ", 4), ("fine", 6), ("Score:3 it is", 3)):
        with pytest.raises(DataError):
            conversation(model, examples(1, words, score)[0])
    with pytest.raises(DataError, match="got none"):
        train_rationales(model, [], steps=1, scratch=tmp_path)


def test_two_steps_move_the_adapters_alone_and_leave_nothing_behind(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of(base, rationale_tokens=8)
    add_lora(model, rank=2)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    losses = train_rationales(model, examples(), steps=2, scratch=tmp_path / "scratch", lr=1e-2)
    assert len(losses) == 2 and np.isfinite(losses).all()
    moved = {n for n, tensor in model.named_parameters() if not torch.equal(tensor, before[n])}
    assert moved and all("lora_" in name for name in moved)
    assert {p.name for p in tmp_path.iterdir()} <= {"scratch"}
    assert not model.training


def test_a_judge_learns_to_say_why_and_is_read(base, tmp_path):
    model = model_of(base, rationale_tokens=8)
    rationales = examples(4, words="red.", score=4)
    losses = train_rationales(model, rationales, steps=24, scratch=tmp_path, lr=1e-2)
    assert losses[-1] < 0.3 < losses[0]
    score = VlmJudge(model, model.settings.card(name="vlm/brief")).score([rationales[0].sample])[0]
    assert score.state == "ok" and score.parts["said"] == 4
    assert score.parts["expectation"] == pytest.approx(4, abs=0.2)
