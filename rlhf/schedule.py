"""The one owner of noise levels: which sigmas, which kernel, how much noise and where.

A `Schedule` is a frozen value carried inside every `Rollouts`; the learner reads it there, so
sampler and learner cannot drift apart. sigma = 1 is noise and sigma = 0 is data. Sigmas are
computed in float64, start at exactly 1.0 and end at exactly 0.0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.coefficients import TABLE, Coefficients, Kernel
from rlhf.errors import ConfigError

MAX_Q = 2.0  # a larger transition std means a grid that divides by (almost) nothing, never a choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Grid, kernel and window of one sampling run. Make it with `build`, which checks it.

    `sigmas` holds n_steps + 1 values from 1 to 0. Steps start <= index < stop of `window` take the
    kernel's noise and are the ones stored and trained; all the others are plain Euler steps.
    """

    sigmas: tuple[float, ...]
    kernel: Kernel = "ode"
    noise_level: float = 0.0  # dimensionless, >= 0
    window: tuple[int, int] = (0, 0)  # (start, stop); (0, 0) = no stochastic step

    @property
    def n_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def s_max(self) -> float:
        """The grid's second sigma, the clamp of the flow-SDE kernel at its first step."""
        return self.sigmas[1]

    @property
    def trained(self) -> range:
        """Indices of the stochastic, stored and trained steps."""
        return range(*self.window)

    def coefficients(self, index: int) -> Coefficients:
        """(alpha, gamma, q) of step `index`; q = 0 outside the window or without noise."""
        if not 0 <= index < self.n_steps:
            raise IndexError(
                f"expected a step index in 0..{self.n_steps - 1}, got {index}: "
                "indices count steps from the noise end, negative ones are not accepted"
            )
        noisy = self.noise_level > 0.0 and index in self.trained
        row = TABLE[self.kernel if noisy else "ode"].coefficients
        return row(self.sigmas[index], self.sigmas[index + 1], self.s_max, self.noise_level)


def build(
    sigmas: Sequence[float],
    kernel: Kernel = "ode",
    noise_level: float = 0.0,
    window: tuple[int, int] = (0, 0),
) -> Schedule:
    """A checked Schedule. Raises ConfigError for anything that could not be sampled or trained."""
    schedule = Schedule(
        sigmas=tuple(float(s) for s in sigmas),
        kernel=kernel,
        noise_level=float(noise_level),
        window=(int(window[0]), int(window[1])),
    )
    _check_grid(schedule.sigmas)
    if kernel not in TABLE:
        raise ConfigError(f"expected a kernel among {', '.join(TABLE)}, got {kernel!r}: pick one")
    if kernel == "ode":
        _check_ode(schedule)
    else:
        _check_stochastic(schedule)
    return schedule


def _check_grid(sigmas: tuple[float, ...]) -> None:
    if len(sigmas) < 2 or sigmas[0] != 1.0 or sigmas[-1] != 0.0:
        raise ConfigError(
            f"expected sigmas from exactly 1.0 down to exactly 0.0, got {sigmas}: "
            "use qwen_image21_sigmas or sd3_sigmas"
        )
    if not all(after < before for before, after in zip(sigmas, sigmas[1:], strict=False)):
        raise ConfigError(
            f"expected strictly decreasing sigmas, got {sigmas}: "
            "use fewer steps or a smaller terminal shift"
        )


def _check_ode(schedule: Schedule) -> None:
    if schedule.noise_level != 0.0 or schedule.window != (0, 0):
        raise ConfigError(
            "expected noise_level 0 and window (0, 0) with kernel 'ode', got "
            f"noise_level {schedule.noise_level} and window {schedule.window}: drop them, "
            "or write kernel 'flow-sde' to sample with noise"
        )


def _check_stochastic(schedule: Schedule) -> None:
    row = TABLE[schedule.kernel]
    start, stop = schedule.window
    if not 0.0 < schedule.noise_level <= row.highest:  # also catches NaN
        limit = "" if math.isinf(row.highest) else f" and at most {row.highest:g}"
        raise ConfigError(
            f"expected noise_level > 0{limit} with kernel {schedule.kernel!r}, got "
            f"{schedule.noise_level}: write 0.7, or kernel 'ode'"
        )
    if not 0 <= start < stop <= schedule.n_steps - row.tail:
        last = "last step is" if row.tail == 1 else f"last {row.tail} steps are"
        raise ConfigError(
            f"expected a window 0 <= start < stop <= {schedule.n_steps - row.tail} of the "
            f"{schedule.n_steps} steps, got {schedule.window}: the {last} never trained with "
            f"kernel {schedule.kernel!r} (so little noise is left that rounding alone moves the "
            "log-prob past any clip range)"
        )
    for index in schedule.trained:
        q = schedule.coefficients(index).q
        if not (math.isfinite(q) and 0.0 < q < MAX_Q):
            raise ConfigError(
                f"expected 0 < q < {MAX_Q} at step {index}, got q = {q}: "
                "lower noise_level, move the window or use another grid"
            )


