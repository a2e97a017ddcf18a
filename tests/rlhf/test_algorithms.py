"""GRPO-Guard, Flow-DPPO, AWM and the KL terms by hand, and which combinations are defined."""

import math
from pathlib import Path

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from rlhf import kernels
from rlhf.coefficients import TABLE
from rlhf.errors import ConfigError
from rlhf.losses import (
    LOSSES,
    Choice,
    added,
    awm,
    check_choice,
    dppo,
    grpo,
    guard,
    kernels_of,
    nft,
    noised,
    penalty,
    summarise,
    transition_log_prob,
    transition_weight,
    velocity_kl,
)
from rlhf.losses.awm import weigh
from rlhf.losses.table import RULES, markdown, refusal
from rlhf.noise import generator
from rlhf.schedule import build, sd3_sigmas

SIGMAS = sd3_sigmas(10, 3.0)
K, G = 2, 4
EVEN = torch.full((G,), 1 / G, dtype=torch.float64)
ADVANTAGE = tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
Q, H = tensor([0.5, 0.3], dtype=torch.float64), tensor([0.05, 0.1], dtype=torch.float64)
ROOT = Path(__file__).parents[2]


def draw(key, *shape):
    return torch.randn(shape, generator=generator(key), dtype=torch.float64)


def grad(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


# --- GRPO-Guard -----------------------------------------------------------------------------------


def test_guard_equals_pencil_and_paper():
    """q (L - L_old + b) = .5 (.2 + .04) = .12 and .5 (-.3 + .1) = -.1; clipped at .05; over h."""
    terms = guard(
        tensor([[0.2, -0.3, 9.0]]),
        torch.zeros(1, 3),
        tensor([[0.04, 0.1, 9.0]]),
        tensor([0.5]),
        tensor([0.25]),
        tensor([2.0, 1.0, 9.0]),
        tensor([0.5, 0.5, 0.0]),
        0.05,
        0.05,
    )
    high, low = -2 * 1.05, -math.exp(-0.1)  # A > 0: clipped above, and below left as it is
    assert terms.loss.item() == pytest.approx(0.5 * (high + low) / 0.25, rel=1e-6)
    row = summarise([terms])
    assert row["kl/old"] == pytest.approx(0.07) and row["ratio/max_dev"] == pytest.approx(0.3)
    assert row["clip/high"] == row["clip/low"] == 0.5
    assert row["ratio/mean"] == pytest.approx((math.exp(0.12) + math.exp(-0.1)) / 2, rel=1e-6)


def drifted(kernel, index, groups=4000, dims=48, size=1.0):
    """Transitions of an old policy scored by a new one, whose velocity is off at random."""
    grid = build(SIGMAS, kernel, 0.7, (0, 8))
    x, v, z, dv = (draw(key, groups, dims).float() for key in (1, 2, 3, 4))
    done = kernels.step(x, v, grid, index, noise=z)
    logp, old = (
        transition_log_prob(w, x, done.next, grid, index)[None] for w in (v + size * dv, v)
    )
    kl = kernels.kl_factor(grid, index) * (size * dv).square().mean(1)[None]
    _, gamma, q = grid.coefficients(index)
    h = SIGMAS[index] - SIGMAS[index + 1]
    return logp, old, kl, q, h, gamma * size * (z * dv).mean(1)


@pytest.mark.parametrize("kernel", kernels_of(LOSSES["guard"]))
@pytest.mark.parametrize("index", [0, 3, 7])
def test_guard_centres_the_ratio_that_leans_below_one(kernel, index):
    logp, old, kl, q, h, own = drifted(kernel, index)
    count = logp.shape[1]
    weight, advantage = torch.full((count,), 1 / count), torch.ones(count)
    lean = summarise([grpo(logp, old, advantage, weight, 1.0, 1.0)])
    error = lean["ratio/std"] / math.sqrt(count)
    assert lean["ratio/mean"] < 1 - 5 * error  # a mean of log-probs: below 1 also on average
    row = summarise([guard(logp, old, kl, tensor([q]), tensor([h]), advantage, weight, 1e-3, 1e-3)])
    assert abs(row["ratio/mean"] - 1) < 5 * row["ratio/std"] / math.sqrt(count)
    assert row["ratio/std"] == pytest.approx(own.std().item(), rel=0.01)  # log rho = bar(z d)


def test_the_first_gradient_of_guard_is_the_policy_gradient_over_the_time_step():
    logp = draw(5, K, G).requires_grad_()
    zero = torch.zeros(K, G, dtype=torch.float64)
    terms = guard(logp, logp.detach().clone(), zero, Q, H, ADVANTAGE, EVEN)
    row = summarise([terms])
    assert row["ratio/mean"] == 1.0 and row["clip/low"] == row["clip/high"] == 0.0
    assert_close(grad(terms.loss, logp), -(Q / H)[:, None] * ADVANTAGE / (K * G))


def test_on_flow_sde_the_time_step_leaves_the_gradient_of_guard():
    """gamma / h is -(1 + a^2/2) at every step but the first, where the score's part is absent."""
    grid = build(SIGMAS, "flow-sde", 0.7, (0, 9))
    for index in range(1, 9):
        h = SIGMAS[index] - SIGMAS[index + 1]
        assert grid.coefficients(index).gamma / h == pytest.approx(-(1 + 0.49 / 2), rel=1e-9)


# --- Flow-DPPO ------------------------------------------------------------------------------------


def test_dppo_drops_only_what_is_far_and_leads_further():
    """Eight samples: A > 0 and A < 0, rho above and below 1, K at the limit and just inside."""
    logp = tensor([[0.2, 0.2, -0.2, -0.2] * 2], dtype=torch.float64).requires_grad_()
    advantage = tensor([1.0, -1.0, 1.0, -1.0] * 2, dtype=torch.float64)
    kl = tensor([[0.01] * 4 + [0.0099] * 4], dtype=torch.float64)
    weight = torch.full((8,), 1 / 8, dtype=torch.float64)
    terms = dppo(logp, torch.zeros_like(logp), kl, advantage, weight, limit=0.01)
    gone = tensor([[1, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    per = torch.where(gone, 0.0, -advantage * logp.detach().exp())
    assert_close(terms.loss.detach(), per.mean())
    assert_close(grad(terms.loss, logp), per / 8)
    row = summarise([terms])
    assert row["dppo/dropped"] == 0.25 and row["kl/old"] == pytest.approx(0.00995)


def test_the_first_gradient_of_dppo_is_the_policy_gradient_whatever_the_limit():
    logp, zero = draw(5, K, G).requires_grad_(), torch.zeros(K, G, dtype=torch.float64)
    terms = dppo(logp, logp.detach().clone(), zero, ADVANTAGE, EVEN, limit=1e-12)
    assert summarise([terms])["ratio/mean"] == 1.0
    assert_close(grad(terms.loss, logp), (-ADVANTAGE / (K * G)).expand(K, G))


# --- AWM ------------------------------------------------------------------------------------------


def awm_inputs(groups=G):
    x0, eps = draw(6, groups, 3, 2), draw(7, groups, 3, 2)
    sigma = tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)[:groups]
    v_old = (eps - x0) + 0.3 * draw(8, groups, 3, 2)
    return dict(v_old=v_old, x0=x0, eps=eps, sigma_G=sigma, advantage_G=ADVANTAGE, weight_G=EVEN)


@pytest.mark.parametrize(
    "weighting, scale", [("uniform", lambda e, s: e), ("sigma", lambda e, s: s * e),
                         ("sigma2", lambda e, s: s * s * e),
                         ("ghuber", lambda e, s: 4 * s * (e**0.25 - 1e-10**0.25))],
)  # fmt: skip
def test_awm_equals_pencil_and_paper(weighting, scale):
    """One dimension: v* = 2, v_theta = 2.5, v_old = 1; errors .25 and 1; s = .5; A' = 1/2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.ones(1, dtype=torch.float64)
    terms = awm(2.5 * one, one, -one, one, weight / 2, weight, weight, 2.0, weighting)
    rho = math.exp(scale(1.0, 0.5) - scale(0.25, 0.5))
    assert terms.loss.item() == pytest.approx(-0.5 * rho, rel=1e-6)
    row = summarise([terms])
    assert row["awm/error"] == pytest.approx(0.25)
    assert row["ratio/max_dev"] == pytest.approx(math.log(rho), rel=1e-6)
    held = awm(2.5 * one, one, -one, one, weight / 2, weight, weight, 2.0, weighting, 0.1, 0.1)
    assert held.loss.item() == pytest.approx(-0.5 * 1.1)  # rho > 1 with A > 0: clipped


def test_the_first_gradients_of_awm_and_nft_are_one_but_for_the_normaliser():
    """2 A' (v - v*) / D; NFT's is A_max s^2 / n times that."""
    inputs, adv_max = awm_inputs(), 2.0
    leaf = inputs["v_old"].clone().requires_grad_()
    ours = grad(awm(leaf, **inputs, adv_max=adv_max).loss, leaf)
    off = inputs["v_old"] - (inputs["eps"] - inputs["x0"])
    derived = 2 * ADVANTAGE.reshape(G, 1, 1) / adv_max * off / (6 * G)
    assert_close(ours, derived)
    s = inputs["sigma_G"].reshape(G, 1, 1)
    x_s = noised(inputs["x0"], inputs["eps"], inputs["sigma_G"])
    rest = {k: v for k, v in inputs.items() if k != "eps"}
    theirs = grad(nft(leaf, x_s=x_s, **rest, adv_max=adv_max).loss, leaf)
    n = (s * off).abs().mean((1, 2), keepdim=True)
    assert_close(theirs, ours * adv_max * s**2 / n)


@pytest.mark.parametrize("weighting", ["uniform", "sigma", "sigma2", "ghuber"])
def test_awm_moves_good_samples_towards_themselves_and_bad_ones_away(weighting):
    inputs = awm_inputs()
    leaf = inputs["v_old"].clone().requires_grad_()
    step = -grad(awm(leaf, **inputs, weighting=weighting).loss, leaf)
    towards = (inputs["eps"] - inputs["x0"]) - leaf.detach()
    assert torch.equal((step * towards).sum((1, 2)).sign(), ADVANTAGE.sign())


def test_awm_takes_advantages_up_to_their_maximum():
    inputs = awm_inputs() | {"advantage_G": 100 * ADVANTAGE}
    leaf = inputs["v_old"].clone().requires_grad_()
    inputs_at = inputs | {"advantage_G": 2.0 * ADVANTAGE.sign()}
    assert_close(grad(awm(leaf, **inputs).loss, leaf), grad(awm(leaf, **inputs_at).loss, leaf))


def test_an_error_of_zero_weighs_zero_in_every_form():
    zero, sigma = torch.zeros(2), tensor([0.2, 1.0])
    for weighting in ("uniform", "sigma", "sigma2", "ghuber"):
        assert torch.count_nonzero(weigh(zero, sigma, weighting)) == 0


# --- finite differences, float64 ------------------------------------------------------------------


def differentiable():
    """Each loss as a function of what carries its gradient, at a point without kinks near it."""
    old, kl = draw(9, K, G), draw(10, K, G).abs()
    start = old + 0.3 * draw(11, K, G)
    inputs = awm_inputs()
    v = inputs["v_old"] + 0.2 * draw(12, G, 3, 2)
    rest = ADVANTAGE, EVEN
    rows = {
        "grpo": (lambda logp: grpo(logp, old, *rest, 0.25, 0.2).loss, start),
        "guard": (lambda logp: guard(logp, old, kl, Q, H, *rest, 0.15, 0.1).loss, start),
        "guard, bias": (lambda b: guard(start, old, b, Q, H, *rest, 0.9, 9.0).loss, kl),
        "dppo": (lambda logp: dppo(logp, old, kl, *rest, limit=0.5).loss, start),
        "velocity KL": (lambda v: velocity_kl(v, inputs["x0"], EVEN), v),
    }
    for weighting in ("uniform", "sigma", "sigma2", "ghuber"):
        call = inputs | {"weighting": weighting}
        rows[f"awm {weighting}"] = (lambda v, call=call: awm(v, **call).loss, v)
    return rows


@pytest.mark.parametrize("name", differentiable())
def test_gradients_equal_finite_differences(name):
    function, start = differentiable()[name]
    leaf = start.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf,), eps=1e-6, atol=1e-7)
    assert grad(function(leaf), leaf).abs().sum() > 0


def test_a_step_of_a_ratio_loss_makes_good_samples_likelier():
    old, zero = draw(9, K, G), torch.zeros(K, G, dtype=torch.float64)
    for function in (
        lambda logp: grpo(logp, old, ADVANTAGE, EVEN),
        lambda logp: guard(logp, old, zero, Q, H, ADVANTAGE, EVEN),
        lambda logp: dppo(logp, old, zero, ADVANTAGE, EVEN),
    ):
        leaf = old.clone().requires_grad_()
        step = -grad(function(leaf).loss, leaf)
        assert torch.equal(step.sign(), ADVANTAGE.sign().expand(K, G))


# --- KL -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [k for k in TABLE if k != "ode"])
def test_weighted_by_the_kernel_the_velocity_kl_is_the_gaussian_one(kernel):
    """Two steps, three samples of which one is not live, against torch.distributions."""
    grid, weight = build(SIGMAS, kernel, 0.7, (0, 8)), tensor([0.5, 0.0, 0.5])
    x, v, ref = (draw(key, 2, 3, 5).float() for key in (1, 2, 3))
    want = 0.0
    for j, index in enumerate((1, 4)):
        zero, q = torch.zeros(3, 5), grid.coefficients(index).q
        means = [kernels.step(x[j], w[j], grid, index, noise=zero).mean for w in (v, ref)]
        normals = (torch.distributions.Normal(m.double(), q) for m in means)
        want += (weight * torch.distributions.kl_divergence(*normals).mean(1)).sum().item() / 2
    factors = [kernels.kl_factor(grid, i) for i in (1, 4)]
    ref[:, 1] = math.nan
    rows = transition_weight(weight, factors)
    got = velocity_kl(v.flatten(0, 1), ref.flatten(0, 1), rows)
    assert got.item() == pytest.approx(want, rel=1e-5)
    even = velocity_kl(v.flatten(0, 1), ref.flatten(0, 1), transition_weight(weight, [1.0, 1.0]))
    d = (v - ref)[:, [0, 2]].square()
    assert even.item() == pytest.approx(d.mean().item(), rel=1e-6)


def test_a_penalty_adds_to_the_loss_and_draws_near():
    v, ref = draw(1, G, 6).requires_grad_(), draw(2, G, 6)
    near = penalty("reference", velocity_kl(v, ref, EVEN), 0.5)
    step = -grad(near.loss, v)
    assert torch.equal(step.sign(), (ref - v.detach()).sign())
    base = dppo(*(torch.zeros(1, G) for _ in range(3)), ADVANTAGE.float(), EVEN.float())
    total = added([base, near])
    assert total.loss.item() == pytest.approx(base.loss.item() + near.loss.item())
    assert total.metrics["kl/reference"].item() == pytest.approx(2 * near.loss.item())
    assert total.metrics["ratio/mean"].item() == 1.0 and "ratio/max_dev" in total.maxima


# --- what goes together ---------------------------------------------------------------------------


def test_every_undefined_choice_has_its_reason():
    ratio = [name for name, loss in LOSSES.items() if loss.form]
    for name, loss in LOSSES.items():
        kernels = set(TABLE) - ({"ode"} if name in ratio else set())
        kernels -= {"cps"} if name == "guard" else set()
        assert set(kernels_of(loss)) == kernels
        noisy = Choice(loss=loss, kernel="flow-sde", kl_form="gaussian", replayed=True)
        assert (refusal(noisy) is None) == (name in ratio)
    for words, choice in {
        "no density": Choice(loss=LOSSES["dppo"], kernel="ode"),
        "divides by the time step": Choice(loss=LOSSES["guard"], kernel="cps"),
        "KL of two transitions": Choice(loss=LOSSES["awm"], kl_form="gaussian"),
        "computed again": Choice(loss=LOSSES["nft"], replayed=True),
        "distilled to a few": Choice(loss=LOSSES["nft"], own_grid=True),
    }.items():
        with pytest.raises(ConfigError, match=words) as caught:
            check_choice(choice)
        assert "; write " in str(caught.value)


def test_every_rule_is_reached_and_the_page_shows_the_table():
    table = markdown()
    assert all(f"no ({i})" in table for i in range(1, len(RULES) + 1))
    assert table in (ROOT / "docs" / "algorithms.md").read_text()
