"""States on the way of a sampler, of teachers and of the student."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load, save
from torch import Tensor

from rlhf.checkpoint import sha256
from rlhf.cluster.pool import Pool, Workers
from rlhf.distill.bundles import Bundle, field_of
from rlhf.distill.grids import Grids, step_at
from rlhf.distill.objectives import euler
from rlhf.distill.teachers import TeacherConfig, Teachers, open_teachers
from rlhf.distributed import ALONE, Ranks
from rlhf.files import atomic_write_bytes
from rlhf.policies.base import Policy
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy

Order = tuple[str, Bundle]  # the name of a file, and what is sampled into it
SLICE = 64  # bundles between which the ranks wait for the first


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
    speak, kept = teachers.fields(bundle, range(len(knots) - 1)), [x]
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

    def of(self, bundle: Bundle) -> Tensor:
        """(K + 1, B, N, C), the first the noise of the bundle's seeds."""
        name = self.name(bundle)
        if not self._path(name).is_file():
            self.make((name, bundle))
        return load(self._path(name).read_bytes())["states"]

    def make(self, order: Order) -> None:
        """Sample a bundle into the file of that name."""
        name, bundle = order
        noises, sigmas = bundle.noises(self.policy), self.grids[bundle.size]
        states = teacher_states(self.teachers, bundle, sigmas, self.knots, noises)
        atomic_write_bytes(self._path(name), save({"states": states.contiguous()}))

    def missing(self, bundles: Iterable[Bundle]) -> list[Order]:
        """Those without a file, each once."""
        named = {self.name(bundle): bundle for bundle in bundles}
        return [(n, bundle) for n, bundle in named.items() if not self._path(n).is_file()]

    def name(self, bundle: Bundle) -> str:
        """Of what is sampled and who samples it."""
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

    @cached_property
    def _made_by(self) -> list[object]:
        said = {name: repr(one.config) for name, one in self.teachers.every.items()}
        return [said, self.teachers.checksums()]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def open_trajectories(
    student: PolicyConfig,
    teachers: Mapping[str, TeacherConfig],
    grids: Grids,
    knots: Sequence[float],
    folder: Path,
) -> Trajectories:
    """Those of a worker process, teachers of its own. Raises what `open_teachers` raises."""
    policy = load_policy(student)
    return Trajectories(policy, open_teachers(policy, teachers), grids, knots, folder)


def make_ahead(
    kept: Trajectories,
    bundles: Iterable[Bundle],
    build: Callable[[], Trajectories],
    workers: int,
    threads: int,
    ranks: Ranks = ALONE,
) -> None:
    """Sample what bundles miss in several processes of `rlhf.cluster.pool`, which `build` theirs
    over the folder of `kept`; the first rank asks them, the others wait. Files are those that one
    process writes. Raises what `build` raises, and ClusterError for a lost worker.
    """
    orders: list[Order] = []
    opened: list[Workers] = []

    def begin() -> None:
        orders.extend(kept.missing(bundles))
        if orders:
            opened.append(Pool(build, workers, threads))

    def work(first: int) -> None:
        for _ in opened[0].map("make", orders[first : first + SLICE]):
            bar.advance(task)

    try:
        ranks.on_first(begin)
        total = ranks.gather(len(orders))[0]
        with Progress(transient=True, disable=not ranks.is_first) as bar:
            task = bar.add_task("trajectories of the teacher", total=total)
            for first in range(0, total, SLICE):  # a wait for the first rank has an end
                ranks.on_first(partial(work, first))
    finally:
        for pool in opened:
            pool.close()
