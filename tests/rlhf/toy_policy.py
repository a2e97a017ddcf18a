"""The smallest whole alignment: an MLP velocity over a 4 x 3 latent "picture", and its brightness.

Rollout, log-probs, advantages and losses are the real ones; only the network and the judge are
toys. The start is a policy that was flow-matched to pictures of known mean, with and without a
condition, so that guidance means something before alignment begins.
"""

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rewards.types import JudgeCard, Score, Scores
from rlhf import kernels
from rlhf.advantage import group_advantages
from rlhf.coefficients import Kernel
from rlhf.losses import (
    LOSSES,
    LossConfig,
    Noised,
    Transitions,
    kernels_of,
    noised,
    summarise,
    transition_log_prob,
)
from rlhf.noise import generator, initial_noise, step_noise
from rlhf.schedule import Schedule, build, qwen_image21_sigmas
from rlhf.types import Trajectory

SHAPE = (4, 3)  # tokens, channels
PIXEL = torch.tensor([0.5, 0.3, 0.2])  # decoder: channels -> brightness of a token
SIGMAS = qwen_image21_sigmas(10, 4, {"use_dynamic_shifting": True, "shift_terminal": 0.02})
CARD = JudgeCard(
    name="brightness", revision="1", preprocessing="none", categories=("*",), low=-1.0, high=1.0
)


