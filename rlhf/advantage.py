"""Group-relative advantages of several judges, by one of three schemes:

    mo-grpo    A_i = sum_k w_k (r_ki - mean_k) / sqrt(var_k + floor_k^2)     arXiv:2509.22047
    gdpo       (A_i - mean(A)) / (std(A) + 1e-4), over the live samples of
               the batch, A_i as in mo-grpo                                  arXiv:2601.05242
    weighted   (R_i - mean) / sqrt(var + floor^2) with R_i = sum_k w_k r_ki,
               floor^2 = sum_k w_k^2 floor_k^2

then clipped. mean and var (population) run over the valid members of one prompt group, floor_k is
the judge's own noise floor, and w_k are the weights of the prompt's category, renormalised over the
judges that apply to the group. The first is that of Qwen-Image-2.0 (arXiv:2606.27608). `weighted`
lets the judge of the largest spread win, and needs all scores of a sample. Scores of a judge whose
card says `better: lower` are turned round.

Rules that differ from, or are not in, the papers:
1. No score is ever invented. A sample that a required judge failed on is left out altogether;
   where another judge failed on it, it is left out of that judge's statistics and gets nothing
   from it.
2. A judge applies to a group unless all its scores there are `na`. One that failed everywhere
   still applies: its weight is not handed to the others.
3. Equal scores give exactly 0. A sample without any score that tells its group apart is not live.
4. Dropped groups are counted by category and reason, never skipped silently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from rewards.arrays import to_arrays
from rewards.backbones.limits import count_flags
from rewards.types import JudgeCard, Scores
from rlhf.errors import ConfigError
from rlhf.types import Advantages

Scheme = Literal["mo-grpo", "gdpo", "weighted"]
EPSILON = 1e-4  # of gdpo's standard deviation
ANY = "*"  # category whose weights hold where a category has none of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """What became of the groups of one category; the other counts add up to `groups`."""

    groups: int = 0
    live: int = 0
    flat_high: int = 0  # every judge gave equal scores, in the upper half of its range
    flat_low: int = 0  # the same in the lower half
    few: int = 0  # fewer than two valid scores from every judge
    required: int = 0  # fewer than two samples are left after failures of required judges
    unjudged: int = 0  # no judge applies

    def plus(self, fate: str) -> "GroupCounts":
        counts = {name: getattr(self, name) for name in self.__slots__}
        counts["groups"] += 1
        counts[fate] += 1
        return GroupCounts(**counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageReport:
    """Counts by category, and `metrics` ready for a log row.

    `reward/<judge>/{mean,std}` over ok scores (std is population), `{failed,na}` as shares of all
    samples, `flag/<flag>` likewise (a prompt that was cut, a picture that was scaled down),
    `reward/total` = mean weighted score of samples with every applying score, higher is better.
    `advantage/live` = share of samples, `advantage/flat` = share of groups that are not live as
    every judge gave equal scores, `advantage/dropped/<category>/<why>` = groups by `GroupCounts`.
    Means and the live share come once more by category: `reward/<judge>/mean/<category>`,
    `reward/total/<category>`, `advantage/live/<category>`. `advantage/share/<judge>` =
    |corr(A_k, A)|, A_k the judge's part of A, over the live samples of groups in which it has a
    weight. For watching judges what is called `reward/<judge>` is called `watch/<judge>`. Means and
    counts of nothing are absent, not 0. `seconds/judge/<judge>` is what a judge worked, in its
    worker.
    """

    by_category: Mapping[str, GroupCounts]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The composite rewards (weighted raw scores, higher is better) of one group's samples.

    `height` says where their mean lies between the bad (0) and the good end of the judges' ranges.
    A group with fewer than two samples that have every score that counts has only `lost`, why.
    """

    low: float = 0.0
    high: float = 0.0
    height: float = 0.0
    lost: str = ""  # "few", "required" or "unjudged" of GroupCounts

    @property
    def range(self) -> float:
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class _Group:
    """The scores of one group as arrays, judge by judge: J x G, 0 where there is no value."""

    value: Float[np.ndarray, "j g"]  # higher is better
    valid: Bool[np.ndarray, "j g"]  # ok, and the sample passed the required judges
    excluded: Bool[np.ndarray, " g"]  # a required judge failed on it
    weight: Float[np.ndarray, " j"]  # sums to 1 over the judges that apply, or all 0


