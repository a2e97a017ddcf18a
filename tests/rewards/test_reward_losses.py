import itertools
import math

import pytest
import torch
from torch.distributions import Normal

from rewards.training import losses
from rewards.training.collate import Labels
from rewards.training.losses import (
    bradley_terry,
    cumulative_link,
    davidson,
    expected_bradley_terry,
    mse_expectation,
    plackett_luce,
    pool_heads,
    positive,
    prompt_weights,
    rao_kupper,
    thresholds,
    thurstone,
    within_prompts,
)
from rewards.training.objective import Objective, RewardLoss

B = 6
ONE = torch.ones(1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


WEIGHT = draw(B, seed=9).abs() + 0.1
Y = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.8, 1.0], dtype=torch.float64)
RATING = torch.tensor([1.0, 5.0, 3.0, 2.4, 4.5, 1.2], dtype=torch.float64)
RANKS = torch.tensor([[1.0, 2, 3], [2, 1, 2], [1, 1, 1], [2, 1, 0], [1, 1, 0], [3, 1, 2]]).double()
PROMPTS = torch.tensor([0, 1, 0, 1, 1, 2])
VAR = [draw(B, seed=s).square() + 0.2 for s in (3, 4)]

# name -> (function of the tensors that carry a gradient, those tensors)
CASES = {
    "mse": (lambda x: mse_expectation(x, RATING, WEIGHT), [draw(B, 5)]),
    "within_prompts": (lambda x: within_prompts(x, PROMPTS), [draw(B)]),
    "bradley_terry": (lambda z: bradley_terry(z, Y, WEIGHT, margin=0.3), [draw(B)]),
    "rao_kupper": (
        lambda z, k: rao_kupper(z, Y, positive(k), WEIGHT),
        [draw(B), draw(1, seed=1)[0]],
    ),
    "davidson": (
        lambda a, b, nu: davidson(a, b, Y, nu, WEIGHT),
        [draw(B), draw(B, seed=1), draw(1, seed=2)[0]],
    ),
    "thurstone": (
        lambda a, va, b, vb: thurstone(a, va, b, vb, Y, WEIGHT),
        [draw(B), VAR[0], draw(B, seed=1), VAR[1]],
    ),
    "expected": (
        lambda a, va, b, vb: expected_bradley_terry(a, va, b, vb, Y, WEIGHT),
        [draw(B), VAR[0], draw(B, seed=1), VAR[1]],
    ),
    "cumulative_link": (
        lambda s, raw: cumulative_link(s, RATING, thresholds(raw), WEIGHT),
        [draw(B), draw(4, seed=1)],
    ),
    "plackett_luce": (lambda s: plackett_luce(s, RANKS, WEIGHT), [draw(B, 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_value(name):
    function, tensors = CASES[name]
    tensors = [t.clone().requires_grad_() for t in tensors]
    assert function(*tensors).dtype == torch.float64
    assert torch.autograd.gradcheck(function, tensors)


# Rows as (function of rows and weight, tensors of rows): for what must hold of each row by itself.
LOG_K, LOG_NU, THETA = torch.tensor(0.4), torch.tensor(0.1), thresholds(torch.zeros(4))
ROWS = {
    "mse": (mse_expectation, [draw(B, 5), RATING]),
    "bradley_terry": (bradley_terry, [draw(B), Y]),
    "rao_kupper": (lambda z, y, w: rao_kupper(z, y, LOG_K, w), [draw(B), Y]),
    "davidson": (lambda a, b, y, w: davidson(a, b, y, LOG_NU, w), [draw(B), draw(B, seed=1), Y]),
    "thurstone": (thurstone, [draw(B), VAR[0], draw(B, seed=1), VAR[1], Y]),
    "expected": (expected_bradley_terry, [draw(B), VAR[0], draw(B, seed=1), VAR[1], Y]),
    "cumulative_link": (lambda s, r, w: cumulative_link(s, r, THETA, w), [draw(B), RATING]),
    "plackett_luce": (plackett_luce, [draw(B, 3), RANKS]),
}


@pytest.mark.parametrize("name", ROWS)
def test_micro_batches_add_up_and_rows_of_weight_0_change_nothing(name):
    function, rows = ROWS[name]
    whole = function(*rows, WEIGHT)
    parts = [function(*(r[i : i + 2] for r in rows), WEIGHT[i : i + 2]) for i in range(0, B, 2)]
    torch.testing.assert_close(sum(parts), whole)

    dead = [torch.cat([r, torch.full_like(r[:1], math.nan)]).requires_grad_() for r in rows]
    again = function(*dead, torch.cat([WEIGHT, torch.zeros(1)]))
    torch.testing.assert_close(again, whole)
    again.backward()
    for tensor in dead[:1]:
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        assert tensor.grad[-1].abs().sum() == 0


@pytest.mark.parametrize("size", [1e3, 1e5])
@pytest.mark.parametrize("name", ROWS)
def test_extreme_scores_give_finite_losses_and_gradients_in_half_precision_too(name, size):
    function, rows = ROWS[name]
    for dtype in (torch.float32, torch.bfloat16):
        first = (rows[0].sign() * size).to(dtype).requires_grad_()
        loss = function(first, *(r.to(dtype) for r in rows[1:]), WEIGHT.float())
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert first.grad is not None and first.grad.isfinite().all()


def test_expectation_and_its_square():
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 50.0, 0.0], [0.0, 0.0, math.log(2)]])
    torch.testing.assert_close(losses.expectation(logits), torch.tensor([2.0, 2.0, 2.25]))
    loss = mse_expectation(logits, torch.tensor([1.0, 2.0, 3.25]), torch.tensor([0.5, 1.0, 2.0]))
    assert loss.item() == pytest.approx(0.5 * 1 + 0 + 2 * 1)


def test_bradley_terry_is_a_binary_cross_entropy():
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(draw(B), Y, weight=WEIGHT)
    torch.testing.assert_close(bradley_terry(draw(B), Y, WEIGHT), wanted * B)
    won = bradley_terry(torch.tensor([1.0]), ONE, ONE, margin=0.4)
    assert won.item() == pytest.approx(math.log1p(math.exp(-0.6)))


def chances(function, z):
    """P(first), P(tie), P(second) that a loss stands for."""
    y = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    return [math.exp(-function(z, y[i : i + 1]).item()) for i in range(3)]


@pytest.mark.parametrize("z", [-3.0, -0.2, 0.0, 1.5])
def test_tie_models_give_three_chances_with_the_published_odds(z):
    gap, k, nu = torch.tensor([z], dtype=torch.float64), 1.7, 0.6
    w = torch.ones(1, dtype=torch.float64)
    win, tie, loss = chances(
        lambda x, y: rao_kupper(x, y, torch.tensor(math.log(k), dtype=torch.float64), w), gap
    )
    assert win + tie + loss == pytest.approx(1)
    assert win == pytest.approx(math.exp(z) / (math.exp(z) + k))
    assert loss == pytest.approx(1 / (1 + k * math.exp(z)))

    win, tie, loss = chances(
        lambda x, y: davidson(x + 2, 0 * x + 2, y, torch.tensor(math.log(nu)).double(), w), gap
    )
    assert win + tie + loss == pytest.approx(1)
    assert win / loss == pytest.approx(math.exp(z))
    assert tie / math.sqrt(win * loss) == pytest.approx(nu)


def test_tie_models_without_room_for_ties_are_bradley_terry():
    strict = torch.tensor([0.0, 1.0, 0.2], dtype=torch.float64)
    z, w = draw(3), torch.ones(3, dtype=torch.float64)
    wanted = bradley_terry(z, strict, w)
    torch.testing.assert_close(rao_kupper(z, strict, torch.tensor(1e-9).double(), w), wanted)
    never = torch.tensor(-40.0, dtype=torch.float64)
    torch.testing.assert_close(davidson(z, 0 * z, strict, never, w), wanted)


@pytest.mark.parametrize("name", ["bradley_terry", "rao_kupper", "davidson"])
def test_a_tie_parameter_is_learnt_and_ties_pull_together(name):
    """40 % ties between equals: the model says so at its optimum."""
    raw = torch.tensor(0.0, requires_grad=True)
    z = torch.tensor([0.8], requires_grad=True)
    y = torch.tensor([0.5, 1.0, 0.0])
    share = torch.tensor([0.4, 0.3, 0.3])
    calls = {
        "bradley_terry": lambda gap: bradley_terry(gap, y, share),
        "rao_kupper": lambda gap: rao_kupper(gap, y, positive(raw), share),
        "davidson": lambda gap: davidson(gap, 0 * gap, y, raw, share),
    }
    fit = torch.optim.LBFGS([raw, z], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        fit.zero_grad()
        loss = calls[name](z.expand(3))
        loss.backward()
        return loss

    fit.step(closure)
    assert abs(z.item()) < 1e-3
    if name == "rao_kupper":  # P(tie | z = 0) = (k - 1) / (k + 1)
        assert math.tanh(positive(raw).item() / 2) == pytest.approx(0.4, abs=1e-3)
    if name == "davidson":  # nu / (2 + nu)
        assert math.exp(raw.item()) / (2 + math.exp(raw.item())) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("function", [thurstone, expected_bradley_terry])
def test_uncertain_scores_swap_with_their_label(function):
    a, b = draw(B), draw(B, seed=1)
    torch.testing.assert_close(
        function(a, VAR[0], b, VAR[1], Y, WEIGHT), function(b, VAR[1], a, VAR[0], 1 - Y, WEIGHT)
    )


def test_swapping_a_pair_and_its_label_changes_nothing():
    a, b, k = draw(B), draw(B, seed=1), torch.tensor(0.4).double()
    for loss, swapped in (
        (bradley_terry(a, Y, WEIGHT, 0.2), bradley_terry(-a, 1 - Y, WEIGHT, 0.2)),
        (rao_kupper(a, Y, k, WEIGHT), rao_kupper(-a, 1 - Y, k, WEIGHT)),
        (davidson(a, b, Y, k, WEIGHT), davidson(b, a, 1 - Y, k, WEIGHT)),
    ):
        torch.testing.assert_close(loss, swapped)


def test_uncertainty_in_closed_form_is_what_sampling_says():
    mean, var = torch.tensor([0.7]).double(), [torch.tensor([v]).double() for v in (0.9, 0.4)]
    z = mean + (var[0] + var[1]).sqrt() * draw(400_000, seed=5)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    first = thurstone(mean, var[0], zero, var[1], one, one)
    assert math.exp(-first.item()) == pytest.approx((z > 0).double().mean().item(), abs=3e-3)
    for y, sampled in (
        (one, -torch.nn.functional.logsigmoid(z)),
        (zero, -torch.nn.functional.logsigmoid(-z)),
    ):
        closed = expected_bradley_terry(mean, var[0], zero, var[1], y, one)
        assert closed.item() == pytest.approx(sampled.mean().item(), abs=5e-3)


def test_log_of_the_normal_distribution_function_and_its_slope_far_out():
    x = torch.tensor([-1e4, -30.0, -1.0, 0.0, 2.0, 30.0], requires_grad=True)
    value = losses._log_ndtr(x)
    value.sum().backward()
    torch.testing.assert_close(value, torch.special.log_ndtr(x.detach()))
    middle = Normal(0.0, 1.0).log_prob(torch.tensor([-1.0, 0, 2])).exp()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[2:5], middle / value[2:5].detach().exp())
    torch.testing.assert_close(x.grad[:2], torch.tensor([1e4, 30.0 + 1 / 30]), rtol=1e-4, atol=0)


def test_variance_is_cut_at_both_ends():
    one = torch.ones(1)
    for size, end in ((0.0, 1e-4), (1e9, 1e4)):
        var = torch.tensor([size / 2], requires_grad=True)
        loss = thurstone(one, var, 0 * one, var, one, one)
        wanted = torch.special.log_ndtr(torch.tensor(1 / math.sqrt(end)))
        assert loss.item() == pytest.approx(-wanted.item(), abs=1e-6)


def test_heads_are_pooled_by_adding_variances():
    heads = draw(200_000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 2.0])
    average = heads.mean(dim=1)
    mean, var = pool_heads(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 4.0, 0.25]]))
    assert mean.item() == pytest.approx(average.mean().item(), abs=0.01)
    assert var.item() == pytest.approx(average.var().item(), rel=0.02)


