import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from rlhf import kernels
from rlhf.coefficients import TABLE
from rlhf.noise import generator, initial_noise, step_noise
from rlhf.schedule import Schedule, build, qwen_image21_sigmas, sd3_sigmas

SIGMAS = sd3_sigmas(10, 3.0)
SDE = build(SIGMAS, "flow-sde", 0.7, (0, 9))
NOISY = {k: build(SIGMAS, k, 0.7, (0, 10 - row.tail)) for k, row in TABLE.items() if k != "ode"}
GRIDS = {
    "sd3": SIGMAS,
    "sd3-40": sd3_sigmas(40, 3.0),
    "qwen21": qwen_image21_sigmas(10, 4096, {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
    "qwen21-small": qwen_image21_sigmas(6, 16, {"use_dynamic_shifting": True}),
}


def latents(key, shape=(3, 4, 5), dtype=torch.float32):
    return torch.randn(shape, generator=generator(key)).to(dtype)


def everywhere(kernel, noise_level, sigmas=SIGMAS):
    """A schedule with noise on all steps, the last one too: not for training, for its formulas."""
    return Schedule(
        sigmas=sigmas, kernel=kernel, noise_level=noise_level, window=(0, len(sigmas) - 1)
    )


def test_q_equals_the_published_numbers():
    schedule = everywhere("flow-sde", 0.7)
    q = [kernels.coefficients(schedule, i).q for i in range(10)]
    anchor = [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]
    assert q == pytest.approx(anchor, abs=6e-4)
    assert q[-1] == pytest.approx(0.0063, abs=5e-5)


@pytest.mark.parametrize("sigmas", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
def test_first_step_has_q_equal_to_the_noise_level_and_every_q_is_below_two(sigmas, a):
    schedule = everywhere("flow-sde", a, sigmas)
    q = [kernels.coefficients(schedule, i).q for i in range(schedule.n_steps)]
    assert q[0] == pytest.approx(a, rel=1e-12)
    assert all(math.isfinite(value) and 0.0 < value < 2.0 for value in q)


def test_a_grid_one_ulp_below_one_does_not_explode():
    below = (math.nextafter(1.0, 0.0), *SIGMAS[1:])
    assert kernels.coefficients(everywhere("flow-sde", 0.7, below), 0).q == pytest.approx(0.7)


@pytest.mark.parametrize("index", range(10))
def test_coefficients_equal_their_closed_form(index):
    a, s, h = 0.7, SIGMAS[index], SIGMAS[index] - SIGMAS[index + 1]
    alpha, gamma, q = kernels.coefficients(everywhere("flow-sde", a), index)
    if index == 0:
        variance = a**2 / (1 - SIGMAS[1])
        closed = (1 - variance * h / 2, -h, math.sqrt(variance * h))
    else:
        closed = (
            1 - a**2 * h / (2 * (1 - s)),
            -h * (1 + a**2 / 2),
            a * math.sqrt(s / (1 - s) * h),
        )
    assert (alpha, gamma, q) == pytest.approx(closed, rel=1e-12)
    assert alpha * (1 - s) - gamma == pytest.approx(1 - SIGMAS[index + 1], rel=1e-12)


@pytest.mark.parametrize("index", range(10))
def test_dance_and_cps_equal_their_closed_forms(index):
    a, s, s_next = 0.7, SIGMAS[index], SIGMAS[index + 1]
    h, k = s - s_next, s_next * math.cos(a * math.pi / 2)
    dance = (
        1 - a**2 * h / (2 * s),
        -h * (1 + a**2 * (1 - s) / (2 * s)),
        a * math.sqrt(h),
    )
    cps = (1 - s_next + k, k * (1 - s) - s * (1 - s_next), s_next * math.sin(a * math.pi / 2))
    for kernel, closed in (("dance", dance), ("cps", cps)):
        assert kernels.coefficients(everywhere(kernel, a), index) == pytest.approx(closed, 1e-12)


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("index", range(10))
def test_the_coefficient_of_the_picture_is_that_of_the_level(kernel, index):
    s, s_next = SIGMAS[index], SIGMAS[index + 1]
    alpha, gamma, q = kernels.coefficients(everywhere(kernel, 0.6), index)
    assert alpha * (1 - s) - gamma == pytest.approx(1 - s_next, rel=1e-12)
    noise = math.hypot(alpha * s + gamma, q)
    if kernel in ("ode", "cps"):  # what coefficient-preserving sampling is called after
        assert noise == pytest.approx(s_next, rel=1e-12, abs=1e-15)
    elif index < 9:
        assert noise > s_next


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("index", range(10))
def test_a_kernel_goes_to_the_ode_as_its_noise_goes_to_zero(kernel, index):
    s, s_next = SIGMAS[index], SIGMAS[index + 1]
    euler = TABLE["ode"].coefficients(s, s_next, SIGMAS[1], 0.0)
    for a, error in ((1e-3, 1e-2), (1e-6, 1e-5)):
        assert TABLE[kernel].coefficients(s, s_next, SIGMAS[1], a) == pytest.approx(
            euler, abs=error
        )


@pytest.mark.parametrize("kernel", TABLE)
@pytest.mark.parametrize("index", [0, 4, 9])
def test_noise_zero_is_euler_as_diffusers_takes_it(kernel, index):
    x, v, z = latents(1), latents(2), latents(3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    stock = scheduler.step(v, scheduler.timesteps[index], x).prev_sample
    ours = kernels.step(x, v, everywhere(kernel, 0.0), index, noise=z)
    assert ours.q == 0.0
    assert_close(ours.next, stock, rtol=0, atol=1e-6)


def test_outside_the_window_a_step_is_euler_and_needs_no_noise():
    schedule = build(SIGMAS, "flow-sde", 0.7, (2, 4))
    x, v = latents(1), latents(2)
    for index in (0, 1, 4, 9):
        outside = kernels.step(x, v, schedule, index)
        assert torch.equal(outside.next, kernels.step(x, v, build(SIGMAS), index).next)
    with pytest.raises(ValueError, match="step_noise"):
        kernels.step(x, v, schedule, 2)
    with pytest.raises(IndexError):
        kernels.step(x, v, schedule, -1)


@pytest.mark.parametrize("kernel", NOISY)
@pytest.mark.parametrize("index", [0, 3, 7])
def test_log_prob_is_the_mean_of_torchs_normal(kernel, index):
    x, v, z = latents(1), latents(2), latents(3)
    step = kernels.step(x, v, NOISY[kernel], index, noise=z)
    ours = kernels.log_prob(step.next, step.mean, step.q)
    density = Independent(Normal(step.mean.double(), step.q), 2)
    assert_close(ours.double(), density.log_prob(step.next.double()) / 20, rtol=1e-5, atol=1e-6)


def test_log_prob_has_no_gradient_through_the_sample_and_the_right_one_through_v():
    x, z, v = latents(1), latents(3), latents(2).requires_grad_()
    step = kernels.step(x, v, SDE, 4, noise=z)
    assert not step.next.requires_grad
    kernels.log_prob(step.next, step.mean, step.q).sum().backward()
    assert v.grad is not None
    gamma, q = SDE.coefficients(4).gamma, SDE.coefficients(4).q
    assert_close(v.grad, gamma * z / (q * 20), rtol=1e-4, atol=1e-6)


def test_densities_refuse_an_euler_step():
    x = latents(1)
    with pytest.raises(ValueError, match="no density"):
        kernels.log_prob(x, x, 0.0)
    with pytest.raises(ValueError, match="no density"):
        kernels.kl_factor(build(SIGMAS, "cps", 0.7, (0, 8)), 9)


@pytest.mark.parametrize("kernel", NOISY)
@pytest.mark.parametrize("index", [0, 5])
def test_samples_have_the_mean_and_the_spread_of_the_closed_form(kernel, index):
    n, x, v = 100_000, 0.4, -1.3
    z = torch.randn((n, 1), generator=generator(13))
    shape = (n, 1)
    done = kernels.step(torch.full(shape, x), torch.full(shape, v), NOISY[kernel], index, noise=z)
    alpha, gamma, q = NOISY[kernel].coefficients(index)
    mean, spread = alpha * x + gamma * v, done.next.double().std().item()
    assert done.next.double().mean().item() == pytest.approx(mean, abs=5 * q / math.sqrt(n))
    assert spread == pytest.approx(q, rel=5 / math.sqrt(2 * n))
    entropy = -kernels.log_prob(done.next, done.mean, done.q).double().mean().item()
    assert entropy == pytest.approx(0.5 + math.log(q * math.sqrt(2 * math.pi)), abs=0.02)


@pytest.mark.parametrize("kernel", NOISY)
@pytest.mark.parametrize("index", [0, 5])
def test_the_exact_kl_is_torchs_for_every_kernel(kernel, index):
    x, v, v_ref, zero = latents(1), latents(2), latents(4), torch.zeros(3, 4, 5)
    means = [kernels.step(x, w, NOISY[kernel], index, noise=zero).mean for w in (v, v_ref)]
    q = NOISY[kernel].coefficients(index).q
    exact = kl_divergence(*(Normal(mean.double(), q) for mean in means)).mean((1, 2))
    ours = kernels.kl_factor(NOISY[kernel], index) * (v - v_ref).double().square().mean((1, 2))
    assert_close(ours, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("index", [0, 5])
def test_exact_kl_equals_monte_carlo_and_holds_the_time_step(index):
    n = 200_000
    x, v, v_ref = latents(1, (1, 2, 2)), latents(2, (1, 2, 2)), 8 * latents(4, (1, 2, 2))
    ref = kernels.step(x, v_ref, SDE, index, noise=torch.zeros(1, 2, 2))
    dv2 = (v - v_ref).square().mean().item()
    exact = kernels.kl_factor(SDE, index) * dv2

    z = torch.randn((n, 2, 2), generator=generator(7))
    wide = kernels.step(x.expand(n, 2, 2), v.expand(n, 2, 2), SDE, index, noise=z)
    gap = kernels.log_prob(wide.next, wide.mean, wide.q) - kernels.log_prob(
        wide.next, ref.mean.expand(n, 2, 2), wide.q
    )
    error = gap.std().item() / math.sqrt(n)
    assert abs(gap.mean().item() - exact) < 4 * error and error < 0.01 * exact

    a, s, h = 0.7, SIGMAS[index], SIGMAS[index] - SIGMAS[index + 1]
    per_dv2 = (
        h**2 / (2 * a**2) if index == 0 else h * (1 + a**2 / 2) ** 2 * (1 - s) / (2 * a**2 * s)
    )
    assert exact == pytest.approx(per_dv2 * dv2, rel=1e-9)


@pytest.mark.parametrize("index", [1, 4, 8])
def test_excess_noise_is_the_formula_and_what_samples_show(index):
    a, s, s_next = 0.7, SIGMAS[index], SIGMAS[index + 1]
    h = s - s_next
    alpha, gamma, q = SDE.coefficients(index)
    excess = a**2 * h**2 / (1 - s) + a**4 * h**2 / (4 * (1 - s) ** 2)
    assert (alpha * s + gamma) ** 2 + q**2 - s_next**2 == pytest.approx(excess, rel=1e-9)

    n, x0 = 100_000, 0.3
    eps = torch.randn((n, 1), generator=generator(11))
    z = torch.randn((n, 1), generator=generator(12))
    step = kernels.step((1 - s) * x0 + s * eps, eps - x0, SDE, index, noise=z)
    expected = s_next**2 + excess
    assert step.next.var().item() == pytest.approx(expected, abs=5 * expected * math.sqrt(2 / n))
    mean_error = 5 * math.sqrt(expected / n)
    assert step.next.mean().item() == pytest.approx((1 - s_next) * x0, abs=mean_error)


MEAN, SPREAD = 0.5, 0.6  # of the data of a one-dimensional world


def exact_velocity(x, s):
    """E[eps - x0 | x_s = x] for x0 ~ N(MEAN, SPREAD^2)."""
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    off = x - (1 - s) * MEAN
    return (s - (1 - s) * SPREAD**2) / variance * off - MEAN


def sampled_moments(kernel, steps, a, n=20_000):
    """Mean and std of x0 of a world whose velocity is known, all steps but the tail with noise."""
    grid = tuple(1 - i / steps for i in range(steps)) + (0.0,)
    schedule = build(grid)
    if kernel != "ode":
        schedule = build(grid, kernel, a, (0, steps - TABLE[kernel].tail))
    rng = generator(17)
    x = torch.randn((n, 1), generator=rng)
    for index in range(steps):
        z = torch.randn((n, 1), generator=rng)
        x = kernels.step(x, exact_velocity(x, grid[index]), schedule, index, noise=z).next
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("kernel", ["ode", "flow-sde", "dance"])
def test_steps_of_an_sde_keep_the_marginal_as_they_get_smaller(kernel):
    """Both claim the ODE's marginals in the limit; 20 000 samples, errors of 0.5% and less."""
    mean, spread = sampled_moments(kernel, 400, 0.7)
    assert mean == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(20_000) + 0.005)
    assert spread == pytest.approx(SPREAD, rel=0.03)
    _, coarse = sampled_moments(kernel, 10, 0.7)
    assert abs(coarse - SPREAD) > abs(spread - SPREAD)


def test_cps_keeps_the_noise_level_but_not_the_spread_of_the_data():
    """Its claim is about one picture: noise of std s' at every step. Over many pictures each noisy
    step goes through an estimate of x0, which varies less than x0 does, however short the step.
    """
    for steps in (10, 400):
        mean, spread = sampled_moments("cps", steps, 0.7)
        assert mean == pytest.approx(MEAN, abs=0.03)
        assert 0.7 * SPREAD < spread < 0.9 * SPREAD


@pytest.mark.parametrize("index", [0, 4, 7])
def test_cps_leaves_noise_of_exactly_the_next_level(index):
    n, x0, s, s_next = 100_000, 0.3, SIGMAS[index], SIGMAS[index + 1]
    eps = torch.randn((n, 1), generator=generator(11))
    z = torch.randn((n, 1), generator=generator(12))
    step = kernels.step((1 - s) * x0 + s * eps, eps - x0, NOISY["cps"], index, noise=z)
    rest = step.next.double() - (1 - s_next) * x0
    assert rest.std().item() == pytest.approx(s_next, rel=5 / math.sqrt(2 * n))
    assert rest.mean().item() == pytest.approx(0.0, abs=5 * s_next / math.sqrt(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", NOISY)
def test_replay_is_bit_equal_and_scores_the_stored_tensor(kernel, dtype):
    schedule = NOISY[kernel]
    x = torch.stack([initial_noise(seed, (4, 5)) for seed in range(3)]).to(dtype)
    for index in schedule.trained:
        v = latents(20 + index, dtype=dtype)
        z = torch.stack([step_noise(seed, index, (4, 5)) for seed in range(3)])
        sampled = kernels.step(x, v, schedule, index, noise=z)
        old = kernels.log_prob(sampled.next, sampled.mean, sampled.q)
        assert sampled.next.dtype == dtype and sampled.mean.dtype == torch.float32

        stored = sampled.next.clone()
        replayed = kernels.step(x, v, schedule, index, x_next=stored)
        assert torch.equal(replayed.mean, sampled.mean) and torch.equal(replayed.next, stored)
        assert torch.equal(kernels.log_prob(replayed.next, replayed.mean, replayed.q), old)
        x = stored


def test_rounding_after_the_log_prob_would_move_it():
    """Why x' is rounded first: the gap is far beyond a clip range of 1e-4."""
    x, v, z = latents(1, dtype=torch.bfloat16), latents(2, dtype=torch.bfloat16), latents(3)
    step = kernels.step(x, v, SDE, 8, noise=z)
    before = kernels.log_prob(step.mean + step.q * z, step.mean, step.q)
    after = kernels.log_prob(step.next, step.mean, step.q)
    assert (before - after).abs().max() > 1e-3


def test_guidance_at_one_is_the_conditional_velocity_and_leaves_no_shift():
    v_c, v_u = latents(1), latents(2)
    assert torch.equal(kernels.guide(v_c, v_u, 1.0), v_c)
    assert_close(kernels.guide(v_c, v_u, 3.0), 3 * v_c - 2 * v_u)
    assert torch.count_nonzero(kernels.guidance_shift(v_c, v_c, SDE, 2)) == 0
    x, v_g = latents(3), kernels.guide(v_c, v_u, 3.0)
    zero = torch.zeros_like(x)
    apart = (
        kernels.step(x, v_g, SDE, 2, noise=zero).mean
        - kernels.step(x, v_c, SDE, 2, noise=zero).mean
    )
    assert_close(kernels.guidance_shift(v_g, v_c, SDE, 2), apart, rtol=1e-4, atol=1e-6)
