"""`rlhf pretrain`: the condition encoder (once, then frozen) and the flow-matching transformer of
the scenes base.

Stage `condition`: next-token prediction on captions in the pipeline's own templates, half of them
behind their picture. Stage `transformer`: v = eps - x0 regression (arXiv:2210.02747), text-to-image
and edits, the condition dropped for a tenth of the steps, sigma logit-normal and shifted as in
sampling. `copies` noisy versions of a picture share the keys and values of its caption, which the
block-causal model computes once.
"""

# What the stock classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from pipelines.data.latents import Bucket, make_buckets, take
from pipelines.data.scenes import MIXTURE, check_shares, mixture, pictures
from rewards import images
from rlhf import noise
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.models import tiny
from rlhf.models.autoencoder import load_autoencoder
from rlhf.models.recall import IGNORED, Recall
from rlhf.policies.base import Condition
from rlhf.policies.qwen_image21 import PolicyConfig, QwenImage21Policy, load_policy
from rlhf.run import Run
from rlhf.sampling import Sampler, sample
from rlhf.training import Average, Pace, equal_parts, open_run, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Size of the transformer: width = heads * head_dim. `block` gelu is `rlhf.models.gelu`."""

    layers: int = 6
    heads: int = 6
    head_dim: int = 32
    block: tiny.TransformerBlock = "swiglu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`vae` and `condition` are directories made by `rlhf vae` and by the condition stage. With
    `start`, a pipeline's directory or `scenes`, its parts are used and its transformer trained
    further.
    """

    stage: Literal["condition", "transformer"] = "transformer"
    name: str = "pretrain"
    runs: str = "runs"
    vae: str | None = None
    condition: str | None = None
    start: str | None = None
    train: Literal["full", "lora"] = "full"
    checkpointing: bool = False  # of the transformer's activations
    seed: int = 0
    threads: int = 1
    size: int = 64
    examples: int = 18000
    batch: int = 16
    copies: int = 4
    dropout: float = 0.1
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))  # of the examples
    edit_share: float = 0.3  # of the batches; of the examples fewer, being dear to encode
    captions: dict[str, float] = field(  # shares of rewards.scenes.captions; the rest is terse
        default_factory=lambda: {"rich": 0.15}
    )
    shift: float = 0.5  # sigma = e^shift u / (1 + (e^shift - 1) u), u logit-normal
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights are float32
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the files
    network: Network = field(default_factory=Network)
    pace: Pace = field(default_factory=lambda: Pace(steps=6000, save_every=500, ema=0.999))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=1e-3, warmup_steps=200, total_steps=6000)
    )

    def check(self) -> None:
        check_shares(self.captions)
        parts = self.vae and self.condition
        if self.stage == "transformer" and not (self.start or parts):
            raise ConfigError(
                "stage transformer: expected vae=DIR and condition=DIR, or start=DIR, got"
                f" vae={self.vae} condition={self.condition}: run `rlhf vae` and stage=condition"
                " first"
            )
        kinds, shares = set(MIXTURE), self.mixture.values()
        if not set(self.mixture) <= kinds or min(shares, default=0) < 0 or sum(shares) <= 0:
            raise ConfigError(
                f"mixture: expected shares >= 0 of {', '.join(sorted(kinds))}, got"
                f" {dict(self.mixture)}"
            )
        if self.start and parts:
            raise ConfigError("start: its own parts are used: leave out vae and condition")
        if self.train == "lora" and not self.start:
            raise ConfigError(
                "train=lora: expected weights to adapt, got none: write start=DIR, or train=full"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout: expected a share below 1, got {self.dropout}: 0.1 is usual"
            )


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Train one stage; the result is in `<run>/condition` or, as a complete pipeline, in
    `<run>/model`, or in `<run>/lora`. Ranks but the first return an empty result.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with session() as ranks:
        home = open_run(config, "pretrain", resume, ranks)
        return (_condition if config.stage == "condition" else _transformer)(config, home, ranks)


# --- the condition encoder
# -----------------------------------------------------------------------------------


