"""Golden scores: what a judge said of a few small pictures when it was written, asked again
whenever it is opened. A library that computes otherwise, weights in another layout or under another
base model give scores that look like scores; here they are found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rewards.errors import JudgeError, RewardConfigError
from rewards.judge import Judge
from rewards.types import JudgeCard, Sample, Score

TOLERANCE = 5e-3  # of a score in [0, 1]; processors differ by 1e-5, a careless port by 2e-2
LIBRARIES = ("torch", "open_clip_torch", "transformers")
Picture = UInt8[np.ndarray, "3 _ _"]


def _disc(colour: tuple[int, int, int]) -> Picture:
    """A disc on white, 64 x 64."""
    y, x = np.mgrid[:64, :64]
    inside = (x - 30) ** 2 + (y - 34) ** 2 < 17**2
    return np.where(inside, np.array(colour)[:, None, None], 255).astype(np.uint8)


def _stripes(step: int) -> Picture:
    """Slanting stripes of every colour, 48 x 80."""
    c, y, x = np.mgrid[:3, :48, :80]
    return ((x * step + y * 5 + c * 85) % 256).astype(np.uint8)


def samples(card: JudgeCard) -> dict[str, Sample]:
    """The pictures by name; each has a source, for judges of edits. Integer arithmetic: the same
    bytes everywhere.
    """
    shown = {
        "disc": ("make the circle red", _disc((200, 30, 40)), _disc((40, 60, 200))),
        "stripes": ("many thin colourful stripes", _stripes(9), _stripes(4)),
        "nothing": ("a large blue circle on white", _disc((40, 60, 200)), _disc((40, 60, 200))),
    }
    category = "general" if card.covers("general") else card.categories[0]
    return {
        name: Sample(image=image, prompt=prompt, category=category, sources=(source,))
        for name, (prompt, image, source) in shown.items()
    }


def _said(judge: Judge) -> dict[str, Score]:
    asked = samples(judge.card)
    return dict(zip(asked, judge.score(list(asked.values())), strict=True))


def versions() -> dict[str, str]:
    """Of the libraries that judges compute with."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def measure(judge: Judge) -> dict[str, Any]:
    """What a judge says of the golden pictures, as JSON.

    Raises:
        JudgeError: it does not answer one of them with a number.
    """
    said = _said(judge)
    silent = [f"{name}: {score.reason}" for name, score in said.items() if score.state != "ok"]
    if silent:
        raise JudgeError(
            f"judge {judge.card.name!r}: expected scores of the golden pictures, got"
            f" {'; '.join(silent)}: it is not fit to be used"
        )
    scores = {name: {"value": s.value, "parts": dict(s.parts)} for name, s in said.items()}
    return {"tolerance": TOLERANCE, "scores": scores, "versions": versions()}


def check(judge: Judge, golden: Mapping[str, Any] | None) -> None:
    """Raise RewardConfigError where a judge says something else than was measured, by more than the
    tolerance (times the size of what is larger than 1). Without golden scores there is nothing to
    say.
    """
    if golden is None:
        return
    said, moved = _said(judge), []
    for name, wanted in golden["scores"].items():
        score = said.get(name)
        found = {} if score is None else {"value": score.value, **score.parts}
        for part, before in {"value": wanted["value"], **wanted["parts"]}.items():
            now = found.get(part)
            if now is None or not abs(now - before) <= golden["tolerance"] * max(1, abs(before)):
                moved.append(f"{name}/{part} was {before:.5g} and is {now}")
    if moved:
        raise RewardConfigError(
            f"judge {judge.card.name!r}: expected its golden scores within {golden['tolerance']},"
            f" got {len(moved)} others: {'; '.join(moved[:3])}. It was written with"
            f" {golden['versions']}, here is {versions()}: install those, or train it again"
        )
