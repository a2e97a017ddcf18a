"""Teachers, bundles and methods of distillation, on stock classes with random weights."""

import pytest
import torch

from rlhf import weights
from rlhf.distill.bundles import Bundles, condition_of, field_of
from rlhf.distill.grids import grid_of, through
from rlhf.distill.matching import FAKE, DistributionMatching, MatchingConfig
from rlhf.distill.method import Consistency, OnPolicy, Segments, student_loss
from rlhf.distill.objectives import euler
from rlhf.distill.student import give_grid
from rlhf.distill.teachers import Teacher, TeacherConfig, Teachers, open_teachers
from rlhf.distill.trajectories import Trajectories, student_states
from rlhf.errors import ConfigError
from rlhf.learner import LearnerConfig
from rlhf.sampling import Sampler, sample
from rlhf.types import Prompt
from tests.pipelines.conftest import make_run
from tests.rlhf.tiny import make_policy, same, shake, snapshot

SIZE = (64, 64)
KNOTS = grid_of("even-2")
TEXTS = ("a red circle", "a blue square on white", "HI", "a red square")


def prompts(category="objects"):
    return [Prompt(id=f"t#{i}", text=t, category=category) for i, t in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def policy(tiny_base):
    """A LoRA policy that is not its base."""
    made = make_policy(tiny_base)
    shake(made)
    return made


@pytest.fixture(scope="module")
def bundle(policy):
    return bundles(policy).at(1)[0]


def bundles(policy, every=None, **changes):
    known = dict(per=2, copies=2, noises=1, seed=0, parts=1)
    return Bundles(every or prompts(), policy, SIZE, **(known | changes))


def teachers(policy, **configs):
    return open_teachers(policy, configs or {"base": TeacherConfig(guidance=3.0)})


def trajectories(policy, folder, steps=6, **configs):
    sigmas = through(policy.sigmas(steps, SIZE), KNOTS)
    return Trajectories(policy, teachers(policy, **configs), {SIZE: sigmas}, KNOTS, folder)


# --- bundles --------------------------------------------------------------------------------------


def test_every_prompt_comes_once_an_epoch_and_every_row_counts_alike(policy):
    made = bundles(policy, [*prompts(), *prompts("text")], parts=2)
    steps = [made.at(step) for step in range(1, made.count + 1)]  # two epochs
    flat = [bundle for step in steps for bundle in step]
    assert made.count == len(flat) / 2 >= 4
    for epoch in (flat[: made.count], flat[made.count :]):
        assert len([p for b in epoch for p in b.prompts]) == 8
    assert all(len({p.category for p in b.prompts}) == 1 for b in flat)
    assert all(b.weight == pytest.approx(b.rows / 4) for b in flat)
    assert len({b.key for b in flat}) == len(flat)
    assert all(len(condition_of(policy, b).embeds_PLD) == len(b.prompts) for b in flat)


@pytest.mark.parametrize("noises, again", [(1, True), (0, False)])
def test_seeds_come_again_after_as_many_epochs_as_stated(policy, noises, again):
    made = bundles(policy, noises=noises)
    first, second = (
        {b.seeds for step in steps for b in made.at(step)}
        for steps in (range(1, made.count + 1), range(made.count + 1, 2 * made.count + 1))
    )
    assert (first == second) == again
    assert made.at(3) == bundles(policy, noises=noises).at(3)


# --- teachers -------------------------------------------------------------------------------------


def test_a_teacher_is_guided(policy, bundle):
    x, sigma = bundle.noises(policy), torch.linspace(0.2, 0.9, bundle.rows)
    v = teachers(policy).fields(bundle, [0])(x, sigma, 0)
    with torch.no_grad():
        v_c, v_u = (
            policy.velocity(x, sigma, c, size=SIZE, slot="reference")
            for c in (condition_of(policy, bundle), condition_of(policy, bundle, negative=True))
        )
    torch.testing.assert_close(v, v_u + 3 * (v_c - v_u), atol=1e-5, rtol=1e-4)
    assert (v - v_c).abs().max() > 1e-3


def test_teachers_share_what_they_say_by_category_and_step(tiny_base, policy, bundle, tmp_path):
    run = make_run(tiny_base, tmp_path, "specialist")
    made = teachers(
        policy,
        base=TeacherConfig(categories={"*": 1.0}, by_step=(1.0, 0.5)),
        special=TeacherConfig(
            model=str(run.root), guidance=1.0, categories={"objects": 3.0}, by_step=(0.0, 0.5)
        ),
    )
    assert made.shares("objects", 0) == {"base": 1.0}
    assert made.shares("objects", 1) == made.shares("objects", 7) == {"base": 0.25, "special": 0.75}
    assert made.shares("text", 1) == {"base": 1.0}
    assert (
        made.every["special"].policy is policy and made.every["special"].slot == "teacher/special"
    )
    x = bundle.noises(policy)
    base, special = (one.field(bundle)(x, 0.5) for one in made.every.values())
    said = made.fields(bundle, [1])(x, 0.5, 1)
    torch.testing.assert_close(said, 0.25 * base + 0.75 * special)
    assert (base - special).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="a say on prompts of 'text' at step 1"):
        teachers(policy, only=TeacherConfig(categories={"objects": 1.0})).check(["text"], 2)


