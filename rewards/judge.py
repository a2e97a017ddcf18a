"""What a judge is, how a plain function becomes one, and how judges are run without ever raising.

A judge scores each sample by itself: the answer depends neither on the other samples nor on their
order.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rewards.errors import JudgeError, RewardConfigError
from rewards.types import JudgeCard, Sample, Score, failed, not_applicable


@runtime_checkable
class Judge(Protocol):
    """Scores samples one by one. `score` may raise; callers go through `run_judge`."""

    card: JudgeCard

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample, in order."""
        ...


# --- running --------------------------------------------------------------------------------------


def _ask(judge: Judge, samples: Sequence[Sample]) -> list[Score]:
    answers = list(judge.score(samples))
    if len(answers) != len(samples) or not all(isinstance(answer, Score) for answer in answers):
        raise JudgeError(
            f"judge {judge.card.name!r}: expected {len(samples)} scores, got {len(answers)} of "
            f"{sorted({type(a).__name__ for a in answers})}: return one Score per sample, in order"
        )
    return answers


def _one(judge: Judge, sample: Sample) -> Score:
    try:
        return _ask(judge, [sample])[0]
    except Exception as error:  # the boundary to a judge's code
        return failed(f"{type(error).__name__}: {error}")


def _many(judge: Judge, samples: Sequence[Sample], retries: int) -> list[Score]:
    for _ in range(1 + retries):
        try:
            return _ask(judge, samples)
        except Exception:  # the boundary to a judge's code; the sample at fault is found below
            continue
    return [_one(judge, sample) for sample in samples]


def run_judge(judge: Judge, samples: Sequence[Sample], retries: int = 1) -> list[Score]:
    """The judge's scores, one per sample. Never raises for what a judge does.

    A category that is not on the judge's card, or a missing source picture, is `na` and the judge
    is not asked. An exception, a wrong number of answers or a value that is not finite is tried
    `retries` times more, then sample by sample, so that only samples at fault are `failed`, each
    with a reason.
    """
    card = judge.card
    answers: list[Score | None] = []
    for sample in samples:
        if not card.covers(sample.category):
            answers.append(not_applicable(f"{card.name} does not judge {sample.category}"))
        elif "source" in card.needs and not sample.sources:
            answers.append(not_applicable(f"{card.name} needs a source picture"))
        elif "mask" in card.needs and sample.columns.get("mask") is None:
            answers.append(not_applicable(f"{card.name} needs a column `mask`"))
        else:
            answers.append(None)
    asked = [i for i, answer in enumerate(answers) if answer is None]
    for i, answer in zip(
        asked, _many(judge, [samples[i] for i in asked], retries) if asked else [], strict=True
    ):
        answers[i] = answer
    return [answer for answer in answers if answer is not None]


# --- a plain function as a judge ------------------------------------------------------------------


def _to_score(value: object) -> Score:
    if value is None:
        return not_applicable("the function returned None")
    if value is np.ma.masked:  # as a number it would be 0
        return failed("the function masked it")
    if hasattr(value, "item"):  # a zero-dimensional array or tensor
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, bool | Real) and math.isfinite(value):
        return Score(value=float(value))
    return failed(f"expected a finite number or None, got {value!r}")


class FunctionJudge:
    """A function `f(images, prompts, sources, **columns) -> list[float | None]` as a judge.

    `images` is uint8 (B, 3, H, W) RGB, `prompts` a list of B strings, `sources` a list of B tuples
    of uint8 (3, H, W) arrays. `category`, `target` and every free column of the prompt set come by
    name, a list of B values each (None where a sample has none); a function without `**` gets only
    those it names. None in the answer means that the function does not apply. The revision is a
    hash of the function's source.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        self.card = JudgeCard(
            name=name, revision=_source_hash(function), preprocessing="none", low=-1e9, high=1e9
        )
        given = inspect.signature(function).parameters.values()
        self._any = any(p.kind is p.VAR_KEYWORD for p in given)
        self._named = {p.name for p in given if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample; pictures of unequal size are passed in separate calls."""
        out: list[Score] = [failed("not asked")] * len(samples)
        shapes = [sample.image.shape for sample in samples]
        for shape in dict.fromkeys(shapes):
            index = [i for i, other in enumerate(shapes) if other == shape]
            for i, answer in zip(index, self._call([samples[i] for i in index]), strict=True):
                out[i] = answer
        return out

    def _call(self, samples: Sequence[Sample]) -> list[Score]:
        columns = {"category": [s.category for s in samples], "target": [s.target for s in samples]}
        for key in dict.fromkeys(key for s in samples for key in s.columns):
            columns[key] = [s.columns.get(key) for s in samples]  # type: ignore[misc]
        taken = {k: v for k, v in columns.items() if self._any or k in self._named}
        images = np.stack([s.image for s in samples])
        answer = self.function(
            images, [s.prompt for s in samples], [s.sources for s in samples], **taken
        )
        values = list(answer)
        if len(values) != len(samples):
            raise JudgeError(
                f"judge {self.card.name!r}: expected {len(samples)} values, got {len(values)}: "
                "return one number or None per picture, in order"
            )
        return [_to_score(value) for value in values]


