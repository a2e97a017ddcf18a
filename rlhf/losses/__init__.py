"""The alignment losses, by the name a config uses. One file per algorithm."""

from collections.abc import Mapping

from rlhf.losses.base import (
    Form,
    Loss,
    LossTerms,
    keep_live,
    summarise,
    transition_log_prob,
    velocity_kl,
)
from rlhf.losses.grpo import grpo
from rlhf.losses.nft import nft, noised

LOSSES: Mapping[str, Loss] = {
    "grpo": Loss(
        name="grpo", requires=("trajectory",), kernels=("flow-sde",), function=grpo, form="plain"
    ),
    "grpo-recentred": Loss(
        name="grpo-recentred",
        requires=("trajectory", "shift"),
        kernels=("flow-sde",),
        function=grpo,
        form="recentred",
    ),
    "nft": Loss(name="nft", requires=("x0",), kernels=("ode", "flow-sde"), function=nft),
}

__all__ = [
    "LOSSES",
    "Form",
    "Loss",
    "LossTerms",
    "grpo",
    "keep_live",
    "nft",
    "noised",
    "summarise",
    "transition_log_prob",
    "velocity_kl",
]