class Velocity(nn.Module):
    """v(x, sigma, condition) with a hidden layer; condition 1 = prompted, 0 = unprompted."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(math.prod(SHAPE) + 3, width), nn.SiLU(), nn.Linear(width, math.prod(SHAPE))
        )

    def forward(self, x: Tensor, sigma: Tensor | float, condition: float = 1.0) -> Tensor:
        s = torch.as_tensor(sigma, dtype=torch.float32).expand(len(x))
        extra = torch.stack([s, s * s, torch.full_like(s, condition)], dim=1)
        return self.layers(torch.cat([x.flatten(1), extra], dim=1)).reshape(x.shape)


def pretrained(steps: int = 300) -> Velocity:
    """Flow matching on x0 ~ N(m, 0.4^2) with m = 0.1 prompted and 0 unprompted."""
    rng = generator(1)
    policy = Velocity()
    with torch.no_grad():
        for weight in policy.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=rng) / weight.shape[-1] ** 0.5)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(steps):
        condition = float(step % 2)
        x0 = 0.1 * condition + 0.4 * torch.randn((256, *SHAPE), generator=rng)
        eps, s = torch.randn((256, *SHAPE), generator=rng), torch.rand(256, generator=rng)
        loss = (policy(noised(x0, eps, s), s, condition) - (eps - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return policy


def brightness(x0: Tensor) -> Tensor:
    return (x0 @ PIXEL).mean(dim=-1)


@torch.no_grad()
def rollout(
    policy: Velocity, seeds: list[int], schedule: Schedule, guidance: float, form: str | None
) -> tuple[Tensor, Trajectory | None]:
    """Final latents of the seeds and, for a ratio loss, the record of the trained steps."""
    x = torch.stack([initial_noise(seed, SHAPE) for seed in seeds])
    kept: dict[str, list] = {n: [] for n in ("index", "x", "next", "logp", "shift", "velocity")}
    for index in range(schedule.n_steps):
        v_c = policy(x, schedule.sigmas[index])
        v_u = policy(x, schedule.sigmas[index], 0.0) if guidance != 1.0 else v_c
        v_g = kernels.guide(v_c, v_u, guidance)
        noise = None
        if index in schedule.trained:
            noise = torch.stack([step_noise(seed, index, SHAPE) for seed in seeds])
        step = kernels.step(x, v_g, schedule, index, noise=noise)
        if step.q > 0.0 and form is not None:
            shift = kernels.guidance_shift(v_g, v_c, schedule, index)
            logp = transition_log_prob(v_c, x, step.next, schedule, index, form, shift)
            row = (index, x, step.next, logp, shift, v_c)
            for name, value in zip(kept, row, strict=True):
                kept[name].append(value)
        x = step.next
    if not kept["index"]:
        return x, None
    stacks = {name: torch.stack(kept[name]) for name in kept if name != "index"}
    return x, Trajectory(
        index_K=tuple(kept["index"]),
        x_KGNC=stacks["x"],
        next_KGNC=stacks["next"],
        logp_KG=stacks["logp"],
        shift_KGNC=stacks["shift"],
        velocity_KGNC=stacks["velocity"],
    )


@dataclass(kw_only=True)
class Alignment:
    """One toy run. `sign` = -1 turns every advantage round: then the opposite must happen."""

    policy: Velocity
    loss: str
    sign: float = 1.0
    guidance: float = 3.0
    groups: int = 8
    size: int = 16
    updates: int = 2
    lag: float = 0.0  # how much of the behaviour weights stays, per iteration
    lr: float = 2e-3
    clip: float | None = 0.01
    divergence: float = 1e-3
    kernel: Kernel | None = None  # the loss's usual one
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.kind = LOSSES[self.loss]
        self.policy = copy.deepcopy(self.policy)
        self.behaviour = copy.deepcopy(self.policy)
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=self.lr)
        self.settings = LossConfig(
            name=self.loss, clip_low=self.clip, clip_high=self.clip, divergence=self.divergence
        )
        self.schedule = build(SIGMAS)
        kernel = self.kernel or kernels_of(self.kind)[0]
        if kernel != "ode":
            self.schedule = build(SIGMAS, kernel, 0.7, (1, 4))

    def iterate(self, iterations: int) -> None:
        for iteration in range(iterations):
            count = self.groups * self.size
            seeds = [10_000 + iteration * count + i for i in range(count)]
            x0, trajectory = rollout(
                self.behaviour, seeds, self.schedule, self.guidance, self.kind.form
            )
            advantage, weight = self.advantages(x0)
            for update in range(self.updates):
                if trajectory is None:
                    terms = self.forward_terms(x0, advantage, weight, iteration, update)
                else:
                    terms = self.ratio_terms(trajectory, advantage, weight)
                self.optimiser.zero_grad()
                terms.loss.backward()
                self.optimiser.step()
                self.rows.append({"update": update, **summarise([terms])})
            with torch.no_grad():
                pairs = zip(self.behaviour.parameters(), self.policy.parameters(), strict=True)
                for old, new in pairs:
                    old.lerp_(new, 1.0 - self.lag)

    def advantages(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        values = brightness(x0).reshape(self.groups, self.size).tolist()
        row = tuple(tuple(Score(value=v, state="ok") for v in group) for group in values)
        table = Scores(judges=(CARD,), table={CARD.name: row})
        found, _ = group_advantages(table, {"*": {CARD.name: 1.0}}, ["toy"] * self.groups)
        live = found.live_PG.flatten().float()
        return self.sign * found.value_PG.flatten(), live / live.sum()

    def ratio_terms(self, trajectory: Trajectory, advantage: Tensor, weight: Tensor):
        t, grid = trajectory, self.schedule
        assert t.shift_KGNC is not None and t.velocity_KGNC is not None
        logp, kl_old = [], []
        for k, index in enumerate(t.index_K):
            x, shift = t.x_KGNC[k], t.shift_KGNC[k]
            v = self.policy(x, grid.sigmas[index])
            logp.append(
                transition_log_prob(v, x, t.next_KGNC[k], grid, index, self.kind.form, shift)
            )
            d = (v - t.velocity_KGNC[k]).square().flatten(1).mean(1)
            kl_old.append(kernels.kl_factor(grid, index) * d)
        steps = Transitions(
            logp_KG=torch.stack(logp),
            old_logp_KG=t.logp_KG,
            kl_old_KG=torch.stack(kl_old),
            q_K=torch.tensor([grid.coefficients(i).q for i in t.index_K]),
            h_K=torch.tensor([grid.sigmas[i] - grid.sigmas[i + 1] for i in t.index_K]),
        )
        return self.kind.function(steps, advantage, weight, self.settings)

    def forward_terms(self, x0: Tensor, advantage: Tensor, weight: Tensor, *keys: int):
        rng = generator(2, *keys)
        pick = torch.randint(self.schedule.n_steps - 1, (len(x0),), generator=rng)
        sigma = torch.tensor(self.schedule.sigmas)[pick]
        eps = torch.randn(x0.shape, generator=rng)
        x_s = noised(x0, eps, sigma)
        with torch.no_grad():
            v_old = self.behaviour(x_s, sigma)
        v = self.policy(x_s, sigma)
        seen = Noised(v_theta=v, v_old=v_old, x_s=x_s, x0=x0, eps=eps, sigma_G=sigma)
        return self.kind.function(seen, advantage, weight, self.settings)


def measure(policy: Velocity, guidance: float, count: int = 500) -> tuple[float, float]:
    """Mean brightness of ODE samples at fresh seeds, and its standard error."""
    values = brightness(rollout(policy, list(range(count)), build(SIGMAS), guidance, None)[0])
    return values.mean().item(), values.std().item() / math.sqrt(count)
