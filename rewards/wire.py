"""What `rewards.client` and `rewards.server` say to each other: JSON, pictures as PNG in base64.

A sample arrives as it was sent, to the byte: PNG is lossless, and columns are plain JSON or
refused. A score has one `value`; what it was made of is under `parts`. Nothing is ever unpickled.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from rewards import images
from rewards.errors import ImageError, JudgeError, RewardConfigError
from rewards.types import JudgeCard, Sample, Score

TOKEN = "RLHF_REWARD_TOKEN"  # environment variable with the token, on both sides
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class WireSample(BaseModel):
    """`rewards.types.Sample` as JSON; pictures are PNG in base64."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    prompt: str
    category: str
    sources: list[str] = Field(default_factory=list)
    target: str | None = None
    columns: dict[str, JsonValue] = Field(default_factory=dict)


class ScoreRequest(BaseModel):
    """Body of POST /v1/judges/{name}/score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: list[WireSample]


class WireScore(BaseModel):
    """`rewards.types.Score` as JSON. Parts that are not finite are written as strings."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    value: float | None
    state: Literal["ok", "na", "failed"]
    reason: str = ""
    parts: dict[str, float] = Field(default_factory=dict)
    flags: tuple[str, ...] = ()


class ScoreResponse(BaseModel):
    """Its answer: who judged, and one score per sample in their order."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    judge: JudgeCard
    scores: list[WireScore]


class JudgesResponse(BaseModel):
    """Answer of GET /v1/judges: the cards by the names under which they are served."""

    judges: dict[str, JudgeCard]


def check_token(token: str | None) -> str | None:
    """The token, None for an empty one. Raises RewardConfigError if a header cannot carry it."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise RewardConfigError(
            f"{TOKEN}: expected printable ASCII without spaces, got {len(token)} characters with "
            "others: openssl rand -hex 32 makes one"
        )
    return token or None


# --- pictures -------------------------------------------------------------------------------------


