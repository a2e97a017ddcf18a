import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipelines.data import cache as caching
from pipelines.data.cache import TensorCache, content, encoder_hash
from rlhf.errors import CheckpointError
from tests.rlhf.tiny import TEXTS, make_policy, picture


def value(number):
    return {"a": torch.full((2, number + 1), float(number)), "b": torch.tensor(number)}


def fill(cache, numbers):
    """Values of these numbers through a cache, and the numbers that were computed for it."""
    asked = []

    def compute(index):
        asked.extend(numbers[i] for i in index)
        return [value(numbers[i]) for i in index]

    got = cache.fetch([content(str(n)) for n in numbers], compute)
    for number, found in zip(numbers, got, strict=True):
        assert found.keys() == {"a", "b"}
        assert all(torch.equal(found[k], v) for k, v in value(number).items())
    return asked


def test_values_are_computed_once_and_found_by_another_process(tmp_path):
    cache = TensorCache(tmp_path, "encoder", per_file=3)
    assert fill(cache, [0, 1, 2, 1, 3, 4]) == [0, 1, 2, 3, 4]
    assert fill(cache, [4, 0, 5]) == [5]
    assert (cache.traffic.found, cache.traffic.computed, cache.traffic.damaged) == (2, 6, 0)
    assert fill(TensorCache(tmp_path, "encoder"), [5, 4, 3, 2, 1, 0]) == []
    assert fill(TensorCache(tmp_path, "another"), [0]) == [0]


@pytest.mark.parametrize("damage", ["cut", "header", "bit", "empty"])
def test_a_damaged_file_is_counted_and_computed_again(tmp_path, damage):
    fill(TensorCache(tmp_path, "e", per_file=2), [0, 1, 2, 3])
    path = sorted((tmp_path / "e").iterdir())[0]
    with safe_open(path, "pt") as file:
        lost = {name.partition("/")[0] for name in file.keys()}
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[-1] ^= 1
    elif damage == "header":
        data[:8] = b"\xff" * 8
    path.write_bytes({"cut": data[:-9], "empty": b""}.get(damage, data))
    cache = TensorCache(tmp_path, "e", per_file=2)
    asked = fill(cache, [0, 1, 2, 3])
    assert asked and {content(str(n)) for n in asked} <= lost
    assert cache.traffic.damaged == 1
    again = TensorCache(tmp_path, "e")
    fill(again, [0, 1, 2, 3])
    assert fill(again, [0, 1, 2, 3]) == [] and again.traffic.damaged == 0


def test_a_file_damaged_while_the_cache_is_open_is_seen(tmp_path):
    cache = TensorCache(tmp_path, "e")
    fill(cache, [0, 1])
    (path,) = (tmp_path / "e").iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert fill(cache, [0, 1]) == [0, 1] and cache.traffic.damaged == 1


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError):
        fill(TensorCache(tmp_path, "e"), [0])
    assert list((tmp_path / "e").iterdir()) == []
    with pytest.raises(CheckpointError, match="expected 1 values"):
        TensorCache(tmp_path, "e").fetch(["k"], lambda index: [])


def test_content_tells_apart_what_differs():
    flat = np.zeros((3, 4, 6), np.uint8)
    parts = [("ab",), ("a", "b"), (b"ab",), (flat,), (flat.reshape(3, 6, 4),), (flat, "a"), ("",)]
    assert len({content(*p) for p in parts}) == len(parts)
    assert content("a", flat) == content("a", flat.copy())


def test_the_encoder_hash_follows_weights_and_settings():
    torch.manual_seed(0)
    one = torch.nn.Linear(2, 2)
    first = encoder_hash({"m": one}, {"size": 64})
    assert encoder_hash({"m": one}, {"size": 64}) == first != encoder_hash({"m": one}, {"size": 32})
    with torch.no_grad():
        one.bias[0] += 1
    assert encoder_hash({"m": one}, {"size": 64}) != first


def test_latents_and_conditions_come_back_as_they_were_made(tmp_path, tiny_base):
    policy = make_policy(tiny_base)
    shown = [picture(1, 64, 96), picture(2, 32, 32), picture(1, 64, 96)]
    store = caching.latent_cache(policy, tmp_path)
    first = caching.latents(policy, shown, store)
    assert [t.shape for t in first] == [(24, 64), (4, 64), (24, 64)]
    assert torch.equal(first[0], policy.encode("x", [shown[0]]).sources_PMC[0])
    again = caching.latent_cache(policy, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(first, caching.latents(policy, shown, again), strict=True)
    )
    assert (store.traffic.computed, again.traffic.computed, again.traffic.found) == (2, 0, 2)

    sources = [[], [shown[1]], []]
    fresh = caching.condition_cache(policy, tmp_path)
    made = caching.conditions(policy, TEXTS[:3], sources, fresh)
    full = caching.condition_cache(policy, tmp_path)
    found = caching.conditions(policy, TEXTS[:3], sources, full)
    assert fresh.folder != store.folder
    assert (fresh.traffic.computed, full.traffic.computed, full.traffic.found) == (3, 0, 3)
    for text, given, a, b in zip(TEXTS, sources, made, found, strict=False):
        want = policy.encode(text, given)
        assert a.layout == b.layout == want.layout
        assert torch.equal(b.embeds_PLD, want.embeds_PLD)
        assert torch.equal(b.image_slots_L, want.image_slots_L)
        assert (b.sources_PMC is None) == (not given)
