"""All that is measured of one judge on one axis: names, means and 95% intervals by prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from rewards import probes
from rewards.benchmark import calibration
from rewards.benchmark.accuracy import agreement, apart, tie_threshold, tied_agreement
from rewards.benchmark.asking import BATCH, Answers, ask, drift, spread_out, swap_consistency
from rewards.benchmark.ranking import best_of, correlation, kendall, spearman
from rewards.benchmark.rows import Bench
from rewards.benchmark.untrained import untrained
from rewards.judge import Judge
from rewards.stats import bootstrap, bootstrap_mean
from rewards.types import Sample

Metric = dict[str, float | int]
CANARY_BAR = 0.05  # the share of wins that a canary may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is asked, and what counts as a clear difference of gold."""

    margin: float = 0.1  # of gold; one standard deviation of the annotators' noise
    probes: int = 64  # prompts whose clean picture is turned into canaries
    steady: int = 64  # pictures and pairs asked again in another order
    batch: int = BATCH
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Metrics by name, and what figures and pages need beside them."""

    metrics: dict[str, Metric]
    bins: list[tuple[float, float, int]]  # see `calibration.bins`; empty without dev pairs
    gold: Float[np.ndarray, " k"]  # of the pictures that have a gold and a score
    score: Float[np.ndarray, " k"]
    flags: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What dev pairs decide; applied to test pairs as it is."""

    eps: float
    temperature: float


def fit(answers: Answers, dev: Bench) -> Fitted | None:
    """eps of ties and T of probabilities; None where no dev pair has both scores."""
    gap = answers.value[dev.first] - answers.value[dev.second]
    kept = ~np.isnan(gap)
    if not kept.any():
        return None
    return Fitted(
        eps=tie_threshold(gap, dev.label),
        temperature=calibration.fit_temperature(gap[kept], dev.label[kept]),
    )


def mean(values: Sequence[float] | np.ndarray, clusters: np.ndarray, seed: int) -> Metric | None:
    """Mean of the values that are not NaN; None of none."""
    array = np.asarray(values, dtype=np.float64)
    kept = ~np.isnan(array)
    if not kept.any():
        return None
    return bootstrap_mean(array[kept], clusters[kept], seed).as_metric()


def _present(found: dict[str, Metric | None]) -> dict[str, Metric]:
    return {name: metric for name, metric in found.items() if metric is not None}


def on_pairs(
    answers: Answers, test: Bench, fitted: Fitted | None, settings: Settings
) -> dict[str, Metric]:
    """Accuracies: against the truth, and (`label_`, `tie_calibrated_`) against annotators."""
    gap = answers.value[test.first] - answers.value[test.second]
    gold_gap = test.gold[test.first] - test.gold[test.second]
    strict = agreement(gap, test.truth)
    same = np.array(
        [
            test.origin[i] != "" and test.origin[i] == test.origin[j]
            for i, j in zip(test.first, test.second, strict=True)
        ],
        dtype=bool,
    )
    known = ~np.isnan(gap) & ~np.isnan(gold_gap)
    annotators = agreement(test.label - 0.5, test.truth)
    arrays = {
        "pairwise_accuracy": strict,
        "half_credit_accuracy": agreement(gap, test.truth, tie=0.5),
        "clear_accuracy": np.where(apart(gold_gap, settings.margin), strict, np.nan),
        "same_policy_accuracy": np.where(same, strict, np.nan),
        "label_accuracy": agreement(gap, test.label),
        "annotator_accuracy": np.where(known, annotators, np.nan),
    }
    if fitted:
        arrays["tie_calibrated_accuracy"] = tied_agreement(gap, test.label, fitted.eps)
    return _present({k: mean(v, test.pair_group, settings.seed) for k, v in arrays.items()})


def on_lists(answers: Answers, test: Bench, seed: int = 0) -> dict[str, Metric]:
    """Mean over prompts of rank correlations and of the best of N, among the scored pictures."""
    found: dict[str, list[float]] = {
        name: [] for name in ("spearman", "kendall", "best_of_n/regret", "best_of_n/gain")
    }
    groups = []
    for index, truth in test.lists:
        score = answers.value[index]
        kept = ~np.isnan(score)
        if kept.sum() < 2:
            continue
        groups.append(int(test.group[index[0]]))
        score, truth = score[kept], truth[kept]
        row = (spearman(score, truth), kendall(score, truth), *best_of(score, truth))
        for values, value in zip(found.values(), row, strict=True):
            values.append(value)
    return _present({k: mean(v, np.array(groups, dtype=int), seed) for k, v in found.items()})


