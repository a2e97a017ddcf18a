"""Activation maxima: which outputs they are read from, and that they add up over calls."""

import pytest
import torch
from torch import nn

from rlhf.models.health import activation_maxima
from tests.rlhf.tiny import TEXTS, make_policy


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Scaled(2.0), Scaled(-10.0)])

    def forward(self, x, last=True):
        x = self.transformer_blocks[0](x)
        return self.transformer_blocks[1](x) if last else x


def test_the_largest_value_of_each_block_over_all_calls():
    toy = Toy()
    with activation_maxima(toy) as seen:
        assert seen.largest == {}
        toy(torch.tensor([[1.0, -3.0]]), last=False)
        assert seen.largest == {0: 6.0}
        toy(torch.tensor([[2.0, 0.0]]))
    assert seen.largest == {0: 6.0, 1: 40.0}
    assert seen.ratio[0] == pytest.approx(6 / ((4 + 36 + 16 + 0) / 4) ** 0.5)
    assert seen.ratio[1] == pytest.approx(40 / (1600 / 2) ** 0.5)


def test_nothing_is_read_outside_the_context_nor_left_behind_by_an_error():
    toy = Toy()
    with pytest.raises(ZeroDivisionError), activation_maxima(toy) as seen:
        raise ZeroDivisionError
    toy(torch.ones(1, 2))
    assert seen.largest == {} and not toy.transformer_blocks[0]._forward_hooks


def test_on_a_policy_with_gradient_it_changes_nothing(tiny_base):
    policy = make_policy(tiny_base, "full")
    condition = policy.encode(TEXTS[0])
    x, sigma = torch.randn(2, 16, 64), torch.tensor([0.5, 0.9])

    def velocity():
        return policy.velocity(
            x, sigma, condition, size=(64, 64), prefix=policy.prefix(condition), slot="train"
        )

    plain = velocity()
    with activation_maxima(policy.transformer) as seen:
        watched = velocity()
    assert torch.equal(plain, watched) and watched.requires_grad
    assert list(seen.largest) == [0, 1] and min(seen.ratio.values()) > 1
