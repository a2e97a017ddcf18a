import os

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pipelines.data.cache import MemoryCache, TensorCache, content, encoder_hash
from rlhf.errors import CheckpointError


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


def test_what_cannot_be_computed_is_not_kept(tmp_path):
    for cache in (TensorCache(tmp_path, "e"), MemoryCache()):
        got = cache.fetch(["a", "b"], lambda index: [value(0) if i == 0 else None for i in index])
        assert got[0] is not None and got[1] is None
        again = cache.fetch(["b", "a"], lambda index: [value(7) for _ in index])
        assert again[0]["b"] == 7 and again[1]["b"] == 0
        assert (cache.traffic.computed, cache.traffic.found) == (2, 1)


def test_memory_keeps_the_newest():
    cache = MemoryCache(most=2)
    assert [fill(cache, [n]) for n in (0, 1, 2, 1, 0)] == [[0], [1], [2], [], [0]]


def test_an_unfinished_file_is_left_to_its_writer(tmp_path):
    fill(TensorCache(tmp_path, "e"), [0])
    mine = tmp_path / "e" / ".x.safetensors.tmp-1"
    old = tmp_path / "e" / ".y.safetensors.tmp-2"
    for path in (mine, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert fill(TensorCache(tmp_path, "e"), [0]) == []
    assert mine.exists() and not old.exists()
