"""From a step to the batch that it trains on, encoded before it is wanted.

A `Draw` says which examples a step takes and is a function of (seed, step); micro-batches are parts
of it, so every rank encodes its own share alone. A thread encodes the next step's while this one
trains; what frozen encoders said is kept by content. Examples are encoded one by one: what one
gives does not depend on its batch mates, so a run that finds its cache empty continues bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pipelines.data.buckets import Buckets, Ladder, Size
from pipelines.data.cache import MemoryCache, TensorCache, Value, encoder_hash
from pipelines.data.examples import Examples, Item, open_examples
from pipelines.data.scenes import rgba
from pipelines.data.stages import Span, span_at
from rewards.errors import ImageError
from rlhf import noise
from rlhf.distributed import Ranks
from rlhf.errors import ConfigError, DataError
from rlhf.flow import Batch, Part, logit_normal
from rlhf.policies.base import Condition
from rlhf.policies.qwen_image21 import QwenImage21Policy, tokens_of
from rlhf.schedule import shift_of

MOST_BROKEN = 0.05  # of the examples drawn
ENOUGH = 1000  # examples before that share is looked at
_ROW, _DROP = 13, 14  # keys of draws
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Examples `index` of a stage at one size; the first is row `first` of the step's batch."""

    step: int
    stage: int
    size: Size
    index: tuple[int, ...]
    first: int = 0


def split_draw(draw: Draw, parts: int) -> list[Draw]:
    """Consecutive examples in equal parts. Raises ConfigError if they do not divide."""
    count, left = divmod(len(draw.index), parts)
    if left:
        raise ConfigError(
            f"pace.micro_batches: expected a divisor of the batch of {len(draw.index)} at"
            f" {draw.size[0]}x{draw.size[1]} px, got {parts}"
        )
    return [
        Draw(
            step=draw.step,
            stage=draw.stage,
            size=draw.size,
            index=draw.index[i : i + count],
            first=draw.first + i,
        )
        for i in range(0, len(draw.index), count)
    ]


class Draws:
    """The draws of all steps. The examples of a stage are opened when it is first drawn from; with
    `held` they are the held-out ones, of which edits are as frequent as they are.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        ladder: Callable[[tuple[int, ...]], Ladder],
        examples: int,
        seed: int,
        lengths: Callable[[Sequence[str]], Sequence[int]],
        held: bool = False,
    ) -> None:
        self.spans, self.ladder, self.examples = spans, ladder, examples
        self.seed, self.lengths, self._held = seed, lengths, held
        self._open: dict[int, tuple[Examples, dict[bool, Buckets]]] = {}
        self._lock = threading.Lock()  # a batch is made in a thread while the next step is drawn

    def examples_of(self, stage: int) -> Examples:
        return self._opened(stage)[0]

    def __call__(self, step: int) -> Draw:
        span = span_at(self.spans, step)
        edits = span.is_edit(step)
        buckets = self._opened(span.number)[1][edits]
        batch = buckets.batch(span.batches_before(step, edits) + 1)
        return Draw(step=step, stage=span.number, size=batch.size, index=batch.index)

    def check(self) -> None:
        """Look at the data sets of all stages. Raises what `open_examples` raises."""
        seen = set()
        for span in self.spans:
            key = (span.settings.data, span.settings.edits)
            if span.settings.data and key not in seen:
                open_examples(span.settings, self.ladder(span.settings.resolutions), 0, 0)
                seen.add(key)

    def held(self, stage: int, n: int) -> Draws:
        """Those of a stage's held-out examples, `n` of them if they are scenes, edits and others
        from one row; each no larger than a micro-batch.
        """
        settings = replace(self.spans[stage].settings, edits=0.0)
        only = replace(self.spans[stage], number=0, first=1, last=n, settings=settings)
        return Draws((only,), self._part, n, self.seed + 2, self.lengths, held=True)

    def _part(self, resolutions: tuple[int, ...]) -> Ladder:
        ladder = self.ladder(resolutions)
        return replace(ladder, budget=ladder.budget // ladder.multiple, multiple=1)

    def _opened(self, stage: int) -> tuple[Examples, dict[bool, Buckets]]:
        with self._lock:
            return self._open_stage(stage)

    def _open_stage(self, stage: int) -> tuple[Examples, dict[bool, Buckets]]:
        if stage not in self._open:
            settings = self.spans[stage].settings
            ladder, seed = self.ladder(settings.resolutions), self.seed + 16 * stage
            found = open_examples(settings, ladder, self.examples, seed, self._held)
            lengths = self.lengths(found.captions)
            buckets = {}
            for edits, share in ((False, 1 - settings.edits), (True, settings.edits)):
                every = self._held  # edits are as frequent as they are
                index = [i for i, edit in enumerate(found.edits) if every or bool(edit) == edits]
                if share > 0:
                    buckets[edits] = Buckets(found.sizes, ladder, seed, lengths, index)
            self._open = {k: v for k, v in self._open.items() if k == stage - 1}
            self._open[stage] = found, buckets
        return self._open[stage]


def token_counts(encoder: Encoder) -> Callable[[Sequence[str]], Sequence[int]]:
    """Lengths of captions in the tokens of the encoder's policy."""
    tokenizer = encoder.policy.pipeline.processor.tokenizer  # type: ignore[union-attr]

    def lengths(captions: Sequence[str]) -> Sequence[int]:
        with encoder.lock:
            return [len(ids) for ids in tokenizer(list(captions))["input_ids"]]

    return lengths


