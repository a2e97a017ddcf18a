"""Reads pictures of `Objects`: what stands in each of the four cells, and on what background.

Per cell: x is the picture, b the background colour (mean over what no shape ever covers), u the
direction of the cell's mean of x - b, t a template (5 shapes in 3 radii).

reading      what is measured                                    soft
shape        Pearson r of (x - b).u with t, best radius          clip(2 r - 1) clip(contrast / 40)
colour       RGB distance d of the shape's core to the declared  1 / (1 + (d / 60)^2)
empty        rms e of |mean of a 4 x 4 block - b|                1 / (1 + (e / 20)^2)
background   RGB distance d of b to the declared                 1 / (1 + (d / 45)^2)

soft = 0.15 background + 0.60 mean over things of (shape + colour) / 2 + 0.25 worst empty cell, the
weights renormalised if no cell is to be empty. Of the placements that the caption allows, the one
whose cells fit best in sum counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from rewards.scenes._pixels import (
    Pixels,
    block_means,
    closeness,
    distances,
    region_means,
    shrink,
    table,
)
from rewards.scenes.render import shape_mask
from rewards.scenes.specs import BACKGROUNDS, COLOURS, SHAPES, Objects

RADII = (0.76, 0.80, 0.84)
MIN_CORRELATION = 0.72  # strict: how well the template must fit; two pixels off its place passes
MIN_MARGIN = 0.02  # strict: by how much it must fit better than any other shape's
MAX_COLOUR, MAX_BACKGROUND = 60.0, 45.0  # strict: RGB distances
MAX_CLUTTER = 18.0  # strict: rms of block means in a cell that is to be empty
MAX_RESIDUAL = 0.35  # strict: rms of block means left unexplained, as a share of the contrast
_BACKGROUNDS, _COLOURS = list(BACKGROUNDS), list(COLOURS)
_PALETTE = np.concatenate([table(COLOURS), table(BACKGROUNDS)])


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks (15, 32, 32), cores of the shapes (5, 32, 32), outside of all (32, 32)."""
    masks = np.stack([[shape_mask(shape, r, 32) for r in RADII] for shape in SHAPES])
    cores = np.stack([shrink((each >= 0.99).all(0)) for each in masks])
    outside = shrink(masks.max((0, 1)) < 0.01)
    return masks.reshape(-1, 32, 32), cores, outside


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What is read in B pictures.

    Last axes: 4 cells, 5 shapes, 10 colours (the things' six, then the backgrounds' four).
    """

    background: np.ndarray  # (B, 4) distances to the declared backgrounds
    shape: np.ndarray  # (B, 4, 5) best correlation over radii
    contrast: np.ndarray  # (B, 4, 5) |core colour - b|
    colour: np.ndarray  # (B, 4, 5, 10) distances
    clutter: np.ndarray  # (B, 4)
    residual: np.ndarray  # (B, 4, 5) share of the contrast left unexplained

    @property
    def shape_soft(self) -> np.ndarray:
        return np.clip(2 * self.shape - 1, 0, 1) * np.clip(self.contrast / 40, 0, 1)


def _split(pixels: Pixels) -> np.ndarray:
    """(B, 4 cells, 3, 32, 32)."""
    batch = len(pixels)
    grid = pixels.reshape(batch, 3, 2, 32, 2, 32).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(grid).reshape(batch, 4, 3, 32, 32)


def read(pixels: Pixels) -> Cells:
    """All that `score` needs to know of B pictures."""
    masks, cores, outside = _templates()
    whole = np.tile(outside, (2, 2))[None]
    b = region_means(pixels, whole)[:, 0]
    cells = _split(pixels) - b[:, None, :, None, None]
    flat = cells.reshape(len(pixels), 4, 3, 1024)

    mean = flat.mean(-1)
    u = mean / np.maximum(np.sqrt(np.square(mean).sum(-1, keepdims=True)), 1e-3)
    along_u = np.matmul(u[:, :, None, :], flat)[:, :, 0]
    along_u = along_u - along_u.mean(-1, keepdims=True)
    unit = masks.reshape(15, -1) - masks.reshape(15, -1).mean(1, keepdims=True)
    unit = (unit / np.sqrt(np.square(unit).sum(1, keepdims=True))).astype(np.float32)
    norm = np.sqrt(np.square(along_u).sum(-1, keepdims=True))
    fit = (np.matmul(along_u, unit.T) / np.maximum(norm, 1.0)).reshape(len(pixels), 4, 5, 3)

    weights = cores.reshape(5, -1) / cores.reshape(5, -1).sum(1, keepdims=True)
    core = np.matmul(flat, weights.T.astype(np.float32)).transpose(0, 1, 3, 2)  # (B, 4, 5, 3)
    blocks = block_means(cells).reshape(len(pixels), 4, 3, -1)
    contrast = np.sqrt(np.square(core).sum(-1))
    return Cells(
        background=distances(b, _PALETTE[6:]),
        shape=fit.max(-1),
        contrast=contrast,
        colour=distances(core + b[:, None, None, :], _PALETTE),
        clutter=np.sqrt(np.square(blocks).sum(2).mean(-1)),
        residual=_residual(blocks, core, fit.argmax(-1)) / np.maximum(contrast, 1.0),
    )


def _residual(blocks: np.ndarray, core: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """rms (B, 4, 5) of block means that the best template in its core colour does not explain.

    With |blocks - core x template|^2 expanded, so no picture is drawn.
    """
    small = block_means(_templates()[0]).reshape(15, -1)
    index = np.arange(5) * 3 + radius  # (B, 4, 5) of the chosen template
    energy = np.square(blocks).sum((2, 3))[..., None]
    cross = np.matmul(blocks, small.T).transpose(0, 1, 3, 2)  # (B, 4, 15, 3)
    cross = (np.take_along_axis(cross, index[..., None], 2) * core).sum(-1)
    own = np.square(small).sum(1)[index] * np.square(core).sum(-1)
    return np.sqrt(np.maximum(energy - 2 * cross + own, 0) / blocks.shape[-1])


@lru_cache(maxsize=64)
def placements(things: int, relation: str | None) -> np.ndarray:
    """All cells (N, things) that a caption allows: in the order of the relation, else any."""
    rows = list(permutations(range(4), things))
    if relation is not None:
        axis, sign = {"left of": (1, 1), "right of": (1, -1), "above": (0, 1), "below": (0, -1)}[
            relation
        ]
        rows = [r for r in rows if sign * (divmod(r[1], 2)[axis] - divmod(r[0], 2)[axis]) > 0]
    return np.array(rows, int).reshape(-1, things)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One picture against one spec at one placement: soft in [0, 1], and what is strict."""

    soft: float
    background: float
    shape: float
    colour: float
    empty: float
    thing_soft: tuple[float, ...]  # mean of shape and colour of each thing
    cell_empty: tuple[float, ...]  # of each of the four cells
    background_ok: bool
    things_ok: tuple[bool, ...]
    colours_ok: tuple[bool, ...]
    cells_empty_ok: tuple[bool, ...]
    cells: tuple[int, ...]

    @property
    def strict(self) -> bool:
        free = [ok for cell, ok in enumerate(self.cells_empty_ok) if cell not in self.cells]
        return self.background_ok and all(self.things_ok) and all(free)