def on_probabilities(
    answers: Answers, test: Bench, fitted: Fitted, seed: int = 0
) -> tuple[dict[str, Metric], list[tuple[float, float, int]]]:
    """ECE, Brier and nll of test pairs under the temperature of dev, and the bins of the ECE."""
    gap = answers.value[test.first] - answers.value[test.second]
    kept = ~np.isnan(gap)
    if not kept.any():
        return {}, []
    gap, label, group, t = gap[kept], test.label[kept], test.pair_group[kept], fitted.temperature
    error = bootstrap(
        lambda i: calibration.ece(gap[i], label[i], t), group, within=(0, 1), seed=seed
    )
    found = {
        "ece": error.as_metric(),
        "brier": mean(calibration.brier(gap, label, t), group, seed),
        "nll": mean(calibration.nll(gap, label, t), group, seed),
        "temperature": {"value": t},
        "tie_eps": {"value": fitted.eps},
    }
    return _present(found), calibration.bins(gap, label, t)


def steadiness(judge: Judge, test: Bench, settings: Settings) -> dict[str, Metric]:
    """Whether scores depend on the order and the size of batches."""
    pairs = spread_out(len(test.first), settings.steady)
    both = [(test.samples[test.first[k]], test.samples[test.second[k]]) for k in pairs]
    some = [test.samples[i] for i in spread_out(len(test.samples), settings.steady)]
    largest, changed = drift(judge, some, settings.seed)
    swapped = swap_consistency(judge, both, settings.batch)
    found = {
        "swap_consistency": mean(swapped, test.pair_group[pairs], settings.seed),
        "drift": {"value": largest, "n": len(some)},
        "drift/states": {"value": changed, "n": len(some)},
    }
    return _present(found)


# --- canaries and biases --------------------------------------------------------------------------


def clean(test: Bench, most: int) -> list[int]:
    """A picture of each of at most `most` prompts: a render if there are any, else one that nobody
    corrupted, and the best of them by gold.
    """
    renders = [i for i, origin in enumerate(test.origin) if origin == "render"]
    usable = renders or [
        i for i, origin in enumerate(test.origin) if not origin.startswith("corrupted")
    ]
    best: dict[int, int] = {}
    gold = np.nan_to_num(test.gold, nan=-np.inf)
    for i in usable:
        group = int(test.group[i])
        if group not in best or gold[i] > gold[best[group]]:
            best[group] = i
    found = list(best.values())
    return [found[k] for k in spread_out(len(found), most)]


def _asked_for(
    judge: Judge,
    samples: Sequence[Sample],
    change: Callable[[Sample], Sample | None],
    batch: int,
) -> Float[np.ndarray, " n"]:
    """Scores of changed samples, NaN where the change does not apply."""
    changed = [(i, new) for i, one in enumerate(samples) if (new := change(one)) is not None]
    out = np.full(len(samples), np.nan)
    out[[i for i, _ in changed]] = ask(judge, [new for _, new in changed], batch).value
    return out


def _oracle(axis: str) -> Judge | None:
    """Who knows the gold of any picture of a scene; of other axes nobody."""
    from rewards.scenes.judge import OracleJudge
    from rewards.scenes.oracle import AXES

    return OracleJudge(axis) if axis in AXES else None