def _source_hash(function: Callable[..., object]) -> str:
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        text = repr(getattr(function, "__qualname__", type(function).__name__))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# --- by name --------------------------------------------------------------------------------------


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _oracle(axis: str) -> Judge:
    from rewards.scenes.judge import OracleJudge
    from rewards.scenes.oracle import AXES

    if axis not in AXES:
        close = difflib.get_close_matches(axis, AXES, n=1)
        raise RewardConfigError(
            f"expected one of {', '.join(f'oracle/{a}' for a in AXES)}, got 'oracle/{axis}'"
            + (f": did you mean 'oracle/{close[0]}'?" if close else ": write one of these")
        )
    return OracleJudge(axis)


def _folder(folder: Path) -> Judge:
    from rewards.trained import open_judge

    return open_judge(folder)


def _shipped(spec: str) -> Judge:
    from rewards.trained import SHIPPED

    known = sorted(path.parent.name for path in SHIPPED.glob("*/card.json"))
    name = spec.removeprefix("scenes/")
    if name not in known:
        raise RewardConfigError(
            f"expected one of {', '.join(f'scenes/{k}' for k in known)}, got {spec!r}"
        )
    return _folder(SHIPPED / name)


def _served(spec: str) -> Judge:
    from rewards.client import RemoteJudge

    return RemoteJudge(spec)


def _hpsv2(spec: str) -> Judge:
    from rewards.backbones.hpsv2 import HpsJudge

    return HpsJudge(spec.removeprefix("hpsv2:"))


_FORMS: dict[str, Callable[[str], Judge]] = {
    "oracle/": lambda spec: _oracle(spec.removeprefix("oracle/")),
    "scenes/": _shipped,
    "http://": _served,
    "https://": _served,
    "hpsv2:": _hpsv2,
}


def load_judge(spec: str) -> Judge:
    """The judge of a name.

    oracle/<axis>            the oracle of the scenes world
    scenes/<judge>           one that ships, such as scenes/fidelity
    <folder>                 one that `rlhf reward train` wrote
    http://host:port/<name>  one that `rlhf reward serve` serves
    hpsv2:<checkpoint>       HPSv2 or 2.1
    module:name, file.py:name  a function f(images, prompts, sources, **columns), or a judge or its
                             class, which is made without arguments

    Raises:
        RewardConfigError: the name has another form, or what it names is missing or no judge.
    """
    for prefix, opened in _FORMS.items():
        if spec.startswith(prefix):
            return opened(spec)
    if (Path(spec) / "card.json").is_file():
        return _folder(Path(spec))
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise RewardConfigError(
            f"expected a judge such as 'oracle/fidelity', 'my_package.rewards:brightness' or "
            f"'rewards.py:brightness', got {spec!r}: write one of these forms"
        )
    try:
        found = getattr(_import(place), name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise RewardConfigError(
            f"expected {name!r} in {place!r}, got {type(error).__name__}: {error}. "
            "Write module:function for an importable module or path/file.py:function for a file"
        ) from error
    if inspect.isclass(found) and hasattr(found, "score"):
        found = found()
    if isinstance(found, Judge):
        return found
    if not callable(found) or inspect.isclass(found):
        raise RewardConfigError(
            f"expected {spec!r} to be f(images, prompts, sources, **columns) or an object with "
            f"`card` and `score`, got {type(found).__name__}: define one of them"
        )
    return FunctionJudge(found, name=spec)
