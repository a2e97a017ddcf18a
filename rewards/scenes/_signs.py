"""Reads pictures of `Sign`: four letters in one ink.

x is the picture, b the background colour (mean over the upper and lower band), u the direction of
the mean of x - b over the band of letters, t a glyph in
its place or a pixel off.

reading      what is measured                                    soft
letters      Pearson r of (x - b).u with t, mean over places     clip(2 r - 1) clip(contrast / 40)
ink          RGB distance d of the strokes' middles to declared  1 / (1 + (d / 60)^2)
background   RGB distance d of b to the declared                 1 / (1 + (d / 45)^2)
empty        rms e of |mean of a 4 x 4 block - b| in the bands   1 / (1 + (e / 20)^2)

soft = 0.15 background + 0.20 ink + 0.55 letters + 0.10 empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from rewards.scenes._pixels import (
    SIZE,
    Pixels,
    block_means,
    closeness,
    distances,
    region_means,
    shrink,
    table,
)
from rewards.scenes.render import GLYPHS, glyph_mask
from rewards.scenes.specs import BACKGROUNDS, COLOURS, Sign

LETTERS = tuple(GLYPHS)
MIN_CORRELATION = 0.65  # strict: how well the best glyph must fit
MAX_COLOUR, MAX_BACKGROUND, MAX_CLUTTER = 75.0, 45.0, 18.0  # strict
_BACKGROUNDS, _COLOURS = list(BACKGROUNDS), list(COLOURS)
_PALETTE = np.concatenate([table(COLOURS), table(BACKGROUNDS)])


@lru_cache(maxsize=1)
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    """Masks and middles of strokes, (12 letters x 9 places, 512): up to a pixel off its place."""
    masks, strokes = [], []
    for letter in LETTERS:
        wide = np.pad(glyph_mask(letter, SIZE), 1)
        for dy, dx in product(range(3), range(3)):
            mask = wide[dy : dy + 32, dx : dx + 16]
            masks.append(mask.ravel())
            strokes.append(shrink(mask >= 0.99).ravel())
    return np.stack(masks), np.stack(strokes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Letters:
    """What is read in B pictures: 4 places, 12 letters."""

    background: np.ndarray  # (B, 4) distances
    letter: np.ndarray  # (B, 4, 12) correlations
    ink: np.ndarray  # (B, 4, 12, 3) colour of each glyph's strokes, 0..255
    base: np.ndarray  # (B, 3) background colour
    clutter: np.ndarray  # (B,)


def read(pixels: Pixels) -> Letters:
    """All that `score` needs to know of B pictures."""
    batch, quarter = len(pixels), SIZE // 4
    band = np.zeros((1, SIZE, SIZE), bool)
    band[:, : quarter - 1] = band[:, -quarter + 1 :] = True
    b = region_means(pixels, band)[:, 0]
    rest = pixels - b[:, :, None, None]
    middle = rest[:, :, quarter:-quarter].reshape(batch, 3, 32, 4, 16).transpose(0, 3, 1, 2, 4)
    flat = np.ascontiguousarray(middle).reshape(batch, 4, 3, 512)

    masks, strokes = _glyphs()
    mean = flat.mean((1, 3))
    u = mean / np.maximum(np.sqrt(np.square(mean).sum(-1, keepdims=True)), 1e-3)
    along_u = np.matmul(u[:, None, None, :], flat)[:, :, 0]
    along_u = along_u - along_u.mean(-1, keepdims=True)
    unit = masks - masks.mean(1, keepdims=True)
    unit = unit / np.sqrt(np.square(unit).sum(1, keepdims=True))
    norm = np.sqrt(np.square(along_u).sum(-1, keepdims=True))
    fit = np.matmul(along_u, unit.T.astype(np.float32)) / np.maximum(norm, 1.0)
    place = fit.reshape(batch, 4, 12, 9).argmax(-1) + 9 * np.arange(12)  # the best of nine
    weights = strokes / strokes.sum(1, keepdims=True)
    ink = np.matmul(flat, weights.T.astype(np.float32)).transpose(0, 1, 3, 2)
    edges = block_means(np.concatenate([rest[:, :, :quarter], rest[:, :, -quarter:]], 2))
    return Letters(
        background=distances(b, table(BACKGROUNDS)),
        letter=np.take_along_axis(fit, place, -1),
        ink=np.take_along_axis(ink, place[..., None], 2),
        base=b,
        clutter=np.sqrt(np.square(edges).sum(1).mean((-2, -1))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One picture against one sign. Soft numbers in [0, 1], and whether each is strict."""

    soft: float
    background: float
    ink: float
    letters: float
    empty: float
    background_ok: bool
    ink_ok: bool
    letters_ok: bool
    empty_ok: bool

    @property
    def strict(self) -> bool:
        return self.background_ok and self.ink_ok and self.letters_ok and self.empty_ok


def fits(letters: Letters, i: int, spec: Sign) -> tuple[np.ndarray, np.ndarray]:
    """(4,) correlations of picture `i` with the letters of a sign, and which are read right."""
    word = [LETTERS.index(letter) for letter in spec.word]
    fit = letters.letter[i][np.arange(4), word]
    best = letters.letter[i].argmax(-1)
    return fit, (best == np.array(word)) & (fit >= MIN_CORRELATION)


def score(letters: Letters, i: int, spec: Sign) -> Found:
    """Picture `i` of `letters` against a sign."""
    word = [LETTERS.index(letter) for letter in spec.word]
    fit, right = fits(letters, i, spec)
    stroke = letters.ink[i][np.arange(4), word].mean(0)
    contrast = float(np.sqrt(np.square(stroke).sum()))
    ink = distances(stroke + letters.base[i], _PALETTE)
    colour, declared = _COLOURS.index(spec.colour), _BACKGROUNDS.index(spec.background)
    distance = letters.background[i]
    soft = {
        "background": float(closeness(distance[declared], 45.0)),
        "ink": float(closeness(ink[colour], 60.0)),
        "letters": float(np.clip(2 * fit - 1, 0, 1).mean() * np.clip(contrast / 40, 0, 1)),
        "empty": float(closeness(letters.clutter[i], 20.0)),
    }
    weights = {"background": 0.15, "ink": 0.20, "letters": 0.55, "empty": 0.10}
    return Found(
        soft=sum(weights[name] * value for name, value in soft.items()),
        **soft,
        background_ok=bool(distance.argmin() == declared and distance[declared] <= MAX_BACKGROUND),
        ink_ok=bool(ink.argmin() == colour and ink[colour] <= MAX_COLOUR),
        letters_ok=bool(right.all()),
        empty_ok=bool(letters.clutter[i] <= MAX_CLUTTER),
    )