def _wins(gap: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.where(np.isnan(gap), np.nan, (gap > 0).astype(float))


def on_canaries(
    judge: Judge, answers: Answers, test: Bench, settings: Settings, axis: str
) -> dict[str, Metric]:
    """`canary/<name>`: share of clean pictures whose canary scores higher (a tie is no preference).

    `canary/<name>/unearned`: the share in which it does and its gold is not higher: where the
    oracle can read the canary against a target, for some spoilt pictures are better on one axis
    taken alone.
    """
    index = clean(test, settings.probes)
    samples, group = [test.samples[i] for i in index], test.group[index]
    oracle, seed, batch = _oracle(axis), settings.seed, settings.batch
    gold = ask(oracle, samples, batch).value if oracle else None
    found: dict[str, Metric | None] = {}
    for name, canary in probes.canaries(samples, axis).items():
        wins = _wins(_asked_for(judge, samples, canary, batch) - answers.value[index])
        found[f"canary/{name}"] = mean(wins, group, seed)
        if oracle and gold is not None:
            earned = _wins(_asked_for(oracle, samples, canary, batch) - gold)
            found[f"canary/{name}/unearned"] = mean(wins * (1 - earned), group, seed)
    return _present(found)


def on_biases(judge: Judge, answers: Answers, test: Bench, settings: Settings) -> dict[str, Metric]:
    """`bias/<measure>`: correlation of the score with it over clean pictures. `bias/<change>/shift`
    and `/size`: mean and mean |difference| that a change makes to clean pictures, in standard
    deviations of the judge's scores over all test pictures.
    """
    index = clean(test, settings.probes)
    samples, group = [test.samples[i] for i in index], test.group[index]
    before, seed = answers.value[index], settings.seed
    kept, known = ~np.isnan(before), answers.value[~np.isnan(answers.value)]
    scale = float(known.std()) if known.size and np.ptp(known) > 0 else 0.0
    found: dict[str, Metric | None] = {}
    for name, measure in probes.MEASURES.items():
        reading = np.array([measure(one.image) for one in samples])[kept]
        found[f"bias/{name}"] = _correlated(before[kept], reading, group[kept], seed)
    for name, change in probes.CHANGES.items():
        if scale > 0:
            shift = (_asked_for(judge, samples, change, settings.batch) - before) / scale
            found[f"bias/{name}/shift"] = mean(shift, group, seed)
            found[f"bias/{name}/size"] = mean(np.abs(shift), group, seed)
    return _present(found)


def _correlated(
    score: np.ndarray, reading: np.ndarray, group: np.ndarray, seed: int
) -> Metric | None:
    if np.isnan(correlation(score, reading)):
        return None
    found = bootstrap(lambda i: correlation(score[i], reading[i]), group, within=(-1, 1), seed=seed)
    return found.as_metric()


# --- all of it ------------------------------------------------------------------------------------


def accuracy_of(
    judge: Judge, dev: Bench, test: Bench, settings: Settings
) -> tuple[Findings, Answers]:
    """What pairs and lists say of a judge, and its scores of the test pictures."""
    answers = ask(judge, test.samples, settings.batch)
    fitted = fit(ask(judge, dev.samples, settings.batch), dev)
    metrics = on_pairs(answers, test, fitted, settings) | on_lists(answers, test, settings.seed)
    bins: list[tuple[float, float, int]] = []
    if fitted:
        more, bins = on_probabilities(answers, test, fitted, settings.seed)
        metrics |= more
    for name, masked in (("failed", answers.failed), ("na", answers.na)):
        metrics[name] = {"value": float(masked.mean()), "n": masked.size}
    seen = ~np.isnan(test.gold) & ~np.isnan(answers.value)
    findings = Findings(
        metrics=metrics,
        bins=bins,
        gold=test.gold[seen],
        score=answers.value[seen],
        flags=answers.flags,
        reasons=answers.reasons,
    )
    return findings, answers


def measure(judge: Judge, dev: Bench, test: Bench, settings: Settings, axis: str = "") -> Findings:
    """Everything, with the untrained judge beside under `untrained/`."""
    findings, answers = accuracy_of(judge, dev, test, settings)
    beside, _ = accuracy_of(untrained(judge, settings.seed), dev, test, settings)
    findings.metrics.update(steadiness(judge, test, settings))
    findings.metrics.update(on_canaries(judge, answers, test, settings, axis))
    findings.metrics.update(on_biases(judge, answers, test, settings))
    findings.metrics.update(
        {
            f"untrained/{name}": beside.metrics[name]
            for name in ("pairwise_accuracy", "label_accuracy", "spearman", "ece")
            if name in beside.metrics
        }
    )
    return findings