def _condition(config: Config, home: Run, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    shown = mixture(config.examples, config.seed + 1, captions={"rich": 0.5})
    processor = tiny.make_processor(tiny.make_tokenizer(e.caption for e in shown))
    model = tiny.make_text_encoder(processor.tokenizer).train()
    rendered = pictures(shown, config.size)

    def batch_of(step: int) -> Tensor:
        """(batch, 2): which example, and whether its picture is hidden."""
        picked = torch.randint(
            len(shown), (config.batch,), generator=noise.generator(config.seed, 12, step)
        )
        return torch.stack([picked, torch.full_like(picked, step % 2)], dim=1)

    def encode(rows: Tensor) -> Mapping[str, Tensor]:
        picked = rows[:, 0]
        captions = [shown[i].caption for i in picked]
        if rows[0, 1]:
            return processor(
                text=[_T2I.format(c) for c in captions], padding=True, return_tensors="pt"
            )
        pics = [images.to_pil(rendered[i]) for i in picked]
        return processor(
            text=[_CAPTION.format(c) for c in captions],
            images=pics,
            padding=True,
            return_tensors="pt",
        )

    recall = Recall(model)

    def objective(rows: Tensor) -> tuple[Tensor, dict[str, float]]:
        batch = encode(rows)
        ids = batch["input_ids"]
        ignored = (batch["attention_mask"] == 0) | (ids == processor.image_token_id)
        labels = ids.masked_fill(ignored, IGNORED)
        language = model(**batch, labels=labels).loss
        recalled = recall(labels)
        return language + recalled, {"loss/recall": float(recalled.detach())}

    parameters = {**dict(model.named_parameters()), **dict(recall.heads.named_parameters("recall"))}
    module = torch.nn.ModuleList([model, recall.heads])
    learner = Learner(parameters, config.learner, ranks, module)
    train(home, learner, batch_of, objective, config.pace)
    recall.close()
    with learner.gathered():
        if not ranks.is_first:
            return {}
        model.eval().save_pretrained(home.root / "condition" / "text_encoder")
        processor.save_pretrained(home.root / "condition" / "processor")
    rows = home.rows()
    metrics = {
        "loss": {"value": rows[-1]["loss"]},
        "loss/recall": {"value": rows[-1]["loss/recall"]},
    }
    return home.write_result(time.monotonic() - began, metrics)


_HEAD = f"<|im_start|>system\n{tiny.SYSTEM}<|im_end|>\n<|im_start|>user\n"
_T2I = _HEAD + "{}<|im_end|>\n<|im_start|>assistant\n"
_CAPTION = (
    _HEAD
    + "<image1><|vision_start|><|image_pad|><|vision_end|><|im_end|>\n"
    + "<|im_start|>assistant\n{}<|im_end|>\n"
)


# --- the transformer
# -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    latents: Tensor
    condition: Condition
    noise: Tensor
    sigma: Tensor


def _shares(buckets: list[Bucket], edit_share: float) -> Tensor:
    """How often each bucket is drawn: by its size, with edits together at `edit_share`."""
    counts = torch.tensor([float(len(b.latents)) for b in buckets])
    edits = torch.tensor([b.condition.sources_PMC is not None for b in buckets])
    if not edits.any() or edits.all():
        return counts
    counts[edits] *= edit_share / counts[edits].sum()
    counts[~edits] *= (1 - edit_share) / counts[~edits].sum()
    return counts


def draw_batch(config: Config, buckets: list[Bucket], step: int) -> Batch:
    """Batch number `step`: one bucket, `batch` of its examples, `copies` noise levels each."""
    rows = noise.generator(config.seed, 13, step)
    shares = _shares(buckets, config.edit_share)
    bucket = buckets[int(torch.multinomial(shares, 1, generator=rows))]
    index = torch.randint(len(bucket.latents), (config.batch,), generator=rows)
    dropped = float(torch.rand(1, generator=rows)) < config.dropout
    latents = bucket.latents[index].repeat_interleave(config.copies, dim=0)
    u = torch.randn(len(latents), generator=rows).sigmoid()
    odds = math.exp(config.shift)
    return Batch(
        latents=latents,
        condition=take(bucket.empty if dropped else bucket.condition, index),
        noise=torch.randn(latents.shape, generator=rows),
        sigma=odds * u / (1 + (odds - 1) * u),
    )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Consecutive examples in equal parts, each with all its copies. Raises ConfigError if they do
    not divide.
    """
    rows = equal_parts(torch.arange(len(batch.condition.embeds_PLD)), parts)
    tensors = (equal_parts(t, parts) for t in (batch.latents, batch.noise, batch.sigma))
    return [
        Batch(latents=latents, condition=take(batch.condition, index), noise=eps, sigma=sigma)
        for index, latents, eps, sigma in zip(rows, *tensors, strict=True)
    ]


def flow_matching(policy: QwenImage21Policy, batch: Batch, size: tuple[int, int]) -> Tensor:
    """Mean squared error of v(x_sigma) against eps - x0."""
    sigma = batch.sigma[:, None, None]
    x = (1 - sigma) * batch.latents + sigma * batch.noise
    prefix = policy.prefix(batch.condition)
    v = policy.velocity(x, batch.sigma, batch.condition, size=size, prefix=prefix)
    return (v - (batch.noise - batch.latents)).pow(2).mean()


@contextmanager
def mixed_precision(policy: QwenImage21Policy, precision: str) -> Iterator[None]:
    """Forward passes with products in `precision`. bfloat16 on a CPU takes attention apart: the
    fused backward is ten times slower there than in float32 (16 target and 24 text tokens).
    """
    kind, half = policy.device.type, precision == "bfloat16"
    apart = attention_backend("_native_math") if half and kind == "cpu" else nullcontext()
    with apart, torch.autocast(kind, torch.bfloat16, enabled=half):
        yield


def _policy(config: Config) -> QwenImage21Policy:
    """The policy to train: `start`, or a new transformer between the trained parts."""
    how = PolicyConfig(
        model=config.start or "", train=config.train, checkpointing=config.checkpointing
    )
    if config.start:
        return load_policy(how)
    condition = Path(str(config.condition))
    pipeline = tiny.assemble(
        load_autoencoder(str(config.vae)),
        Qwen3VLForConditionalGeneration.from_pretrained(condition / "text_encoder"),
        Qwen3VLProcessor.from_pretrained(condition / "processor"),
        tiny.make_transformer(
            config.network.layers,
            config.network.heads,
            config.network.head_dim,
            block=config.network.block,
        ),
    )
    return QwenImage21Policy(pipeline, how)


def _transformer(config: Config, home: Run, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    size = (config.size, config.size)
    policy = _policy(config)
    examples = mixture(
        config.examples, config.seed + 3, weights=config.mixture, captions=config.captions
    )
    buckets = make_buckets(policy, examples, config.size, least=config.batch)
    shown = mixture(16, config.seed + 4, "heldout")

    def preview(step: int, average: Average | None) -> dict[str, float]:
        if average is not None:
            policy.slots.load("ema", average.tensors)
        slot = "ema" if average is not None else "train"
        sampler = Sampler(steps=20, guidance=2.0, height=size[0], width=size[1])
        rows = []
        for i, one in enumerate(shown):
            picture = one.source_picture(config.size)
            sources = () if picture is None else (picture,)
            rows.append(
                sample(
                    policy, sampler, one.caption, sources=sources, seeds=(i, i + 1000), slot=slot
                ).pixels
            )
        images.contact_sheet(list(torch.cat(rows).numpy()), columns=8).save(
            home.samples / f"step_{step:06d}.png"
        )
        return {}

    def objective(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with mixed_precision(policy, config.precision):
            return flow_matching(policy, batch, size), {}

    learner = Learner(policy.slots.parameters, config.learner, ranks, policy.transformer)
    policy.slots.parameters.update(learner.parameters)
    average = train(
        home,
        learner,
        lambda step: draw_batch(config, buckets, step),
        objective,
        config.pace,
        preview=preview,
        split=split_batch,
    )
    with learner.gathered() as weights, torch.no_grad():
        if not ranks.is_first:
            return {}
        if average is not None:
            average.copy_to(weights)
        losses = [
            float(flow_matching(policy, draw_batch(config, buckets, 10_000_000 + i), size))
            for i in range(16)
        ]
        if config.train == "lora":
            policy.export(str(home.root / "lora"), {n: p.detach() for n, p in weights.items()})
        else:
            dtype = getattr(torch, config.save_dtype)
            policy.pipeline.to(dtype=dtype).save_pretrained(home.root / "model")
    metrics = {"loss/flow": {"value": float(np.mean(losses)), "n": len(losses)}}
    return home.write_result(time.monotonic() - began, metrics)