def test_a_teacher_that_is_no_slot_of_the_student_is_a_policy_of_its_own(tiny_base, tmp_path):
    student = make_policy(tiny_base)
    run = make_run(tiny_base, tmp_path, "full", train="full")
    made = teachers(student, full=TeacherConfig(model=str(run.root)))
    assert made.every["full"].policy is not student and "teacher/full" not in student.slots.names
    assert not any(p.requires_grad for p in made.every["full"].policy.transformer.parameters())


@pytest.fixture
def moved(tiny_base, policy, monkeypatch):
    """Two teachers with policies of their own, whose device is an accelerator that is only written
    down, beside one that is a slot of the student; and the moves that were asked for.
    """
    said = {
        "base": TeacherConfig(),
        "signs": TeacherConfig(categories={"text": 1.0}),
        "early": TeacherConfig(by_step=(1.0, 0.0)),
    }
    moves: list[tuple[str, str]] = []

    def watch(name, made):
        note = lambda place: moves.append((name, torch.device(place).type))  # noqa: E731
        monkeypatch.setattr(made.pipeline, "to", note, raising=False)
        monkeypatch.setattr(made, "device", torch.device("cuda"))
        return made

    every = {"base": Teacher(config=said["base"], policy=policy, slot="reference")}
    for name in ("signs", "early"):
        own = watch(name, make_policy(tiny_base, train="none"))
        every[name] = Teacher(config=said[name], policy=own, slot="train", own=True)
    return Teachers(every), moves


def test_teachers_that_are_silent_leave_the_device_before_others_come(policy, moved):
    made, moves = moved
    shapes, signs = (bundles(policy, prompts(c)).at(1)[0] for c in ("objects", "text"))
    for bundle, steps, wanted in [
        (shapes, [0], [("early", "cuda")]),
        (shapes, [0, 1], []),
        (shapes, [1], [("early", "cpu")]),
        (signs, [0], [("early", "cuda"), ("signs", "cuda")]),
        (signs, [1], [("early", "cpu")]),
        (shapes, [0], [("signs", "cpu"), ("early", "cuda")]),
    ]:
        made.fields(bundle, steps)
        assert moves == wanted
        moves.clear()


def test_teachers_are_opened_one_by_one_and_stay_where_they_are_on_a_cpu(
    tiny_base, bundle, tmp_path, monkeypatch
):
    student, asked = make_policy(tiny_base), []
    run = make_run(tiny_base, tmp_path, "full", train="full")
    place = Teacher.place
    monkeypatch.setattr(Teacher, "place", lambda self, on: asked.append(on) or place(self, on))
    made = teachers(student, one=TeacherConfig(model=str(run.root)), base=TeacherConfig())
    assert asked == [False, False] and made.every["one"].own and not made.every["base"].own
    to = lambda *_: pytest.fail("nothing moves on a CPU")  # noqa: E731
    monkeypatch.setattr(made.every["one"].policy.pipeline, "to", to, raising=False)
    assert made.fields(bundle, [0])(bundle.noises(student), 0.5, 0).isfinite().all()
    made.call(())
    assert asked == [False, False, True, True, False, False]


