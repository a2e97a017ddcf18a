"""Instruction following: whether an edit did what it was told. Sees source, instruction, output."""

from __future__ import annotations

from rewards.trained import TowersJudge
from rewards.training.heads import HeadConfig


class Instruction(TowersJudge):
    """Edits."""

    AXIS = "instruction"
    HEADS = {"instruction": HeadConfig(text=True, source=True)}
    CATEGORIES = ("edit", "edits")
    NEEDS = ("source",)
