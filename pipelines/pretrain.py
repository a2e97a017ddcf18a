"""`rlhf pretrain`: the condition encoder (once, then frozen) and the flow-matching transformer.

Stage `condition`: next-token prediction on captions in the pipeline's own templates, half of them
behind their picture. Stage `transformer`: flow matching (`rlhf.flow`) on prompts and edits through
the phases and stages of `pipelines.data.stages`; the condition is dropped for a tenth of the steps,
sigma is logit-normal and shifted as in sampling at that resolution.
"""

# What the stock classes declare is wider than what they hold.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from pipelines.data.buckets import Ladder
from pipelines.data.examples import SCENE_SIDES, SceneItem
from pipelines.data.held import Held
from pipelines.data.loader import (
    Ahead,
    Batches,
    Draw,
    Draws,
    Encoder,
    Noising,
    Traffic,
    split_draw,
    token_counts,
    upcoming,
)
from pipelines.data.scenes import MIXTURE, check_mixture, check_shares, mixture, pictures
from pipelines.data.stages import Phase, Settings, Span, span_at, spans
from rewards import images
from rlhf import noise
from rlhf.distributed import Ranks, session
from rlhf.errors import ConfigError
from rlhf.flow import Batch, flow_matching, mixed_precision
from rlhf.learner import Learner, LearnerConfig
from rlhf.models import tiny
from rlhf.models.autoencoder import load_autoencoder
from rlhf.models.recall import IGNORED, Recall
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.qwen_image21 import QwenImage21Policy, tokens_of
from rlhf.run import Run
from rlhf.sampling import Sampler, sample
from rlhf.training import Average, Pace, open_run, train


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Size of the transformer: width = heads * head_dim. `block` gelu is `rlhf.models.gelu`."""

    layers: int = 6
    heads: int = 6
    head_dim: int = 32
    axes: tuple[int, int, int] | None = None  # rotary: frame, height, width; None: 1/4, 3/8, 3/8
    block: tiny.TransformerBlock = "swiglu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`vae` and `condition` are directories made by `rlhf vae` and by the condition stage. With
    `start`, a pipeline's directory or `scenes`, its parts are used and its transformer trained
    further. `size`, `edits`, `data`, `mixture` and `captions` hold where no phase or stage says
    otherwise.
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
    device: str = "cpu"
    phases: tuple[Phase, ...] = ()
    size: int = 64
    aspects: tuple[float, ...] = (1.0,)  # width over height; scenes are square
    batch: int = 16  # pictures of `size`; at other sizes as many as have their latent tokens
    copies: int = 4
    dropout: float = 0.1
    shift: float | None = None  # of the noise levels; None: the sampler's, by resolution
    edits: float = 0.3  # share of the batches that are edits
    data: str | None = None  # folder of `rlhf data`; None: scenes
    examples: int = 18000  # scenes of a stage
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))  # of the scenes
    captions: dict[str, float] = field(  # shares of rewards.scenes.captions; the rest is terse
        default_factory=lambda: {"rich": 0.15}
    )
    shown: int = 16  # held-out prompts on the sheet of a checkpoint, two pictures each
    cache: str | None = None  # folder for what the frozen parts said; None: memory
    precision: Literal["float32", "bfloat16"] = "float32"  # of the products; weights are float32
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the files
    network: Network = field(default_factory=Network)
    pace: Pace = field(default_factory=lambda: Pace(steps=6000, save_every=500, ema=0.999))
    learner: LearnerConfig = field(
        default_factory=lambda: LearnerConfig(lr=1e-3, warmup_steps=200, total_steps=6000)
    )

    def spans(self) -> tuple[Span, ...]:
        """The stages with their steps."""
        base = Settings(
            resolutions=(self.size,),
            edits=self.edits,
            data=self.data,
            mixture=self.mixture,
            captions=self.captions,
        )
        return spans(self.phases, self.pace.steps, base)

    def ladder(self, resolutions: tuple[int, ...]) -> Ladder:
        """The bucket sizes of a stage, at the latent tokens of `batch` pictures of `size`."""
        budget = self.batch * tokens_of((self.size, self.size))
        return Ladder(
            resolutions=resolutions,
            aspects=self.aspects,
            budget=budget,
            multiple=self.pace.micro_batches,
        )

    def check(self) -> None:
        parts = self.vae and self.condition
        if self.stage == "transformer" and not (self.start or parts):
            raise ConfigError(
                "stage transformer: expected vae=DIR and condition=DIR, or start=DIR, got"
                f" vae={self.vae} condition={self.condition}: run `rlhf vae` and stage=condition"
                " first"
            )
        if self.start and parts:
            raise ConfigError("start: its own parts are used: leave out vae and condition")
        if self.train == "lora" and not self.start:
            raise ConfigError(
                "train=lora: expected weights to adapt, got none: write start=DIR, or train=full"
            )
        if min(self.copies, self.examples) < 1 or self.shown < 0:
            raise ConfigError(
                f"expected copies and examples of at least 1 and shown of at least 0, got"
                f" {self.copies}, {self.examples} and {self.shown}"
            )
        if 0 < self.learner.total_steps < self.pace.steps:
            raise ConfigError(
                f"learner.total_steps: expected at least pace.steps, {self.pace.steps}, got"
                f" {self.learner.total_steps}: the rate would stay at its lowest; 0 keeps it"
                " constant"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(
                f"dropout: expected a share below 1, got {self.dropout}: 0.1 is usual"
            )
        for span in self.spans():
            self._check_stage(span)

    def _check_stage(self, span: Span) -> None:
        settings, ladder = span.settings, self.ladder(span.settings.resolutions)
        check_shares(settings.captions)
        check_mixture(settings.mixture)
        ladder.check()
        if not 0 <= settings.edits <= 1:
            raise ConfigError(
                f"stage {span.name}: expected a share of edits of 0 to 1, got {settings.edits}"
            )
        kinds = {kind == "edits" for kind, share in settings.mixture.items() if share}
        shares = {True: settings.edits, False: 1 - settings.edits}
        wanted = {edits for edits, share in shares.items() if share}
        if not settings.data and not wanted <= kinds:
            raise ConfigError(
                f"stage {span.name}: expected a mixture for a share of edits of {settings.edits},"
                f" got {dict(settings.mixture)}: change one of the two"
            )
        sides = settings.resolutions
        if not settings.data and (self.aspects != (1.0,) or set(sides) - set(SCENE_SIDES)):
            raise ConfigError(
                f"stage {span.name}: scenes are squares of {SCENE_SIDES} px, got {sides} px and"
                f" aspects {self.aspects}: write data=DIR, or change resolutions and aspects"
            )


def run(config: Config, resume: Path | None = None) -> dict[str, Any]:
    """Train one stage; the result is in `<run>/condition` or, as a complete pipeline, in
    `<run>/model`, or in `<run>/lora`. Ranks but the first return an empty result.
    """
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    with session(config.device) as ranks:
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


def _policy(config: Config, device: str) -> QwenImage21Policy:
    """The policy to train: `start`, or a new transformer between the trained parts."""
    how = PolicyConfig(
        model=config.start or "",
        train=config.train,
        device=device,
        checkpointing=config.checkpointing,
    )
    if config.start:
        policy = load_policy(how)
        if not isinstance(policy, QwenImage21Policy):
            raise ConfigError(f"start: expected a QwenImage21Pipeline, got '{config.start}'")
        return policy
    condition, net = Path(str(config.condition)), config.network
    vae = load_autoencoder(str(config.vae))
    encoder = Qwen3VLForConditionalGeneration.from_pretrained(condition / "text_encoder")
    transformer = tiny.make_transformer(
        net.layers,
        net.heads,
        net.head_dim,
        context=encoder.config.text_config.hidden_size,
        latents=len(vae.config.latents_mean),
        axes=net.axes,
        block=net.block,
    )
    processor = Qwen3VLProcessor.from_pretrained(condition / "processor")
    return QwenImage21Policy(tiny.assemble(vae, encoder, processor, transformer), how)


class Trainer:
    """The parts of a transformer run, from a configuration."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks, self.spans = config, ranks, config.spans()
        self.policy = policy = _policy(config, ranks.device)
        encoder = Encoder(policy, config.cache)
        self.draws = Draws(
            self.spans, config.ladder, config.examples, config.seed + 3, token_counts(encoder)
        )
        self.draws.check()
        noising = Noising(
            seed=config.seed, copies=config.copies, dropout=config.dropout, shift=config.shift
        )
        self.batches = Batches(self.draws, encoder, noising)
        self.learner = Learner(
            policy.slots.parameters,
            config.learner,
            ranks,
            policy.transformer,
            factor=lambda step: span_at(self.spans, step).rate,
        )
        policy.slots.parameters.update(self.learner.parameters)

    def ahead(self) -> Ahead[Batch]:
        """This rank's batches, made a step ahead."""
        pace = self.config.pace
        later = upcoming(self.draws, self.ranks, pace.micro_batches, pace.steps)
        return Ahead(self.batches, later, self.config.threads)

    def loss(self, batch: Batch) -> Tensor:
        with mixed_precision(self.policy, self.config.precision):
            return flow_matching(self.policy, batch)


