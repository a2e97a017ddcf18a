"""Random numbers by name. Every draw is keyed by integers and touches no global generator.

The key of a draw says what it is for, (sample seed, step index), so a picture does not depend on
who its batch mates are or on how many workers there are. Noise is drawn on the CPU in float32,
whatever the model runs on.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

_INITIAL, _STEP, _OTHER = 0, 1, 2  # what a draw is for: equal keys of different kinds never collide


def initial_noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """x at sigma = 1 of the sample with this seed: standard normal, CPU, fp32."""
    return _normal((_INITIAL, seed), shape)


def step_noise(seed: int, index: int, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """z of step `index` of the sample with this seed: standard normal, CPU, fp32."""
    return _normal((_STEP, seed, index), shape)


def generator(*keys: int) -> torch.Generator:
    """A fresh CPU generator for any other draw (a window, a sigma), keyed by integers in 0..2^64-1.

    torch's CPU engine keeps 32 bits of its seed, so two keys agree by chance once in 4e9: harmless
    for small draws. Raises ValueError without keys or outside that range.
    """
    if not keys:
        raise ValueError(
            "expected at least one integer key, got none: pass e.g. (seed, iteration, group)"
        )
    seed = int(_sequence((_OTHER, *keys)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def _normal(keys: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    rng = np.random.Generator(
        np.random.PCG64(_sequence(keys))
    )  # keeps the whole 128 bits of the key
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _sequence(keys: tuple[int, ...]) -> np.random.SeedSequence:
    """Each key as two 32-bit words, behind their number.

    SeedSequence pads with zeros: without the number (5) and (5, 0) would be one stream.
    """
    words = [len(keys)]
    for key in keys:
        if not 0 <= key < 2**64:
            raise ValueError(
                f"expected integer keys in 0..2^64-1, got {key}: use non-negative seeds"
            )
        words += [key & 0xFFFFFFFF, key >> 32]
    return np.random.SeedSequence(words)
