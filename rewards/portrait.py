"""Portraits: proportions, skin and hair, the features of a face.

Whether it applies is decided by the prompt's category, hence for a whole group at once: a sample
that hides or loses its face is judged as the bad portrait it is, and does not escape.
"""

from __future__ import annotations

from rewards.trained import TowersJudge
from rewards.training.heads import HeadConfig


class Portrait(TowersJudge):
    """Pictures whose prompt asks for a person."""

    AXIS = "portrait"
    HEADS = {"portrait": HeadConfig(text=False)}
    CATEGORIES = ("portrait", "portraits")
