"""`rlhf reward collect`: pictures of the scenes world with judgements of its annotators.

Some are the world's own candidates (`rewards.scenes.candidates`: right, wrong and worn), some are
samples of models at several settings; each prompt's pictures are one group. Every axis that is
asked of a prompt gives one rank over the group and one rating per picture
(`rewards.scenes.annotators`). Train prompts are of the training split of the world, dev and test
prompts held out; `align-heldout` is never touched. Train rows hold no gold values, the others do,
in columns `gold`, `origin`, `target`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rewards.probes import CANARIES
from rewards.scenes import annotators, candidates, world
from rewards.scenes.candidates import Candidate
from rewards.scenes.render import render
from rewards.scenes.specs import Edit, Spec
from rewards.training.collate import TOUCHED
from rewards.training.schema import Judgement
from rewards.training.table import write_judgements
from rlhf.cluster.pool import Here, Pool, Workers
from rlhf.errors import ConfigError
from rlhf.gallery import Painter, Wanted, make_painter
from rlhf.policies.open import Opening, open_policy
from rlhf.rollout import seeds_of
from rlhf.run import report
from rlhf.sampling import Sampler

SHARES: Mapping[str, float] = {
    "objects/1": 0.08,
    "objects/2": 0.30,
    "objects/3": 0.10,
    "portraits": 0.16,
    "text": 0.12,
    "edits": 0.24,
}
SPLITS: Mapping[str, world.Split] = {"train": "train", "dev": "heldout", "test": "heldout"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and how it samples; `share` of the sampled groups."""

    model: str = "scenes"
    steps: int = 10
    guidance: float = 2.0
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig:
    """`drawn` and `sampled` count groups of `per_prompt` pictures by split."""

    out: str = "runs/judgements"
    seed: int = 0
    size: int = 64
    per_prompt: int = 6
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))
    drawn: dict[str, int] = field(default_factory=lambda: {"train": 4000, "dev": 240, "test": 360})
    sampled: dict[str, int] = field(default_factory=lambda: {"train": 900, "dev": 160, "test": 360})
    annotators: dict[str, int] = field(
        default_factory=lambda: {"train": 9, "dev": 9, "test": 1}
    )  # who rate one picture; of the test split, one, whose own accuracy is reported
    canaries: float = 0.12  # share of the drawn groups' pictures, in training alone
    swapped: float = 0.0  # edits that come a second time under another instruction, likewise
    rich: float = 0.0  # groups asked for in the longer caption, likewise
    models: dict[str, Source] = field(default_factory=lambda: {"scenes": Source()})
    workers: int = 2
    threads: int = 1

    def check(self) -> None:
        unknown = sorted({*self.drawn, *self.sampled, *self.annotators} - set(SPLITS))
        if unknown or self.per_prompt < 2:
            raise ConfigError(
                f"expected groups of train, dev and test and per_prompt >= 2, got {unknown} and"
                f" {self.per_prompt}"
            )
        for name in self.shares:
            _share(name)
        if not all(1 <= n <= annotators.ANNOTATORS for n in self.annotators.values()):
            raise ConfigError(
                f"annotators: expected 1 to {annotators.ANNOTATORS}, got {self.annotators}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt and its pictures; of edits also whose picture is the source."""

    spec: Spec | Edit
    pictures: tuple[Candidate, ...]
    source: Spec | None = None


def specs(config: CollectConfig, split: str, kind: str, count: int) -> list[Spec | Edit]:
    """`count` specs of a split in the shares of the config, other ones for each kind of group."""
    rng = np.random.default_rng([config.seed, len(split), len(kind), count])
    names, shares = list(config.shares), np.array(list(config.shares.values()))
    first = {"train": 0, "dev": 10_000_000, "test": 20_000_000}[split]
    first += (config.seed * 2 + (kind == "sampled")) * 1_000_000
    out: list[Spec | Edit] = []
    for i, k in enumerate(rng.choice(len(names), size=count, p=shares / shares.sum())):
        out.append(world.draw(seed=first + i, split=SPLITS[split], **_share(names[k])))
    return out


def _share(name: str) -> dict[str, Any]:
    """What to draw for a share: a category, `objects/2` of a level, `edits/move` of a kind."""
    category, _, rest = name.partition("/")
    if category == "edits":
        if rest in ("", *get_args(world.EditKind)):
            return {"category": category, "kind": rest or None}
    elif category in get_args(world.Category) and rest in ("", "1", "2", "3"):
        return {"category": category, "level": int(rest or 1)}
    raise ConfigError(f"shares: expected such as text, objects/2 or edits/move, got {name!r}")


def drawn(config: CollectConfig, split: str) -> Iterator[Group]:
    """Groups of the world's candidates; in training some of them are what no judge may like."""
    for i, spec in enumerate(specs(config, split, "drawn", config.drawn.get(split, 0))):
        rng = np.random.default_rng([config.seed, 17, len(split), i])
        found = candidates.candidates(rng, spec, config.per_prompt, config.size)
        if split == "train":
            found = [_spoilt(rng, spec, c, config.canaries) for c in found]
            if isinstance(spec, Edit) and rng.random() < config.swapped:
                yield _swapped(rng, spec, config, i)
        yield Group(spec=spec, pictures=tuple(found))


def _swapped(rng: np.random.Generator, spec: Edit, config: CollectConfig, i: int) -> Group:
    """Pictures of an edit under the instruction of another one."""
    other = spec
    while world.terse(other) == world.terse(spec):
        number = 25_000_000 + i * 100 + int(rng.integers(100))
        drawn_ = world.draw("edits", number, split="train")
        assert isinstance(drawn_, Edit)
        other = drawn_
    found = candidates.candidates(rng, spec, config.per_prompt, config.size)
    origin = "canary:swapped_prompt"
    pictures = tuple(Candidate(picture=c.picture, origin=origin) for c in found)
    return Group(spec=other, pictures=pictures, source=spec.source)


def _spoilt(rng: np.random.Generator, spec: Spec | Edit, one: Candidate, share: float) -> Candidate:
    """Now and then, the right picture made into a canary."""
    if rng.random() >= share:
        return one
    right = render(spec.target if isinstance(spec, Edit) else spec, one.picture.shape[-1])
    name = list(CANARIES)[int(rng.integers(len(CANARIES)))]
    made = CANARIES[name](candidates.answer(spec, right))
    return one if made is None else Candidate(picture=made.image, origin=f"canary:{name}")


def sampled(config: CollectConfig, split: str) -> Iterator[Group]:
    """Groups of pictures that models make of their prompts."""
    wanted = specs(config, split, "sampled", config.sampled.get(split, 0))
    shares = np.array([m.share for m in config.models.values()])
    edges = np.rint(np.cumsum(shares) / shares.sum() * len(wanted)).astype(int)
    start = 0
    for (name, source), stop in zip(config.models.items(), edges, strict=True):
        yield from _painted(config, name, source, wanted[start:stop], split)
        start = stop


def _painted(
    config: CollectConfig, name: str, source: Source, wanted: Sequence[Spec | Edit], split: str
) -> Iterator[Group]:
    if not wanted:
        return
    opening = Opening(model=source.model)
    seeds = seeds_of(config.seed + len(split), 2**30, len(wanted), config.per_prompt)
    orders = [
        Wanted(
            text=world.terse(spec),
            seeds=own,
            sources=(render(spec.source, config.size),) if isinstance(spec, Edit) else (),
        )
        for spec, own in zip(wanted, seeds, strict=True)
    ]
    sampler = Sampler(
        steps=source.steps, guidance=source.guidance, height=config.size, width=config.size
    )
    batches = Painter(open_policy(opening).policy).batches(orders, sampler)
    workers: Workers
    if config.workers > 1:
        workers = Pool(partial(make_painter, opening), config.workers, config.threads)
    else:
        workers = Here(partial(make_painter, opening), config.threads)
    origin = f"model:{name}"
    try:
        for batch, pictures in workers.map("paint", batches):
            for index, group in zip(batch.index, pictures, strict=True):
                made = tuple(Candidate(picture=p, origin=origin) for p in group)
                yield Group(spec=wanted[index], pictures=made)
    finally:
        workers.close()


# --- judgements ----------------------------------------------------------------------------------

REJECTED = 0.3  # how far below the clean picture a canary is rated at best


def judgements(
    group: Group, number: int, split: str, seed: int, people: int, rich: float = 0.0
) -> Iterator[Judgement]:
    """What so many people say of a group: on each axis a rank, and a rating of each picture."""
    spec, rng = group.spec, np.random.default_rng([seed, 29, len(split), number])
    longer = np.random.default_rng([seed, 31, len(split), number]).random() < rich
    size = group.pictures[0].picture.shape[-1]
    source = group.source or (spec.source if isinstance(spec, Edit) else None)
    common: dict[str, Any] = {
        "prompt": world.rich(spec) if longer else world.terse(spec),
        "category": world.category_of(spec),
        "group": f"{split}-{number:06d}",
        "sources": (render(source, size),) if source else (),
    }
    pictures = tuple(c.picture for c in group.pictures)
    about: dict[str, Any] = {TOUCHED: None}
    if isinstance(spec, Edit):
        about[TOUCHED] = annotators.touched(spec).tolist()
    for axis in annotators.axes_of(spec):
        values = [_value(axis, c, spec) for c in group.pictures]
        said = rng.permuted(np.tile(np.arange(annotators.ANNOTATORS), (len(values) + 1, 1)), axis=1)
        who = ["+".join(str(a) for a in sorted(row[:people])) for row in said]
        for k, value in enumerate(values):
            one = {"gold": [value], "origin": [group.pictures[k].origin]}
            yield Judgement(
                kind="point",
                axis=axis,
                images=(pictures[k],),
                ratings=(annotators.point(rng, axis, value, said[k][:people]),),
                annotator=who[k],
                columns=_columns(about, one, spec, split),
                **common,
            )
        every = {"gold": values, "origin": [c.origin for c in group.pictures]}
        yield Judgement(
            kind="rank",
            axis=axis,
            images=pictures,
            ratings=annotators.rank(rng, axis, values, people),
            annotator=who[-1],
            columns=_columns(about, every, spec, split),
            **common,
        )
    if isinstance(spec, Edit):
        yield Judgement(
            kind="point",
            axis="face",
            images=pictures[:1],
            ratings=(2.0 if annotators.has_face(spec.source) else 1.0,),
            high=2.0,
            columns=_columns(about, {"gold": [], "origin": []}, spec, split),
            **common,
        )


def _value(axis: str, candidate: Candidate, spec: Spec | Edit) -> float:
    value = annotators.gold(axis, candidate.picture, spec)
    assert value is not None
    if candidate.origin.startswith("canary:"):
        return max(0.0, min(value, annotators.ceiling(axis, spec)) - REJECTED)
    return value


def _columns(
    about: Mapping[str, Any], found: Mapping[str, Any], spec: Spec | Edit, split: str
) -> dict[str, Any]:
    if split == "train":
        return dict(about)
    return {**about, **found, "target": world.dump(spec)}


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the data set; returns how many judgements of each axis a split holds."""
    began, counts = time.monotonic(), {}
    if Path(config.out).is_dir() and any(Path(config.out).glob("*.parquet")):
        raise ConfigError(f"out: '{config.out}' holds judgements: name another folder")
    for split in SPLITS:
        tally: dict[str, int] = {}

        def rows(split: str = split, tally: dict[str, int] = tally) -> Iterator[Judgement]:
            number = 0
            for groups in (drawn(config, split), sampled(config, split)):
                for group in groups:
                    people = config.annotators.get(split, 1)
                    rich = config.rich if split == "train" else 0.0
                    for judgement in judgements(group, number, split, config.seed, people, rich):
                        name = f"{split}/{judgement.axis}/{judgement.kind}"
                        tally[name] = tally.get(name, 0) + 1
                        yield judgement
                    number += 1

        if config.drawn.get(split, 0) + config.sampled.get(split, 0):
            write_judgements(config.out, split, rows())
        counts.update(tally)
    metrics = {f"judgements/{name}": {"value": n} for name, n in counts.items()}
    return report("reward collect", time.monotonic() - began, metrics)


def plan_collect(config: CollectConfig) -> str:
    """How many pictures of each split."""
    lines = []
    for split in SPLITS:
        own, made = (n.get(split, 0) * config.per_prompt for n in (config.drawn, config.sampled))
        lines.append(f"{split}: {own} drawn pictures and {made} of {', '.join(config.models)}")
    return "\n".join(lines)
