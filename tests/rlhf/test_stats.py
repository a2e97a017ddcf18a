import numpy as np
import pytest

from rlhf.stats import bootstrap_gain, gain_metric


def test_pairing_removes_what_is_common():
    generator = np.random.default_rng(3)
    before = generator.normal(0, 10, size=100)
    after = before + 1 + generator.normal(0, 0.1, size=100)
    gain = bootstrap_gain(before.tolist(), after.tolist())
    assert gain.value == pytest.approx(1, abs=0.05) and 0 < gain.high - gain.low < 0.1
    metric = gain_metric(float(before.mean()), float(after.mean()), gain)
    assert set(metric) == {"before", "after", "gain", "low", "high", "n"}


def test_lengths_must_match():
    with pytest.raises(ValueError, match="paired"):
        bootstrap_gain([1.0], [1.0, 2.0])
