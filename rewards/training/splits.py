"""Which split a judgement belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

SHARES: Mapping[str, float] = MappingProxyType({"train": 0.8, "dev": 0.1, "test": 0.1})


def split_of(group: str, shares: Mapping[str, float] = SHARES, seed: int = 0) -> str:
    """The split of a prompt, by a hash of its group: the same for ever, whatever else is there.

    Groups that differ only in case or in spaces go together. `shares` need not add up to 1.
    """
    text = f"{seed}:{' '.join(group.lower().split())}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * sum(shares.values())
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return next(reversed(list(shares)))
