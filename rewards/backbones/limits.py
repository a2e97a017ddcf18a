"""What a model does not see of a sample, said in words that a reader can count."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rewards.types import JudgeCard, Score

TRUNCATED = "truncated"  # the prompt was longer than the model reads
DOWNSCALED = "downscaled"  # a picture was larger than the model sees


def limit_flags(card: JudgeCard, *, tokens: int, side: int) -> tuple[str, ...]:
    """Flags for a prompt of `tokens` tokens beside pictures of at most `side` px."""
    cut = card.text_tokens is not None and tokens > card.text_tokens
    shrunk = card.pixels is not None and side > card.pixels
    return (TRUNCATED,) * cut + (DOWNSCALED,) * shrunk


def count_flags(scores: Iterable[Score]) -> Counter[str]:
    """How many scores carry each flag."""
    return Counter(flag for score in scores for flag in score.flags)


def digest_of(path: str | os.PathLike[str]) -> str:
    """The first twelve hex digits of a file's SHA-256, as a revision."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
