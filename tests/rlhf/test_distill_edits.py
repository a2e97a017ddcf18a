"""Distillation of edits: what rollouts see of a source picture, student and teachers see too."""

import pytest
import torch

from rewards import images
from rlhf.distill.bundles import Bundles, condition_of
from rlhf.distill.grids import grid_of, through
from rlhf.distill.matching import DistributionMatching, MatchingConfig
from rlhf.distill.method import Consistency, OnPolicy, Segments, student_loss
from rlhf.distill.student import Shown
from rlhf.distill.teachers import TeacherConfig, open_teachers
from rlhf.distill.trajectories import Trajectories, student_states
from rlhf.learner import LearnerConfig
from rlhf.sampling import Sampler, sample
from rlhf.types import Prompt
from tests.rlhf.tiny import make_policy, picture, shake

SIZE, WIDE = (64, 64), (64, 96)
KNOTS = grid_of("even-2")
TEXTS = ("make the circle red", "make the square red")
METHODS = ("segments", "consistency", "dmd", "opd")


@pytest.fixture(scope="module")
def policy(tiny_base):
    """A LoRA policy that is not its base."""
    made = make_policy(tiny_base)
    shake(made)
    return made


def edits(folder, seed=1, size=None):
    """Prompts of one layout about a picture each; its path is the same whatever the seed."""
    out = []
    for i, text in enumerate(TEXTS):
        path = folder / f"{i}.png"
        images.save_png(path, picture(seed + 10 * i, 64, 64))
        out.append(
            Prompt(id=f"e#{i}", text=text, category="edits", sources=(str(path),), size=size)
        )
    return out


def bundles(policy, prompts, **changes):
    known = dict(per=2, copies=2, noises=1, seed=0, parts=1)
    return Bundles(prompts, policy, SIZE, **(known | changes))


def grids(policy, steps, sizes=(SIZE,)):
    return {size: policy.sigmas(steps, size) for size in sizes}


def trajectories(policy, folder, sizes=(SIZE,)):
    teachers = open_teachers(policy, {"base": TeacherConfig(guidance=3.0)})
    usual = {size: through(s, KNOTS) for size, s in grids(policy, 6, sizes).items()}
    return Trajectories(policy, teachers, usual, KNOTS, folder / "kept")


def method_of(name, policy, kept):
    if name == "dmd":
        config = MatchingConfig(ratio=1, learner=LearnerConfig(lr=1e-2))
        return DistributionMatching(policy, kept.teachers, KNOTS, config)
    if name == "opd":
        weights = {size: [1.0] * 3 for size in kept.grids}
        return OnPolicy(policy, kept.teachers, grids(policy, 3, kept.grids), weights)
    return Segments(kept) if name == "segments" else Consistency(policy, kept)


def test_edits_of_one_layout_share_a_bundle_and_no_other_prompt_is_in_it(policy, tmp_path):
    texts = [Prompt(id=f"t#{i}", text=t, category="edits") for i, t in enumerate(TEXTS)]
    wide = [Prompt(id="w", text=TEXTS[0], category="edits", sources=(str(tmp_path / "w.png"),))]
    images.save_png(tmp_path / "w.png", picture(5, 64, 96))
    made = bundles(policy, [*edits(tmp_path), *texts, *wide], per=4)
    found = [made.at(step)[0] for step in range(1, made.count + 1)]
    assert sorted(sorted(p.id for p in b.prompts) for b in found) == [
        ["e#0", "e#1"],
        ["t#0", "t#1"],
        ["w"],
    ]
    sources = {len(condition_of(policy, b).source_shapes) for b in found}
    assert sources == {0, 1}


def test_a_teacher_edits_as_rollouts_do(policy, tmp_path):
    """Guided, on the usual grid: the states at its end are the latents of a group of rollouts."""
    teachers = open_teachers(policy, {"base": TeacherConfig(guidance=3.0)})
    kept = Trajectories(policy, teachers, grids(policy, 4), (1.0, 0.0), tmp_path / "kept")
    (bundle,) = bundles(policy, edits(tmp_path)).at(1)
    made = kept.of(bundle)[-1].unflatten(0, (2, 2))
    sampler = Sampler(steps=4, guidance=3.0)
    for prompt, seeds, mine in zip(bundle.prompts, bundle.seeds, made, strict=True):
        sources = [images.load_image(path) for path in prompt.sources]
        usual = sample(policy, sampler, prompt.text, sources=sources, seeds=seeds, slot="reference")
        torch.testing.assert_close(mine, usual.x0_GNC, atol=1e-4, rtol=1e-4)


