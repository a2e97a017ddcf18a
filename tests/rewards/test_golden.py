"""What a judge said when it was written is what it says: after any opening, move or copy."""

import copy
import gc
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards import golden, trained
from rewards.backbones.towers import save_towers
from rewards.backbones.vlm import add_lora
from rewards.backbones.vlm_folder import load_vlm_judge, save
from rewards.errors import JudgeError, RewardConfigError
from rewards.judge import load_judge
from rewards.trained import KINDS, open_judge, save_judge
from rewards.types import Calibration
from tests.rewards.towers_tiny import sample_of, tiny_judge, tiny_towers
from tests.rewards.vlm_tiny import model_of, write_base

MADE = [sample_of(c, i) for i in range(2) for c in ("objects", "portraits", "text")]
EDITS = [sample_of("edits", i) for i in range(4)]


@pytest.fixture
def towers(tmp_path):
    return tiny_towers(tmp_path / "towers")


def written(towers, tmp_path, axis, **about):
    """A judge on disk whose heads are not flat."""
    judge = tiny_judge(towers, axis, **({"floor": 4.0} if axis == "consistency" else {}))
    for parameter in judge.model.heads.parameters():
        parameter.data *= 3
    judge.card = replace(judge.card, **about)
    save_judge(tmp_path / axis, judge, "../towers")
    return judge


def scores(judge, samples):
    return [(s.value, dict(s.parts)) for s in judge.score(samples)]


# --- golden scores --------------------------------------------------------------------------------


def test_the_golden_pictures_are_the_same_bytes_everywhere(towers):
    made = golden.samples(tiny_judge(towers, "fidelity").card)
    total = hashlib.sha256()
    for sample in made.values():
        for picture in (sample.image, *sample.sources):
            total.update(repr(picture.shape).encode() + picture.tobytes())
    assert total.hexdigest()[:12] == "447d9f7c5a88"
    assert len({s.image.shape for s in made.values()}) > 1  # one is not square


@pytest.mark.parametrize("axis", KINDS)
def test_a_judge_carries_its_golden_scores(towers, tmp_path, axis):
    judge = written(towers, tmp_path, axis)
    about = json.loads((tmp_path / axis / "card.json").read_text())
    found = about["golden"]["scores"]
    assert found == golden.measure(judge)["scores"] and len(found) == 3
    assert about["golden"]["versions"]["torch"] == torch.__version__
    assert open_judge(tmp_path / axis).card == judge.card


@pytest.mark.parametrize("axis", KINDS)
def test_weights_that_changed_are_refused(towers, tmp_path, axis):
    written(towers, tmp_path, axis)
    path = tmp_path / axis / "heads.safetensors"
    good = load_file(path)
    save_file({k: v.flip(0) for k, v in good.items()}, path)
    with pytest.raises(RewardConfigError, match=r"golden scores within 0\.005.*was .* and is"):
        open_judge(tmp_path / axis)
    save_file(good, path)
    open_judge(tmp_path / axis)


def test_a_port_that_is_two_percent_off_is_refused(towers, tmp_path):
    judge = written(towers, tmp_path, "fidelity")
    about = golden.measure(judge)
    golden.check(judge, about)
    said = judge.score

    class Off:
        card = judge.card

        def score(self, samples):
            return [replace(s, value=(s.value or 0) + self.by) for s in said(samples)]

    for by, refused in ((0.02, True), (-0.02, True), (0.001, False)):
        Off.by = by
        if refused:
            with pytest.raises(RewardConfigError, match="disc/value"):
                golden.check(Off(), about)
        else:
            golden.check(Off(), about)


def test_other_towers_or_another_calibration_are_refused(towers, tmp_path):
    map_of = Calibration(raw=(0.0, 0.4, 1.0), value=(0.0, 0.9, 1.0))
    written(towers, tmp_path, "fidelity", calibration=map_of)
    about = json.loads((tmp_path / "fidelity" / "card.json").read_text())
    lost = {**about, "card": {**about["card"], "calibration": {}}}
    (tmp_path / "fidelity" / "card.json").write_text(json.dumps(lost))
    with pytest.raises(RewardConfigError, match="golden"):
        open_judge(tmp_path / "fidelity")
    (tmp_path / "fidelity" / "card.json").write_text(json.dumps(about))
    open_judge(tmp_path / "fidelity")
    for parameter in towers.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    save_towers(towers, tmp_path / "towers")
    with pytest.raises(RewardConfigError, match="golden"):  # and not those of the cache
        open_judge(tmp_path / "fidelity")


def test_golden_scores_are_of_the_weights_as_they_were_rounded(towers, tmp_path):
    judge = tiny_judge(towers, "fidelity")
    save_towers(towers, tmp_path / "small" / "towers", torch.bfloat16)
    save_judge(tmp_path / "small" / "fidelity", judge, "../towers", dtype=torch.bfloat16)
    found = json.loads((tmp_path / "small" / "fidelity" / "card.json").read_text())["golden"]
    assert found["scores"] == golden.measure(open_judge(tmp_path / "small" / "fidelity"))["scores"]
    assert found["scores"] != golden.measure(judge)["scores"]


