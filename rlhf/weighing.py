"""Weights of judges as programs state them: in the configuration or in a file, and checked against
the judges and the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rlhf.config import read_yaml
from rlhf.errors import ConfigError
from rlhf.typed import convert

T = TypeVar("T")


def read_weights(config: T) -> T:
    """A configuration with the weights of its file in their place. Raises ConfigError."""
    path = config.weights_from  # type: ignore[attr-defined]
    if path is None:
        return config
    table = convert(
        dict[str, dict[str, float]], read_yaml(Path(path)), "weights_from", type(config)
    )
    return replace(config, weights=table, weights_from=None)  # type: ignore[type-var]


def or_equal(
    weights: Mapping[str, Mapping[str, float]], names: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """`weights`, or where none are stated equal ones of the judges of these names."""
    return weights or {"*": {name: 1.0 for name in names}}


def check_judges(
    required: Sequence[str],
    weights: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    categories: set[str],
) -> None:
    """Raise ConfigError where weights, required judges and prompts do not fit the judges."""
    named = {*required, *(name for row in weights.values() for name in row)}
    if unknown := sorted(named - set(names)):
        raise ConfigError(
            f"weights and required: expected judges among {list(names)}, got {unknown}"
        )
    missing = sorted(categories - set(weights))
    if missing and "*" not in weights:
        raise ConfigError(f"weights: expected weights for {missing}, which prompts have: add '*'")
    for category, row in weights.items():
        if not sum(row.values()) > 0 or min(row.values()) < 0:
            raise ConfigError(
                f"weights.{category}: expected weights >= 0 with a positive sum, got {dict(row)}"
            )
