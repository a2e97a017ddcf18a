"""Towers and judges of the smallest size, untrained, made in place."""

from __future__ import annotations

from pathlib import Path

import torch

from rewards.backbones.towers import Shape, Towers, new_towers
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.scenes.specs import Edit
from rewards.trained import TowersJudge, TowersModel, kind_of
from rewards.types import JudgeCard, Sample

SHAPE = Shape(width=32, layers=1, text_width=32, text_layers=1, context=24, words=300)


def tiny_towers(folder: Path) -> Towers:
    torch.manual_seed(3)
    texts = [world.terse(world.draw(c, i)) for c in ("objects", "text", "edits") for i in range(40)]
    return new_towers(SHAPE, texts, folder)


def tiny_judge(towers: Towers, axis: str, **settings: float) -> TowersJudge:
    torch.manual_seed(5)
    kind = kind_of(axis)
    model = TowersModel(towers, kind.HEADS).eval().requires_grad_(False)
    card = JudgeCard(
        name=axis,
        revision="1",
        preprocessing="letterbox-64",
        categories=kind.CATEGORIES,
        needs=kind.NEEDS,
    )
    return kind(model, card, axis, settings)


def sample_of(category: str, seed: int, size: int = 64) -> Sample:
    spec = world.draw(category, seed)  # type: ignore[arg-type]
    edit = isinstance(spec, Edit)
    return Sample(
        image=render(spec.target if isinstance(spec, Edit) else spec, size),
        prompt=world.terse(spec),
        category=category,
        sources=(render(spec.source, size),) if isinstance(spec, Edit) else (),
        target=world.dump(spec) if edit else None,
    )