def test_levels_of_a_cumulative_link_are_a_distribution_that_moves_with_the_score():
    theta = thresholds(torch.tensor([-1.0, -3.0, 0.5, 2.0]).double())
    assert (theta.diff() > 0).all()
    means = []
    for score in (-2.0, 0.0, 3.0):
        s, w = torch.tensor([score]).double(), torch.ones(1).double()
        p = [
            math.exp(-cumulative_link(s, torch.tensor([r]).double(), theta, w).item())
            for r in (1.0, 2.0, 3.0, 4.0, 5.0)
        ]
        assert sum(p) == pytest.approx(1)
        for k in range(4):
            assert sum(p[: k + 1]) == pytest.approx((theta[k] - score).sigmoid().item())
        means.append(sum(i * q for i, q in enumerate(p)))
        between = cumulative_link(s, torch.tensor([2.25]).double(), theta, w).item()
        assert between == pytest.approx(-0.75 * math.log(p[1]) - 0.25 * math.log(p[2]))
    assert means == sorted(means)


def test_plackett_luce_by_brute_force():
    s, w = draw(1, 4), torch.ones(1).double()
    total = 0.0
    for order in itertools.permutations(range(4)):
        chance, left = 1.0, list(order)
        while left:
            chance *= (s[0, left[0]].exp() / s[0, left].exp().sum()).item()
            left.pop(0)
        ranks = torch.zeros(1, 4).double()
        ranks[0, list(order)] = torch.arange(1, 5).double()
        assert math.exp(-plackett_luce(s, ranks, w).item()) == pytest.approx(chance)
        total += chance
    assert total == pytest.approx(1)


