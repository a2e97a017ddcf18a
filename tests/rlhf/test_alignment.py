"""Invariants 1 (replay), 7 (samples not live) and 8 (what is frozen), on the real policy."""

from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from rewards import images
from rlhf import kernels, noise
from rlhf.alignment import AlignmentLearner, LossConfig
from rlhf.errors import ConfigError, ReplayMismatch
from rlhf.losses import LOSSES, kernels_of, transition_log_prob
from rlhf.rollout import RolloutWorker
from rlhf.types import Advantages, Trajectory
from tests.rlhf.tiny import (
    alignment,
    make_policy,
    noises,
    picture,
    request,
    same,
    sampler,
    shake,
    snapshot,
)

RATIO = tuple(name for name, loss in LOSSES.items() if loss.form)
GROUPS, SIZE = 2, 4


class Pair:
    """A learner and a rollout worker with policies of their own, as in a cluster."""

    def __init__(self, base, loss, guidance=3.0, worker_dtype="float32", cached=True, **changes):
        how = {key: changes.pop(key) for key in ("kernel",) if key in changes}
        policy = make_policy(base)
        shake(policy)
        self.learner = AlignmentLearner(policy, alignment(loss, **changes))
        self.worker = RolloutWorker(make_policy(base, dtype=worker_dtype))
        self.loss = LOSSES[loss]
        self.sampler = sampler(loss, guidance=guidance, cached_prefix=cached, **how)

    def roll(self, iteration=1):
        handover = self.learner.publish("behaviour")
        self.worker.bind(handover)
        guidance = self.learner.config.train_guidance
        asked = replace(
            request(iteration, self.sampler, self.loss.requires, GROUPS, SIZE),
            train_guidance=guidance,
        )
        return [self.worker.rollout(ref, asked) for ref in asked.refs(handover.version)]

    def train(self):
        return snapshot(self.learner.policy)


def advantages(live=None):
    value = torch.randn(GROUPS, SIZE, generator=torch.Generator().manual_seed(5))
    live = torch.ones(GROUPS, SIZE, dtype=torch.bool) if live is None else live
    return Advantages(value_PG=torch.where(live, value, 0.0), live_PG=live)


# --- invariant 1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "whole"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("loss", ["grpo", "guard"])
def test_replay_at_the_rollouts_geometry_is_bit_equal(any_base, loss, guidance, cached):
    pair = Pair(any_base, loss, guidance, cached=cached)
    policy = pair.learner.policy
    for got in pair.roll():
        t, grid = got.trajectory, got.schedule
        assert t.index_K == (0, 1)
        condition = policy.encode(got.ref.prompt.text)
        prefix = policy.prefix(condition) if got.geometry.cached_prefix else None
        for j, index in enumerate(t.index_K):
            level = torch.full((SIZE,), grid.sigmas[index])
            v = policy.velocity(t.x_KGNC[j], level, condition, size=(64, 64), prefix=prefix)
            assert v.requires_grad  # the gradient's graph costs no bit
            shift = None if t.shift_KGNC is None else t.shift_KGNC[j]
            logp = transition_log_prob(
                v, t.x_KGNC[j], t.next_KGNC[j], grid, index, pair.loss.form, shift
            )
            assert torch.equal(logp, t.logp_KG[j])
        assert torch.equal(t.x_KGNC[1], t.next_KGNC[0])
        assert (t.shift_KGNC is not None) == ("shift" in pair.loss.requires)
        assert (t.velocity_KGNC is not None) == ("velocity" in pair.loss.requires)


def test_sampling_is_repeatable_from_the_seeds(any_base):
    pair = Pair(any_base, "grpo")
    first, second = pair.roll(), pair.roll()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.x0_GNC, b.x0_GNC) and torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.trajectory.logp_KG, b.trajectory.logp_KG)


