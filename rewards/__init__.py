"""Judges of pictures, and a world in which the right judgement is known."""

from rewards.compat import ensure_torchvision

ensure_torchvision()
