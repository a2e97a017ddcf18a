"""The alignment library: policies, losses, the learner, the cluster, runs and checkpoints."""

from rewards.compat import ensure_torchvision

ensure_torchvision()