def test_a_step_of_the_rollout_is_the_kernel_at_the_recorded_noise(any_base):
    pair = Pair(any_base, "grpo", guidance=1.0)
    got = pair.roll()[0]
    t, policy = got.trajectory, pair.learner.policy
    condition = policy.encode(got.ref.prompt.text)
    z = torch.stack([noise.step_noise(s, 0, policy.latent_shape((64, 64))) for s in got.ref.seeds])
    with torch.no_grad():
        v = policy.velocity(
            t.x_KGNC[0], torch.ones(SIZE), condition, size=(64, 64), prefix=policy.prefix(condition)
        )
    done = kernels.step(t.x_KGNC[0], v, got.schedule, 0, z)
    assert torch.equal(done.next, t.next_KGNC[0])


CASES = [
    *(("grpo", "flow-sde", *w) for w in ((1.0, 1.0), (3.0, 3.0))),
    *(("guard", "flow-sde", *w) for w in ((1.0, 1.0), (3.0, 3.0))),
    *((loss, kernel, 3.0, 1.0) for loss in RATIO for kernel in kernels_of(LOSSES[loss])),
]


@pytest.mark.parametrize("loss, kernel, guidance, train", CASES)
def test_the_first_ratio_is_one_at_the_training_geometry(any_base, loss, kernel, guidance, train):
    pair = Pair(any_base, loss, guidance, train_guidance=train, kernel=kernel)
    before = pair.train()
    for iteration in (1, 2):
        metrics = pair.learner.update(pair.roll(iteration), advantages()).metrics
        assert metrics["ratio/first_max_dev"] <= 1e-6
        assert metrics["ratio/max_dev"] > 1e-6  # the second update is at other weights
        assert metrics.get("kl/old", 1.0) > 0
    assert not same(before, pair.train())


def test_other_weights_than_the_rollouts_are_noticed(any_base):
    pair = Pair(any_base, "grpo")
    got = pair.roll()
    shake(pair.learner.policy, seed=9, size=0.02)  # behaviour, and so the version, stay
    before = pair.train()
    with pytest.raises(ReplayMismatch, match="group 0 differ by"):
        pair.learner.update(got, advantages())
    assert same(before, pair.train())


def test_another_grid_than_the_rollouts_is_noticed(any_base):
    """The learner has none of its own: levels and numbers of steps are those of the record."""
    pair = Pair(any_base, "grpo")
    got, before = pair.roll(), pair.train()
    other = replace(pair.sampler, steps=5).schedule(pair.learner.policy)
    swapped = [replace(r, trajectory=replace(r.trajectory, index_K=(1, 0))) for r in got]
    for wrong in ([replace(r, schedule=other) for r in got], swapped):
        with pytest.raises(ReplayMismatch):
            pair.learner.update(wrong, advantages())
    assert same(before, pair.train())
    assert pair.learner.update(got, advantages()).metrics["ratio/first_max_dev"] <= 1e-6


def test_another_dtype_than_the_rollouts_is_noticed_and_replay_mode_bridges_it(any_base):
    for mode in ("rollout", "replay"):
        pair = Pair(any_base, "grpo", worker_dtype="bfloat16", old_logp=mode)
        got = pair.roll()
        if mode == "rollout":
            with pytest.raises(ReplayMismatch, match="old_logp=replay"):
                pair.learner.update(got, advantages())
        else:
            metrics = pair.learner.update(got, advantages()).metrics
            assert metrics["ratio/first_max_dev"] <= 1e-6


@pytest.mark.parametrize("loss", ["grpo", "guard", "dppo"])
def test_replay_mode_trains_as_the_stored_log_probs_do(any_base, loss):
    """The old log-prob is of the weights before the first update, also at the later ones."""
    ends = []
    for mode in ("rollout", "replay"):
        pair = Pair(any_base, loss, old_logp=mode, updates_per_rollout=3)
        for iteration in (1, 2):
            metrics = pair.learner.update(pair.roll(iteration), advantages()).metrics
        ends.append((pair.train(), metrics["ratio/mean"]))
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-6) and abs(ends[0][1] - 1) > 1e-6
    for name, tensor in ends[0][0].items():
        assert (tensor - ends[1][0][name]).abs().max() < 2e-3


