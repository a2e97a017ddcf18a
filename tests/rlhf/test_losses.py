import math

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

from rlhf import kernels
from rlhf.losses import (
    LOSSES,
    LossConfig,
    Noised,
    Transitions,
    grpo,
    keep_live,
    nft,
    noised,
    summarise,
    transition_log_prob,
    velocity_kl,
)
from rlhf.noise import generator, initial_noise
from rlhf.schedule import build, sd3_sigmas

SDE = build(sd3_sigmas(10, 3.0), "flow-sde", 0.7, (1, 4))
G, SHAPE = 4, (3, 2)
EVEN = torch.full((G,), 1 / G)
ADVANTAGE = tensor([1.0, -1.0, 0.5, -0.5])


def latents(key, groups=G):
    return torch.stack([initial_noise(100 * key + i, SHAPE) for i in range(groups)])


def grad(loss, leaf):
    (value,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    return value


# ---- ratio losses ------------------------------------------------------------------------------


def test_grpo_equals_pencil_and_paper():
    """Two steps, three samples. Ratios in columns: 1.2 and 1.0; 0.7 and 0.9; 1.05 and 1.3."""
    ratio = tensor([[1.2, 0.7, 1.05], [1.0, 0.9, 1.3]])
    terms = grpo(
        ratio.log(),
        torch.zeros(2, 3),
        tensor([2.0, -1.0, -1.0]),
        tensor([0.5, 0.5, 0.0]),
        clip_low=0.2,
        clip_high=0.1,
    )
    # A=2:  -2*1.1 and -2*1.0 -> mean -2.1.  A=-1: max(.7, .8) and max(.9, .9) -> mean .85.
    assert terms.loss.item() == pytest.approx(0.5 * -2.1 + 0.5 * 0.85, abs=1e-6)
    row = summarise([terms])
    assert row["ratio/mean"] == pytest.approx((1.1 + 0.8) / 2, abs=1e-6)
    variance = (0.04 + 0 + 0.09 + 0.01) / 4 - 0.05**2
    assert row["ratio/std"] == pytest.approx(math.sqrt(variance), abs=1e-6)
    assert row["ratio/max_dev"] == pytest.approx(-math.log(0.7), abs=1e-6)
    assert row["clip/high"] == pytest.approx(1 / 4) and row["clip/low"] == pytest.approx(1 / 4)


def test_grpo_gradient_is_silent_exactly_where_it_is_clipped():
    logp = tensor([[1.3, 1.3, 0.7, 0.7]]).log().requires_grad_()
    advantage = tensor([1.0, -1.0, 1.0, -1.0])
    terms = grpo(logp, torch.zeros(1, 4), advantage, EVEN, 0.1, 0.1)
    expected = tensor([[0.0, 1.3, -0.7, 0.0]]) / 4
    assert_close(grad(terms.loss, logp), expected)


def test_grpo_equal_log_probs_clip_nothing_and_leave_the_policy_gradient():
    logp = torch.randn((3, G), generator=generator(1)).requires_grad_()
    terms = grpo(logp, logp.detach().clone(), ADVANTAGE, EVEN, 1e-6, 1e-6)
    row = summarise([terms])
    assert row["clip/low"] == row["clip/high"] == row["ratio/max_dev"] == row["ratio/std"] == 0.0
    assert row["ratio/mean"] == 1.0
    assert_close(grad(terms.loss, logp), (-ADVANTAGE / (3 * G)).expand(3, G))


def test_grpo_never_differentiates_the_old_log_prob():
    old = torch.zeros(2, G, requires_grad=True)
    logp = torch.zeros(2, G, requires_grad=True)
    loss = grpo(logp, old, ADVANTAGE, EVEN).loss
    assert torch.autograd.grad(loss, old, allow_unused=True) == (None,)


def test_terms_of_micro_batches_add_up():
    logp = 0.01 * torch.randn((3, 8), generator=generator(2))
    advantage, weight = torch.randn(8, generator=generator(3)), torch.full((8,), 1 / 8)
    zero = torch.zeros(3, 8)
    whole = summarise([grpo(logp, zero, advantage, weight)])
    halves = summarise(
        [grpo(logp[:, i], zero[:, i], advantage[i], weight[i]) for i in (slice(0, 4), slice(4, 8))]
    )
    assert whole == pytest.approx(halves, rel=1e-6, abs=1e-9)


# ---- log-prob forms under guidance -------------------------------------------------------------


def transition(guidance, index=2):
    """One recorded step of a guided rollout: x, x', v_c and the guidance shift."""
    x, v_c, v_u, z = latents(1), latents(2), latents(3), latents(4)
    v_g = kernels.guide(v_c, v_u, guidance)
    step = kernels.step(x, v_g, SDE, index, noise=z)
    return x, step.next, v_c, kernels.guidance_shift(v_g, v_c, SDE, index), z


def old_and_new(form, guidance):
    """Old and new log-prob of one transition, the new one after a small change of weights."""
    x, x_next, v_c, shift, _ = transition(guidance)
    shift = None if form == "plain" else shift
    old = transition_log_prob(v_c, x, x_next, SDE, 2, form, shift)[None]
    leaf = (v_c + 0.01 * latents(5)).requires_grad_()
    new = transition_log_prob(leaf, x, x_next, SDE, 2, form, shift)[None]
    return old, new, leaf


@pytest.mark.parametrize("form", ["plain", "recentred"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_first_ratio_is_exactly_one_in_both_forms(form, guidance):
    x, x_next, v_c, shift, _ = transition(guidance)
    old = transition_log_prob(v_c, x, x_next, SDE, 2, form, shift)[None]
    new = transition_log_prob(v_c.clone(), x, x_next, SDE, 2, form, shift)[None]
    row = summarise([grpo(new, old, ADVANTAGE, EVEN, 1e-6, 1e-6)])
    assert row["clip/low"] == row["clip/high"] == row["ratio/max_dev"] == 0.0


def test_without_guidance_plain_recentred_and_ordinary_grpo_are_bit_identical():
    old, new, leaf = old_and_new("plain", 1.0)
    plain = grpo(new, old, ADVANTAGE, EVEN, 1e-3, 1e-3).loss
    plain_grad = grad(plain, leaf)
    old, new, leaf = old_and_new("recentred", 1.0)
    recentred = grpo(new, old, ADVANTAGE, EVEN, 1e-3, 1e-3).loss
    recentred_grad = grad(recentred, leaf)

    x, x_next, v_c, _, _ = transition(1.0)  # ordinary GRPO, written out
    leaf = (v_c + 0.01 * latents(5)).requires_grad_()
    mine, theirs = (kernels.step(x, v, SDE, 2, x_next=x_next) for v in (leaf, v_c))
    new = kernels.log_prob(mine.next, mine.mean, mine.q)
    ratio = (new - kernels.log_prob(theirs.next, theirs.mean, theirs.q)).exp()
    ordinary = torch.maximum(-ADVANTAGE * ratio, -ADVANTAGE * ratio.clamp(1 - 1e-3, 1 + 1e-3))
    ordinary = (EVEN * ordinary).sum()

    assert plain.item() == recentred.item() == ordinary.item()
    ordinary_grad = grad(ordinary, leaf)
    assert torch.equal(plain_grad, recentred_grad) and torch.equal(plain_grad, ordinary_grad)
    assert plain_grad.abs().sum() > 0


def test_recentred_old_log_prob_is_the_guided_rollouts_own():
    x, x_next, v_c, shift, z = transition(3.0)
    recentred = transition_log_prob(v_c, x, x_next, SDE, 2, "recentred", shift)
    q = SDE.coefficients(2).q
    own = -z.square().flatten(1).mean(1) / 2 - math.log(q) - 0.5 * math.log(2 * math.pi)
    assert_close(recentred, own, rtol=0, atol=1e-5)


def test_gradient_of_each_form_is_as_derived():
    """dL/dv_c: plain gamma (q z + S) / (q^2 D), recentred gamma z / (q D)."""
    x, x_next, v_c, shift, z = transition(3.0)
    _, gamma, q = SDE.coefficients(2)
    leaf = v_c.clone().requires_grad_()
    plain = transition_log_prob(leaf, x, x_next, SDE, 2, "plain").sum()
    assert_close(grad(plain, leaf), gamma * (q * z + shift) / (q**2 * 6), rtol=1e-4, atol=1e-5)
    recentred = transition_log_prob(leaf, x, x_next, SDE, 2, "recentred", shift).sum()
    assert_close(grad(recentred, leaf), gamma * z / (q * 6), rtol=1e-4, atol=1e-5)


def test_a_guided_denominator_clips_before_anything_was_learnt():
    """Why it is refused: with it the very first ratios already lie outside the clip range."""
    x, x_next, v_c, _, _ = transition(3.0)
    v_g = kernels.guide(v_c, latents(3), 3.0)
    guided_old = transition_log_prob(v_g, x, x_next, SDE, 2)[None]
    new = transition_log_prob(v_c, x, x_next, SDE, 2)[None]
    row = summarise([grpo(new, guided_old, ADVANTAGE, EVEN, 1e-4, 1e-4)])
    assert row["clip/low"] + row["clip/high"] == 1.0
    assert row["ratio/mean"] < 0.99


def test_recentred_without_a_shift_and_steps_without_noise_are_refused():
    x, x_next, v_c, _, _ = transition(1.0)
    with pytest.raises(ValueError, match="guidance shift"):
        transition_log_prob(v_c, x, x_next, SDE, 2, "recentred")
    with pytest.raises(ValueError, match="no density"):
        transition_log_prob(v_c, x, x_next, SDE, 0)


# ---- forward-process losses --------------------------------------------------------------------


def nft_inputs():
    x0, eps = latents(6), latents(7)
    sigma = tensor([0.9, 0.7, 0.5, 0.3])
    x_s = noised(x0, eps, sigma)
    v_old = (eps - x0) + 0.3 * latents(8)
    return dict(v_old=v_old, x_s=x_s, x0=x0, sigma_G=sigma, advantage_G=ADVANTAGE, weight_G=EVEN)


def test_noised_is_the_straight_path():
    x0, eps = latents(6), latents(7)
    x_s = noised(x0, eps, tensor([0.0, 1.0, 0.25, 0.5]))
    assert torch.equal(x_s[0], x0[0]) and torch.equal(x_s[1], eps[1])
    assert_close(x_s[2], 0.75 * x0[2] + 0.25 * eps[2])


def test_nft_equals_pencil_and_paper():
    """One dimension: s = .5, x_s = 1, x0 = 0, v_old = 1, v_theta = 2, A = 1, A_max = 2, beta = .5.

    v+ = 1.5, v- = .5; x0 predictions .25 and .75; errors .0625/.25 and .5625/.75; r = .75.
    """
    one = torch.ones(1, 1)
    terms = nft(2 * one, one, one, 0 * one, tensor([0.5]), tensor([1.0]), tensor([1.0]), beta=0.5)
    assert terms.loss.item() == pytest.approx(2 / 0.5 * (0.75 * 0.25 + 0.25 * 0.75), rel=1e-6)
    assert terms.metrics["nft/drift"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("adv_max", [2.0, 5.0])
def test_nft_first_gradient_is_as_derived_and_does_not_depend_on_beta(adv_max):
    """At v_theta = v_old: 2 A s^2 (v_old - v*) / (n D), with n the mean |s (v_old - v*)|."""
    inputs = nft_inputs()
    grads = []
    for beta in (0.1, 1.0, 3.0):
        leaf = inputs["v_old"].clone().requires_grad_()
        loss = nft(leaf, **inputs, beta=beta, adv_max=adv_max).loss
        grads.append(grad(loss, leaf))
    s = inputs["sigma_G"].reshape(G, 1, 1)
    e = inputs["v_old"] - (inputs["x_s"] - inputs["x0"]) / s
    n = (s * e).abs().mean((1, 2), keepdim=True)
    derived = EVEN.reshape(G, 1, 1) * 2 * ADVANTAGE.reshape(G, 1, 1) * s**2 * e / (n * 6)
    for value in grads:
        assert_close(value, derived, rtol=1e-4, atol=1e-6)


def test_nft_minus_its_normaliser_is_the_proximal_form_of_the_derivation():
    """With E = bar((v - v*)^2): loss = const + 2 A bar(e dv) + A_max beta bar(dv^2)."""
    inputs = nft_inputs()
    s, beta, adv_max = inputs["sigma_G"].reshape(G, 1, 1), 0.7, 2.0
    target, v_old = (inputs["x_s"] - inputs["x0"]) / s, inputs["v_old"]
    leaf = (v_old + 0.2 * latents(9)).requires_grad_()
    dv = leaf.detach() - v_old

    def bar(x):
        return x.flatten(1).mean(1)

    r = 0.5 + 0.5 * (ADVANTAGE / adv_max)
    plus = bar(((1 - beta) * v_old + beta * leaf - target).square())
    minus = bar(((1 + beta) * v_old - beta * leaf - target).square())
    loss = (adv_max / beta * (r * plus + (1 - r) * minus)).sum()
    proximal = 2 * ADVANTAGE.reshape(G, 1, 1) * (v_old - target) + 2 * adv_max * beta * dv
    assert_close(grad(loss, leaf), proximal / 6, rtol=1e-4, atol=1e-5)

    # ours is that loss with each error multiplied by s^2 / n, n held fixed
    def n(v):
        return (s * (v - target)).abs().mean((1, 2)).detach()

    scale = inputs["sigma_G"].square()
    v_plus, v_minus = (1 - beta) * v_old + beta * leaf, (1 + beta) * v_old - beta * leaf
    scaled = adv_max / beta * scale * (r * plus / n(v_plus) + (1 - r) * minus / n(v_minus))
    ours = nft(leaf, **inputs, beta=beta, adv_max=adv_max).loss
    assert_close(ours, (EVEN * scaled).sum(), rtol=1e-4, atol=1e-6)


def test_nft_moves_good_samples_towards_themselves_and_bad_ones_away():
    inputs = nft_inputs()
    leaf = inputs["v_old"].clone().requires_grad_()
    step = -grad(nft(leaf, **inputs).loss, leaf)
    towards = (inputs["x_s"] - inputs["x0"]) / inputs["sigma_G"].reshape(G, 1, 1) - leaf.detach()
    assert torch.equal((step * towards).sum((1, 2)).sign(), ADVANTAGE.sign())


# ---- what holds for every loss -----------------------------------------------------------------


def seen_by(name, network, weight, dead=None):
    """What a loss sees of a small network's velocities; `dead` overwrites all of sample 1."""
    x, x_next, v_old, shift, _ = transition(3.0)
    x0, eps, sigma, advantage = latents(6), latents(7), tensor([0.9, 0.7, 0.5, 0.3]), ADVANTAGE
    old_logp = transition_log_prob(v_old, x, x_next, SDE, 2, "plain", shift)
    advantage = advantage.clone()
    if dead is not None:
        for value in (x, x_next, shift, v_old, x0, eps, sigma, advantage, old_logp):
            value[1] = dead
    form = LOSSES[name].form
    if form is None:
        x_s = noised(x0, eps, sigma)
        v = network(keep_live(x_s, weight))
        seen = Noised(v_theta=v, v_old=v_old, x_s=x_s, x0=x0, eps=eps, sigma_G=sigma)
        return seen, advantage
    x, x_next, shift, v_old = (keep_live(t, weight) for t in (x, x_next, shift, v_old))
    v = network(x)
    kl_old = kernels.kl_factor(SDE, 2) * (v - v_old).square().mean((1, 2))
    _, _, q = SDE.coefficients(2)
    seen = Transitions(
        logp_KG=transition_log_prob(v, x, x_next, SDE, 2, form, shift)[None],
        old_logp_KG=old_logp[None],
        kl_old_KG=kl_old[None],
        q_K=tensor([q]),
        h_K=tensor([SDE.sigmas[2] - SDE.sigmas[3]]),
    )
    return seen, advantage


def loss_by_name(name, network, weight, dead=None):
    """Loss of a small network's velocities, nothing clipped or dropped."""
    seen, advantage = seen_by(name, network, weight, dead)
    settings = LossConfig(name=name, clip_low=0.999, clip_high=1e3, divergence=1e3)
    return LOSSES[name].function(seen, advantage, weight, settings)


def gradients(name, weight, dead=None):
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    terms = loss_by_name(name, network, weight, dead)
    terms.loss.backward()
    return [terms.loss.detach(), *(p.grad for p in network.parameters())], summarise([terms])


@pytest.mark.parametrize("dead", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_samples_that_are_not_live_change_nothing(name, dead):
    weight = tensor([1.0, 0.0, 1.0, 1.0]) / 3
    clean, clean_row = gradients(name, weight)
    dirty, dirty_row = gradients(name, weight, dead)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(value.isfinite().all() for value in clean) and clean_row == dirty_row


@pytest.mark.parametrize("name", LOSSES)
def test_samples_that_are_live_do_change_the_gradient(name):
    clean, _ = gradients(name, EVEN)
    other, _ = gradients(name, EVEN, 0.123)
    assert all(value.abs().sum() > 0 for value in clean)
    assert not torch.equal(clean[1], other[1])


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_live_gives_exactly_zero(name):
    values, row = gradients(name, torch.zeros(G), math.nan)
    assert all(torch.count_nonzero(value) == 0 for value in values) and row["loss"] == 0.0


def test_the_velocity_kl_alone_has_a_gradient_and_counts_live_samples_only():
    v, ref = latents(1).requires_grad_(), latents(2)
    value = velocity_kl(v, ref, EVEN)
    assert_close(value.detach(), (v.detach() - ref).square().mean())
    assert grad(value, v).abs().sum() > 0
    ref[1] = math.nan
    weight = tensor([0.5, 0.0, 0.5, 0.0])
    kept = (v.detach() - ref)[[0, 2]].square().mean()
    assert_close(velocity_kl(v, ref, weight).detach(), kept)


def slopes(loss, start, direction, width=1e-2):
    """Derivative along a direction: by autograd, and by central differences (fp32: a wide step)."""
    leaf = start.clone().requires_grad_()
    there, back = (loss(start + k * width * direction).item() for k in (1, -1))
    return (grad(loss(leaf), leaf) * direction).sum().item(), (there - back) / (2 * width)


def test_grpo_gradient_equals_finite_differences():
    x, x_next, v_c, _, _ = transition(3.0)
    old = transition_log_prob(v_c, x, x_next, SDE, 2)[None]

    def loss(v):
        new = transition_log_prob(v, x, x_next, SDE, 2)[None]
        return grpo(new, old, ADVANTAGE, EVEN, 0.9, 10.0).loss

    slope, measured = slopes(loss, v_c, latents(9))
    assert measured == pytest.approx(slope, rel=1e-2)


def test_nft_gradient_equals_finite_differences():
    """In one dimension bar(d^2)/bar|d| is |d|; with the normaliser held fixed its slope doubles."""
    inputs = nft_inputs()
    inputs |= {key: inputs[key][:, :1, :1] for key in ("v_old", "x_s", "x0")}
    start = inputs["v_old"] + 0.1
    slope, measured = slopes(lambda v: nft(v, **inputs).loss, start, latents(9)[:, :1, :1])
    assert 2 * measured == pytest.approx(slope, rel=1e-2)


def test_every_loss_says_what_it_needs():
    assert LOSSES["grpo"].requires == ("trajectory",)
    assert LOSSES["grpo-recentred"].requires == ("trajectory", "shift")
    assert LOSSES["nft"].requires == ("x0",)
    assert {name: loss.form for name, loss in LOSSES.items()} == {
        "grpo": "plain",
        "grpo-recentred": "recentred",
        "guard": "recentred",
        "dppo": "recentred",
        "nft": None,
        "awm": None,
    }
    assert all(loss.name == name for name, loss in LOSSES.items())
