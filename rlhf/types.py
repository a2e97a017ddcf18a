"""The nouns of an alignment run.

Shape letters: P prompts, G samples per prompt (a group), K trained steps, N latent tokens, C latent
channels. sigma = 1 is noise and sigma = 0 is data: x = (1 - sigma) x0 + sigma eps, v = eps - x0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rlhf.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a prompt set. `target` is whatever the judges check against (for scenes, the spec
    as JSON).
    """

    id: str
    text: str
    category: str
    negative: str = ""
    sources: tuple[str, ...] = ()  # paths of source pictures, for edits
    target: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """Which weights: slot name, iteration they are of, and the checksum of their bytes."""

    slot: str
    step: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How a rollout was computed; replay at the same geometry is bit-equal on one CPU machine."""

    group_size: int
    height: int
    width: int
    cached_prefix: bool
    dtype: str
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRef:
    """Handle of one group of samples that lives in the cluster. Carries no pictures or latents."""

    id: str  # unique among the groups alive: iteration, purpose and position
    iteration: int
    group: int  # integer position in the iteration's batch
    prompt: Prompt
    seeds: tuple[int, ...]  # one per sample
    version: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The stored steps of one group. ODE steps have no log-prob, so they are absent here."""

    index_K: tuple[int, ...]  # position of each stored step in the schedule
    x_KGNC: Float[Tensor, "k g n c"]
    next_KGNC: Float[Tensor, "k g n c"]
    logp_KG: Float[Tensor, "k g"]  # unguided, nats per latent dimension; see `kernels.log_prob`
    shift_KGNC: Float[Tensor, "k g n c"] | None = None  # guidance shift mu_guided - mu_conditional
    velocity_KGNC: Float[Tensor, "k g n c"] | None = None  # the unguided one, of the old weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """One group sampled by one policy version: the final latents, the pictures and what the loss
    asked for.
    """

    ref: GroupRef
    schedule: Schedule
    geometry: Geometry
    guidance: float
    x0_GNC: Float[Tensor, "g n c"]
    pixels: UInt8[Tensor, "g 3 h w"]
    trajectory: Trajectory | None = None
    stats: Mapping[str, float] = field(default_factory=dict)  # nfe, guidance/cosine, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Value per sample, and whether the sample may be learnt from. Not live means weight 0 in every
    loss.
    """

    value_PG: Float[Tensor, "p g"]
    live_PG: Bool[Tensor, "p g"]


# What a loss asks rollouts to hold. x0 is always there; `shift` makes the log-prob a recentred one.
Field = Literal["x0", "trajectory", "shift", "velocity"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one update did; `metrics` is ready for a log row."""

    iteration: int  # of the weights after it
    metrics: Mapping[str, float]