@pytest.mark.parametrize("loss", ["grpo", "guard"])
def test_log_probs_of_edits_are_computed_again_with_their_source(tiny_base, tmp_path, loss):
    """Another picture behind the same path is another policy: noticed before anything is learnt."""
    source = tmp_path / "source.png"
    images.save_png(source, picture(1, 64, 64))
    pair = Pair(tiny_base, loss)
    asked = request(1, pair.sampler, pair.loss.requires, GROUPS, SIZE)
    asked = replace(asked, prompts=tuple(replace(p, sources=(str(source),)) for p in asked.prompts))
    handover = pair.learner.publish("behaviour")
    pair.worker.bind(handover)
    got = [pair.worker.rollout(ref, asked) for ref in asked.refs(handover.version)]
    images.save_png(source, picture(2, 64, 64))
    with pytest.raises(ReplayMismatch):
        pair.learner.update(got, advantages())
    images.save_png(source, picture(1, 64, 64))
    assert pair.learner.update(got, advantages()).metrics["ratio/first_max_dev"] <= 1e-6


# --- w = 1 ----------------------------------------------------------------------------------------


def test_unguided_plain_recentred_and_ordinary_are_one(any_base):
    ends, stored = [], []
    for loss in ("grpo", "grpo-recentred"):
        pair = Pair(any_base, loss, guidance=1.0)
        got = pair.roll()
        assert all(r.stats["nfe"] == SIZE * pair.sampler.steps for r in got)  # no second branch
        stored.append(got[0].trajectory.logp_KG)
        pair.learner.update(got, advantages())
        pair.learner.update(pair.roll(2), advantages())
        ends.append(pair.train())
    assert same(*ends) and torch.equal(*stored)


def test_guided_forms_differ_and_count_both_branches(any_base):
    logps = []
    for loss in ("grpo", "grpo-recentred"):
        pair = Pair(any_base, loss, guidance=3.0)
        got = pair.roll()[0]
        assert got.stats["nfe"] == 2 * SIZE * pair.sampler.steps
        logps.append(got.trajectory.logp_KG)
    assert not torch.equal(*logps)


# --- invariant 7 ----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def spoil(rollouts, live, value):
    """The rollouts with every tensor of the samples that are not live replaced."""
    out = []
    for one, alive in zip(rollouts, live, strict=True):
        dead = ~alive

        def fill(t, axis, dead=dead):
            index = (slice(None),) * axis + (dead,)
            t = t.clone()
            t[index] = value if t.is_floating_point() else 77
            return t

        t = one.trajectory
        if t is not None:
            t = Trajectory(
                index_K=t.index_K,
                x_KGNC=fill(t.x_KGNC, 1),
                next_KGNC=fill(t.next_KGNC, 1),
                logp_KG=fill(t.logp_KG, 1),
                shift_KGNC=None if t.shift_KGNC is None else fill(t.shift_KGNC, 1),
                velocity_KGNC=None if t.velocity_KGNC is None else fill(t.velocity_KGNC, 1),
            )
        out.append(
            replace(one, x0_GNC=fill(one.x0_GNC, 0), pixels=fill(one.pixels, 0), trajectory=t)
        )
    return out


SPOILT = [*((loss, NAN) for loss in LOSSES), ("nft", INF), ("grpo", INF), ("guard", 3.0)]


