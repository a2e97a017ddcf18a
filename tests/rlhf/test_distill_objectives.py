"""The formulas of distillation: by hand, by finite differences, and in a world of Gaussians."""

import math

import numpy as np
import pytest
import torch

from rlhf import kernels
from rlhf.distill.grids import GRIDS, grid_of, step_at, through
from rlhf.distill.objectives import (
    average_velocity,
    by_prompt,
    euler,
    levels_by_prompt,
    matching_gradient,
    matching_target,
    path_weights,
    score_difference,
    velocity_loss,
)
from rlhf.errors import ConfigError
from rlhf.schedule import build, qwen_image21_sigmas

torch.manual_seed(0)


def rows(seed, b=3, n=4, c=2):
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(seed)).double()


def differences(f, x, h=1e-6):
    """Central differences of a scalar function at every entry of x."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = h
        step = step.reshape(x.shape)
        out.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * h)
    return out


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRIDS)
def test_a_teacher_passes_through_every_level_of_a_preset_in_as_many_steps(name):
    usual = qwen_image21_sigmas(40, 16, {"use_dynamic_shifting": True, "shift_terminal": 0.02})
    knots = grid_of(name)
    grid = through(usual, knots)
    assert len(grid) == 41 and set(knots) <= set(grid)
    moved = [abs(a - b) for a, b in zip(grid, usual, strict=True) if a != b]
    assert len(moved) <= len(knots) - 2 and max(moved, default=0) < 0.02


def test_a_level_belongs_to_the_step_that_leaves_from_it():
    knots = (1.0, 0.75, 0.5, 0.25, 0.0)
    assert [step_at(knots, s) for s in (1.0, 0.8, 0.75, 0.6, 0.5, 0.25, 0.01)] == [
        0, 0, 1, 1, 2, 3, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "grid, words",
    [
        ("odd-4", "expected one of even-1"),
        ((), "from 1 to above 0"),
        ((1.0, 0.5, 0.0), "above 0"),
        ((0.9, 0.5), "exactly 1.0"),
        ((1.0, 0.5, 0.6), "strictly decreasing"),
    ],
    ids=str,
)
def test_grids_that_cannot_be_sampled_are_refused(grid, words):
    with pytest.raises(ConfigError, match=words):
        grid_of(grid)


def test_a_teacher_of_too_few_steps_is_refused():
    with pytest.raises(ConfigError, match="raise teacher_steps"):
        through((1.0, 0.6, 0.3, 0.0), (1.0, 0.75, 0.5, 0.25, 0.0))


# --- objectives -----------------------------------------------------------------------------------


def test_the_gradient_of_the_loss_agrees_with_finite_differences():
    v, target, weight = rows(1), rows(2), torch.tensor([0.5, 0.3, 0.2]).double()
    v.requires_grad_()
    (gradient,) = torch.autograd.grad(velocity_loss(v, target, weight), v)
    found = differences(lambda x: velocity_loss(x, target, weight), v.detach())
    torch.testing.assert_close(gradient, found, atol=1e-8, rtol=1e-6)


def test_a_step_with_the_average_velocity_ends_where_the_teacher_did():
    x, x_end, s = rows(1), rows(2), torch.tensor([1.0, 0.7, 0.4]).double()
    s_end = s - 0.25
    v = average_velocity(x, x_end, s, s_end)
    torch.testing.assert_close(euler(x, v, s, s_end), x_end)


def test_matching_moves_the_clean_prediction_by_the_gradient_it_is_given():
    """d velocity_loss / d v = d bar(g x) / d v with x = x_s - s v, by finite differences."""
    x_s, v, g = rows(1), rows(2), rows(3)
    s, each = torch.tensor([1.0, 0.6, 0.3]).double(), torch.full((3,), 1 / 3).double()
    target, weight = matching_target(v, g, s)
    asked = v.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(velocity_loss(asked, target, weight * each), asked)

    def along(v):
        x = euler(x_s, v, s, torch.zeros_like(s))
        return (each * (g * x).flatten(1).mean(1)).sum()

    torch.testing.assert_close(gradient, differences(along, v), atol=1e-8, rtol=1e-6)


def gaussian_velocity(x, t, mean, std):
    """E[eps - x0 | x_t] for x0 ~ N(mean, std^2)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    off = x - (1 - t) * mean
    return t / variance * off - (mean + (1 - t) * std**2 / variance * off)


