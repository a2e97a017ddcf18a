"""What is read off an autoencoder or a transformer of the ablations: one number per held-out
picture or prompt, the same ones for every arm and seed, so that differences are paired.

psnr, ssim, psnr128    of round trips of the mixture an autoencoder sees, at 64 px and at 128
kept                   soft oracle score of round trips of objects: the most `soft` can be
soft, chance           soft oracle score of generated objects, against their own prompt and others
flow                   held-out flow loss over the variance of the velocity, mean over noise levels
peak, peak_ratio       largest |x| of any block's output, and the largest over a block's rms
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from pipelines.data.scenes import PICTURES, example, mixture, pictures, rgba
from rewards import images
from rewards.scenes.render import render_batch
from rlhf import heldout, noise
from rlhf.gallery import Painter, assemble
from rlhf.models.autoencoder import encode_mode, load_autoencoder
from rlhf.models.health import activation_maxima
from rlhf.models.measures import ssim
from rlhf.models.reconstruction import psnr, reconstruct
from rlhf.policies.open import Opening, open_policy
from rlhf.policies.qwen_image21 import QwenImage21Policy
from rlhf.sampling import Sampler

Values = dict[str, np.ndarray]
SIZE = 64
SEED = 4242  # of held-out pictures and noise, the same for all arms and seeds
SHIFT = math.exp(0.5)  # of the noise levels; in training the sampler's, 0.49 at 64 px
KINDS = ("objects/1", "objects/2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Sizes of the held-out sets: pictures, prompts with `each` samples, and noise levels."""

    pictures: int = 128
    prompts: int = 48
    each: int = 4
    levels: int = 8
    steps: int = 20
    guidance: float = 2.0


def _objects(count: int) -> list[Any]:
    """Up to `count` held-out specs of different captions, half of them of two objects."""
    sets = (heldout.specs_of("objects", level, "heldout", count // 2) for level in (1, 2))
    return [spec for specs in sets for spec in specs]


@torch.no_grad()
def codec(folder: Path, held: Held) -> Values:
    """Measures of an autoencoder's directory."""
    vae = load_autoencoder(folder).eval()
    found: Values = {}
    for size, names in ((64, ("psnr", "ssim")), (128, ("psnr128",))):
        shown = rgba(pictures(mixture(held.pictures, SEED, "heldout", PICTURES), size))
        again = reconstruct(vae, shown, batch=16)[:, :3]
        for name, measure in zip(names, (psnr, ssim), strict=False):
            found[name] = measure(again, shown[:, :3]).numpy()
    specs = _objects(held.prompts)
    again = reconstruct(vae, rgba(render_batch(specs, SIZE)), batch=16)
    read = images.to_uint8(again[:, :3]).numpy()[:, None]
    found["kept"] = heldout.read("fidelity", specs, read).soft_PG[:, 0]
    return found


def transformer(folder: Path, held: Held) -> tuple[Values, dict[str, Any]]:
    """Measures of a pipeline's directory, and what concerns it as a whole: its number of weights
    and the largest activations of each block.
    """
    policy = open_policy(Opening(model=str(folder))).policy
    found, maxima = flow(policy, held)
    weights = sum(p.numel() for p in policy.transformer.parameters())
    return found | painted(policy, held), {"weights": weights, "blocks": maxima}


@torch.no_grad()
def flow(policy: QwenImage21Policy, held: Held) -> tuple[Values, dict[str, list[float]]]:
    """Loss and activations on held-out captions at the quantiles of the training noise levels."""
    count, size = held.pictures, (SIZE, SIZE)
    shown = [example(KINDS[i % 2], SEED + i, "heldout") for i in range(count)]
    spread = [NormalDist().inv_cdf((k + 0.5) / held.levels) for k in range(held.levels)]
    u = torch.tensor(spread).sigmoid()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    rows: dict[str, list[float]] = {name: [] for name in ("flow", "size", "peak", "peak_ratio")}
    with activation_maxima(policy.transformer) as every:
        for i, one in enumerate(shown):
            x0 = policy.pack(encode_mode(policy.pipeline.vae, rgba(pictures([one], SIZE))))
            draw = noise.generator(SEED, 21, i)
            eps = torch.randn(held.levels, *x0.shape[1:], generator=draw)
            x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * eps
            condition = policy.encode(one.caption)
            with activation_maxima(policy.transformer) as seen:
                prefix = policy.prefix(condition)
                v = policy.velocity(x, sigma, condition, size=size, prefix=prefix)
            rows["flow"].append(float((v - (eps - x0)).pow(2).mean()))
            rows["size"].append(float((eps - x0).pow(2).mean()))
            rows["peak"].append(max(seen.largest.values()))
            rows["peak_ratio"].append(max(seen.ratio.values()))
    found = {name: np.array(values) for name, values in rows.items() if name != "size"}
    found["flow"] /= np.mean(rows["size"])
    blocks = {"largest": list(every.largest.values()), "ratio": list(every.ratio.values())}
    return found, blocks


def painted(policy: QwenImage21Policy, held: Held) -> Values:
    """Oracle's soft readings of samples, a mean for each prompt."""
    specs = _objects(held.prompts)
    task = heldout.make_task("objects", specs, len(specs) * held.each, SIZE, SEED, held.each)
    sampler = Sampler(steps=held.steps, guidance=held.guidance, height=SIZE, width=SIZE)
    painter = Painter(policy)
    batches = painter.batches(task.wanted, sampler)
    made = assemble(((b, painter.paint(b)) for b in batches), len(specs))
    soft = heldout.read("fidelity", specs, made).soft_PG
    others = [heldout.read("fidelity", specs[k:] + specs[:k], made).soft_PG for k in (1, 3, 7)]
    return {"soft": soft.mean(1), "chance": np.concatenate(others, axis=1).mean(1)}
