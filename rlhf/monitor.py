"""Watching a run for a reward that is hacked: it rises while what it stands for does not.

`figures` are what one iteration tells (`monitor/<name>`); `read` looks back over a window of rows:

trend        of a curve: its rank correlation with time, times sqrt(n - 1): about standard normal
             where there is no trend
divergence   a witness falls by `sigmas` while the training reward rises (by 1 at least: prompts
             differ from iteration to iteration, so its curve is rough)
correlation  the rank correlation of the two, times sqrt(n - 1), is below -`sigmas`
beyond       share of a judge's scores at or past the ends of its calibration: it never saw such
limits       the window's mean of `monitor/<name>` leaves the stated range

Witnesses are the judges that watch, on the training pictures, and the held-out figures of these and
of the oracle. With 3 sigmas a curve needs ten values to raise an alarm. In simulated runs of 200
iterations one in twenty raised one without any trend, and one in ten where the reward rose all the
time and the witness did not move; where both rose, none did.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from rewards.benchmark import ranking
from rewards.types import JudgeCard, Score, Scores
from rlhf.errors import ConfigError

LEAST = 4  # values from which a curve has a trend
RISES = 1.0  # sigmas
ROUNDING = 1e-9
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """What counts as an alarm (see the module), and what follows from it.

    `warn` prints one line for every new one; `stop` ends the run after a checkpoint. `limits`:
    name -> [lowest, highest], such as `{grid: [0, 0.2], diversity/thumbnails: [0.05, 1]}`.
    """

    window: int = 20  # iterations; of held-out figures as many values
    sigmas: float = 3.0
    beyond: float = 0.5
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    pictures: bool = True  # statistics of the pictures (`rewards.statistics`)
    warn: bool = True
    stop: bool = False

    def check(self) -> None:
        if not self.sigmas > 0 or self.window - 1 < self.sigmas**2:
            raise ConfigError(
                f"monitor: expected sigmas > 0 and a window of more than sigmas^2, got sigmas"
                f" {self.sigmas} and window {self.window}: nothing could raise an alarm; write"
                f" window={max(20, math.ceil(2 * self.sigmas**2))}"
            )
        for name, (low, high) in self.limits.items():
            if not low <= high:
                raise ConfigError(
                    f"monitor.limits.{name}: expected [lowest, highest], got [{low}, {high}]"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One signal that fired: its name, and what was seen."""

    signal: str
    text: str


# --- one iteration --------------------------------------------------------------------------------


def figures(scores: Scores) -> dict[str, float]:
    """`monitor/...` of one iteration: means of the pictures' statistics over groups, the share of
    every calibrated judge's scores `beyond` its calibration, and the `disagreement` of judges: mean
    difference of two judges' ranks in a group, scaled to [0, 1] (1/3 where they have nothing in
    common). What there is nothing to say about is absent.
    """
    out: dict[str, float] = {}
    for name, values in scores.figures.items():
        found = [v for v in values if math.isfinite(v)]
        if found:
            out[f"monitor/{name}"] = float(np.mean(found))
    for card in scores.judges:
        ok = [s for group in scores.table[card.name] for s in group if s.state == "ok"]
        if card.calibration.raw and ok:
            share = float(np.mean([_is_beyond(card, s) for s in ok]))
            out[f"monitor/beyond/{card.name}"] = share
    apart = [
        d
        for one, other in combinations(scores.judges, 2)
        for d in _rank_differences(one, other, scores)
    ]
    if apart:
        out["monitor/disagreement"] = float(np.mean(apart))
    return out


def _is_beyond(card: JudgeCard, score: Score) -> bool:
    """Whether a score lies outside the knots; without its raw value, whether it is at their end."""
    knots = card.calibration
    if "raw" in score.parts:
        return not knots.raw[0] <= score.parts["raw"] <= knots.raw[-1]
    assert score.value is not None
    return not knots.value[0] < score.value < knots.value[-1]


def _rank_differences(one: JudgeCard, other: JudgeCard, scores: Scores) -> list[float]:
    """One per group in which both tell samples apart."""
    out = []
    for pair in zip(scores.table[one.name], scores.table[other.name], strict=True):
        both = [
            (a.value, b.value) for a, b in zip(*pair, strict=True) if a.state == b.state == "ok"
        ]
        values = np.array(both, dtype=float).reshape(-1, 2)
        values *= [sign(one), sign(other)]
        if len(values) > 1 and np.ptp(values, axis=0).all():
            apart = np.abs(ranks(values[:, 0]) - ranks(values[:, 1]))
            out.append(float(apart.mean() / (len(values) - 1)))
    return out


def sign(card: JudgeCard) -> float:
    """1 where high scores are good, else -1."""
    return 1.0 if card.better == "higher" else -1.0


