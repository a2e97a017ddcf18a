import numpy as np
import pytest

from rewards import stats
from rewards.stats import bootstrap, bootstrap_mean


def test_interval_agrees_with_the_normal_theory():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=900)
    got = bootstrap_mean(values.tolist(), draws=4000)
    half = 1.96 * values.std() / 30
    assert got.value == pytest.approx(values.mean()) and got.n == 900
    assert got.low == pytest.approx(got.value - half, abs=0.1 * half)
    assert got.high == pytest.approx(got.value + half, abs=0.1 * half)


def test_coverage_is_near_95_percent():
    generator = np.random.default_rng(1)
    trials = [bootstrap_mean(generator.normal(size=60).tolist(), draws=400) for _ in range(300)]
    assert 0.90 <= np.mean([t.low <= 0 <= t.high for t in trials]) <= 0.98


def test_copies_inside_a_cluster_add_no_certainty():
    values = np.random.default_rng(2).normal(size=50)
    alone = bootstrap_mean(values.tolist())
    copied = np.repeat(values, 8).tolist()
    clustered = bootstrap_mean(copied, clusters=np.repeat(np.arange(50), 8).tolist())
    naive = bootstrap_mean(copied)
    assert clustered.high - clustered.low == pytest.approx(alone.high - alone.low, rel=1e-9)
    assert naive.high - naive.low < 0.5 * (alone.high - alone.low)


def test_unequal_clusters_keep_the_mean_over_samples():
    got = bootstrap_mean([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"])
    assert got.value == 0.25 and got.low == 0.0 and got.high == 1.0


def test_the_seed_decides():
    values = [0.0, 1.0, 3.0, 7.0]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, draws=50, seed=1) != bootstrap_mean(values, draws=50, seed=2)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_values_must_be_there_and_finite(values):
    with pytest.raises(ValueError, match="finite"):
        bootstrap_mean(values)


def test_successes_may_be_booleans_integers_or_arrays():
    want = bootstrap_mean([1.0, 0.0, 1.0])
    for values in ([True, False, True], [1, 0, 1], np.array([1, 0, 1], dtype=np.float32)):
        assert bootstrap_mean(values) == want


def test_many_values_are_drawn_in_parts_of_one_stream(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = stats.bootstrap_mean(values)
    monkeypatch.setattr(stats, "AT_ONCE", 50 * 7)
    again = stats.bootstrap_mean(values)
    assert (again.low, again.high) == pytest.approx((whole.low, whole.high), abs=1e-12)


def test_lengths_must_match():
    with pytest.raises(ValueError, match="a cluster for each"):
        bootstrap_mean([1.0, 2.0], clusters=[1])


def test_any_statistic_has_the_interval_of_the_mean_where_it_is_the_mean():
    values = np.random.default_rng(4).normal(size=240)
    clusters = np.repeat(np.arange(60), 4)
    want = bootstrap_mean(values, clusters)
    got = bootstrap(lambda i: float(values[i].mean()), clusters, draws=2000)
    assert got.value == want.value and got.n == want.n
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.02)


def test_an_interval_holds_its_estimate_and_keeps_to_its_range():
    values = np.random.default_rng(5).normal(size=40)  # |mean| grows in resamples
    got = bootstrap(lambda i: abs(float(values[i].mean())), range(40), within=(0, 1))
    assert 0 <= got.low <= got.value <= got.high
    assert bootstrap(lambda i: 0.0, range(3), within=(0, 1)).high == 0.0


def test_a_draw_without_a_statistic_does_not_count():
    def spread(i):
        return float("nan") if len(set(i)) == 1 else 1.0

    assert bootstrap(spread, [0, 1]).value == 1.0
    for clusters in ([], [0]):
        with pytest.raises(ValueError, match="finite statistic"):
            bootstrap(spread, clusters)
