"""Group-relative advantages, judge by judge:

    A_i = clip( sum_k w_k (r_ki - mean_k) / sqrt(var_k + floor_k^2) )        arXiv:2601.05242

mean_k and var_k (population) run over the valid members of one prompt group, floor_k is the
judge's own noise floor, and w_k are the weights of the prompt's category, renormalised over the
judges that apply to the group.

Rules that differ from, or are not in, the paper:
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

import numpy as np
import torch
from jaxtyping import Bool, Float

from rewards.arrays import to_arrays
from rewards.types import JudgeCard, Scores
from rlhf.errors import ConfigError
from rlhf.types import Advantages

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
    samples, `reward/total` = mean weighted raw score of samples with every applying score,
    `advantage/live` = share. Means over nothing are absent rather than 0.
    """

    by_category: Mapping[str, GroupCounts]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Group:
    """The scores of one group as arrays, judge by judge: J x G, NaN where there is no value."""

    value: Float[np.ndarray, "j g"]
    valid: Bool[np.ndarray, "j g"]  # ok, and the sample passed the required judges
    excluded: Bool[np.ndarray, " g"]  # a required judge failed on it
    weight: Float[np.ndarray, " j"]  # sums to 1 over the judges that apply, or all 0


def group_advantages(
    scores: Scores,
    weights: Mapping[str, Mapping[str, float]],
    categories: Sequence[str],
    required: Sequence[str] = (),
    clip: float = 5.0,
) -> tuple[Advantages, AdvantageReport]:
    """Advantages of P groups of G samples (float64 inside, float32 out) and what was dropped.

    `weights` maps category -> judge -> weight >= 0, with "*" for all other categories;
    `categories` holds one per group; `required` names judges whose failure takes the sample out.
    Non-live values are exactly 0. Raises ConfigError for unknown judges, negative or all-zero
    weights, or a category without weights.
    """
    _check(scores, weights, categories, required)
    counts: dict[str, GroupCounts] = {}
    values, lives, totals = [], [], []
    for p, category in enumerate(categories):
        group = _read(scores, p, _weights_of(weights, category), required)
        value, live, fate = _advantage(group, scores.judges)
        counts[category] = counts.get(category, GroupCounts()).plus(fate)
        values.append(np.clip(value, -clip, clip))
        lives.append(live)
        totals.append(_total(group))
    live = np.stack(lives)
    metrics = _judge_metrics(scores)
    raw = np.concatenate(totals)
    if raw.size:
        metrics["reward/total"] = float(raw.mean())
    metrics["advantage/live"] = float(live.mean())
    advantages = Advantages(
        value_PG=torch.from_numpy(np.stack(values).astype(np.float32)),
        live_PG=torch.from_numpy(live),
    )
    return advantages, AdvantageReport(by_category=counts, metrics=metrics)


def _advantage(group: _Group, judges: Sequence[JudgeCard]) -> tuple[np.ndarray, np.ndarray, str]:
    """Values (0 where not live), live flags, and the group's fate: a field of GroupCounts."""
    value = np.zeros(group.value.shape[1])
    informed = np.zeros(group.value.shape[1], dtype=bool)
    flat: list[float] = []  # for each judge with equal scores, where in its range they lie
    for k in np.flatnonzero(group.weight).tolist():
        valid = group.valid[k]
        if valid.sum() < 2:
            continue
        r = group.value[k, valid]
        if r.max() == r.min():
            flat.append((r[0] - judges[k].low) / (judges[k].high - judges[k].low))
            continue
        spread = np.sqrt(r.var() + judges[k].noise_floor ** 2)
        value[valid] += group.weight[k] * (r - r.mean()) / spread
        informed |= valid
    if informed.any():
        return value, informed, "live"
    return value, informed, _fate(group, flat)


def _fate(group: _Group, flat: Sequence[float]) -> str:
    if not group.weight.any():
        return "unjudged"
    if flat:
        return "flat_high" if np.mean(flat) >= 0.5 else "flat_low"
    return "required" if (~group.excluded).sum() < 2 else "few"


def _read(scores: Scores, p: int, weights: Mapping[str, float], required: Sequence[str]) -> _Group:
    rows = [to_arrays(scores.table[card.name][p]) for card in scores.judges]
    ok, na = np.stack([row.ok for row in rows]), np.stack([row.na for row in rows])
    value = np.stack([row.value for row in rows])
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


def _judge_metrics(scores: Scores) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for card in scores.judges:
        found = to_arrays([s for group in scores.table[card.name] for s in group])
        value = found.value[found.ok]
        if value.size:
            metrics[f"reward/{card.name}/mean"] = float(value.mean())
            metrics[f"reward/{card.name}/std"] = float(value.std())
        for state, masked in (("failed", found.failed), ("na", found.na)):
            metrics[f"reward/{card.name}/{state}"] = float(masked.sum() / max(masked.size, 1))
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
) -> None:
    known = {card.name for card in scores.judges}
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
    groups = {len(scores.table[name]) for name in known}
    if groups != {len(categories)}:
        raise ValueError(
            f"expected one category per group, got {len(categories)} for {sorted(groups)} groups: "
            "pass the category of each prompt, in the order of the scores"
        )