@dataclass(frozen=True, slots=True)
class _Parts:
    """What each judge adds to the advantages of a group, 0 where it adds nothing."""

    part: Float[np.ndarray, "j g"]
    live: Bool[np.ndarray, " g"]
    fate: str  # a field of GroupCounts


def group_advantages(
    scores: Scores,
    weights: Mapping[str, Mapping[str, float]],
    categories: Sequence[str],
    required: Sequence[str] = (),
    clip: float = 5.0,
    scheme: Scheme = "mo-grpo",
    watch: Sequence[str] = (),
) -> tuple[Advantages, AdvantageReport]:
    """Advantages of P groups of G samples (float64 inside, float32 out) and what was dropped.

    `weights` maps category -> judge -> weight >= 0, with "*" for all other categories;
    `categories` holds one per group; `required` names judges whose failure takes the sample out;
    `watch` those that have no say. Non-live values are exactly 0. Raises ConfigError for unknown
    judges, negative or all-zero weights, a category without weights, or a judge that
    watches and weighs.
    """
    _check(scores, weights, categories, required, watch)
    counts: dict[str, GroupCounts] = {}
    groups, found = [], []
    for p, category in enumerate(categories):
        group = _read(scores, p, _weights_of(weights, category), required)
        parts = _weighted(group, scores.judges) if scheme == "weighted" else _sum(group, scores)
        counts[category] = counts.get(category, GroupCounts()).plus(parts.fate)
        groups.append(group)
        found.append(parts)
    live = np.stack([parts.live for parts in found])
    raw = np.stack([parts.part.sum(axis=0) for parts in found])
    value = np.clip(_over_batch(raw, live) if scheme == "gdpo" else raw, -clip, clip)
    metrics = _judge_metrics(scores, categories, watch)
    metrics |= _totals([_total(group) for group in groups], categories)
    metrics |= _liveness(live, categories, counts)
    metrics |= _shares(scores.judges, groups, found, value)
    advantages = Advantages(
        value_PG=torch.from_numpy(value.astype(np.float32)), live_PG=torch.from_numpy(live)
    )
    return advantages, AdvantageReport(by_category=counts, metrics=metrics)


def spreads(
    scores: Scores,
    weights: Mapping[str, Mapping[str, float]],
    categories: Sequence[str],
    required: Sequence[str] = (),
) -> list[Spread]:
    """How far apart the composite rewards of each group are; arguments as of `group_advantages`.

    Raises ConfigError for unknown judges, and weights that are negative or of no category.
    """
    _check(scores, weights, categories, required, ())
    out = []
    for p, category in enumerate(categories):
        group = _read(scores, p, _weights_of(weights, category), required)
        total = _total(group)
        if len(total) < 2:
            out.append(Spread(lost=_fate(group, ())))
            continue
        weighed = list(zip(group.weight, scores.judges, strict=True))
        worst = sum(w * (c.low if c.better == "higher" else -c.high) for w, c in weighed)
        reach = sum(w * (c.high - c.low) for w, c in weighed)
        height = float((total.mean() - worst) / reach)
        out.append(Spread(low=float(total.min()), high=float(total.max()), height=height))
    return out


def _sum(group: _Group, scores: Scores) -> _Parts:
    """mo-grpo: every judge normalised by itself."""
    part = np.zeros_like(group.value)
    informed = np.zeros(group.value.shape[1], dtype=bool)
    flat: list[float] = []  # for each judge with equal scores, where in its range they lie
    for k in np.flatnonzero(group.weight).tolist():
        valid = group.valid[k]
        if valid.sum() < 2:
            continue
        r = group.value[k, valid]
        if r.max() == r.min():
            flat.append(_height(scores.judges[k], r[0]))
            continue
        spread = np.sqrt(r.var() + scores.judges[k].noise_floor ** 2)
        part[k, valid] = group.weight[k] * (r - r.mean()) / spread
        informed |= valid
    return _Parts(part, informed, "live" if informed.any() else _fate(group, flat))


