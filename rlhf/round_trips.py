"""What is left of pictures after a round trip through an autoencoder, figure by figure.

Pure functions and one tally; `pipelines.codecs` says which pictures and which autoencoders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from rewards.scenes import oracle
from rewards.scenes.specs import Sign, Spec
from rlhf.models.measures import frechet
from rlhf.stats import bootstrap_mean

Metrics = dict[str, dict[str, float | int]]


@dataclass(slots=True)
class Tally:
    """Of one autoencoder on one set: figures by picture, rows of features, pictures to show."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    features: list[Tensor] = field(default_factory=list)
    shown: list[np.ndarray] = field(default_factory=list)

    def add(self, name: str, values: Iterable[float | np.bool] | Tensor) -> None:
        """More values of a figure, one per picture."""
        self.values[name] += map(float, values)

    def see(
        self, pictures: UInt8[np.ndarray, "b 3 h w"], features: Float[Tensor, "b d"], most: int
    ) -> None:
        """Keep the features of a batch, and its pictures until there are `most`."""
        self.features.append(features)
        self.shown += list(pictures[: max(0, most - len(self.shown))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the oracle says of pictures: each right or not, and the letters of signs by index."""

    strict: Bool[np.ndarray, " b"]
    letters: dict[int, np.ndarray]  # (4,) bool


def read(specs: Sequence[Spec], pictures: UInt8[np.ndarray, "b 3 h w"]) -> Reading:
    """Read pictures against their specs. Raises ImageError below 64 px."""
    strict = np.array([found.strict for found in oracle.fidelity_batch(pictures, specs)])
    signs = {i: spec for i, spec in enumerate(specs) if isinstance(spec, Sign)}
    if not signs:
        return Reading(strict=strict, letters={})
    letters = oracle.spelling(pictures[list(signs)], list(signs.values()))
    return Reading(strict=strict, letters=dict(zip(signs, letters, strict=True)))


def keep_reading(tally: Tally, kinds: Sequence[str], first: Reading, then: Reading) -> None:
    """Of what was right in the originals (`first`), whether it still is: `<kind>/strict_ratio`, and
    of signs `text/word_ratio` and `text/letter_ratio`.
    """
    for kind, before, after in zip(kinds, first.strict, then.strict, strict=True):
        if before:
            tally.add(f"{kind}/strict_ratio", [after])
    for index, before in first.letters.items():
        after = then.letters[index]
        if before.all():
            tally.add("text/word_ratio", [after.all()])
        if before.any():
            tally.add("text/letter_ratio", [after[before].mean()])


def figures(tally: Tally, originals: Tally) -> Metrics:
    """Of one autoencoder on one set: first those of any pictures, then what the oracle read."""
    out = {key: bootstrap_mean(values).as_metric() for key, values in tally.values.items()}
    seen, again = torch.cat(originals.features), torch.cat(tally.features)
    out["frechet"] = {"value": frechet(seen, again), "n": len(seen)}
    return {key: out[key] for key in sorted(out, key=lambda k: ("/" in k, k))}
