"""Pictures of many prompts at once, for looking at and measuring; nothing here is trained on. A
`Painter` makes them, a `Studio` has one or more of them and says how far it is, an `Album` keeps
what a studio made.

Prompts of one layout (equal text length and source shapes) share a call, which is about twice as
fast as a call per prompt. Every picture depends on its own prompt and seed alone, up to rounding:
other batches change it by about 1e-6 before it is quantised.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load, save

from rlhf import kernels, noise
from rlhf.cluster.pool import Here, Pool, Workers
from rlhf.errors import ConfigError
from rlhf.files import atomic_write_bytes
from rlhf.policies.base import Policy, stack
from rlhf.policies.open import Opening, describe_opening, open_policy
from rlhf.sampling import Sampler, guided_field

Pictures = UInt8[np.ndarray, "p g 3 h w"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A prompt, a seed for each of its pictures, and the pictures it edits (uint8 RGB)."""

    text: str
    seeds: tuple[int, ...]
    negative: str = ""
    sources: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Prompts of one layout with equally many seeds; `index` is their place in the whole list."""

    index: tuple[int, ...]
    wanted: tuple[Wanted, ...]
    sampler: Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    """Pictures in the order of the prompts, uint8 (P, G, 3, H, W), and the seconds from the first
    call to the last; the conditions were read before.
    """

    pixels: Pictures
    seconds: float


def usual_sampler(
    model: str,
    size: tuple[int, int],
    steps: int | None = None,
    guidance: float | None = None,
    key: str = "steps",
) -> Sampler:
    """How a model or run makes pictures: as asked, and else 40 steps at guidance 2; one that was
    distilled to noise levels of its own in their number, without guidance.

    Raises:
        ConfigError: no such model, another number of steps than it has (`key` is their name), or
        guidance below 1.
    """
    own = describe_opening(Opening(model=model)).levels
    if own and steps not in (None, len(own)):
        raise ConfigError(
            f"{key}: expected {len(own)}, since '{model}' was distilled to the noise levels"
            f" {list(own)} and is untrained between others, got {steps}: leave it out, or distil a"
            f" student of {steps} steps (rlhf distill fewstep grid=even-{steps})"
        )
    usual = (len(own), 1.0) if own else (40, 2.0)
    made = Sampler(
        steps=usual[0] if steps is None else steps,
        guidance=usual[1] if guidance is None else guidance,
        height=size[0],
        width=size[1],
    )
    made.check()
    return made


class Painter:
    """Makes batches of pictures with a policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def batches(self, wanted: Sequence[Wanted], sampler: Sampler, rows: int = 64) -> list[Batch]:
        """The prompts by layout, about `rows` pictures to a batch. Raises ConfigError for a sampler
        that is stochastic.
        """
        if sampler.kernel != "ode":
            raise ConfigError(f"expected kernel ode to measure a model, got {sampler.kernel}")
        groups: dict[object, list[int]] = {}
        for i, one in enumerate(wanted):
            layout = self.policy.encode(one.text, one.sources).layout
            negative = self.policy.encode(one.negative, one.sources).layout
            groups.setdefault((layout, negative, len(one.seeds)), []).append(i)
        out = []
        for (_, _, seeds), members in groups.items():  # type: ignore[misc]
            size = max(1, rows // seeds)
            for start in range(0, len(members), size):
                part = tuple(members[start : start + size])
                picked = tuple(wanted[i] for i in part)
                out.append(Batch(index=part, wanted=picked, sampler=sampler))
        return out

    @torch.no_grad()
    def paint(self, batch: Batch) -> Pictures:
        """Pictures of a batch, uint8 (P, G, 3, H, W)."""
        policy, sampler = self.policy, batch.sampler
        condition = stack([policy.encode(w.text, w.sources) for w in batch.wanted])
        empty = None
        if sampler.guidance > 1:
            empty = stack([policy.encode(w.negative, w.sources) for w in batch.wanted])
        grid, shape = sampler.schedule(policy), policy.latent_shape(sampler.size)
        field = guided_field(policy, sampler, condition, empty, "train")
        x = torch.stack([noise.initial_noise(s, shape) for w in batch.wanted for s in w.seeds])
        for step in range(grid.n_steps):
            v_c, v_u = field(x, grid.sigmas[step])
            v = v_c if v_u is None else kernels.guide(v_c, v_u, sampler.guidance)
            x = kernels.step(x, v, grid, step).next
        pixels = policy.decode(x, sampler.size).numpy()
        return pixels.reshape(len(batch.wanted), -1, *pixels.shape[1:])


def make_painter(opening: Opening) -> Painter:
    """A painter of its own for a worker process. Raises what `open_policy` raises."""
    return Painter(open_policy(opening).policy)


def assemble(parts: Iterator[tuple[Batch, np.ndarray]], prompts: int) -> Pictures:
    """Painted batches in the order of the prompts. Raises ValueError unless each is there once."""
    rows: dict[int, np.ndarray] = {}
    for batch, pictures in parts:
        rows.update(zip(batch.index, pictures, strict=True))
    if sorted(rows) != list(range(prompts)):
        raise ValueError(f"expected pictures of {prompts} prompts, got those of {len(rows)}")
    return np.stack([rows[i] for i in range(prompts)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    """Where pictures are made, and who is told how far it is."""

    painter: Painter  # of this process, plans the batches
    workers: Workers
    rows: int  # pictures in one call
    console: Console

    @staticmethod
    def of(
        opening: Opening, policy: Policy, console: Console, rows: int, workers: int, threads: int
    ) -> Studio:
        """A studio of a policy that was opened here, in as many processes as asked for."""
        painter = Painter(policy)
        hands: Workers = Here(lambda: painter, threads)
        if workers > 1:
            hands = Pool(partial(make_painter, opening), workers, threads)
        return Studio(painter=painter, workers=hands, rows=rows, console=console)

    def paint(self, wanted: Sequence[Wanted], sampler: Sampler, label: str) -> Painted:
        """The pictures of some prompts."""
        batches = self.painter.batches(wanted, sampler, self.rows)
        total = sum(len(w.seeds) for w in wanted)
        quiet, began = not self.console.is_terminal, time.monotonic()
        with Progress(console=self.console, transient=True, disable=quiet) as progress:
            bar = progress.add_task(label, total=total)
            found = []
            for batch, painted in self.workers.map("paint", batches):
                progress.update(bar, advance=painted.shape[0] * painted.shape[1])
                found.append((batch, painted))
        seconds = time.monotonic() - began
        return Painted(pixels=assemble(iter(found), len(wanted)), seconds=seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Album:
    """A studio whose pictures are kept in a folder, so that the same ones are made once: those of a
    teacher beside whom many students are measured. A file is named after the weights, how they
    sample and what is wanted; `seconds` are those of when it was made.
    """

    studio: Studio
    folder: Path
    maker: str  # whose pictures: a checksum of all its weights

    def paint(self, wanted: Sequence[Wanted], sampler: Sampler, label: str) -> Painted:
        """As `Studio.paint`; read where it is kept."""
        path = self.folder / f"{self._name(wanted, sampler)}.safetensors"
        if not path.is_file():
            made = self.studio.paint(wanted, sampler, label)
            seconds = torch.tensor(made.seconds, dtype=torch.float64)
            pixels = torch.from_numpy(np.ascontiguousarray(made.pixels))
            atomic_write_bytes(path, save({"pixels": pixels, "seconds": seconds}))
        kept = load(path.read_bytes())
        return Painted(pixels=kept["pixels"].numpy(), seconds=float(kept["seconds"]))

    def _name(self, wanted: Sequence[Wanted], sampler: Sampler) -> str:
        asked = {
            "maker": self.maker,
            "sampler": asdict(sampler),
            "wanted": [
                [
                    w.text,
                    w.negative,
                    w.seeds,
                    [hashlib.sha256(s.tobytes()).hexdigest() for s in w.sources],
                ]
                for w in wanted
            ],
        }
        return hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