# --- encoding -------------------------------------------------------------------------------------


class Encoder:
    """Values of examples by a policy's frozen parts: packed latents (N, C), the condition's tensors
    and, for an edit, those of the empty prompt about the same sources. All on the CPU.

    Tokenizers and autoencoders keep state while they work: whoever uses those of the policy while
    batches are made in a thread holds `lock`.
    """

    def __init__(self, policy: QwenImage21Policy, folder: str | None) -> None:
        self.policy = policy
        self.cache = TensorCache(folder, _encoder_hash(policy)) if folder else MemoryCache()
        self.empty = {name: tensor.cpu() for name, tensor in _tensors(policy.encode("")).items()}
        self.seen = self.broken = 0
        self.lock = threading.RLock()

    def values(self, items: Sequence[Item | None], size: Size) -> list[Value | None]:
        """One each, None where a picture does not decode, which is counted.

        Raises:
            DataError: too many of them.
        """
        whole = [item for item in items if item is not None]
        keys = [f"{item.content()}-{size[0]}x{size[1]}" for item in whole]
        with self.lock:
            read = self.cache.fetch(keys, lambda index: [self._one(whole[i], size) for i in index])
        found = iter(read)
        out = [None if item is None else next(found) for item in items]
        self.seen += len(out)
        self.broken += sum(value is None for value in out)
        if self.broken > MOST_BROKEN * max(self.seen, ENOUGH):
            raise DataError(
                f"expected at most {MOST_BROKEN:.0%} unreadable examples, got {self.broken} of"
                f" {self.seen}: prepare the set again with `rlhf data`"
            )
        return out

    @torch.no_grad()
    def _one(self, item: Item, size: Size) -> Value | None:
        try:
            target, sources = item.pictures(size)
        except ImageError:
            return None
        policy = self.policy
        pixels = rgba(target[None]).to(policy.device, policy.dtype).unsqueeze(2)
        latents = policy.pipeline.vae.encode(pixels).latent_dist.mode()[:, :, 0]  # type: ignore[union-attr]
        texts = [item.caption, ""] if sources else [item.caption]
        made = policy.encode_variants(texts, sources)
        value = {"latent": policy.pack(latents)[0], **_tensors(made[0])}
        if sources:
            value |= {f"empty_{k}": v for k, v in _tensors(made[1]).items() if k != "sources"}
        return {name: tensor.cpu() for name, tensor in value.items()}