def test_a_judge_on_the_towers_that_ship_names_them_and_no_place(towers, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "SHIPPED", tmp_path)
    save_judge(tmp_path / "one" / "fidelity", tiny_judge(towers, "fidelity"), "scenes")
    about = json.loads((tmp_path / "one" / "fidelity" / "card.json").read_text())
    assert about["towers"] == "scenes" and str(tmp_path) not in json.dumps(about)
    assert scores(open_judge(tmp_path / "one" / "fidelity"), MADE) == scores(
        tiny_judge(towers, "fidelity"), MADE
    )


def test_a_judge_that_does_not_answer_is_not_written(towers, tmp_path):
    judge = tiny_judge(towers, "fidelity")
    next(judge.model.heads.parameters()).data.fill_(float("nan"))
    with pytest.raises(JudgeError, match="finite"):
        save_judge(tmp_path / "fidelity", judge, "../towers")
    assert [p.name for p in tmp_path.iterdir()] == ["towers"]
    fine = tiny_judge(towers, "portrait")
    save_judge(tmp_path / "portrait", fine, "../towers")
    with pytest.raises(RewardConfigError, match="no folder"):
        save_judge(tmp_path / "portrait", fine, "../towers")


def test_a_vision_language_judge_has_them_unless_it_thinks_first(tmp_path):
    base = write_base(tmp_path / "base")
    model = model_of(base)
    for parameter in add_lora(model, rank=2):
        parameter.data += 0.2 * torch.randn(parameter.shape)
    save(model, tmp_path / "judge", base=str(base), card=model.settings.card(name="x"), readme="")
    load_vlm_judge(tmp_path / "judge")
    path = tmp_path / "judge" / "adapter.safetensors"
    save_file({k: v * (-1 if "lora_A" in k else 1) for k, v in load_file(path).items()}, path)
    with pytest.raises(RewardConfigError, match="golden"):
        load_judge(str(tmp_path / "judge"))
    thinks = model_of(base, rationale_tokens=4)
    card = thinks.settings.card(name="y")
    save(thinks, tmp_path / "thinks", base=str(base), card=card, readme="")
    assert "golden" not in json.loads((tmp_path / "thinks" / "card.json").read_text())


# --- freed, moved, copied -------------------------------------------------------------------------


@pytest.mark.parametrize("axis", KINDS)
def test_scores_survive_everything_that_happens_to_a_judge(towers, tmp_path, axis):
    """Opened again after it was freed, cast and back, its weights loaded again, copied."""
    map_of = Calibration(raw=(0.0, 0.4, 1.0), value=(0.0, 0.9, 1.0))
    written(towers, tmp_path, axis, calibration=map_of, noise_floor=0.1)
    samples = EDITS if axis in ("instruction", "consistency") else MADE
    judge = open_judge(tmp_path / axis)
    first, card = scores(judge, samples), judge.card
    weights = {k: v.clone() for k, v in judge.model.state_dict().items()}
    judge.model.double()
    assert [v for v, _ in scores(judge, samples)] == pytest.approx([v for v, _ in first], abs=1e-5)
    judge.model.float()
    assert scores(judge, samples) == first
    judge.model.load_state_dict({k: torch.zeros_like(v) for k, v in weights.items()})
    assert scores(judge, samples) != first
    judge.model.load_state_dict(weights)
    assert scores(judge, samples) == first
    twin = copy.deepcopy(judge)
    del judge
    gc.collect()
    assert scores(twin, samples) == first and twin.card == card
    again = open_judge(tmp_path / axis)
    assert scores(again, samples) == first and again.card == card


def test_towers_that_were_written_anew_are_opened_anew(towers, tmp_path):
    written(towers, tmp_path, "fidelity")
    before = scores(open_judge(tmp_path / "fidelity"), MADE)
    for parameter in towers.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    save_towers(towers, tmp_path / "towers")
    judge = tiny_judge(towers, "portrait")
    save_judge(tmp_path / "portrait", judge, "../towers")
    again = open_judge(tmp_path / "portrait")
    assert scores(again, MADE) == scores(judge, MADE) != before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
@pytest.mark.parametrize("axis", KINDS)
def test_scores_are_the_same_after_a_stay_on_another_device(towers, tmp_path, axis):
    written(towers, tmp_path, axis)
    samples = EDITS if axis in ("instruction", "consistency") else MADE
    judge = open_judge(tmp_path / axis)
    first = scores(judge, samples)
    judge.model.cuda()
    there = [value for value, _ in scores(judge, samples)]
    assert there == pytest.approx([value for value, _ in first], abs=1e-3)
    golden.check(judge, json.loads((tmp_path / axis / "card.json").read_text())["golden"])
    judge.model.cpu()
    assert scores(judge, samples) == first
