import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlhf.errors import ConfigError
from rlhf.schedule import Schedule, build, model_time, qwen_image21_sigmas, sd3_sigmas, shift_of

QWEN21 = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": 0.02,
}


def stock_sigmas(steps, tokens, config):
    """What QwenImage21Pipeline does before its loop, with diffusers' own functions."""
    from diffusers.pipelines.qwenimage21 import (
        pipeline_qwenimage21 as pipeline,
    )  # needs rewards.compat

    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = pipeline.calculate_shift(
        tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    grid = np.linspace(1.0, 1 / steps, steps)
    pipeline.retrieve_timesteps(scheduler, steps, "cpu", sigmas=grid, mu=mu)
    return scheduler.sigmas.double().numpy(), scheduler.timesteps


VARIANTS = {
    "as shipped": QWEN21,
    "no terminal": {k: v for k, v in QWEN21.items() if k != "shift_terminal"},
    "terminal none": {**QWEN21, "shift_terminal": None},
    "linear": {**QWEN21, "time_shift_type": "linear"},
    "defaults": {"use_dynamic_shifting": True},
    "static": {"shift": 3.0},
    "static, terminal": {"shift": 3.0, "shift_terminal": 0.02},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("steps", [2, 10, 40])
@pytest.mark.parametrize("tokens", [16, 256, 4096])
def test_grid_equals_the_stock_scheduler(config, steps, tokens):
    stock, _ = stock_sigmas(steps, tokens, config)
    ours = qwen_image21_sigmas(steps, tokens, config)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-6)


def test_qwen21_grid_equals_its_closed_form_and_the_published_numbers():
    m = 0.5 + 0.4 * (4096 - 256) / 7936
    assert shift_of(4096, QWEN21) == pytest.approx(m, abs=1e-12)
    u = np.linspace(1, 0.1, 10)
    e = math.exp(m) / (math.exp(m) + 1 / u - 1)
    closed = [*(1 - 0.98 * (1 - e) / (1 - e[-1])), 0.0]
    ours = qwen_image21_sigmas(10, 4096, QWEN21)
    np.testing.assert_allclose(ours, closed, rtol=0, atol=1e-12)
    anchor = [1, 0.937, 0.867, 0.7887, 0.7006, 0.6008, 0.4867, 0.3551, 0.2015, 0.02, 0]
    np.testing.assert_allclose(ours, anchor, rtol=0, atol=5e-4)


def test_sd3_grid_equals_the_published_numbers_and_the_stock_scheduler():
    ours = sd3_sigmas(10, 3.0)
    anchor = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    np.testing.assert_allclose(ours, anchor, rtol=0, atol=5e-5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", range(1, 60))
def test_every_grid_starts_at_exactly_one_and_ends_at_exactly_zero(steps):
    for sigmas in (
        qwen_image21_sigmas(steps, 777, QWEN21),
        qwen_image21_sigmas(steps, 777, {"shift": 3.1}),
        sd3_sigmas(steps, 2.7),
    ):
        assert len(sigmas) == steps + 1
        assert sigmas[0] == 1.0 and sigmas[-1] == 0.0
        build(sigmas)  # strictly decreasing


def test_a_configured_grid_replaces_the_default_one():
    grid = (1.0, 0.75, 0.5)
    scheduler = FlowMatchEulerDiscreteScheduler(**QWEN21)
    scheduler.set_timesteps(sigmas=list(grid), mu=shift_of(64, QWEN21))
    ours = qwen_image21_sigmas(3, 64, QWEN21, sample_sigmas=grid)
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match="4 sample_sigmas"):
        qwen_image21_sigmas(4, 64, QWEN21, sample_sigmas=grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_time_equals_what_the_pipeline_gives_its_transformer(dtype):
    stock, timesteps = stock_sigmas(10, 1024, QWEN21)
    for sigma, t in zip(stock[:-1], timesteps, strict=True):
        assert torch.equal(model_time(float(sigma), dtype), t.to(dtype) / 1000)


def test_model_time_is_not_the_cast_sigma():
    sigmas = qwen_image21_sigmas(40, 4096, QWEN21)[:-1]
    apart = [
        abs(model_time(s, torch.bfloat16).item() - torch.tensor(s, dtype=torch.bfloat16).item())
        for s in sigmas
    ]
    assert max(apart) > 1e-4


SIGMAS = sd3_sigmas(10, 3.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(kernel="flow-sde", noise_level=0.7, window=(0, 10)), "last step is never trained"),
        (dict(kernel="flow-sde", noise_level=0.7, window=(3, 3)), "0 <= start < stop"),
        (dict(kernel="flow-sde", noise_level=0.7, window=(-1, 2)), "0 <= start < stop"),
        (dict(kernel="flow-sde", noise_level=0.7), "0 <= start < stop"),
        (dict(kernel="flow-sde", noise_level=0.0, window=(0, 2)), "noise_level > 0"),
        (dict(kernel="flow-sde", noise_level=float("nan"), window=(0, 2)), "noise_level > 0"),
        (dict(kernel="flow-sde", noise_level=2.1, window=(0, 2)), "q < 2.0 at step 0"),
        (dict(kernel="cps", noise_level=0.7, window=(0, 9)), "last 2 steps are never trained"),
        (dict(kernel="dance", noise_level=0.7, window=(0, 10)), "last step is never trained"),
        (dict(kernel="cps", noise_level=1.2, window=(0, 2)), "at most 1 with kernel 'cps'"),
        (dict(kernel="ode", noise_level=0.7), "kernel 'ode'"),
        (dict(kernel="ode", window=(0, 2)), "kernel 'ode'"),
    ],
)
def test_what_cannot_be_sampled_or_trained_is_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        build(SIGMAS, **arguments)


@pytest.mark.parametrize(
    "sigmas", [(), (1.0,), (0.99, 0.5, 0.0), (1.0, 0.5, 0.1), (1.0, 0.5, 0.5, 0.0), (1.0, 2.0, 0.0)]
)
def test_a_wrong_grid_is_refused(sigmas):
    with pytest.raises(ConfigError, match="sigmas"):
        build(sigmas)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "invert_sigmas", "stochastic_sampling"])
def test_a_scheduler_we_do_not_reproduce_is_refused(key):
    with pytest.raises(ConfigError, match=key):
        qwen_image21_sigmas(10, 64, {**QWEN21, key: True})


def test_a_schedule_names_its_trained_steps():
    schedule = build(SIGMAS, "flow-sde", 0.7, (2, 5))
    assert schedule.n_steps == 10 and schedule.s_max == SIGMAS[1]
    assert list(schedule.trained) == [2, 3, 4]
    assert list(build(SIGMAS).trained) == []
    assert isinstance(hash(schedule), int) and schedule == Schedule(
        sigmas=SIGMAS, kernel="flow-sde", noise_level=0.7, window=(2, 5)
    )