def test_plackett_luce_of_pairs_ties_and_empty_places():
    w = torch.ones(1).double()
    s = draw(1, 2)
    z = s[:, 0] - s[:, 1]
    pair = plackett_luce(s, torch.tensor([[1.0, 2.0]]), w)
    torch.testing.assert_close(pair, bradley_terry(z, torch.ones(1), w))
    tie = plackett_luce(s, torch.tensor([[1.0, 1.0]]), w)
    torch.testing.assert_close(tie, 2 * bradley_terry(z, torch.full((1,), 0.5), w))
    padded = torch.cat([s, torch.tensor([[math.nan]])], dim=1)
    torch.testing.assert_close(plackett_luce(padded, torch.tensor([[1.0, 2.0, 0.0]]), w), pair)
    swapped = plackett_luce(s.flip(1), torch.tensor([[2.0, 1.0]]), w)
    torch.testing.assert_close(swapped, pair)


def test_prompts_count_the_same_however_often_they_were_judged():
    weight = prompt_weights(["a", "b", "a", "a"])
    torch.testing.assert_close(weight, torch.tensor([2 / 3, 2.0, 2 / 3, 2 / 3]))
    assert weight.mean().item() == pytest.approx(1) and prompt_weights([]).shape == (0,)


def test_an_error_that_all_pictures_of_a_prompt_share_is_free_within_it():
    error = torch.tensor([1.0, 5.0, 3.0, 5.0, 5.0, -7.0])
    assert float(within_prompts(error, PROMPTS)) == pytest.approx((3 - 1) ** 2 / 4)  # of 4 pairs
    shift = torch.tensor([10.0, 20.0, 30.0])[PROMPTS]
    assert torch.allclose(within_prompts(error + shift, PROMPTS), within_prompts(error, PROMPTS))
    assert float(within_prompts(error[:2], PROMPTS[:2])) == 0


@pytest.mark.parametrize("pair", ["bradley-terry", "rao-kupper", "davidson", "thurstone"])
@pytest.mark.parametrize("point", ["mse", "ordinal"])
def test_labels_follow_the_logits_to_their_device(pair, point):
    """Without a device at hand: tensors that hold nothing refuse to be mixed with others."""
    objective = Objective(["a"], RewardLoss(pair=pair, point=point)).to("meta")
    labels = Labels(
        point=torch.tensor([0, 1]),
        rating=torch.tensor([0.2, 0.8]),
        point_weight=torch.tensor([0.5, 0.5]),
        point_prompt=torch.tensor([0, 0]),
        first=torch.tensor([0]),
        second=torch.tensor([1]),
        preference=torch.tensor([1.0]),
        pair_weight=torch.tensor([1.0]),
    )
    loss = objective.axis_loss("a", torch.zeros(2, 5, device="meta"), labels, torch.arange(2))
    assert loss.device.type == "meta"