def noised_kl(t, mean, std, mean_real, std_real):
    """KL of the student's noised pictures from the teacher's, closed form."""
    mine, real = ((1 - t) ** 2 * s**2 + t**2 for s in (std, std_real))
    gap = (1 - t) * (mean - mean_real)
    return 0.5 * (math.log(real / mine) + (mine + gap**2) / real - 1)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_the_score_difference_is_the_gradient_of_the_kl(t):
    """Of a student x = mean + std z, in both of its parameters; the mean over z and eps is exact by
    quadrature, the derivative of the KL by finite differences.
    """
    mean, std, mean_real, std_real = 0.7, 0.5, -0.3, 1.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    z, eps = (torch.tensor(a).flatten() for a in np.meshgrid(nodes, nodes))
    weight = torch.tensor(np.outer(weights, weights).flatten() / weights.sum() ** 2)
    x_t = (1 - t) * (mean + std * z) + t * eps
    v_fake, v_real = (
        gaussian_velocity(x_t, t, *p)[:, None, None] for p in ((mean, std), (mean_real, std_real))
    )
    levels = torch.full_like(z, t)
    difference = score_difference(v_fake, v_real, levels)[:, 0, 0] * (1 - t)
    h = 1e-5
    by_mean = noised_kl(t, mean + h, std, mean_real, std_real) - noised_kl(
        t, mean - h, std, mean_real, std_real
    )
    by_std = noised_kl(t, mean, std + h, mean_real, std_real) - noised_kl(
        t, mean, std - h, mean_real, std_real
    )
    assert float((weight * difference).sum()) == pytest.approx(by_mean / (2 * h), rel=1e-6)
    assert float((weight * difference * z).sum()) == pytest.approx(by_std / (2 * h), rel=1e-6)


def test_the_matching_gradient_is_the_gap_of_the_clean_predictions_over_their_size():
    x, x_t, v_fake, v_real = (rows(i) for i in range(4))
    t = torch.tensor([0.2, 0.5, 0.9]).double()
    x0_fake, x0_real = (x_t - t[:, None, None] * v for v in (v_fake, v_real))
    scale = (x - x0_real).abs().mean((1, 2), keepdim=True)
    found = matching_gradient(x, x_t, v_fake, v_real, t)
    torch.testing.assert_close(found, (x0_fake - x0_real) / scale)


def test_path_weights_make_squared_distances_the_kl_of_the_transitions():
    sigmas = qwen_image21_sigmas(6, 16, {"use_dynamic_shifting": True})
    weights = path_weights(sigmas, 0.7)
    schedule = build(sigmas, "flow-sde", 0.7, (0, 5))
    x, one, other = (rows(i).float() for i in range(3))
    for index in range(5):
        means = [kernels.step(x, v, schedule, index, x_next=x).mean for v in (one, other)]
        q = schedule.coefficients(index).q
        normals = [torch.distributions.Normal(m, q) for m in means]
        kl = torch.distributions.kl_divergence(*normals).mean()
        assert float(kl) == pytest.approx(
            weights[index] * float((one - other).square().mean()), rel=1e-4
        )
    assert weights[5] == weights[4] and len(weights) == 6


def test_rows_of_a_prompt_stay_together():
    stacks = torch.arange(12.0).reshape(2, 6, 1)  # 2 levels of 3 prompts with 2 seeds
    assert by_prompt(stacks, 3).flatten().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert levels_by_prompt((1.0, 0.5), 4, 2).tolist() == [1, 1, 0.5, 0.5, 1, 1, 0.5, 0.5]
