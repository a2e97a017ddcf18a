"""Where noise goes and what is trained: windows that slide or are drawn, subsets, shared starts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf import config
from rlhf.alignment import AlignmentLearner
from rlhf.bare import work_of
from rlhf.errors import ConfigError
from rlhf.plan import Config, Plan
from rlhf.prompts import load_prompts
from rlhf.rollout import Noisy, Request, RolloutWorker, seeds_of
from rlhf.sampling import Sampler, sample
from rlhf.schedule import build, sd3_sigmas
from rlhf.types import Advantages
from rlhf.windows import Windows, drawn, emphasised
from tests.rlhf.tiny import TEXTS, alignment, make_policy, prompts, sampler, shake, snapshot

SLIDING = Windows(kind="sliding", width=2, every=3)
RANDOM = Windows(kind="random", width=3)


@pytest.fixture(scope="module")
def policy(tiny_base):
    made = make_policy(tiny_base)
    shake(made)
    return made


# --- windows --------------------------------------------------------------------------------------


def test_a_sliding_window_dwells_moves_towards_the_data_and_begins_again():
    starts = [SLIDING.at((1, 5), 0, i, g)[0] for i in range(1, 14) for g in (0, 5)]
    assert starts[::2] == starts[1::2] == [1] * 3 + [2] * 3 + [3] * 3 + [1] * 3 + [2]
    wide = replace(SLIDING, stride=2, every=1)
    assert [wide.at((0, 7), 0, i, 0) for i in (1, 2, 3, 4)] == [(0, 2), (2, 4), (4, 6), (0, 2)]


def test_a_random_window_covers_its_range_is_a_function_of_its_keys_and_of_nothing_else():
    torch.manual_seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = [RANDOM.at((1, 7), 0, i, g) for i in range(1, 101) for g in range(4)]
    assert found == [RANDOM.at((1, 7), 0, i, g) for i in range(1, 101) for g in range(4)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    seen = Counter(found)
    assert set(seen) == {(s, s + 3) for s in range(1, 5)}
    assert all(abs(n - 100) < 4 * 100**0.5 for n in seen.values())
    assert found != [RANDOM.at((1, 7), 1, i, g) for i in range(1, 101) for g in range(4)]
    assert len({RANDOM.at((1, 7), 0, 1, g) for g in range(20)}) == 4  # groups differ


def test_high_noise_is_drawn_more_often_by_the_stated_weights():
    assert emphasised(range(4), 4, 0.0).tolist() == [1.0] * 4
    assert emphasised([0, 1, 2], 4, 2.0).tolist() == pytest.approx([1.0, 0.5625, 0.25])
    count = Counter(drawn((0, 4), 8, 1, 3.0, i)[0] for i in range(2000))
    want = emphasised(range(4), 8, 3.0)
    for index, share in enumerate((want / want.sum()).tolist()):
        assert count[index] / 2000 == pytest.approx(share, abs=0.045)
    even = Counter(i for key in range(400) for i in drawn((2, 6), 8, 2, 0.0, key))
    assert set(even) == {2, 3, 4, 5} and max(even.values()) - min(even.values()) < 80
    three = [drawn((0, 8), 8, 3, 1.0, key) for key in range(50)]
    assert all(list(t) == sorted(set(t)) and len(t) == 3 for t in three)


@pytest.mark.parametrize(
    "windows, words",
    [
        (Windows(width=2), "expected 0 with kind fixed"),
        (Windows(kind="sliding"), "1 or more with the others"),
        (Windows(kind="random", width=2, every=0), "every and stride of at least 1"),
    ],
)
def test_windows_that_say_nothing_are_refused(windows, words):
    with pytest.raises(ConfigError, match=words):
        windows.check()


def test_trained_steps_lie_in_the_window():
    grid = build(sd3_sigmas(8), "flow-sde", 0.7, (1, 5), (1, 4))
    assert grid.trained == (1, 4) and list(grid.noisy) == [1, 2, 3, 4]
    assert grid.coefficients(2).q > 0 and grid.coefficients(5).q == 0
    assert build(sd3_sigmas(8), "flow-sde", 0.7, (1, 5)).trained == (1, 2, 3, 4)
    for bad in ((0,), (5,), (2, 1), (2, 2)):
        with pytest.raises(ConfigError, match="rising order inside the window"):
            build(sd3_sigmas(8), "flow-sde", 0.7, (1, 5), bad)


# --- requests -------------------------------------------------------------------------------------

SDE = ("loss.name=grpo", "rollout.kernel=flow-sde", "rollout.steps=10", "prompts.count=24")


def plan(*changes):
    made = config.load(Config, None, [*SDE, *changes], "align")
    return Plan.of(made, load_prompts(made.prompts))


def test_a_group_has_one_window_and_groups_have_their_own():
    made = plan("rollout.window=[0,6]", "windows={kind: random, width: 2}", "loss.trained_steps=1")
    request = made.request(3)
    assert request == made.request(3) and len(request.noisy) == 12
    assert len({n.window for n in request.noisy}) > 2
    for own in request.noisy:
        start, stop = own.window
        assert 0 <= start < stop <= 6 and stop - start == 2
        assert len(own.trained) == 1 and start <= own.trained[0] < stop
    assert made.request(4).noisy != request.noisy
    sliding = plan("rollout.window=[0,6]", "windows={kind: sliding, width: 2, every: 2}")
    assert [sliding.request(i).noisy[0].window for i in (1, 2, 3)] == [(0, 2), (0, 2), (1, 3)]
    fixed = plan("rollout.window=[0,6]", "rollout.trained=[0,2]").request(1)
    assert set(fixed.noisy) == {Noisy(window=(0, 6), trained=(0, 2))}


@pytest.mark.parametrize(
    "changes, words",
    [
        (("windows={kind: random, width: 4}", "rollout.window=[0,4]"), "nothing could move"),
        (("rollout.window=[0,4]", "loss.trained_steps=4"), "less than the 4 steps of a window"),
        (
            ("rollout.window=[0,4]", "rollout.trained=[0]", "loss.trained_steps=2"),
            "two answers to one question",
        ),
        (
            ("rollout.window=[0,4]", "rollout.trained=[0]", "windows={kind: random, width: 2}"),
            "two answers to one question",
        ),
        (("rollout.window=[0,4]", "loss.emphasis=2.0"), "nothing is drawn"),
        (("rollout.window=[0,4]", "loss.sigma_span=[0.0,0.5]"), "write rollout.window"),
        (("rollout.window=[0,4]", "loss.emphasis=-1.0"), "an emphasis from 0 to 100"),
        (("loss.name=nft", "rollout.window=[0,4]", "loss.trained_steps=2"), "drawn afresh"),
        (
            ("loss.name=nft", "rollout.kernel=ode", "windows={kind: random, width: 2}"),
            "Euler steps take none",
        ),
        (("loss.name=nft", "rollout.kernel=ode", "rollout.shared_noise=true"), "one picture"),
    ],
)
def test_what_is_not_defined_is_refused_with_the_reason(changes, words):
    with pytest.raises(ConfigError, match=words):
        plan(*changes)


def test_held_out_pictures_have_noise_of_their_own_and_no_window():
    made = plan("rollout.window=[2,6]", "rollout.trained=[3]", "rollout.shared_noise=true").config
    protocol = made.protocol().sampler
    assert (protocol.window, protocol.trained, protocol.shared_noise) == ((0, 0), (), False)


# --- rollouts and training ------------------------------------------------------------------------


def test_members_that_share_their_start_branch_at_the_window(policy):
    made_by = Sampler(
        steps=6, guidance=3.0, kernel="flow-sde", window=(3, 5), trained=(4,), shared_noise=True
    )
    assert made_by.shared_steps == 3
    got = sample(policy, made_by, TEXTS[0], seeds=(1, 2, 3), store=("trajectory",))
    assert got.forwards == made_by.forwards(3) == 2 * (3 * 1 + 3 * 3)
    assert got.trajectory.index_K == (4,) and got.trajectory.x_KGNC.shape[:2] == (1, 3)
    whole = sample(
        policy, replace(made_by, trained=()), TEXTS[0], seeds=(1, 2, 3), store=("trajectory",)
    )
    assert torch.equal(whole.x0_GNC, got.x0_GNC)
    first, second = whole.trajectory.x_KGNC
    assert torch.equal(first[0], first[1]) and torch.equal(first[0], first[2])
    assert not torch.equal(second[0], second[1])
    own = sample(
        policy,
        replace(made_by, shared_noise=False, trained=()),
        TEXTS[0],
        seeds=(1, 9, 8),
        store=("trajectory",),
    )
    assert (own.trajectory.x_KGNC[0, 0] - first[0]).abs().max() < 1e-5
    assert own.forwards == 2 * 6 * 3


def rolled(policy, learner, made_by, loss, noisy):
    worker = RolloutWorker(policy)
    handover = learner.publish("behaviour")
    worker.bind(handover)
    request = Request(
        iteration=1,
        prompts=prompts(len(noisy)),
        seeds=seeds_of(0, 1, len(noisy), 4),
        sampler=made_by,
        store=loss.requires,
        noisy=noisy,
    )
    done = [worker.rollout(ref, request) for ref in request.refs(handover.version)]
    assert request.forwards == sum(int(r.stats["nfe"]) for r in done)
    return done


@pytest.mark.parametrize("name", ["grpo", "guard", "dppo"])
@pytest.mark.parametrize("old", ["rollout", "replay"])
def test_groups_of_different_windows_are_trained_together(tiny_base, name, old):
    policy = make_policy(tiny_base)
    shake(policy)
    learner = AlignmentLearner(policy, alignment(name, old_logp=old))
    noisy = (Noisy(window=(0, 3), trained=(0, 2)), Noisy(window=(1, 4)))
    made_by = sampler(name, steps=6, shared_noise=True)
    rollouts = rolled(make_policy(tiny_base), learner, made_by, learner.config.loss.loss, noisy)
    assert [r.trajectory.index_K for r in rollouts] == [(0, 2), (1, 2, 3)]
    before = snapshot(policy)
    value = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 2)
    report = learner.update(rollouts, Advantages(value_PG=value, live_PG=value != 0))
    assert report.metrics["ratio/first_max_dev"] <= 1e-6
    assert any(not torch.equal(before[n], t) for n, t in snapshot(policy).items())
    levels = [[r.schedule.sigmas[i] for i in r.trajectory.index_K] for r in rollouts]
    assert report.metrics["trained/sigma"] == pytest.approx(np.mean([np.mean(x) for x in levels]))


def test_a_forward_process_loss_draws_the_stated_part_of_the_grid(tiny_base):
    policy = make_policy(tiny_base)
    mean = {}
    for name, changes in {
        "all": {},
        "emphasis": {"emphasis": 4.0},
        "early": {"sigma_span": (0.0, 0.25)},
    }.items():
        learner = AlignmentLearner(policy, alignment("nft", lr=1e-9, **changes))
        noisy = (Noisy(window=(0, 0)),) * 2
        rollouts = rolled(make_policy(tiny_base), learner, sampler(steps=8), _nft(), noisy)
        value = torch.tensor([[1.0, -1.0, 0.5, -0.5]] * 2)
        levels = []
        for _ in range(8):
            report = learner.update(rollouts, Advantages(value_PG=value, live_PG=value != 0))
            levels.append(report.metrics["trained/sigma"])
            rollouts = rolled(make_policy(tiny_base), learner, sampler(steps=8), _nft(), noisy)
        mean[name] = np.mean(levels)
        grid = rollouts[0].schedule.sigmas
    assert mean["all"] < mean["emphasis"] < 1
    assert grid[1] <= mean["early"] <= 1
    assert mean["all"] == pytest.approx(np.mean(grid[:-1]), abs=0.15)


def _nft():
    return alignment("nft").loss.loss


def test_work_is_counted_with_shared_steps_and_trained_subsets():
    made = plan("rollout.window=[2,8]", "rollout.shared_noise=true", "loss.trained_steps=2").config
    work = work_of(3, 8, made.usual_sampler(), made.recipe().alignment)
    rows = work.counts()
    assert rows["count/rollout/forward_rows"] == 3 * 2 * (2 + 8 * 8)
    assert rows["count/train/backward_rows"] == 3 * 6 * 8 * 2
    moving = plan("rollout.window=[2,8]", "windows={kind: random, width: 2}").config
    assert moving.usual_sampler().window == (4, 6)