def _weighted(group: _Group, judges: Sequence[JudgeCard]) -> _Parts:
    """The weighted sum of the raw scores, normalised; samples without all of them are left out."""
    part = np.zeros_like(group.value)
    counts = group.weight > 0
    whole = np.logical_and.reduce(group.valid[counts], axis=0) & bool(counts.any())
    live = np.zeros_like(whole)
    if whole.sum() < 2:
        return _Parts(part, live, _fate(group, ()))
    r = group.weight[:, None] * group.value[:, whole]
    total = r.sum(axis=0)
    if np.ptp(total) <= 1e-12 * np.abs(r).max():  # equal but for rounding
        at = [_height(card, group.value[k, whole][0]) for k, card in enumerate(judges) if counts[k]]
        return _Parts(part, live, _fate(group, at))
    floors = group.weight * [card.noise_floor for card in judges]
    part[:, whole] = (r - r.mean(axis=1, keepdims=True)) / np.sqrt(total.var() + floors @ floors)
    return _Parts(part, whole, "live")


def _over_batch(value: np.ndarray, live: np.ndarray) -> np.ndarray:
    """gdpo: P x G advantages normalised over the live samples of the batch."""
    out = np.zeros_like(value)
    if live.any():
        own = value[live]
        out[live] = (own - own.mean()) / (own.std() + EPSILON)
    return out


def _shares(
    judges: Sequence[JudgeCard],
    groups: Sequence[_Group],
    found: Sequence[_Parts],
    value: np.ndarray,
) -> dict[str, float]:
    shares: dict[str, float] = {}
    for k, card in enumerate(judges):
        has = [p for p, group in enumerate(groups) if group.weight[k] > 0]
        mine = np.concatenate([np.zeros(0), *(found[p].part[k, found[p].live] for p in has)])
        whole = np.concatenate([np.zeros(0), *(value[p, found[p].live] for p in has)])
        if mine.size > 1 and np.ptp(mine) > 0 and np.ptp(whole) > 0:
            shares[f"advantage/share/{card.name}"] = float(abs(np.corrcoef(mine, whole)[0, 1]))
    return shares


def _sign(card: JudgeCard) -> float:
    return 1.0 if card.better == "higher" else -1.0


def _height(card: JudgeCard, value: float) -> float:
    """Where a value (higher is better) lies between the bad (0) and the good end of its range."""
    worst = card.low if card.better == "higher" else -card.high
    return (value - worst) / (card.high - card.low)


def _fate(group: _Group, flat: Sequence[float]) -> str:
    if not group.weight.any():
        return "unjudged"
    if flat:
        return "flat_high" if np.mean(flat) >= 0.5 else "flat_low"
    return "required" if (~group.excluded).sum() < 2 else "few"


def _read(scores: Scores, p: int, weights: Mapping[str, float], required: Sequence[str]) -> _Group:
    rows = [to_arrays(scores.table[card.name][p]) for card in scores.judges]
    ok, na = np.stack([row.ok for row in rows]), np.stack([row.na for row in rows])
    signs = np.array([_sign(card) for card in scores.judges])[:, None]
    value = np.where(ok, signs * np.stack([row.value for row in rows]), 0.0)
    must = np.array([card.name in required for card in scores.judges])
    excluded = np.any(~ok & ~na & must[:, None], axis=0)
    weight = np.array([weights.get(card.name, 0.0) for card in scores.judges]) * ~na.all(axis=1)
    if weight.any():
        weight = weight / weight.sum()
    return _Group(value=value, valid=ok & ~excluded, excluded=excluded, weight=weight)


