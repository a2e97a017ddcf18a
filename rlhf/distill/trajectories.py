"""States on the way of a sampler, of teachers and of the student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from rlhf.checkpoint import sha256
from rlhf.distill.bundles import Bundle, field_of
from rlhf.distill.grids import Grids, step_at
from rlhf.distill.objectives import euler
from rlhf.distill.teachers import Teachers
from rlhf.files import atomic_write_bytes
from rlhf.policies.base import Policy


@torch.no_grad()
def student_states(
    policy: Policy,
    bundle: Bundle,
    sigmas: Sequence[float],
    x: Tensor,
    steps: int,
    slot: str = "train",
) -> list[Tensor]:
    """x and its states after each of the first `steps` unguided steps of the student."""
    field, states = field_of(policy, bundle, slot), [x]
    for s, s_end in zip(sigmas[:steps], sigmas[1 : steps + 1], strict=True):
        level = torch.full((len(x),), s)
        states.append(euler(states[-1], field(states[-1], s), level, torch.full_like(level, s_end)))
    return states


@torch.no_grad()
def teacher_states(
    teachers: Teachers, bundle: Bundle, sigmas: Sequence[float], knots: Sequence[float], x: Tensor
) -> Tensor:
    """States of the teachers' guided trajectory from x at every knot of the student's grid, (K + 1,
    B, N, C). `sigmas` is the teachers' grid and holds the knots.
    """
    speak, kept = teachers.fields(bundle), [x]
    for s, s_end in zip(sigmas, sigmas[1:], strict=False):
        v = speak(x, s, step_at(knots, s))
        level = torch.full((len(x),), s)
        x = euler(x, v, level, torch.full_like(level, s_end))
        if s_end in knots:
            kept.append(x)
    return torch.stack(kept)


class Trajectories:
    """The teachers' states at the knots for the seeds of a bundle, sampled when they are first
    asked for and kept in files of a folder, so that a resumed run reads what it had. `grids`: the
    teachers', for every size of a picture.
    """

    def __init__(
        self,
        policy: Policy,
        teachers: Teachers,
        grids: Grids,
        knots: Sequence[float],
        folder: Path,
    ) -> None:
        self.policy, self.teachers, self.folder = policy, teachers, folder
        self.grids, self.knots = dict(grids), tuple(knots)
        said = {name: repr(one.config) for name, one in teachers.every.items()}
        self._made_by = [said, teachers.checksums()]

    def of(self, bundle: Bundle) -> Tensor:
        """(K + 1, B, N, C), the first the noise of the bundle's seeds."""
        path = self.folder / f"{self._name(bundle)}.safetensors"
        if path.is_file():
            return load(path.read_bytes())["states"]
        noises, sigmas = bundle.noises(self.policy), self.grids[bundle.size]
        states = teacher_states(self.teachers, bundle, sigmas, self.knots, noises)
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save({"states": states.contiguous()}))
        return states

    def _name(self, bundle: Bundle) -> str:
        seen = {path: sha256(Path(path)) for p in bundle.prompts for path in p.sources}
        asked: Mapping[str, object] = {
            "made_by": [*self._made_by, self.grids[bundle.size], self.knots],
            "prompts": [
                [p.id, p.text, p.negative, [seen[path] for path in p.sources]]
                for p in bundle.prompts
            ],
            "seeds": bundle.seeds,
            "size": bundle.size,
        }
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