@pytest.mark.parametrize("loss, value", SPOILT)
def test_what_is_not_live_changes_no_weight(any_base, loss, value):
    live = torch.tensor([[True, False, True, True], [False, True, True, False]])
    ends = []
    for spoiled in (False, True):
        pair = Pair(any_base, loss, updates_per_rollout=3, kl=0.1, kl_ema=0.1, ema=0.5)
        for iteration in (1, 2):
            got, judged = pair.roll(iteration), advantages(live)
            if spoiled:
                got = spoil(got, live, value)
                judged = replace(judged, value_PG=torch.where(live, judged.value_PG, value))
            report = pair.learner.update(got, judged)
            assert torch.isfinite(torch.tensor(report.metrics["grad_norm"]))
        ends.append([snapshot(pair.learner.policy, s) for s in ("train", "behaviour", "ema")])
    assert all(same(*pair) for pair in zip(*ends, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_group_without_live_samples_changes_no_weight(any_base, loss):
    """Its micro-batch is as if it were not there, whatever it holds."""
    live = torch.tensor([[True] * 4, [False] * 4])
    ends = []
    for spoiled in (False, True):
        pair = Pair(any_base, loss)
        got = pair.roll()
        got = spoil(got, live, NAN) if spoiled else got[:1]
        judged = advantages(live)
        if not spoiled:
            judged = Advantages(value_PG=judged.value_PG[:1], live_PG=live[:1])
        pair.learner.update(got, judged)
        ends.append(pair.train())
    assert same(*ends)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_live_changes_nothing_even_with_momentum(any_base, loss):
    pair = Pair(any_base, loss)
    pair.learner.update(pair.roll(1), advantages())
    before, (moments, counters) = pair.train(), pair.learner.learner.state()
    report = pair.learner.update(
        pair.roll(2), advantages(torch.zeros(GROUPS, SIZE, dtype=torch.bool))
    )
    assert same(before, pair.train())
    after, again = pair.learner.learner.state()
    assert same(moments, after) and counters == again
    assert report.iteration == 2 and report.metrics["loss"] == 0.0
    pair.learner.update(pair.roll(3), advantages())  # and the run goes on
    assert not same(before, pair.train())


# --- invariant 8 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_what_is_frozen_is_byte_identical_after_training(any_base, loss):
    pair = Pair(any_base, loss, kl=0.1)
    policy = pair.learner.policy
    found = policy.pipeline.components.items()
    parts = {n: part for n, part in found if isinstance(part, torch.nn.Module)}

    def frozen():
        names = set(policy.slots.parameters)
        out = {f"reference/{n}": t.clone() for n, t in policy.slots.tensors("reference").items()}
        for part, module in parts.items():
            for name, tensor in module.state_dict().items():
                if part != "transformer" or name not in names:
                    out[f"{part}/{name}"] = tensor.clone()
        return out

    before, train = frozen(), pair.train()
    with torch.no_grad():
        condition = policy.encode("a red circle")
        x = noises(policy, [1])
        call = dict(size=(64, 64), slot="reference")
        v = policy.velocity(x, torch.ones(1), condition, **call)
    for iteration in (1, 2):
        pair.learner.update(pair.roll(iteration), advantages())
    assert same(before, frozen()) and not same(train, pair.train())
    with torch.no_grad():
        assert torch.equal(v, policy.velocity(x, torch.ones(1), condition, **call))


# --- the behaviour slot ---------------------------------------------------------------------------


def test_nft_behaviour_lags_behind_train_as_documented(any_base):
    pair = Pair(any_base, "nft", updates_per_rollout=3, lag_rate=0.3, lag_max=0.5)
    slots = pair.learner.policy.slots
    assert same(slots.tensors("behaviour"), slots.tensors("train"))
    for iteration, kept in ((1, 0.3), (2, 0.5), (3, 0.5)):
        before = snapshot(pair.learner.policy, "behaviour")
        pair.learner.update(pair.roll(iteration), advantages())
        train, after = slots.tensors("train"), slots.tensors("behaviour")
        for name in before:
            want = kept * before[name] + (1 - kept) * train[name]
            assert (after[name] - want).abs().max() <= 1e-6
        assert not same(train, after) and not same(before, after)


@pytest.mark.parametrize("loss", RATIO)
def test_ratio_losses_roll_out_with_what_was_just_trained(any_base, loss):
    pair = Pair(any_base, loss, updates_per_rollout=2)
    slots = pair.learner.policy.slots
    for iteration in (1, 2):
        behaviour = snapshot(pair.learner.policy, "behaviour")
        pair.learner.update(pair.roll(iteration), advantages())
        assert same(slots.tensors("behaviour"), slots.tensors("train"))
        assert not same(behaviour, slots.tensors("behaviour"))


def test_each_update_of_a_rollout_is_an_optimiser_step_and_draws_its_own_noise(any_base):
    ends = {}
    for updates in (1, 2, 3):
        pair = Pair(any_base, "nft", updates_per_rollout=updates)
        pair.learner.update(pair.roll(), advantages())
        assert pair.learner.learner.steps == updates
        ends[updates] = pair.train()
    assert not same(ends[1], ends[2]) and not same(ends[2], ends[3])


# --- held near other weights ----------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("form", ["velocity", "gaussian"])
def test_the_kl_of_a_ratio_loss_is_that_of_its_transitions(any_base, form, guidance):
    """Against torch.distributions, on the rollouts the loss saw; the reference guided or not."""
    how = dict(kl=0.1, kl_form=form, reference_guidance=guidance)
    pair = Pair(any_base, "grpo", updates_per_rollout=1, **how)
    got, policy, want = pair.roll(), pair.learner.policy, 0.0
    for one in got:
        t, grid = one.trajectory, one.schedule
        condition = policy.encode(one.ref.prompt.text)
        empty = policy.encode(one.ref.prompt.negative)
        for x, index in zip(t.x_KGNC, t.index_K, strict=True):
            level, call = torch.full((SIZE,), grid.sigmas[index]), dict(size=(64, 64))
            with torch.no_grad():
                v = policy.velocity(x, level, condition, **call)
                call |= dict(slot="reference")
                ref, without = (policy.velocity(x, level, c, **call) for c in (condition, empty))
            ref = without + guidance * (ref - without)
            per_dim = (v - ref).double().square()
            if form == "gaussian":
                zero = torch.zeros_like(x)
                mean, other = (kernels.step(x, w, grid, index, noise=zero).mean for w in (v, ref))
                q = grid.coefficients(index).q
                normals = (Normal(m.double(), q) for m in (mean, other))
                per_dim = torch.distributions.kl_divergence(*normals)
            want += float(per_dim.mean()) / (GROUPS * 2)
    metrics = pair.learner.update(got, advantages()).metrics
    assert metrics["kl/reference"] == pytest.approx(want, rel=1e-4) and want > 0


@pytest.mark.parametrize("form", ["velocity", "gaussian"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_kl_alone_pulls_the_weights_back(any_base, loss, form):
    """Without advantages the penalty is the whole gradient; turned round, it would drive away."""
    if form == "gaussian" and LOSSES[loss].form is None:
        return  # not defined
    pair = Pair(any_base, loss, kl=10.0, kl_form=form, updates_per_rollout=4, lr=1e-3)
    still = replace(advantages(), value_PG=torch.zeros(GROUPS, SIZE))
    rows = [pair.learner.update(pair.roll(i), still).metrics for i in (1, 2, 3)]
    assert rows[0]["grad_norm"] > 0
    assert rows[2]["kl/velocity"] < 0.9 * rows[0]["kl/velocity"]


def test_a_guided_reference_is_what_the_unguided_field_is_drawn_to(tiny_base):
    """The diagnostics compare with the plain reference: its own guidance is what is taken in."""
    how = dict(kl=10.0, reference_guidance=3.0, updates_per_rollout=8, lr=1e-3)
    pair = Pair(tiny_base, "nft")
    pair.learner = AlignmentLearner(make_policy(tiny_base), alignment("nft", **how))
    still = replace(advantages(), value_PG=torch.zeros(GROUPS, SIZE))
    rows = [pair.learner.update(pair.roll(i), still).metrics for i in (1, 2, 3)]
    assert rows[2]["kl/reference"] < 0.9 * rows[0]["kl/reference"]
    assert rows[2]["guidance/cosine"] > 0.2


def test_the_running_average_follows_the_weights_update_by_update(tiny_base):
    pair = Pair(tiny_base, "nft", updates_per_rollout=1, ema=0.25)
    slots = pair.learner.policy.slots
    assert same(slots.tensors("ema"), slots.tensors("train"))
    for iteration in (1, 2, 3, 4):
        before = snapshot(pair.learner.policy, "ema")
        pair.learner.update(pair.roll(iteration), advantages())
        train, after = slots.tensors("train"), slots.tensors("ema")
        kept = min(0.25, (1 + iteration) / (10 + iteration))
        for name, value in before.items():
            want = kept * value + (1 - kept) * train[name]
            assert (after[name] - want).abs().max() <= 1e-6
    assert kept == 0.25 and not same(train, after)
    assert pair.learner.publish("ema").version.slot == "ema"


def test_without_a_decay_there_is_no_average_and_none_is_held_near_it(tiny_base):
    assert "ema" not in Pair(tiny_base, "nft").learner.policy.slots.names
    pair = Pair(tiny_base, "awm", ema=0.9, kl_ema=1.0, updates_per_rollout=1)
    first = pair.learner.update(pair.roll(1), advantages()).metrics
    second = pair.learner.update(pair.roll(2), advantages()).metrics
    assert first["kl/ema"] == 0.0 < second["kl/ema"]  # it starts as the weights themselves


def test_rollouts_of_awm_are_of_what_was_just_trained(tiny_base):
    pair = Pair(tiny_base, "awm")
    metrics = pair.learner.update(pair.roll(), advantages()).metrics
    slots = pair.learner.policy.slots
    assert same(slots.tensors("behaviour"), slots.tensors("train"))
    assert metrics["ratio/first_max_dev"] == 0.0 < metrics["ratio/max_dev"]


def test_what_the_diagnostics_measure_is_nothing_at_the_reference_and_grows_away_from_it(tiny_base):
    learner = AlignmentLearner(make_policy(tiny_base), alignment("nft"))
    worker = RolloutWorker(make_policy(tiny_base))
    handover = learner.publish("behaviour")
    worker.bind(handover)
    asked = request(1, sampler("nft"), (), 1, SIZE)
    got = worker.rollout(asked.refs(handover.version)[0], asked)
    at_start = learner._diagnostics(got)
    assert at_start["norm/velocity_ratio"] == 1.0 and at_start["kl/velocity"] == 0.0
    assert at_start["guidance/gap"] > 0
    shake(learner.policy, size=0.2)
    moved = learner._diagnostics(got)
    assert moved["norm/velocity_ratio"] != 1.0 and moved["kl/velocity"] > 0
    assert abs(moved["guidance/cosine"]) <= 1.0


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["grpo", "nft"])
@pytest.mark.parametrize("first_live", [True, False], ids=["trained", "nothing learnt yet"])
def test_a_learner_continues_bit_for_bit_from_its_checkpoint(any_base, tmp_path, loss, first_live):
    pair = Pair(any_base, loss, ema=0.9)
    live = torch.full((GROUPS, SIZE), first_live)
    pair.learner.update(pair.roll(1), advantages(live))
    pair.learner.save(tmp_path, 1, 1, 0, None)
    other = Pair(any_base, loss, ema=0.9)
    shake(other.learner.policy, seed=4)
    assert other.learner.load(tmp_path / "step_000001") == 1
    for one in (pair, other):
        one.learner.update(one.roll(2), advantages())
    for slot in ("train", "behaviour", "reference", "ema"):
        assert same(*(snapshot(p.learner.policy, slot) for p in (pair, other)))
    assert same(*(p.learner.learner.state()[0] for p in (pair, other)))


# --- refusals -------------------------------------------------------------------------------------


def test_a_ratio_loss_without_a_trajectory_is_refused(any_base):
    pair = Pair(any_base, "grpo")
    got = [replace(one, trajectory=None) for one in pair.roll()]
    with pytest.raises(ConfigError, match="needs the trajectory"):
        pair.learner.update(got, advantages())


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(name="ppo"), "expected one of grpo"),
        (dict(updates_per_rollout=0), "updates_per_rollout: expected at least 1"),
        (dict(sigma_span=(0.5, 0.5)), "sigma_span"),
        (dict(beta=0.0), "above 0"),
        (dict(lag_max=1.0), "lag_max < 1"),
        (dict(kl=-0.1), "loss.kl"),
        (dict(clip_low=0.0), "clip_low and clip_high above 0"),
    ],
    ids=str,
)
def test_impossible_losses_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        LossConfig(**changes).check()