def score(cells: Cells, i: int, spec: Objects, *, exact: bool = False) -> Found:
    """Picture `i` against a spec: at its own cells (`exact`) or the best the caption allows."""
    shapes = [SHAPES.index(thing.shape) for thing in spec.things]
    colours = [_COLOURS.index(thing.colour) for thing in spec.things]
    declared = _BACKGROUNDS.index(spec.background)
    shape_fit = cells.shape_soft[i][:, shapes]  # (4, T)
    colour_fit = closeness(cells.colour[i][:, shapes, colours], 60.0)
    empty_fit = closeness(cells.clutter[i], 20.0)
    thing_fit = (shape_fit + colour_fit) / 2

    count = len(spec.things)
    options = placements(count, spec.relation)
    if exact:
        options = np.array([[thing.cell for thing in spec.things]], int).reshape(1, count)
    order = np.arange(count)
    gain = (thing_fit - empty_fit[:, None])[options, order].sum(-1)
    best = options[int(gain.argmax())]
    free = np.setdiff1d(np.arange(4), best)

    background = float(closeness(cells.background[i, declared], 45.0))
    parts = [(0.15, background)]
    if count:
        parts.append((0.60, float(thing_fit[best, order].mean())))
    if len(free):
        parts.append((0.25, float(empty_fit[free].min())))
    weight = sum(w for w, _ in parts)
    colour_ok = _colours_ok(cells, i, best, shapes, colours)
    fits = cells.shape[i][best, shapes]
    others = cells.shape[i][best].copy()
    others[order, shapes] = -1
    shape_ok = (fits >= MIN_CORRELATION) & (fits >= others.max(-1) + MIN_MARGIN)
    clean = cells.residual[i][best, shapes] <= MAX_RESIDUAL
    distance = cells.background[i]
    return Found(
        soft=sum(w * v for w, v in parts) / weight,
        background=background,
        shape=float(shape_fit[best, order].mean()) if count else 1.0,
        colour=float(colour_fit[best, order].mean()) if count else 1.0,
        empty=float(empty_fit[free].min()) if len(free) else 1.0,
        thing_soft=tuple(thing_fit[best, order].tolist()),
        cell_empty=tuple(empty_fit.tolist()),
        background_ok=bool(distance.argmin() == declared and distance[declared] <= MAX_BACKGROUND),
        things_ok=tuple((colour_ok & shape_ok & clean).tolist()),
        colours_ok=tuple(colour_ok.tolist()),
        cells_empty_ok=tuple((cells.clutter[i] <= MAX_CLUTTER).tolist()),
        cells=tuple(best.tolist()),
    )


def _colours_ok(cells: Cells, i: int, best: np.ndarray, shapes, colours) -> np.ndarray:
    distance = cells.colour[i][best, shapes]  # (T, 10)
    declared = distance[np.arange(len(best)), colours]
    return (distance.argmin(-1) == np.array(colours, int)) & (declared <= MAX_COLOUR)