# --- methods --------------------------------------------------------------------------------------


def test_steps_with_the_segments_targets_follow_the_guided_teacher(policy, tmp_path):
    made = trajectories(policy, tmp_path)
    one = bundles(policy, per=1).at(1)[0]
    asked = Segments(made).targets(one)
    states = made.of(one)
    x = one.noises(policy)
    for k in range(2):
        rows = asked.sigma_B == KNOTS[k]
        torch.testing.assert_close(asked.x_BNC[rows], x, atol=1e-5, rtol=1e-4)
        level = torch.full((one.rows,), KNOTS[k])
        x = euler(x, asked.velocity_BNC[rows], level, torch.full_like(level, KNOTS[k + 1]))
    torch.testing.assert_close(x, states[-1], atol=1e-5, rtol=1e-4)
    sampler = Sampler(steps=6, guidance=3.0)
    usual = sample(policy, sampler, one.prompts[0].text, seeds=one.seeds[0], slot="reference")
    gap = (states[-1] - usual.x0_GNC).square().mean() / usual.x0_GNC.square().mean()
    assert gap < 0.05  # a grid that passes through the knots is hardly another one
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    assert made.of(one).equal(states) and kept.stat().st_mtime_ns == written


def test_a_segment_of_one_teacher_step_is_that_step_for_consistency_too(policy, tmp_path):
    """At the last level before the end of a segment v* is the teacher's own velocity."""
    sigmas = (1.0, 0.5, 0.0)
    made = Trajectories(policy, teachers(policy), {SIZE: sigmas}, KNOTS, tmp_path)
    one = bundles(policy).at(1)[0]
    asked = Consistency(policy, made).targets(one)
    step = KNOTS.index(float(asked.sigma_B[0]))
    said = made.teachers.fields(one, [step])(asked.x_BNC, asked.sigma_B, step)
    torch.testing.assert_close(asked.velocity_BNC, said, atol=1e-5, rtol=1e-4)


def test_consistency_leads_where_the_teacher_and_then_the_student_lead(policy, tmp_path):
    made = trajectories(policy, tmp_path)
    grid = torch.tensor(made.grids[SIZE])
    for bundle in (b for step in range(1, 4) for b in bundles(policy).at(step)):
        asked = Consistency(policy, made).targets(bundle)
        s = asked.sigma_B
        step = sum(float(s[0]) <= knot for knot in KNOTS[1:-1])
        s_end = torch.full_like(s, KNOTS[step + 1])
        at = (grid[None] == s[:, None]).nonzero()[:, 1]
        s_next = grid[at + 1]
        x_next = euler(
            asked.x_BNC, made.teachers.fields(bundle, [step])(asked.x_BNC, s, step), s, s_next
        )
        own = field_of(policy, bundle, "train")(x_next, s_next)
        end = euler(x_next, own, s_next, s_end)
        mine = euler(asked.x_BNC, asked.velocity_BNC, s, s_end)
        torch.testing.assert_close(mine, end, atol=1e-5, rtol=1e-4)


def test_opd_asks_the_guided_teacher_at_every_state_of_the_student(policy):
    one = bundles(policy, per=1).at(1)[0]
    sigmas = policy.sigmas(3, SIZE)
    method = OnPolicy(policy, teachers(policy), {SIZE: sigmas}, {SIZE: [1.0, 2.0, 4.0]})
    asked = method.targets(one)
    x = asked.x_BNC[asked.sigma_B == 1.0]
    states = student_states(policy, one, sigmas, x, 2)
    speak = teachers(policy).fields(one, range(3))
    for k, state in enumerate(states):
        rows = asked.sigma_B == torch.tensor(sigmas[k])
        torch.testing.assert_close(asked.x_BNC[rows], state)
        torch.testing.assert_close(asked.velocity_BNC[rows], speak(state, sigmas[k], k))
        assert asked.weight_B[rows].unique().tolist() == pytest.approx([2**k / (3 * one.rows)])
    assert not asked.velocity_BNC.requires_grad and not asked.x_BNC.requires_grad


