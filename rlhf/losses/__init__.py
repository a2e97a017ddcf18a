"""The alignment losses. One file per algorithm; `table` names them and what goes together."""

from rlhf.losses.awm import awm
from rlhf.losses.base import (
    Form,
    Loss,
    LossTerms,
    Noised,
    Transitions,
    form_of,
    keep_live,
    summarise,
    transition_log_prob,
)
from rlhf.losses.dppo import dppo
from rlhf.losses.grpo import grpo
from rlhf.losses.guard import guard
from rlhf.losses.kl import added, penalty, transition_weight, velocity_kl
from rlhf.losses.nft import nft, noised
from rlhf.losses.table import LOSSES, Choice, LossConfig, check_choice, kernels_of

__all__ = [
    "LOSSES",
    "Choice",
    "Form",
    "Loss",
    "LossConfig",
    "LossTerms",
    "Noised",
    "Transitions",
    "added",
    "awm",
    "check_choice",
    "dppo",
    "form_of",
    "grpo",
    "guard",
    "keep_live",
    "kernels_of",
    "nft",
    "noised",
    "penalty",
    "summarise",
    "transition_log_prob",
    "transition_weight",
    "velocity_kl",
]
