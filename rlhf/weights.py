"""Handing weights from the learner to the rollout workers, with proof that they arrived.

A hand-over carries the tensors of one slot, their checksum and the velocities of a probe input
under them. The receiver loads the tensors by exact name, recomputes the checksum from what it
bound, counts the modules and repeats the probe. A worker whose rollouts use other weights than the
learner's cannot pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf import noise
from rlhf.errors import HandoverError
from rlhf.policies.base import Policy
from rlhf.types import Version

PROBE_TEXT = "a probe of the weights"
PROBE_SIZE = (64, 64)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """One slot on its way. Tensors travel as numpy arrays, which Ray shares without a copy."""

    version: Version
    arrays: Mapping[str, np.ndarray]
    probe: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a receiver bound: checksum and modules, and how far its probe was from the sender's."""

    checksum: str
    modules: int
    probe_gap: float


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """blake2b over names, shapes and bytes, in order of name."""
    total = hashlib.blake2b(digest_size=12)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        total.update(value.flatten().view(torch.uint8).numpy().data)  # no copy
    return total.hexdigest()


@torch.no_grad()
def probe(policy: Policy, slot: str) -> np.ndarray:
    """Velocities of a fixed input under a slot, float32 (1, N, C)."""
    condition = policy.encode(PROBE_TEXT)
    x = noise.initial_noise(0, policy.latent_shape(PROBE_SIZE))[None]
    return (
        policy.velocity(x, torch.full((1,), 0.5), condition, size=PROBE_SIZE, slot=slot)
        .cpu()
        .numpy()
    )


def prepare(policy: Policy, slot: str, step: int) -> Handover:
    """A slot packed for the way."""
    tensors = policy.slots.tensors(slot)
    version = Version(slot=slot, step=step, checksum=checksum(tensors))
    arrays = {n: t.detach().cpu().clone().numpy() for n, t in tensors.items()}
    return Handover(version=version, arrays=arrays, probe=probe(policy, slot))


def bind(policy: Policy, handover: Handover) -> Bound:
    """Load a hand-over into the policy's live weights.

    Raises:
        HandoverError: nothing was bound, the bytes differ, or the probe differs from the sender's.
    """
    tensors = {n: torch.from_numpy(np.array(a)) for n, a in handover.arrays.items()}
    if not tensors:
        raise HandoverError(
            "expected weights to bind, got none: the policy has no trainable modules"
        )
    policy.slots.load("train", tensors)
    mine = checksum(policy.slots.tensors("train"))
    if mine != handover.version.checksum:
        raise HandoverError(
            f"expected weights {handover.version.checksum} of {handover.version.slot}, bound"
            f" {mine}:"
            " the transport changed them"
        )
    gap = float(np.abs(probe(policy, "train") - handover.probe).max())
    limit = TOLERANCE[getattr(policy, "dtype", torch.float32)]
    if not gap <= limit:
        raise HandoverError(
            f"expected the learner's velocities to within {limit}, got a gap of {gap:.2e}: the"
            " bound weights are"
            " not the ones in use (merged adapters, another base, or another dtype)"
        )
    modules = len({name.rpartition(".")[0] for name in tensors})
    return Bound(checksum=mine, modules=modules, probe_gap=gap)
