"""Aesthetics: composition, light, texture, coherence. Looks at the picture alone, so no prompt can
talk it round.
"""

from __future__ import annotations

from rewards.trained import TowersJudge
from rewards.training.heads import HeadConfig


class Aesthetics(TowersJudge):
    """Any picture."""

    AXIS = "aesthetics"
    HEADS = {"aesthetics": HeadConfig(text=False)}
