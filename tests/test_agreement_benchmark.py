"""benchmarks/agreement.py: what gradients of groups have in common."""

import json

import pytest
import torch

from benchmarks import agreement


def rows(seed: int, count: int, common: float = 0.0) -> torch.Tensor:
    """Noise of unit size in 400 dimensions, and `common` times one vector of that size."""
    shared = torch.ones(400).index_fill(0, torch.arange(200), -1.0)
    return torch.randn(count, 400, generator=torch.Generator().manual_seed(seed)) + common * shared


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_what_rows_have_in_common_is_found_whatever_their_lengths(common):
    expected = common**2 / (1 + common**2)
    found = agreement.agreement(rows(0, 60, common) * torch.linspace(0.1, 9, 60)[:, None])
    assert found["low"] < expected < found["high"] and found["n"] == 60
    assert found["value"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("common", "widest"), [(0.0, 1.7), (1.0, 1.35)])
def test_the_interval_is_as_wide_as_the_estimate_varies_and_wider_where_there_is_nothing(
    common, widest
):
    found = [agreement.agreement(rows(seed, 16, common)) for seed in range(200)]
    spread = torch.tensor([one["value"] for one in found]).std()
    errors = torch.tensor([(one["high"] - one["low"]) / 3.92 for one in found])
    assert 0.75 < float(errors.mean() / spread) < widest


def test_a_group_that_teaches_nothing_is_left_out_and_too_few_are_refused():
    rows = torch.eye(4)
    rows[0] = 0
    assert agreement.agreement(rows)["n"] == 3
    with pytest.raises(ValueError, match="at least 3 groups"):
        agreement.agreement(rows[:3])


@pytest.mark.parametrize("common", [0.0, 0.5])
def test_across_arms_a_group_is_compared_with_other_groups_alone(common):
    these, expected = rows(0, 60, common), -(common**2) / (1 + common**2)
    found = agreement.agreement(these, -these)
    assert found["low"] < expected < found["high"]
    assert found["value"] == pytest.approx(expected, abs=0.02)


def test_every_arm_is_a_configuration_and_the_figures_are_written(tmp_path, tiny_base):
    small = [f"policy.model={tiny_base}", "group_size=4", "rollout.steps=6", "prompts.count=8"]
    given = ["--groups", "4", "--across", "--name", "two", "--out", str(tmp_path), *small]
    agreement.main(["--arms", "nft", "unguided-shared-noise", *given])
    metrics = json.loads((tmp_path / "two.json").read_text())["metrics"]
    arms = "nft", "unguided-shared-noise", "nft/unguided-shared-noise"
    assert set(metrics) == {f"agreement/{arm}" for arm in arms}
    assert all(-1 <= m["low"] <= m["value"] <= m["high"] <= 1 for m in metrics.values())
    for base, *own in agreement.ARMS.values():
        agreement.config.load(agreement.Config, base, own, "align").check()