def test_a_student_edits_as_rollouts_do(policy, tmp_path):
    (bundle,) = bundles(policy, edits(tmp_path), per=1).at(1)
    sigmas = policy.sigmas(3, SIZE)
    states = student_states(policy, bundle, sigmas, bundle.noises(policy), 3)
    (prompt,) = bundle.prompts
    sources = [images.load_image(path) for path in prompt.sources]
    usual = sample(policy, Sampler(steps=3), prompt.text, sources=sources, seeds=bundle.seeds[0])
    torch.testing.assert_close(states[-1], usual.x0_GNC, atol=1e-4, rtol=1e-4)


def gradient(policy, bundle, asked):
    """Of the student, by name, in what it is asked."""
    policy.transformer.zero_grad()
    student_loss(policy, bundle, asked)[0].backward()
    found = {n: p.grad.clone() for n, p in policy.slots.parameters.items() if p.grad is not None}
    policy.transformer.zero_grad()
    return found


@pytest.mark.parametrize("name", METHODS)
def test_what_is_learnt_of_an_edit_depends_on_its_picture(policy, tmp_path, name):
    """The same instructions and seeds about other pictures at the same paths: other targets, and
    for the same target another gradient.
    """
    kept = trajectories(policy, tmp_path)
    method = method_of(name, policy, kept)
    (bundle,) = bundles(policy, edits(tmp_path, seed=1)).at(1)
    asked = method.targets(bundle)
    mine = gradient(policy, bundle, asked)
    assert mine and all(torch.isfinite(g).all() for g in mine.values())
    assert any(g.abs().max() > 0 for g in mine.values())
    edits(tmp_path, seed=2)
    other = method.targets(bundle)
    assert torch.equal(asked.sigma_B, other.sigma_B)
    assert (asked.velocity_BNC - other.velocity_BNC).abs().max() > 1e-3
    theirs = gradient(policy, bundle, asked)
    assert any((mine[n] - theirs[n]).abs().max() > 0 for n in mine)


def test_the_fake_score_sees_what_is_edited(policy, tmp_path):
    losses = []
    for seed in (1, 1, 2):
        batch = bundles(policy, edits(tmp_path, seed)).at(1)
        method = method_of("dmd", policy, trajectories(policy, tmp_path))
        method.follow(batch)
        losses.append(method.figures()["fake/loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("name", METHODS)
def test_every_size_has_a_grid_of_its_own(policy, tmp_path, name):
    """The teacher's levels depend on the size of a picture, with which its grid is shifted."""
    kept = trajectories(policy, tmp_path, (SIZE, WIDE))
    assert kept.grids[SIZE] != kept.grids[WIDE]
    method = method_of(name, policy, kept)
    (bundle,) = bundles(policy, edits(tmp_path, size=WIDE)).at(1)
    asked = method.targets(bundle)
    assert asked.x_BNC.shape[1:] == policy.latent_shape(WIDE)
    levels = set(asked.sigma_B.tolist())
    allowed = {"segments": KNOTS, "dmd": KNOTS, "opd": policy.sigmas(3, WIDE)}
    wanted = torch.tensor(allowed.get(name, kept.grids[WIDE])).tolist()
    assert levels <= set(wanted)
    assert gradient(policy, bundle, asked)


def test_a_trajectory_is_sampled_on_the_grid_of_its_size(policy, tmp_path):
    kept = trajectories(policy, tmp_path, (SIZE, WIDE))
    (bundle,) = bundles(policy, edits(tmp_path, size=WIDE)).at(1)
    states = kept.of(bundle)
    speak = kept.teachers.fields(bundle, [0, 1])
    x, sigmas = bundle.noises(policy), kept.grids[WIDE]
    for s, s_end in zip(sigmas, sigmas[1:], strict=False):
        x = x - (s - s_end) * speak(x, s, int(s <= 0.5))
    torch.testing.assert_close(states[-1], x, atol=1e-4, rtol=1e-4)


def test_a_sheet_has_what_is_edited_above_the_pictures_made_of_it(policy, tmp_path):
    made = bundles(policy, edits(tmp_path))
    kept = trajectories(policy, tmp_path)
    shown = Shown(policy, made, {SIZE: KNOTS}, kept)
    sheet = shown.sheet(shown.ends())
    assert sheet.size == (2 + 4 * 66, 2 + 3 * 66)  # sources, teachers, student; two seeds each
    source = images.load_image(made.at(1)[0].prompts[0].sources[0])
    first = images.from_pil(sheet.crop((2, 2, 66, 66)))
    assert (first == source).all()