def _total(group: _Group) -> np.ndarray:
    """Weighted raw scores of the samples that have every score that counts."""
    counts = group.weight > 0
    if not counts.any():
        return np.zeros(0)
    whole = group.valid[counts].all(axis=0)
    return group.weight[counts] @ group.value[counts][:, whole]


def _totals(totals: Sequence[np.ndarray], categories: Sequence[str]) -> dict[str, float]:
    kinds = np.repeat(categories, [len(group) for group in totals])
    values = np.concatenate(totals)
    parts = {"": values} | {f"/{c}": values[kinds == c] for c in dict.fromkeys(categories)}
    return {f"reward/total{c}": float(own.mean()) for c, own in parts.items() if own.size}


def _liveness(
    live: Bool[np.ndarray, "p g"], categories: Sequence[str], counts: Mapping[str, GroupCounts]
) -> dict[str, float]:
    out = {"advantage/live": float(live.mean())}
    for category in counts:
        own = live[[c == category for c in categories]]
        out[f"advantage/live/{category}"] = float(own.mean())
    flat = sum(n.flat_high + n.flat_low for n in counts.values())
    out["advantage/flat"] = flat / len(categories)
    whys = [name for name in GroupCounts.__slots__ if name not in ("groups", "live")]
    found = {f"{c}/{why}": getattr(n, why) for c, n in counts.items() for why in whys}
    return out | {f"advantage/dropped/{name}": float(n) for name, n in found.items() if n}


def _judge_metrics(
    scores: Scores, categories: Sequence[str], watch: Sequence[str]
) -> dict[str, float]:
    metrics = {f"seconds/judge/{name}": spent for name, spent in scores.seconds.items()}
    for card in scores.judges:
        name = f"{'watch' if card.name in watch else 'reward'}/{card.name}"
        groups = scores.table[card.name]
        flat = [s for group in groups for s in group]
        found = to_arrays(flat)
        kinds = np.repeat(categories, [len(group) for group in groups])
        value = found.value[found.ok]
        if value.size:
            metrics[f"{name}/mean"] = float(value.mean())
            metrics[f"{name}/std"] = float(value.std())
        for category in dict.fromkeys(categories):
            own = found.value[found.ok & (kinds == category)]
            if own.size:
                metrics[f"{name}/mean/{category}"] = float(own.mean())
        for state, masked in (("failed", found.failed), ("na", found.na)):
            metrics[f"{name}/{state}"] = float(masked.sum() / max(masked.size, 1))
        for flag, count in count_flags(flat).items():
            metrics[f"{name}/flag/{flag}"] = count / len(flat)
    return metrics


def _weights_of(weights: Mapping[str, Mapping[str, float]], category: str) -> Mapping[str, float]:
    found = weights.get(category, weights.get(ANY))
    if found is None:
        raise ConfigError(
            f"expected judge weights for category {category!r} or for {ANY!r}, got only "
            f"{sorted(weights)}: add one of the two"
        )
    return found


def _check(
    scores: Scores,
    weights: Mapping[str, Mapping[str, float]],
    categories: Sequence[str],
    required: Sequence[str],
    watch: Sequence[str],
) -> None:
    known = {card.name for card in scores.judges} - set(watch)
    for name in [*required, *(judge for row in weights.values() for judge in row)]:
        if name not in known:
            raise ConfigError(
                f"expected judges among {sorted(known)}, got {name!r} in weights or required: "
                "fix the name, or add the judge"
            )
    for category, row in weights.items():
        if not sum(row.values()) > 0.0 or min(row.values()) < 0.0:
            raise ConfigError(
                f"expected weights >= 0 with a positive sum for {category!r}, got {dict(row)}: "
                "turn a judge that should be low the other way round instead"
            )
    groups = {len(groups) for groups in scores.table.values()}
    if groups != {len(categories)}:
        raise ValueError(
            f"expected one category per group, got {len(categories)} for {sorted(groups)} groups: "
            "pass the category of each prompt, in the order of the scores"
        )
