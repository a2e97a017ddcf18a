"""Whether the people of a picture are still themselves after an edit: cosine of face embeddings.

Who is compared is decided from the prompt's columns and the source alone, so all pictures of a
group have the term or none has it: hiding a face does not escape it.

state    when
na       no face in the source (`src_no_face`), or column `face` says that the edit takes it away:
         remove, replace, anonymise, away (seen from behind)
ok, 0    the face should be there and is not (flag `lost_face`): measured, not a failure
failed   the detector or the embedder broke down, or gave a vector that is none
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from rewards.errors import JudgeError, RewardConfigError
from rewards.types import JudgeCard, Sample, Score, failed, not_applicable

COLUMN, KEEP = "face", "keep"
TAKEN_AWAY = ("remove", "replace", "anonymise", "away")
STRANGERS, SAME = 0.2, 0.7  # cosines of no likeness, and of all the likeness that is asked for
SIDE, SHARE, SURE = 64, 0.01, 0.6  # px, share of the picture, detector score: full weight from here


@dataclass(frozen=True, slots=True, kw_only=True)
class Face:
    """A face found: `box` is (x, y, width, height) in px, `score` the detector's in [0, 1].

    Raises:
        JudgeError: a box or score that is not finite.
    """

    box: tuple[float, float, float, float]
    score: float
    vector: Float[np.ndarray, " d"]  # any length, normalised where it is compared

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (*self.box, self.score))):
            raise JudgeError(f"expected a face at a place, got {self.box} of score {self.score}")


@runtime_checkable
class FaceEmbedder(Protocol):
    """Finds faces and describes each by a vector; the same person gives a high cosine."""

    name: str
    revision: str
    licence: str
    commercial: bool

    def faces(self, image: UInt8[np.ndarray, "3 h w"]) -> list[Face]:
        """All faces of an RGB picture. Raises JudgeError if it cannot tell."""
        ...


def ramp(cosine: float, low: float = STRANGERS, high: float = SAME) -> float:
    """clip((c - low) / (high - low), 0, 1): beyond `high` a likeness is a copy, and earns no more.

    The anchors are customary for ArcFace-like vectors; others need their own.
    """
    return min(1.0, max(0.0, (cosine - low) / (high - low)))


def cosines(a: Sequence[Face], b: Sequence[Face]) -> Float[np.ndarray, "m n"]:
    """Raises JudgeError for vectors that are zero, not finite or of unequal length."""
    vectors = [np.asarray(face.vector, dtype=np.float64) for face in (*a, *b)]
    norms = [float(np.linalg.norm(v)) for v in vectors]
    if len({v.shape for v in vectors}) > 1 or not all(0 < n < math.inf for n in norms):
        raise JudgeError(
            f"expected face vectors of one length, finite and not zero, got lengths"
            f" {sorted({v.size for v in vectors})} and norms {norms}"
        )
    units = np.stack([v / n for v, n in zip(vectors, norms, strict=True)])
    return units[: len(a)] @ units[len(a) :].T


def assign(gain: Float[np.ndarray, "m n"]) -> list[tuple[int, int]]:
    """min(m, n) pairs (row, column), each row and column once, of the largest total gain.

    The Hungarian method with potentials: exact, O(min^2 max).
    """
    if gain.shape[0] > gain.shape[1]:
        return sorted((row, column) for column, row in assign(gain.T))
    rows, columns = gain.shape
    row_price, column_price = np.zeros(rows + 1), np.zeros(columns + 1)
    taken_by = np.zeros(columns + 1, dtype=int)  # row of each column; 0 is none, all count from 1
    for row in range(1, rows + 1):
        taken_by[0], column = row, 0
        slack, came_from = np.full(columns + 1, np.inf), np.zeros(columns + 1, dtype=int)
        done = np.zeros(columns + 1, dtype=bool)
        while taken_by[column]:
            done[column], at = True, taken_by[column]
            cost = -gain[at - 1] - row_price[at] - column_price[1:]
            better = ~done[1:] & (cost < slack[1:])
            slack[1:][better], came_from[1:][better] = cost[better], column
            following = int(np.where(done, np.inf, slack).argmin())
            step = slack[following]
            row_price[taken_by[done]] += step
            column_price[done] -= step
            slack[~done] -= step
            column = following
        while column:  # turn the path over
            taken_by[column] = taken_by[came_from[column]]
            column = int(came_from[column])
    return sorted((int(taken_by[c]) - 1, c - 1) for c in range(1, columns + 1) if taken_by[c])


def confidence(face: Face, height: int, width: int) -> float:
    """In (0, 1]: below 1 for a face under 64 px, under 1% of the picture or of a low score."""
    side, area = min(face.box[2:]), face.box[2] * face.box[3]
    return max(1e-6, min(1.0, side / SIDE, area / (SHARE * height * width), face.score / SURE))


def identity(
    sources: Sequence[Face],
    found: Sequence[Face],
    size: tuple[int, int],
    low: float = STRANGERS,
    high: float = SAME,
) -> Score:
    """How far the source's people are still there: mean over *their* faces of ramp(cosine) with the
    face each is matched to, 0 for one that is gone, weighted by `confidence` in the source.

    Weights come from the source alone, so that a smaller face in the edit gains nothing. `size` is
    the source's (height, width). `parts["weight"]` is the mean weight: how much to trust the value.

    Raises:
        JudgeError: a vector that is none.
    """
    if not sources:
        return not_applicable("src_no_face")
    weights = [confidence(face, *size) for face in sources]
    values, likeness = [0.0] * len(sources), []
    if found:
        table = cosines(sources, found)
        for i, j in assign(table):
            values[i] = ramp(float(table[i, j]), low, high)
            likeness.append(float(table[i, j]))
    lost, extra = len(sources) - len(likeness), len(found) - len(likeness)
    flags = ("lost_face",) * (lost > 0) + ("extra_face",) * (extra > 0)
    flags += ("low_confidence",) * (min(weights) < 1.0)
    parts = {"faces": float(len(sources)), "lost": float(lost), "extra": float(extra)}
    parts["weight"] = sum(weights) / len(weights)
    if likeness:
        parts["cosine"] = sum(likeness) / len(likeness)
    total = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return Score(value=total, parts=parts, flags=flags)


class FaceJudge:
    """`identity` of the first source picture's faces in the edited picture, in [0, 1].

    Raises:
        RewardConfigError: anchors that do not rise.
    """

    def __init__(
        self,
        embedder: FaceEmbedder,
        *,
        name: str = "faces/identity",
        categories: tuple[str, ...] = ("*",),
        low: float = STRANGERS,
        high: float = SAME,
    ) -> None:
        if not -1.0 <= low < high <= 1.0:
            raise RewardConfigError(f"expected -1 <= low < high <= 1, got {low} and {high}")
        self._embedder, self._low, self._high = embedder, low, high
        self.card = JudgeCard(
            name=name,
            revision=f"{embedder.name}@{embedder.revision}",
            preprocessing=f"native-{low:g}-{high:g}",
            categories=categories,
            needs=("source", "face"),
            licence=embedder.licence,
            commercial=embedder.commercial,
        )

    def _one(self, sample: Sample, sources: list[Face]) -> Score:
        if not sources:  # the edited picture is not even looked at
            return not_applicable("src_no_face")
        found = self._embedder.faces(sample.image)
        height, width = sample.sources[0].shape[1:]
        return identity(sources, found, (height, width), self._low, self._high)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score per sample; a source that several samples share is looked at once."""
        out: list[Score] = []
        known: dict[tuple[tuple[int, ...], bytes], list[Face]] = {}
        for sample in samples:
            wish = sample.columns.get(COLUMN) or KEEP
            if wish != KEEP:
                taken = wish in TAKEN_AWAY
                out.append(
                    not_applicable(f"the edit says {wish} to the face")
                    if taken
                    else failed(f"column {COLUMN!r}: expected {KEEP} or {TAKEN_AWAY}, got {wish!r}")
                )
                continue
            if not sample.sources:
                out.append(not_applicable(f"{self.card.name} needs a source picture"))
                continue
            key = sample.sources[0].shape, sample.sources[0].tobytes()
            try:
                if key not in known:
                    known[key] = self._embedder.faces(sample.sources[0])
                out.append(self._one(sample, known[key]))
            except Exception as error:  # the boundary to a detector, which raises its own types
                out.append(failed(f"{type(error).__name__}: {error}"))
        return out
