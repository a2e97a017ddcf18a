"""Judges on towers: one score in any company, folders, limits, and the consistency of edits."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from rewards.backbones.towers import new_towers, open_towers, save_towers
from rewards.backbones.trunk import small_resnet
from rewards.consistency import closeness, gate, outside_rms
from rewards.errors import RewardConfigError
from rewards.judge import load_judge, run_judge
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.trained import KINDS, open_judge, save_judge
from rewards.training.fitting import fit_calibration, monotone
from rewards.training.heads import (
    FaceHead,
    HeadConfig,
    RegionHead,
    Sizes,
    Tokens,
    make_head,
    normal_levels,
)
from rewards.training.losses import expectation
from tests.rewards.towers_tiny import SHAPE, sample_of, tiny_judge, tiny_towers


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return tiny_towers(tmp_path_factory.mktemp("towers") / "towers")


SIZES = Sizes(image_width=32, pooled_width=48, text_width=32, context=24)
POOLED = torch.zeros(2, 48)
EDITS = [sample_of("edits", i) for i in range(6)]
MADE = [sample_of(c, i) for i in range(3) for c in ("objects", "portraits", "text")]


@pytest.mark.parametrize("axis", KINDS)
def test_a_score_depends_on_the_sample_alone(towers, axis):
    judge = tiny_judge(towers, axis)
    samples = EDITS if judge.card.needs else MADE
    together = [s.value for s in judge.score(samples)]
    towers.forget()
    alone = [judge.score([s])[0].value for s in samples]
    towers.forget()
    turned = [s.value for s in judge.score(samples[::-1])][::-1]
    assert np.ptp(together) > 1e-6 or axis == "consistency"
    assert np.allclose(together, alone, atol=1e-5) and np.allclose(together, turned, atol=1e-5)


def test_judges_that_share_towers_pay_for_a_picture_once(towers, monkeypatch):
    seen = []
    original = towers._see
    monkeypatch.setattr(towers, "_see", lambda p: seen.append(len(p)) or original(p))
    towers.forget()
    for axis in ("aesthetics", "fidelity", "portrait"):
        tiny_judge(towers, axis).score(MADE)
    assert sum(seen) == len(MADE)


def test_towers_that_trained_have_forgotten(tmp_path):
    own = tiny_towers(tmp_path / "towers").eval()
    pictures = [MADE[0].image]
    with torch.no_grad():
        before = own.see(pictures)[1]
        own.train()
        for weight in own.parameters():
            weight.mul_(1.5)
        after = own.eval().see(pictures)[1]
    assert not torch.allclose(before, after)


def test_a_folder_gives_the_same_judge_back(towers, tmp_path):
    save_towers(towers, tmp_path / "towers")
    judge = tiny_judge(towers, "consistency", floor=4.0)
    judge.card = replace(
        judge.card, calibration=fit_calibration(np.linspace(0, 1, 80), np.linspace(0, 1, 80))
    )
    save_judge(tmp_path / "consistency", judge, "../towers")
    again = load_judge(str(tmp_path / "consistency"))
    assert again.card == judge.card
    assert [s.value for s in again.score(EDITS)] == pytest.approx(
        [s.value for s in judge.score(EDITS)], abs=1e-6
    )


def test_what_is_no_judge_is_refused_with_a_hint(towers, tmp_path):
    with pytest.raises(RewardConfigError, match="rlhf reward train"):
        open_judge(tmp_path)
    with pytest.raises(RewardConfigError, match="folder with open_clip_config"):
        open_towers(str(tmp_path))
    save_towers(towers, tmp_path / "towers")
    save_judge(tmp_path / "fidelity", tiny_judge(towers, "fidelity"), "../towers")
    about = json.loads((tmp_path / "fidelity" / "card.json").read_text())
    about["heads"]["fidelity"]["width"] = 64
    (tmp_path / "fidelity" / "card.json").write_text(json.dumps(about))
    with pytest.raises(RewardConfigError, match="expected the weights"):
        open_judge(tmp_path / "fidelity")
    with pytest.raises(RewardConfigError, match="scenes/"):
        load_judge("scenes/nothing")


def test_what_is_cut_or_scaled_down_is_flagged(towers):
    judge = tiny_judge(towers, "fidelity")
    long = replace(MADE[0], prompt=MADE[0].prompt + " and a red ring" * 20)
    large = sample_of("objects", 0, 128)
    flags = [s.flags for s in judge.score([MADE[0], long, large])]
    assert flags == [(), ("truncated",), ("downscaled",)]
    assert tiny_judge(towers, "aesthetics").score([long])[0].flags == ()


def test_whether_a_portrait_is_judged_is_up_to_the_prompt(towers):
    judge = tiny_judge(towers, "portrait")
    face = sample_of("portraits", 1)
    hidden = replace(face, image=np.full_like(face.image, 128))
    scores = run_judge(judge, [face, hidden, MADE[0]])
    assert [s.state for s in scores] == ["ok", "ok", "na"]


@pytest.mark.parametrize("axis", KINDS)
def test_a_head_that_says_no_number_fails_the_sample_and_no_other(towers, axis, monkeypatch):
    """Whichever head it is: no gate, ramp or minimum may make 0 or 1 of it."""
    samples = EDITS[:2] if axis in ("instruction", "consistency") else MADE[1::3][:2]
    for name in tiny_judge(towers, axis).model.heads:
        for wrong in (float("nan"), float("inf")):
            judge = tiny_judge(towers, axis)
            head = judge.model.heads[name]

            def broken(tokens, real=head.forward, wrong=wrong):
                return torch.cat([torch.full_like(real(tokens)[:1], wrong), real(tokens)[1:]])

            monkeypatch.setattr(head, "forward", broken)
            first, second = run_judge(judge, samples)
            assert (first.state, first.value) == ("failed", None) and name in first.reason
            assert second.state == "ok"


def test_an_untrained_twin_has_other_weights_and_says_so(towers):
    judge = tiny_judge(towers, "fidelity")
    twin = judge.fresh(1)
    assert twin.card.name == "untrained/fidelity"
    first, second = ([s.value for s in j.score(MADE)] for j in (judge, twin))
    assert not np.allclose(first, second, atol=1e-4)
    assert [s.value for s in judge.score(MADE)] == first  # and leaves this one as it was


def _recoloured(rng: torch.Generator, n: int) -> tuple[Tokens, torch.Tensor]:
    """Four places that hold a shape each, then a colour each; words name a shape and a colour.
    True where the place of that shape has that colour now.
    """
    shape = torch.stack([torch.randperm(4, generator=rng) for _ in range(n)])
    colour, named, asked = (torch.randint(4, size, generator=rng) for size in ((n, 4), (n,), (n,)))
    place = (shape == named[:, None]).float().argmax(1)
    done = torch.rand(n, generator=rng) < 0.5
    colour[torch.arange(n)[done], place[done]] = asked[done]
    words = torch.stack([one_hot(named, 8), one_hot(asked + 4, 8)], 1).float()
    tokens = Tokens(
        image=torch.zeros(n, 1, 8),
        pooled=one_hot(colour, 4).flatten(1).float(),
        pooled_source=one_hot(shape, 4).flatten(1).float(),
        text=words,
        words=torch.ones(n, 2, dtype=torch.bool),
    )
    return tokens, colour[torch.arange(n), place] == asked


def test_a_head_holds_one_picture_against_the_other_in_the_place_that_words_name():
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    sizes = Sizes(image_width=8, pooled_width=16, text_width=8, context=2)
    head = make_head(HeadConfig(source=True, width=128), sizes)
    optimiser = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(120):
        tokens, done = _recoloured(rng, 256)
        loss = (expectation(head(tokens)) - 1 - 4 * done.float()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    tokens, done = _recoloured(rng, 1024)
    right = (expectation(head(tokens)) > 3) == done
    assert right.float().mean() > 0.9  # 0.77 without what the words pick of both


# --- consistency ----------------------------------------------------------------------------------


def test_the_gate_and_the_distance_by_hand():
    assert [gate(v) for v in (0.0, 0.3, 0.5, 0.7, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert closeness(0.0) == 1 and closeness(25.0) == pytest.approx(0.5)
    source = np.full((3, 64, 64), 100, np.uint8)
    output = source.copy()
    output[:, :16, :16] += 40  # one of 16 patches
    touched = np.zeros(16)
    assert outside_rms(source, output, touched) == pytest.approx(40 / 4)
    touched[0] = 1
    assert outside_rms(source, output, touched) == 0
    touched[0] = 0.25
    assert outside_rms(source, output, touched) == pytest.approx((0.5 * 1600 / 15.5) ** 0.5)
    touched[0] = 0.5  # rather touched than not
    assert outside_rms(source, output, touched) == 0
    assert outside_rms(source, output, np.ones(16)) == 0


class _Said:
    """Consistency with heads that say what the test wants."""

    @staticmethod
    def answer(towers, sample, done, touched, identity=1.0, face=False):
        judge = tiny_judge(towers, "consistency", floor=4.0)
        sure = torch.tensor([0.0, 0, 0, 0, 0])
        level = lambda v: torch.log(torch.tensor([1 - v, 0, 0, 0, v]) + 1e-9)  # noqa: E731
        said = {
            "instruction": level(done),
            "region": (torch.tensor(touched) - 0.5) * 100,
            "identity": level(identity),
            "face": torch.tensor([0.0, 9.0 if face else -9.0]),
        }
        assert len(sure) == 5
        return judge.answer(said, sample)[0]


def test_doing_nothing_keeps_nothing_and_another_source_is_no_match(towers):
    sample, free = EDITS[0], [0.0] * 16
    nothing = replace(sample, image=sample.sources[0])
    assert _Said.answer(towers, nothing, done=0.1, touched=free) == 0
    assert _Said.answer(towers, nothing, done=1.0, touched=free) == pytest.approx(1.0)
    other = replace(sample, image=render(world.draw("text", 3)))
    assert _Said.answer(towers, other, done=1.0, touched=free) < 0.3


def test_the_codecs_own_loss_costs_nothing_and_a_lost_face_half(towers):
    sample = replace(EDITS[0], image=EDITS[0].sources[0])
    noise = np.random.default_rng(0).integers(-4, 5, sample.image.shape)
    worn = replace(sample, image=np.clip(sample.image + noise, 0, 255).astype(np.uint8))
    free = [0.0] * 16
    assert _Said.answer(towers, worn, 1.0, free) == 1.0
    whole = _Said.answer(towers, sample, 1.0, free, identity=0.999, face=True)
    lost = _Said.answer(towers, sample, 1.0, free, identity=0.001, face=True)
    assert whole > 0.99 and lost == pytest.approx(0.5, abs=0.01)


def test_the_region_is_read_without_the_output():
    torch.manual_seed(0)
    head = make_head(HeadConfig(kind="region", source=True), SIZES)
    assert isinstance(head, RegionHead)
    one = Tokens(
        image=torch.randn(2, 16, 32),
        pooled=POOLED,
        source=torch.randn(2, 16, 32),
        text=torch.randn(2, 5, 32),
        words=torch.ones(2, 5, dtype=torch.bool),
    )
    assert torch.equal(head(one), head(replace(one, image=torch.randn(2, 16, 32))))


def test_a_face_is_most_like_itself():
    torch.manual_seed(0)
    head = make_head(HeadConfig(kind="face", text=False, source=True), SIZES)
    assert isinstance(head, FaceHead)
    one, other = torch.randn(3, 16, 32), torch.randn(3, 16, 32)
    pooled = torch.zeros(3, 48)
    same = head(Tokens(image=one, pooled=pooled, source=one))
    differs = head(Tokens(image=other, pooled=pooled, source=one))
    assert bool((expectation(same) > expectation(differs)).all())
    assert torch.allclose(same.exp().sum(-1), torch.ones(3), atol=1e-4)


# --- fitting --------------------------------------------------------------------------------------


def test_monotone_regression_against_hand():
    found = monotone(np.array([1.0, 3.0, 2.0, 4.0]), np.ones(4))
    assert found.tolist() == [1.0, 2.5, 2.5, 4.0]
    weighted = monotone(np.array([3.0, 0.0]), np.array([1.0, 2.0]))
    assert weighted.tolist() == [1.0, 1.0]


def test_calibration_maps_raw_values_to_mean_ratings_and_never_ties():
    rng = np.random.default_rng(0)
    raw = rng.uniform(0.3, 0.7, 4000)
    rating = np.clip((raw - 0.3) / 0.4 + rng.normal(0, 0.1, 4000), 0, 1)
    fitted = fit_calibration(raw, rating)
    for value in (0.35, 0.5, 0.65):
        assert fitted(value) == pytest.approx((value - 0.3) / 0.4, abs=0.04)
    grid = [fitted(v) for v in np.linspace(0.0, 1.0, 50)]
    assert all(a < b for a, b in zip(grid, grid[1:], strict=False))
    assert fit_calibration(raw[:5], rating[:5]).raw == ()
    assert fit_calibration(np.full(99, 0.5), rating[:99]).raw == ()


@pytest.mark.parametrize(
    ("trunk", "stage", "patches"), [("", 0, 16), ("test_convnext2", 1, 64), ("small_resnet", 2, 64)]
)
def test_image_towers_of_three_makes_give_tokens_and_features(tmp_path, trunk, stage, patches):
    torch.manual_seed(0)
    shape = replace(SHAPE, trunk=trunk, stage=stage, embed=40)
    made = new_towers(shape, ["a red ring on white"] * 4, tmp_path / "made")
    assert made.sizes.pooled_width == 40
    again = open_towers(str(tmp_path / "made"))
    pictures = [s.image for s in MADE[:3]]
    with torch.no_grad():
        for first, second in zip(made._see(pictures), again._see(pictures), strict=True):
            assert torch.equal(first, second)
        tokens, features = made.see(pictures)
        assert tokens.shape == (3, patches, made.sizes.image_width)
        unit = features / features.norm(dim=-1, keepdim=True)
        assert torch.allclose(unit, made.embed(pictures, ["a ring"])[0], atol=1e-5)
    made.requires_grad_(True)
    sum(part.sum() for part in made._see(pictures)).backward()
    idle = [n for n, p in made.named_parameters() if p.grad is None and "visual" in n]
    assert not idle


def test_small_resnet_has_no_published_weights():
    with pytest.raises(ValueError, match="no published weights"):
        small_resnet(pretrained=True)


def test_a_normal_score_is_expected_at_its_mean_and_keeps_a_gradient():
    numbers = torch.tensor([[0.0, 0.0], [0.5, -2.0], [-0.5, -1.0]], requires_grad=True)
    logits = normal_levels(numbers, 5)
    assert torch.allclose(expectation(logits), torch.tensor([3.0, 4.0, 2.0]), atol=0.12)
    sure = normal_levels(torch.tensor([[0.5, -20.0]], requires_grad=True), 5)
    assert float(sure.softmax(-1)[0, 3].detach()) > 0.99  # all mass on 4, and yet
    one = torch.tensor([[0.5, -2.0]], requires_grad=True)
    expectation(normal_levels(one, 5)).sum().backward()
    assert one.grad is not None and float(one.grad[0, 0]) > 0.5