# --- many iterations ------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    """0 .. n-1, the mean rank for equal values."""
    return ranking.ranks(np.asarray(values, np.float64)) - 1


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; 0 where one of the two is constant."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def read(
    rows: Sequence[Row], config: MonitorConfig, witnesses: Mapping[str, float]
) -> tuple[dict[str, float], tuple[Alarm, ...]]:
    """What the rows so far say: figures of the last one, and alarms.

    `witnesses` maps names of metrics to 1, or to -1 where low values are good.
    """
    out: dict[str, float] = {}
    alarms: list[Alarm] = []
    for name, direction in witnesses.items():
        pairs = _last(rows, ("reward/total", name), config.window)
        if len(pairs) < LEAST:
            continue
        train, witness = pairs[:, 0], direction * pairs[:, 1]
        root, time = math.sqrt(len(pairs) - 1), np.arange(len(pairs))
        rises, falls = (root * rank_correlation(time, curve) for curve in (train, witness))
        together = rank_correlation(train, witness)
        short = name.removeprefix("watch/").removesuffix("/mean")
        out[f"monitor/trend/{short}"] = falls
        out[f"monitor/correlation/{short}"] = together
        said = f"over {len(pairs)} values"
        limit = config.sigmas - ROUNDING
        if rises >= RISES and falls <= -limit:
            text = f"the training reward rises ({rises:+.1f} sigmas) while {short} falls"
            alarms.append(Alarm(signal=f"divergence/{short}", text=f"{text} ({falls:+.1f}) {said}"))
        elif root * together <= -limit:
            text = f"the training reward and {short} go opposite ways (rank correlation"
            alarms.append(
                Alarm(signal=f"correlation/{short}", text=f"{text} {together:.2f}) {said}")
            )
    total = _last(rows, ("reward/total",), config.window)
    if len(total) >= LEAST:
        time = np.arange(len(total))
        out["monitor/trend/reward"] = math.sqrt(len(total) - 1) * rank_correlation(
            time, total[:, 0]
        )
    return out, (*alarms, *_past_limits(rows, config))


def _past_limits(rows: Sequence[Row], config: MonitorConfig) -> list[Alarm]:
    limits = {f"monitor/{name}": pair for name, pair in config.limits.items()}
    for name in rows[-1] if rows else ():
        if name.startswith("monitor/beyond/"):
            limits.setdefault(name, (0.0, config.beyond))
    out = []
    for name, (low, high) in limits.items():
        values = _last(rows, (name,), config.window)
        if len(values) >= LEAST and not low <= values.mean() <= high:
            short = name.removeprefix("monitor/")
            text = f"{short} is {values.mean():.3g} on average over {len(values)} iterations"
            out.append(Alarm(signal=short, text=f"{text}, outside [{low:g}, {high:g}]"))
    return out


def _last(rows: Sequence[Row], names: Sequence[str], window: int) -> np.ndarray:
    """The last `window` rows that have all of these metrics: rows x names."""
    cells = [[row.get(name) for name in names] for row in rows]
    full = [line for line in cells if all(v is not None and math.isfinite(v) for v in line)]
    return np.array(full[-window:], dtype=float).reshape(-1, len(names))


def needed(rows: Sequence[Row], window: int) -> list[Row]:
    """The rows that `read` looks at: of every metric the last `window` that have a reward, too."""
    seen: Counter[str] = Counter()
    kept = []
    for row in reversed(rows):
        names = [name for name, value in row.items() if _is_number(value)]
        if any(seen[name] < window for name in names):
            kept.append(row)
        if "reward/total" in names:
            seen.update(names)
    return kept[::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Monitor:
    """The rows of a run that count, and what is new. `rows` are those before a resume."""

    def __init__(
        self,
        config: MonitorConfig,
        cards: Sequence[JudgeCard],
        watch: Sequence[str],
        rows: Sequence[Row] = (),
    ) -> None:
        self.config = config
        self.signs = {card.name: sign(card) for card in cards if card.name in watch}
        self.rows = needed(rows, config.window)
        self.fired: set[str] = set()

    def observe(self, row: Row) -> tuple[dict[str, float], tuple[Alarm, ...]]:
        """Figures to add to a row, and the alarms that it raises."""
        self.rows = needed([*self.rows, dict(row)], self.config.window)
        out, alarms = read(self.rows, self.config, self.witnesses())
        return out | {"monitor/alarm": float(len(alarms))}, alarms

    def new(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those that the row before did not raise."""
        fresh = [alarm for alarm in alarms if alarm.signal not in self.fired]
        self.fired = {alarm.signal for alarm in alarms}
        return fresh

    def witnesses(self) -> dict[str, float]:
        """See `read`."""
        found = {f"watch/{name}/mean": way for name, way in self.signs.items()}
        for name in dict.fromkeys(n for row in self.rows for n in row if n.startswith("heldout/")):
            plain = name.removesuffix("/w1").removesuffix("/steps4")
            judge = plain.split("/", 2)[-1]  # heldout/<category>/<judge>
            if judge == "soft" or judge in self.signs:
                found[name] = self.signs.get(judge, 1.0)
        return found
