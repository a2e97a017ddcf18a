"""Prompt fidelity: what the prompt asks for is there, as often, as it says, and where it says.

Says nothing of beauty. Annotators and vision-language judges go by the order of arXiv:2606.27608
(presence and count, then attributes, then places, then actions), and what fails higher up caps the
score (`rewards.rubric`); the towers answer with one head that learnt from such scores.
"""

from __future__ import annotations

from rewards.trained import TowersJudge
from rewards.training.heads import HeadConfig


class Fidelity(TowersJudge):
    """Pictures made from a prompt; edits are `instruction` and `consistency`."""

    AXIS = "fidelity"
    HEADS = {"fidelity": HeadConfig(text=True)}
    CATEGORIES = ("general", "objects", "portrait", "portraits", "text")