@pytest.fixture
def matching(tiny_base):
    """A student with its fake score."""
    student = make_policy(tiny_base)
    shake(student)
    config = MatchingConfig(ratio=3, learner=LearnerConfig(lr=1e-2))
    return student, DistributionMatching(student, teachers(student), KNOTS, config)


def test_the_fake_score_is_fitted_to_what_the_student_makes(matching):
    student, method = matching
    batch = bundles(student).at(1)
    train, before = snapshot(student), snapshot(student, FAKE)
    assert same(before, student.slots.tensors("reference"))
    losses = []
    for _ in range(12):
        method.follow(batch)
        losses.append(method.figures()["fake/loss"])
    assert method.fake.steps == 36 and losses[-1] < 0.9 * losses[0]
    assert not same(before, snapshot(student, FAKE)) and same(train, snapshot(student))


def test_matching_uses_the_fake_score_as_it_is_now(matching):
    student, method = matching
    (bundle,) = bundles(student).at(1)
    first = method.targets(bundle)
    again = method.targets(bundle)
    assert torch.equal(first.velocity_BNC, again.velocity_BNC)
    with torch.no_grad():
        for parameter in method.fake.parameters.values():
            parameter.add_(0.1)
    moved = method.targets(bundle)
    assert torch.equal(moved.x_BNC, first.x_BNC)
    assert not torch.allclose(moved.velocity_BNC, first.velocity_BNC)


def test_matching_leaves_a_student_alone_whose_score_is_the_teachers(matching):
    student, _ = matching
    plain = teachers(student, base=TeacherConfig(guidance=1.0))
    method = DistributionMatching(student, plain, KNOTS, MatchingConfig())
    (bundle,) = bundles(student).at(1)
    asked = method.targets(bundle)  # fake = reference = an unguided teacher
    v = field_of(student, bundle, "train")(asked.x_BNC, asked.sigma_B)
    torch.testing.assert_close(asked.velocity_BNC, v, atol=1e-5, rtol=1e-4)
    assert asked.metrics["dmd/gradient"] < 1e-9


def method_of(name, policy, folder):
    kept = trajectories(policy, folder)
    if name == "dmd":
        return DistributionMatching(policy, kept.teachers, KNOTS, MatchingConfig(ratio=1))
    if name == "opd":
        usual = {SIZE: policy.sigmas(3, SIZE)}
        return OnPolicy(policy, kept.teachers, usual, {SIZE: [1.0] * 3})
    return Segments(kept) if name == "segments" else Consistency(policy, kept)


@pytest.mark.parametrize("name", ["segments", "consistency", "dmd", "opd"])
def test_a_student_learns_and_nothing_else_moves(tiny_base, tmp_path, name):
    student = make_policy(tiny_base, train="full")
    method = method_of(name, student, tmp_path)
    frozen = {n: p.clone() for n, p in student.pipeline.vae.named_parameters()}
    reference, train = snapshot(student, "reference"), snapshot(student)
    batch = bundles(student).at(1)
    method.follow(batch)
    loss, _ = student_loss(student, batch[0], method.targets(batch[0]))
    loss.backward()
    grads = [p.grad for p in student.slots.parameters.values() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    with torch.no_grad():
        for parameter in student.slots.parameters.values():
            parameter -= 0.01 * (parameter.grad if parameter.grad is not None else 0)
    assert weights.checksum(reference) == weights.checksum(student.slots.tensors("reference"))
    assert same(frozen, dict(student.pipeline.vae.named_parameters()))
    assert not same(train, snapshot(student))


def test_a_pipeline_samples_at_the_levels_it_is_given(tiny_base):
    policy = make_policy(tiny_base, train="none")
    give_grid(policy.pipeline, grid_of("turbo-8"))
    assert policy.sigmas(8, SIZE) == pytest.approx(grid_of("turbo-8"))
    with pytest.raises(ConfigError, match="expected 40 sample_sigmas, one per step, got 8"):
        policy.sigmas(40, SIZE)


def test_other_pipelines_cannot_be_given_levels(tiny_sd3):
    with pytest.raises(ConfigError, match="expected a QwenImage21Pipeline"):
        give_grid(make_policy(tiny_sd3, train="none").pipeline, KNOTS)