def qwen_image21_sigmas(
    steps: int,
    tokens: int,
    scheduler_config: Mapping[str, object],
    *,
    sample_sigmas: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """steps + 1 sigmas as QwenImage21Pipeline drives its scheduler, equal to it within 1e-6.

    u = linspace(1, 1/steps, steps); s = e^m / (e^m + 1/u - 1) with m linear in `tokens`, the number
    of target latent tokens (without dynamic shifting, s = shift u / (1 + (shift - 1) u)); then
    stretched so that the last one is `shift_terminal`; then 0. `scheduler_config` is the config of
    the scheduler, absent keys take the pipeline's defaults. `sample_sigmas` replaces u (a grid that
    the pipeline is configured with) and must hold `steps` values. One step has only grid (1, 0).

    Raises ConfigError for steps < 1, wrong values, and kinds of grid that are not implemented.
    """
    _need_steps(steps)
    _refuse_other_grids(scheduler_config)
    if sample_sigmas is not None and len(sample_sigmas) != steps:
        raise ConfigError(
            f"expected {steps} sample_sigmas, one per step, got {len(sample_sigmas)}: "
            "set steps to their number"
        )
    if steps == 1:
        return (1.0, 0.0)
    grid = np.linspace(1.0, 1.0 / steps, steps) if sample_sigmas is None else sample_sigmas
    u = np.asarray(grid, dtype=np.float64)
    if scheduler_config.get("use_dynamic_shifting", False):
        m = shift_of(tokens, scheduler_config)
        top = math.exp(m) if scheduler_config.get("time_shift_type") != "linear" else m
        s = top / (top + 1.0 / u - 1.0)
    else:
        s = _static_shift(u, _number(scheduler_config, "shift", 1.0))
    terminal = _number(scheduler_config, "shift_terminal", 0.0)
    if terminal:
        s = 1.0 - (1.0 - s) * (1.0 - terminal) / (1.0 - s[-1])
    return _closed(s)


def shift_of(tokens: int, scheduler_config: Mapping[str, object]) -> float:
    """The resolution-dependent shift m, linear in the number of target latent tokens."""
    low = _number(scheduler_config, "base_image_seq_len", 256.0)
    high = _number(scheduler_config, "max_image_seq_len", 4096.0)
    base = _number(scheduler_config, "base_shift", 0.5)
    top = _number(scheduler_config, "max_shift", 1.15)
    return base + (top - base) * (tokens - low) / (high - low)


def sd3_sigmas(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """steps + 1 sigmas of Stable Diffusion 3: f(u) = shift u / (1 + (shift - 1) u), applied twice.

    u = linspace(1, f(1/1000), steps), s = f(u), then 0. The stock scheduler shifts its training
    grid once when it is made and once more when steps are set; parity needs both.
    """
    _need_steps(steps)
    smallest = float(_static_shift(np.float64(1.0 / 1000.0), shift))
    return _closed(_static_shift(np.linspace(1.0, smallest, steps), shift))


def static_shift(scheduler_config: Mapping[str, object]) -> float:
    """`shift` of a scheduler that moves every grid alike. Raises ConfigError for any other."""
    _refuse_other_grids(scheduler_config)
    for key in ("use_dynamic_shifting", "shift_terminal"):
        if scheduler_config.get(key):
            raise ConfigError(
                f"expected a scheduler without {key}, got {scheduler_config[key]}: this grid is not"
                " implemented for Stable Diffusion 3, turn it off in the checkpoint's"
                " scheduler/scheduler_config.json"
            )
    return _number(scheduler_config, "shift", 1.0)


def train_time(sigma: float | Tensor) -> Tensor:
    """sigma * 1000 in float32, the time input of Stable Diffusion 3 in whatever dtype it runs."""
    return torch.as_tensor(sigma, dtype=torch.float32) * 1000


def model_time(sigma: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The time input of Qwen-Image-2.1 in `dtype`, of a number or a tensor.

    (sigma * 1000 in float32, cast to the model's dtype) / 1000. Casting sigma itself gives another
    number, up to 2e-3 apart in bfloat16.
    """
    return train_time(sigma).to(dtype) / 1000


def _static_shift(u, shift: float):
    return shift * u / (1.0 + (shift - 1.0) * u)


def _closed(s: np.ndarray) -> tuple[float, ...]:
    """Start at exactly 1, whatever rounding did, and append the 0."""
    return (1.0, *(float(value) for value in s[1:]), 0.0)


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"expected a number for scheduler key {key!r}, got {value!r}: fix its config"
        )
    return float(value)


def _need_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"expected at least 1 sampling step, got {steps}: write e.g. 10")


def _refuse_other_grids(config: Mapping[str, object]) -> None:
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(key):
            raise ConfigError(
                f"expected a scheduler with {key} off, got it on: these grids are not implemented, "
                "turn it off in the checkpoint's scheduler/scheduler_config.json"
            )
    if config.get("stochastic_sampling"):
        raise ConfigError(
            "expected a scheduler with stochastic_sampling off, got it on: its noise has no "
            "log-prob here, turn it off and choose a kernel instead"
        )
