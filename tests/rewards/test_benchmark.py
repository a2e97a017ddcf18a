"""What the benchmark says of judges whose faults are known, and what it reads."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import rlhf.advantage
from rewards import arrays
from rewards.benchmark import asking
from rewards.benchmark.asking import ask, drift, spread_out, swap_consistency
from rewards.benchmark.measure import Settings, clean, fit, measure, on_pairs
from rewards.benchmark.rows import Row, bench, read_judgements
from rewards.benchmark.untrained import RandomProjection, untrained
from rewards.errors import DataError
from rewards.scenes.judge import OracleJudge
from rewards.training.schema import Judgement
from rewards.training.table import load_judgements
from rewards.types import JudgeCard, Sample, Score, Scores, failed, not_applicable
from tests.rewards.judgements import records, write

# --- judges ---------------------------------------------------------------------------------------


class Reads:
    """Scores a picture by its first pixel, from 0 to 1, after a function; counts its calls."""

    def __init__(self, answer=lambda x: x, **card):
        self.answer = answer
        given = {"name": "reads", "revision": "1", "preprocessing": "none", **card}
        self.card = JudgeCard(**given)
        self.seen, self.samples = 0, []

    def score(self, samples):
        self.seen += len(samples)
        self.samples += samples
        out = []
        for one in samples:
            found = self.answer(one.image[0, 0, 0] / 100)
            out.append(found if isinstance(found, Score) else Score(value=float(found)))
        return out


def _picture(level: int) -> np.ndarray:
    return np.full((3, 16, 16), level, np.uint8)


def _rows(groups: int, levels=(10, 20, 40, 80), flip: float = 0.0, seed: int = 0) -> list[Row]:
    """All pairs of pictures whose gold is their level / 100; a share `flip` of labels is wrong."""
    rows, out = np.random.default_rng(seed), []
    for g in range(groups):
        for i, a in enumerate(levels):
            for b in levels[i + 1 :]:
                label = float(a > b)
                label = 1 - label if rows.random() < flip else label
                judgement = Judgement(
                    kind="pair",
                    axis="light",
                    prompt=f"light {g}",
                    images=(_picture(a), _picture(b)),
                    ratings=(label,),
                )
                origin = tuple("low" if x < 30 else "high" for x in (a, b))
                out.append(Row(judgement=judgement, gold=(a / 100, b / 100), origin=origin))
    return out


def _measured(judge, dev=None, test=None, **settings):
    dev, test = bench(dev or _rows(6)), bench(test or _rows(8))
    return measure(judge, dev, test, Settings(**settings)).metrics


def _value(metrics, name) -> float:
    return metrics[name]["value"]


def test_a_perfect_judge_an_anti_judge_and_a_constant_one():
    perfect, anti, flat = (_measured(Reads(f)) for f in (lambda x: x, lambda x: -x, lambda x: 0.5))
    for name in ("pairwise_accuracy", "label_accuracy", "half_credit_accuracy", "clear_accuracy"):
        assert [_value(m, name) for m in (perfect, anti)] == [1.0, 0.0]
    for name in ("spearman", "kendall"):
        assert [_value(m, name) for m in (perfect, anti, flat)] == pytest.approx([1, -1, 0])
    assert _value(flat, "pairwise_accuracy") == 0.0
    assert _value(flat, "half_credit_accuracy") == 0.5
    assert _value(flat, "ece") == pytest.approx(0.0)
    assert [_value(m, "best_of_n/regret") for m in (perfect, anti)] == pytest.approx([0, 0.7])
    assert _value(perfect, "best_of_n/gain") == pytest.approx(0.8 - 0.375)
    assert perfect["pairwise_accuracy"]["n"] == 8 * 6 and perfect["spearman"]["n"] == 8
    assert _value(perfect, "annotator_accuracy") == 1.0


def test_a_judge_of_whom_lower_is_better_is_turned():
    assert _value(_measured(Reads(lambda x: -x + 1, better="lower")), "pairwise_accuracy") == 1.0


def test_subsets_of_pairs_are_those_they_say():
    """Right only across origins: 4 of 6 pairs; of 0.1 to 0.7 apart, 5 are at least 0.2."""
    metrics = _measured(Reads(lambda x: {0.1: 0.2, 0.2: 0.1, 0.4: 0.9, 0.8: 0.8}[round(x, 1)]),
                        margin=0.2)  # fmt: skip
    assert _value(metrics, "same_policy_accuracy") == 0.0
    assert metrics["same_policy_accuracy"]["n"] == 8 * 2
    assert _value(metrics, "pairwise_accuracy") == pytest.approx(4 / 6)
    assert metrics["clear_accuracy"]["n"] == 8 * 5
    assert _value(metrics, "clear_accuracy") == pytest.approx(4 / 5)


def test_wrong_labels_cost_the_annotators_and_not_the_judge():
    metrics = _measured(Reads(), test=_rows(40, flip=0.25))
    assert _value(metrics, "pairwise_accuracy") == 1.0
    assert _value(metrics, "annotator_accuracy") == pytest.approx(0.75, abs=0.07)
    assert _value(metrics, "label_accuracy") == _value(metrics, "annotator_accuracy")


def test_without_gold_the_annotators_are_the_truth():
    rows = [replace(row, gold=(), origin=()) for row in _rows(8)]
    metrics = _measured(Reads(), rows, rows)
    assert _value(metrics, "pairwise_accuracy") == 1.0
    assert not {"annotator_accuracy", "clear_accuracy", "spearman", "same_policy_accuracy"} & set(
        metrics
    )


def test_the_tie_band_is_chosen_on_dev_and_not_on_test():
    """On dev small gaps are ties, on test they are not: a band tuned on test would score 1."""

    def rows(label):
        made = _rows(6, levels=(10, 20, 80))
        small = [replace(r.judgement, ratings=(label,)) for r in made]
        return [
            replace(r, judgement=s if abs(r.gold[0] - r.gold[1]) < 0.2 else r.judgement)
            for r, s in zip(made, small, strict=True)
        ]

    metrics = _measured(Reads(), dev=rows(0.5), test=rows(0.0))
    assert _value(metrics, "tie_eps") == pytest.approx(0.1)
    assert _value(metrics, "tie_calibrated_accuracy") == pytest.approx(2 / 3)
    assert _value(_measured(Reads(), rows(0.5), rows(0.5)), "tie_calibrated_accuracy") == 1.0


def test_the_temperature_is_fitted_on_dev_and_not_on_test():
    noisy, clear = _rows(60, flip=0.3), _rows(60)
    metrics = _measured(Reads(), dev=clear, test=noisy)
    assert _value(metrics, "temperature") < 0.01 and _value(metrics, "ece") > 0.2
    fair = _measured(Reads(), dev=noisy, test=_rows(60, flip=0.3, seed=1))
    assert _value(fair, "temperature") > 0.1 and _value(fair, "ece") < 0.1


def test_what_failed_or_does_not_apply_is_counted_and_never_scored():
    def answer(x):
        return failed("broken") if x == 0.1 else not_applicable("dark") if x == 0.2 else x

    metrics = _measured(Reads(answer))
    assert [metrics[k] for k in ("failed", "na")] == [{"value": 0.25, "n": 32}] * 2
    assert metrics["pairwise_accuracy"]["n"] == 8 and _value(metrics, "pairwise_accuracy") == 1.0
    silent = _measured(Reads(lambda x: failed("broken")))
    assert _value(silent, "failed") == 1.0
    assert not {"pairwise_accuracy", "ece", "spearman", "swap_consistency"} & set(silent)
    assert "untrained/pairwise_accuracy" in silent
    answers = ask(Reads(answer), [Sample(image=_picture(10), prompt="", category="any")])
    assert answers.reasons == Counter({"broken": 1})


def test_benchmark_and_training_have_one_rule_for_what_is_not_there():
    """A score that is na or failed enters neither, whatever else is in the group."""
    assert rlhf.advantage.to_arrays is asking.to_arrays is arrays.to_arrays
    scores = [Score(value=1.0), not_applicable("no face"), failed("timeout"), Score(value=3.0)]
    found = arrays.to_arrays(scores)
    assert found.value[[0, 3]].tolist() == [1.0, 3.0] and np.isnan(found.value[1:3]).all()
    assert found.ok.tolist() == [True, False, False, True]
    assert (found.na.tolist(), found.failed.tolist()) == (
        [False, True, False, False],
        [False, False, True, False],
    )
    card = Reads().card
    whole = Scores(judges=(card,), table={"reads": (tuple(scores),)})
    weights = {"*": {"reads": 1.0}}
    advantages, seen = rlhf.advantage.group_advantages(whole, weights, ["any"])
    assert advantages.live_PG[0].tolist() == found.ok.tolist()
    assert advantages.value_PG[0].tolist() == pytest.approx([-1, 0, 0, 1])
    assert seen.metrics["reward/reads/mean"] == 2.0 == np.nanmean(found.value)


# --- asking ---------------------------------------------------------------------------------------


def test_the_cost_of_a_judge_is_linear_in_pictures():
    """No pair is scored by itself: pictures in many pairs are asked for once."""

    def calls(groups, levels):
        judge = Reads()
        one = bench(_rows(groups, levels))
        fit(ask(judge, one.samples), one)
        return judge.seen

    assert calls(5, (10, 20, 40, 80)) == 5 * 4
    assert calls(10, (10, 20, 40, 80)) == 2 * calls(5, (10, 20, 40, 80))
    assert calls(5, tuple(range(10, 90, 10))) == 2 * calls(5, (10, 20, 40, 80))
    judges = [Reads(), Reads()]
    for judge, groups in zip(judges, (100, 200), strict=True):
        measure(judge, bench(_rows(1)), bench(_rows(groups)), Settings(probes=4, steady=4))
    extra = [judge.seen - 4 * groups for judge, groups in zip(judges, (100, 200), strict=True)]
    assert extra[0] == extra[1]  # dev, canaries and steadiness do not grow with the test set


def test_a_judge_sees_the_stored_pixels(tmp_path):
    """Nothing lossy lies between the file and the judge."""
    rows = records("fidelity", 2, 0)
    folder = write(tmp_path, "test", rows)
    judge = Reads()
    ask(judge, bench(read_judgements(folder, "test")).samples)
    noise = np.random.default_rng(0).integers(0, 256, (3, 33, 65), dtype=np.uint8)
    rows[0]["images"][0] = _png(noise)
    write(folder, "test", rows)
    ask(judge, bench(read_judgements(folder, "test")).samples)
    assert any(np.array_equal(s.image, noise) for s in judge.samples)


def _png(picture):
    from tests.rewards.judgements import png

    return png(picture)


class Positional(Reads):
    """Prefers whatever comes first, and the larger the batch the more."""

    def score(self, samples):
        super().score(samples)
        return [Score(value=1 - i / 100 + len(samples)) for i in range(len(samples))]


def test_a_judge_that_depends_on_its_batch_is_found_out():
    test = bench(_rows(8))
    pairs = [
        (test.samples[i], test.samples[j]) for i, j in zip(test.first, test.second, strict=True)
    ]
    assert swap_consistency(Reads(), pairs).tolist() == [1.0] * 48
    assert swap_consistency(Positional(), pairs).tolist() == [0.0] * 48
    assert drift(Reads(), test.samples) == (0.0, 0)
    assert drift(Positional(), test.samples)[0] >= 31

    class Moody(Reads):
        def score(self, samples):
            return [Score(value=1.0)] if len(samples) == 1 else [failed("busy") for _ in samples]

    assert drift(Moody(), test.samples) == (0.0, 32)
    assert spread_out(10, 3).tolist() == [0, 4, 9] and spread_out(2, 9).tolist() == [0, 1]


def test_an_untrained_judge_stands_beside():
    class Fresh(Reads):
        def fresh(self, seed):
            return Reads(lambda x: -x)

    assert _value(_measured(Fresh()), "untrained/pairwise_accuracy") == 0.0
    judge = untrained(Reads(), seed=3)
    assert isinstance(judge, RandomProjection)
    sample = Sample(image=_picture(200), prompt="any", category="any")
    other = replace(sample, prompt="other")
    assert judge.score([sample]) == untrained(Reads(), 3).score([other])
    assert judge.score([sample]) != untrained(Reads(), 4).score([sample])


# --- rows -----------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(tmp_path):
    wrote = records("fidelity", 3, 0) + records("instruction", 2, 9, category="edits")
    folder = write(tmp_path, "test", wrote)
    rows = read_judgements(folder, "test")
    assert len(rows) == len(wrote) == 30
    assert [r.gold for r in rows] == [tuple(w["gold"]) for w in wrote]
    assert [r.judgement.ratings for r in rows] == [tuple(w["ratings"]) for w in wrote]
    edits = read_judgements(folder, "test", "instruction")
    assert len(edits) == 12 and all(len(r.judgement.sources) == 1 for r in edits)
    sample = edits[0].samples()[0]
    assert sample.target == wrote[-1 - 11]["target"] and sample.columns["words"] > 2
    found = bench(rows)
    assert len(found.samples) == 5 * 4 and len(found.first) == 30
    assert len(found.lists) == 5 and all(len(index) == 4 for index, _ in found.lists)
    gap = found.gold[found.first] - found.gold[found.second]
    assert gap.tolist() == [w["gold"][0] - w["gold"][1] for w in wrote]


def test_one_reader_serves_training_and_benchmark(tmp_path):
    """The same judgements, from either form of table; the truth beside them is no judge's."""
    wrote = records("instruction", 2, 9, category="edits")
    folder = write(tmp_path, "test", wrote)
    lines = []
    for k, row in enumerate(wrote):
        row = row | {name: [] for name in ("images", "sources")}
        for name in ("images", "sources"):
            for i, data in enumerate(wrote[k][name]):
                (tmp_path / f"{k}-{name}-{i}.png").write_bytes(data)
                row[name] = [*row[name], f"{k}-{name}-{i}.png"]
        lines.append(json.dumps(row | {"split": "test"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    first = read_judgements(folder, "test")
    second = read_judgements(tmp_path / "rows.jsonl", "test")
    trained = load_judgements(folder, "test")
    for one, other, seen, was in zip(first, second, trained, wrote, strict=True):
        assert (one.gold, one.origin, one.target) == (other.gold, other.origin, other.target)
        assert (one.gold, one.target) == (tuple(was["gold"]), was["target"])
        assert dict(one.judgement.columns) == {"words": was["words"]}
        assert {**one.judgement.columns, "gold": was["gold"]}.items() <= seen.columns.items()
        assert one.judgement.ratings == other.judgement.ratings == seen.ratings
        for a, b, c in zip(one.samples(), other.samples(), seen.samples(), strict=True):
            assert np.array_equal(a.image, b.image) and np.array_equal(a.image, c.image)
            assert np.array_equal(a.sources[0], b.sources[0]) and a.target == b.target


def test_a_part_of_the_rows_is_whole_prompts(tmp_path):
    folder = write(tmp_path, "dev", records("fidelity", 6, 0))
    part = read_judgements(folder, "dev", most=20)
    groups = Counter(row.judgement.group for row in part)
    assert len(part) == 18 and set(groups.values()) == {6}
    assert [r.gold for r in part] == [r.gold for r in read_judgements(folder, "dev", most=20)]
    assert len(read_judgements(folder, "dev", most=1)) == 6  # at least one prompt


def test_rankings_and_points_are_lists_where_there_is_no_gold():
    pictures = tuple(_picture(level) for level in (10, 20, 30))
    given = {"axis": "light", "prompt": "p", "images": pictures}
    rank = Row(judgement=Judgement(kind="rank", ratings=(3.0, 1.0, 2.0), **given))
    points = [
        Row(judgement=Judgement(kind="point", ratings=(r,), **{**given, "images": (p,)}))
        for p, r in zip((*pictures[:2], pictures[0]), (1.0, 5.0, 3.0), strict=True)
    ]
    found = bench([rank, *points])
    assert len(found.samples) == 3
    assert [(i.tolist(), t.tolist()) for i, t in found.lists] == [
        ([0, 1, 2], [-3, -1, -2]),
        ([0, 1], [2.0, 5.0]),
    ]
    assert found.label.tolist() == [0.0, 0.0, 1.0] and found.truth.tolist() == [0, 0, 1]


def test_clean_pictures_are_renders_then_what_nobody_spoilt():
    test = bench(_rows(5))
    assert test.gold[clean(test, 3)].tolist() == [0.8] * 3
    named = replace(test, origin=tuple("render" if g == 0.2 else "" for g in test.gold))
    assert test.gold[clean(named, 9)].tolist() == [0.2] * 5
    spoilt = replace(test, origin=("corrupted:blur",) * 20)
    assert clean(spoilt, 9) == []


def test_data_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected dev-\*\.parquet"):
        read_judgements(tmp_path, "dev")
    rows = records("fidelity", 1, 0)
    write(tmp_path, "dev", [{k: v for k, v in r.items() if k != "ratings"} for r in rows])
    with pytest.raises(DataError, match="ratings"):
        read_judgements(tmp_path, "dev")
    write(tmp_path, "dev", [rows[0] | {"gold": [1.0]}])
    with pytest.raises(DataError, match="one entry for each of 2 pictures"):
        read_judgements(tmp_path, "dev")
    write(tmp_path, "dev", [rows[0] | {"gold": ["high", "low"]}])
    with pytest.raises(DataError, match="gold: expected a list of numbers"):
        read_judgements(tmp_path, "dev")
    write(tmp_path, "dev", rows)
    with pytest.raises(DataError, match="rows of axis 'beauty', got axes .'fidelity'.: name one"):
        read_judgements(tmp_path, "dev", "beauty")


def test_the_oracle_is_its_own_gold(tmp_path):
    folder = write(tmp_path, "test", records("fidelity", 4, 0))
    test = bench(read_judgements(folder, "test"))
    answers = ask(OracleJudge("fidelity"), test.samples)
    assert np.array_equal(answers.value, test.gold)
    found = on_pairs(answers, test, None, Settings())
    assert found["pairwise_accuracy"]["value"] == 1.0
    assert found["annotator_accuracy"]["value"] < 1.0
    assert "tie_calibrated_accuracy" not in found