def to_png(chw: np.ndarray) -> str:
    """uint8 RGB (3, H, W) -> PNG in base64. Raises ImageError for another layout or dtype."""
    buffer = BytesIO()
    images.to_pil(chw).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(text: str, largest: int) -> np.ndarray:
    """PNG in base64 -> uint8 RGB (3, H, W), its checksums verified.

    Raises:
        ImageError: not base64, not a whole PNG, or a side longer than `largest` (seen before
            anything is decoded).
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"expected base64, got {error}: encode the PNG's bytes") from error
    if not data.startswith(_SIGNATURE) or len(data) < 24:
        raise ImageError(f"expected a PNG, got {len(data)} bytes of something else: send PNG")
    width, height = struct.unpack(">II", data[16:24])
    if not 0 < max(width, height) <= largest:
        raise ImageError(
            f"expected sides of 1 to {largest} px, got {width} x {height}: scale it down, or raise "
            "max_side of the server"
        )
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            image.verify()
    except Exception as error:  # the boundary to Pillow's decoder, which raises many types
        raise ImageError(f"expected a whole PNG, got one that is damaged ({error})") from error
    return images.from_pil(images.decode(data)[0])


# --- samples --------------------------------------------------------------------------------------


def _plain(value: object, where: str) -> None:
    """Raise JudgeError, or UnicodeEncodeError, unless `value` comes out of JSON as it went in."""
    if isinstance(value, dict) and all(type(key) is str for key in value):
        for key, item in value.items():
            _plain(item, f"{where}.{key}")
    elif type(value) is list:
        for i, item in enumerate(value):
            _plain(item, f"{where}[{i}]")
    elif type(value) is str:
        value.encode()
    elif type(value) not in (type(None), bool, int, float) or (
        type(value) is float and not math.isfinite(value)
    ):
        raise JudgeError(
            f"{where}: expected a JSON value (None, bool, int, finite float, str, list, or dict "
            f"with str keys), got {type(value).__name__} {str(value)[:40]!r}: convert "
            "the column, or load this judge in the process that uses it"
        )


def encode_sample(sample: Sample) -> WireSample:
    """A sample for the wire.

    Raises:
        JudgeError: a column or text that JSON cannot carry unchanged. ImageError: no uint8 RGB.
    """
    columns = dict(sample.columns)
    try:
        _plain(columns, "columns")
        for name in ("prompt", "category", "target"):
            (getattr(sample, name) or "").encode()
        return WireSample(
            image=to_png(sample.image),
            prompt=sample.prompt,
            category=sample.category,
            sources=[to_png(source) for source in sample.sources],
            target=sample.target,
            columns=columns,  # type: ignore[arg-type]
        )
    except UnicodeEncodeError as error:
        raise JudgeError(f"expected text that UTF-8 can carry, got {error}: mend it") from error


def decode_sample(item: WireSample, where: str, largest: int) -> Sample:
    """The sample that was sent. Raises ImageError, its message beginning with `where`."""
    pictures = []
    for name, text in [("image", item.image)] + [
        (f"sources[{i}]", text) for i, text in enumerate(item.sources)
    ]:
        try:
            pictures.append(from_png(text, largest))
        except ImageError as error:
            raise ImageError(f"{where}.{name}: {error}") from error
    return Sample(
        image=pictures[0],
        prompt=item.prompt,
        category=item.category,
        sources=tuple(pictures[1:]),
        target=item.target,
        columns=item.columns,
    )


def digest(card: JudgeCard, sample: Sample) -> str:
    """sha256 over who judges and every byte of the sample."""
    pictures = (sample.image, *sample.sources)
    text = json.dumps(
        [
            [card.name, card.revision, card.preprocessing],
            [sample.prompt, sample.category, sample.target, dict(sample.columns)],
            [picture.shape for picture in pictures],
        ],
        sort_keys=True,
    )
    sha = hashlib.sha256(text.encode())
    for picture in pictures:
        sha.update(np.ascontiguousarray(picture).tobytes())
    return sha.hexdigest()


# --- scores and cards -----------------------------------------------------------------------------


def _encode_score(score: Score) -> WireScore:
    try:
        return WireScore(
            value=None if score.value is None else float(score.value),
            state=score.state,
            reason=score.reason,
            parts={name: float(part) for name, part in score.parts.items()},
            flags=score.flags,
        )
    except (TypeError, ValueError) as error:  # a judge may put anything into its parts
        reason = f"expected parts that are numbers and flags that are text, got {error}"
        return WireScore(value=None, state="failed", reason=reason)


def encode_scores(card: JudgeCard, scores: Sequence[Score]) -> bytes:
    """The body of an answer."""
    items = [_encode_score(score) for score in scores]
    return ScoreResponse(judge=card, scores=items).model_dump_json().encode()


def decode_scores(body: bytes, count: int) -> tuple[JudgeCard, list[Score]]:
    """Who judged, and the scores. Raises JudgeError for anything but `count` whole scores."""
    try:
        answer = ScoreResponse.model_validate_json(body)
    except ValidationError as error:
        raise JudgeError(f"expected scores, got {complaint(error)}") from error
    if len(answer.scores) != count:
        raise JudgeError(f"expected {count} scores, got {len(answer.scores)}")
    return answer.judge, [Score(**dict(item)) for item in answer.scores]


def changes(before: JudgeCard, now: JudgeCard) -> str:
    """What differs between two cards, empty if nothing does."""
    names = [field.name for field in dataclasses.fields(JudgeCard)]
    return "; ".join(
        f"{name} was {getattr(before, name)!r} and is {getattr(now, name)!r}"
        for name in names
        if getattr(before, name) != getattr(now, name)
    )


def complaint(error: ValidationError) -> str:
    """The first thing that is wrong, with its place: 'samples[3].image: Field required'."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    return f"{place or 'body'}: {first['msg']}"
