"""The smallest real thing: the stock classes with random weights, and judges of their pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImage21Pipeline

from rlhf import noise
from rlhf.alignment import AlignmentConfig, LossConfig
from rlhf.cluster.base import ClusterConfig, Recipe
from rlhf.learner import LearnerConfig
from rlhf.losses import LOSSES
from rlhf.policies.config import Lora, PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.policies.pipeline import PipelinePolicy
from rlhf.rollout import Request, seeds_of
from rlhf.sampling import Sampler
from rlhf.types import Prompt

JUDGES = Path(__file__).with_name("judges.py")
TEXTS = ("a red circle on white", "a blue square", "HI", "two green squares above a cross")
WINDOW = dict(kernel="flow-sde", noise_level=0.7, window=(0, 2))


def policy_config(base: Path, train: str = "lora", **changes) -> PolicyConfig:
    known = dict(t5_tokens=16)  # 256, the default, is slow here
    lora = Lora(rank=4, alpha=8)
    return PolicyConfig(model=str(base), train=train, lora=lora, **(known | changes))


def make_policy(base: Path, train: str = "lora", **changes) -> PipelinePolicy:
    return load_policy(policy_config(base, train, **changes))


def stock_pipeline(base: Path, **parts) -> Any:
    """The pipeline as its users open it."""
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def drawn(pipeline, policy, text, seed, size, guidance, steps=4, **extra):
    """What the stock pipeline makes from our initial noise: packed latents (N, C), and a picture
    (3, H, W).
    """
    x = noise.initial_noise(seed, policy.latent_shape(size))[None]
    flat = isinstance(pipeline, QwenImage21Pipeline)  # takes packed latents; SD3 takes (C, H, W)
    made = [
        pipeline(
            text,
            negative_prompt="" if guidance > 1 else None,
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            latents=x.clone() if flat else x.transpose(1, 2).unflatten(2, (size[0] // 8, -1)),
            output_type=output,
            **(
                {"true_cfg_scale": guidance}
                if flat
                else {"guidance_scale": guidance, "max_sequence_length": policy.config.t5_tokens}
            ),
            **extra,
        ).images[0]
        for output in ("latent", "pil")
    ]
    latent = made[0] if flat else made[0].flatten(1).T
    return latent, np.asarray(made[1])[..., :3].transpose(2, 0, 1)


def close_pictures(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for latents 1e-4 apart, rounded to either side."""
    gap = np.abs(one.astype(int) - other.astype(int))
    return gap.max() <= 1 and (gap > 0).mean() < 1e-3


def noises(policy: PipelinePolicy, seeds, size=(64, 64)) -> torch.Tensor:
    """Initial noise of the seeds, packed."""
    return torch.stack([noise.initial_noise(s, policy.latent_shape(size)) for s in seeds])


@torch.no_grad()
def shake(policy: PipelinePolicy, seed: int = 1, size: float = 0.05) -> None:
    """Random train weights, so that LoRA does something."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.slots.parameters.values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def snapshot(policy: PipelinePolicy, slot: str = "train") -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in policy.slots.tensors(slot).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def alignment(loss: str = "nft", lr: float = 1e-2, **changes) -> AlignmentConfig:
    """Wide clips, so that later updates still have a gradient."""
    known = dict(updates_per_rollout=2, clip_low=0.2, clip_high=0.2)
    own = ("train_guidance", "reference_guidance", "ema")
    more = {name: changes.pop(name) for name in own if name in changes}
    return AlignmentConfig(
        loss=LossConfig(name=loss, **(known | changes)),
        learner=LearnerConfig(lr=lr),
        **more,
    )


def sampler(loss: str = "nft", **changes) -> Sampler:
    known = dict(steps=4, guidance=3.0, height=64, width=64)
    return Sampler(**(known | (WINDOW if LOSSES[loss].form else {}) | changes))


def recipe(base: Path, loss: str = "nft", judges=("brightness",), **cluster) -> Recipe:
    known = dict(kind="local", rollout_workers=1, learner_threads=1, timeout_seconds=600.0)
    return Recipe(
        policy=policy_config(base),
        alignment=alignment(loss),
        judges=tuple(judge_spec(j) for j in judges),
        cluster=ClusterConfig(**(known | cluster)),
    )


def judge_spec(name: str) -> str:
    return f"{JUDGES}:{name}"


def prompts(n: int = 2) -> tuple[Prompt, ...]:
    return tuple(Prompt(id=f"t#{i}", text=TEXTS[i], category="objects") for i in range(n))


def request(iteration: int, made_by: Sampler, store=(), groups: int = 2, size: int = 4) -> Request:
    return Request(
        iteration=iteration,
        prompts=prompts(groups),
        seeds=seeds_of(0, iteration, groups, size),
        sampler=made_by,
        store=store,
    )


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A source picture with structure, uint8 (3, H, W)."""
    small = np.random.default_rng(seed).integers(0, 256, (3, height // 16, width // 16))
    return np.kron(small, np.ones((1, 16, 16))).astype(np.uint8)


def with_guidance(s: Sampler, guidance: float) -> Sampler:
    return replace(s, guidance=guidance)


# --- whole runs -----------------------------------------------------------------------------------


def prompt_file(folder: Path, count: int = 5) -> Path:
    """A prompt set of its own, as JSONL."""
    path = folder / "prompts.jsonl"
    texts = [f"a red circle number {i}" for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def arguments(base: Path, folder: Path, *more: str) -> list[str]:
    """The command line of the smallest run of `rlhf align`: folder/runs/tiny."""
    prompts = prompt_file(folder)
    return [
        "align",
        "name=tiny",
        f"runs={folder / 'runs'}",
        f"policy.model={base}",
        "policy.lora.rank=4",
        "policy.lora.alpha=8",
        "policy.t5_tokens=16",
        "iterations=4",
        "prompts_per_iteration=2",
        "group_size=4",
        "rollout.steps=3",
        "loss.updates_per_rollout=2",
        "learner.lr=0.01",
        f"prompts.source={prompts}",
        "prompts.count=0",
        f"evaluation.prompts.source={prompts}",
        "evaluation.prompts.count=2",
        "evaluation.per_prompt=2",
        "evaluation.steps=2",
        "evaluation.every=2",
        "checkpoints.every=1",
        f"judges=[{judge_spec('brightness')}]",
        "cluster.kind=local",
        "cluster.learner_threads=1",
        *more,
    ]