def _transformer(config: Config, home: Run, ranks: Ranks) -> dict[str, Any]:
    began = time.monotonic()
    trainer = Trainer(config, ranks)
    policy, learner = trainer.policy, trainer.learner
    held = Held(trainer.draws, trainer.batches)
    with trainer.ahead() as ahead:
        encoder = trainer.batches.encoder
        traffic = Traffic(ahead, encoder, ranks)

        def objective(draw: Draw) -> tuple[Tensor, dict[str, float]]:
            batch = ahead.get(draw)
            traffic.enter(batch)
            return trainer.loss(batch), {}

        def preview(step: int, average: Average | None) -> dict[str, float]:
            traffic.pause()
            if average is not None:
                policy.slots.load("ema", average.tensors)
            slot = "ema" if average is not None else "train"
            if config.shown:
                with encoder.lock:
                    _sheet(config, policy, slot, home.samples / f"step_{step:06d}.png")
            return held.figures(span_at(trainer.spans, step), slot)

        average = train(
            home,
            learner,
            trainer.draws,
            objective,
            config.pace,
            preview=preview,
            split=split_draw,
            figures=traffic.figures,
        )
    totals = traffic.totals()
    with learner.gathered() as weights, torch.no_grad():
        if not ranks.is_first:
            return {}
        if average is not None:
            average.copy_to(weights)
        figures = held.figures(trainer.spans[-1], "train") | totals
        if config.train == "lora":
            policy.export(str(home.root / "lora"), {n: p.detach() for n, p in weights.items()})
        else:
            dtype = getattr(torch, config.save_dtype)
            policy.pipeline.to(dtype=dtype).save_pretrained(home.root / "model")
    metrics = {name: {"value": value} for name, value in figures.items()}
    return home.write_result(time.monotonic() - began, metrics)


def _sheet(config: Config, policy: QwenImage21Policy, slot: str, path: Path) -> None:
    """Pictures of held-out prompts, two seeds each, as large as scenes can be."""
    side = min(config.size, max(SCENE_SIDES))
    sampler = Sampler(steps=20, guidance=2.0, height=side, width=side)
    rows = []
    for i, one in enumerate(mixture(config.shown, config.seed + 4, "heldout")):
        sources = SceneItem(one).pictures((side, side))[1]
        made = sample(policy, sampler, one.caption, sources=sources, seeds=(i, i + 1000), slot=slot)
        rows.append(made.pixels)
    images.contact_sheet(list(torch.cat(rows).numpy()), columns=8).save(path)