def _encoder_hash(policy: QwenImage21Policy) -> str:
    pipeline: Any = policy.pipeline
    settings = {
        "dtype": str(policy.dtype),
        "vae": dict(pipeline.vae.config),
        "tokenizer": pipeline.processor.tokenizer.backend_tokenizer.to_str(),
        "pictures": pipeline.processor.image_processor.to_dict(),
    }
    return encoder_hash({"text_encoder": pipeline.text_encoder, "vae": pipeline.vae}, settings)


def _tensors(condition: Condition) -> dict[str, Tensor]:
    out = {"embeds": condition.embeds_PLD, "slots": condition.image_slots_L}
    if condition.sources_PMC is not None:
        out |= {"sources": condition.sources_PMC, "shapes": torch.tensor(condition.source_shapes)}
    return out


def _layout(value: Value) -> tuple[int, ...]:
    """What the rows of one call share: length of the text, shapes of the sources."""
    shapes = value["shapes"].flatten().tolist() if "shapes" in value else []
    return value["embeds"].shape[1], *shapes


def _condition(values: Sequence[Value], empty: Value | None, device: torch.device) -> Condition:
    """Conditions of one layout together; with `empty` (of a prompt without sources), or where the
    values hold their own, those of the empty prompt.
    """
    first = values[0]
    words = "empty_" if empty is not None and "shapes" in first else ""
    texts = [empty] * len(values) if empty is not None and not words else values
    shapes = first["shapes"].tolist() if "shapes" in first else []
    return Condition(
        embeds_PLD=torch.cat([one[f"{words}embeds"] for one in texts]).to(device),
        image_slots_L=texts[0][f"{words}slots"].to(device),
        sources_PMC=torch.cat([one["sources"] for one in values]).to(device) if shapes else None,
        source_shapes=tuple((a, b, c) for a, b, c in shapes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Noising:
    """`copies` noise levels of each example, logit-normal moved by `shift` (None: by that of the
    policy's sampler at this size); the prompt of all examples of a layout is dropped for a share
    `dropout` of the steps.
    """

    seed: int
    copies: int
    dropout: float
    shift: float | None


class Batches:
    """Batches of draws: `encoder`'s values with noise that is a function of (seed, step, row)."""

    def __init__(self, draws: Draws, encoder: Encoder, noising: Noising) -> None:
        self.draws, self.encoder, self.noising = draws, encoder, noising

    def __call__(self, draw: Draw) -> Batch:
        """What cannot be read is left out; if nothing remains the batch has no weight. Raises
        DataError if that is too often.
        """
        examples = self.draws.examples_of(draw.stage)
        values = self.encoder.values([_item(examples, i) for i in draw.index], draw.size)
        groups: dict[tuple[int, ...], list[tuple[int, Value]]] = defaultdict(list)
        for row, value in enumerate(values, start=draw.first):
            if value is not None:
                groups[_layout(value)].append((row, value))
        weight = 1.0 if groups else 0.0
        if not groups:  # every rank has something to compute
            blank = torch.zeros(self.encoder.policy.latent_shape(draw.size))
            nothing = {"latent": blank, **self.encoder.empty}
            groups[_layout(nothing)].append((draw.first, nothing))
        parts = [self._part(draw, layout, rows) for layout, rows in groups.items()]
        return Batch(parts=tuple(parts), size=draw.size, weight=weight)

    def _part(self, draw: Draw, layout: tuple[int, ...], rows: Sequence[tuple[int, Value]]) -> Part:
        how, device = self.noising, self.encoder.policy.device
        tokens = tokens_of(draw.size)
        shift = how.shift
        if shift is None:
            shift = shift_of(tokens, self.encoder.policy.pipeline.scheduler.config)
        u, eps = [], []
        for row, value in rows:
            keyed = noise.generator(how.seed, _ROW, draw.step, row)
            u.append(torch.randn(how.copies, generator=keyed))
            eps.append(torch.randn((how.copies, *value["latent"].shape), generator=keyed))
        keyed = noise.generator(how.seed, _DROP, draw.step, *layout)
        dropped = float(torch.rand(1, generator=keyed)) < how.dropout
        latents = torch.stack([value["latent"] for _, value in rows])
        return Part(
            latents=latents.repeat_interleave(how.copies, dim=0).to(device),
            noise=torch.cat(eps).to(device),
            sigma=logit_normal(torch.cat(u), shift).to(device),
            condition=_condition(
                [value for _, value in rows], self.encoder.empty if dropped else None, device
            ),
        )


def _item(examples: Examples, index: int) -> Item | None:
    try:
        return examples[index]
    except ImageError:
        return None


# --- ahead of time --------------------------------------------------------------------------------


@dataclass
class Ahead(Generic[T]):
    """`make(draw)` for the draws that `upcoming(step)` names, one step ahead, in a thread.

    A context manager. `waited` are the seconds that `get` has waited for a batch.
    """

    make: Callable[[Draw], T]
    upcoming: Callable[[int], Sequence[Draw]]
    threads: int = 1
    waited: float = 0.0
    _pending: dict[Draw, Future[T]] = field(default_factory=dict)

    def __enter__(self) -> Ahead[T]:
        self._worker = ThreadPoolExecutor(
            1, "batches", initializer=torch.set_num_threads, initargs=(self.threads,)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown(cancel_futures=True)

    def get(self, draw: Draw) -> T:
        """The batch, made now if nobody asked for it ahead. Raises what `make` raises."""
        began = time.monotonic()
        pending = self._pending.pop(draw, None)
        for other in [one for one in self._pending if one.step != draw.step]:
            self._pending.pop(other).cancel()  # the caller went elsewhere
        batch = (pending or self._worker.submit(self.make, draw)).result()
        self.waited += time.monotonic() - began
        if not self._pending:
            for later in self.upcoming(draw.step + 1):
                self._pending[later] = self._worker.submit(self.make, later)
        return batch


def upcoming(
    draws: Draws, ranks: Ranks, micro_batches: int, steps: int
) -> Callable[[int], Sequence[Draw]]:
    """This rank's draws of a step, none after the last."""

    def of(step: int) -> Sequence[Draw]:
        return ranks.share(split_draw(draws(step), micro_batches)) if step <= steps else ()

    return of


@dataclass
class Traffic:
    """Latent tokens trained on per second by size, and the share of time spent waiting for data."""

    ahead: Ahead[Batch]
    encoder: Encoder
    ranks: Ranks
    tokens: Counter[Size] = field(default_factory=Counter)
    seconds: dict[Size, float] = field(default_factory=dict)
    _last: tuple[float, Size, int] | None = None
    _waited: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    def enter(self, batch: Batch) -> None:
        """A batch is about to be trained on; the time since the last one was the last one's."""
        now = time.monotonic()
        if self._last is not None:
            began, size, tokens = self._last
            self.seconds[size] = self.seconds.get(size, 0.0) + now - began
            self.tokens[size] += tokens
        self._last = now, batch.size, batch.rows * tokens_of(batch.size)

    def pause(self) -> None:
        """Something else comes: the last batch is not counted."""
        self._last = None

    def figures(self) -> dict[str, float]:
        """Since the last call; what is broken, of all ranks since they were started."""
        now, waited = time.monotonic(), self.ahead.waited
        share = (waited - self._waited) / (now - self._since)
        self._waited, self._since = waited, now
        return {"data/wait": share} | self.ranks.sum({"data/broken": float(self.encoder.broken)})

    def totals(self) -> dict[str, float]:
        """Since the start of this process; tokens and broken examples of all ranks."""
        rates = {
            f"tokens/s/{height}x{width}": self.tokens[height, width] / spent
            for (height, width), spent in sorted(self.seconds.items())
        }
        total = self.ranks.sum(rates | {"data/broken": float(self.encoder.broken)})
        return total | {"data/wait_seconds": self.ahead.waited}
