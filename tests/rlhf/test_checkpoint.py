import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from rlhf import checkpoint
from rlhf.checkpoint import State
from rlhf.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    lora = {"up.weight": torch.randn(4, 3, generator=generator)}
    moments = {"up.weight/exp_avg": torch.randn(4, 3, generator=generator)}
    meta = {"step": seed, "rng": 2**127 + seed, "lr": 0.1 + 0.2, "cursor": [1, None, "x"]}
    return State({"slots/train": lora, "optimiser": moments}, meta)


def assert_equal(got: State, want: State) -> None:
    assert got.meta == want.meta and got.tensors.keys() == want.tensors.keys()
    for part, tensors in want.tensors.items():
        assert got.tensors[part].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(got.tensors[part][name], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 2, 4)], ids=str)
def test_round_trip_is_bit_exact(tmp_path, dtype, shape):
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    tensor = raw.view(dtype).reshape(shape)  # every bit pattern, NaNs and infinities among them
    got = checkpoint.load(checkpoint.save(tmp_path, 1, State({"a/b": {"x": tensor}})))
    back = got.tensors["a/b"]["x"]
    assert back.dtype is dtype and back.shape == tensor.shape and bits(back) == bits(tensor)


def test_views_shared_and_grad_tensors_are_stored_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    parts = {"all": base, "again": base, "turned": base.T, "row": base[1]}
    got = checkpoint.load(checkpoint.save(tmp_path, 1, State({"w": parts}))).tensors["w"]
    assert all(torch.equal(got[name], tensor) for name, tensor in parts.items())


def test_meta_and_extra_files_come_back(tmp_path):
    path = checkpoint.save(tmp_path, 7, state(), files={"lora/config.json": b"{}"})
    assert path.name == "step_000007" and (path / "lora/config.json").read_bytes() == b"{}"
    assert_equal(checkpoint.load(path), state())


def test_a_run_a_folder_and_a_checkpoint_are_all_places_to_load_from(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, state(step))
    newest = tmp_path / "checkpoints" / "step_000002"
    assert checkpoint.latest(tmp_path) == checkpoint.latest(tmp_path / "checkpoints") == newest
    for place in (tmp_path, tmp_path / "checkpoints", newest):
        assert_equal(checkpoint.load(place), state(2))
    assert_equal(checkpoint.load(tmp_path, step=1), state(1))
    assert checkpoint.step_of(newest) == 2
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9: it has \[1, 2\]"):
        checkpoint.load(tmp_path, step=9)


def test_nothing_to_load_is_said(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.load(tmp_path)


def truncate(path):
    data = (path / "optimiser.safetensors").read_bytes()
    (path / "optimiser.safetensors").write_bytes(data[:-1])


def flip(path):
    data = bytearray((path / "optimiser.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimiser.safetensors").write_bytes(data)


def remove(path):
    (path / "slots" / "train.safetensors").unlink()


def edit_meta(path):
    (path / "meta.json").write_text((path / "meta.json").read_text().replace("0.3", "0.4"))


def break_seal(path):
    (path / "complete.json").write_text('{"step": 1, "fil')


@pytest.mark.parametrize("damage", [truncate, flip, remove, edit_meta, break_seal])
def test_damage_is_refused_with_advice(tmp_path, damage):
    path = checkpoint.save(tmp_path, 1, state())
    damage(path)
    with pytest.raises(CheckpointError, match="remove"):
        checkpoint.load(path)


def test_an_unsealed_directory_is_no_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    late = checkpoint.save(tmp_path, 2, state(2))
    (late / "complete.json").unlink()
    assert_equal(checkpoint.load(tmp_path), state(1))
    checkpoint.save(tmp_path, 2, state(3))
    assert_equal(checkpoint.load(tmp_path), state(3))


def test_a_complete_checkpoint_is_never_overwritten(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save(tmp_path, 1, state(2))
    assert_equal(checkpoint.load(tmp_path), state(1))


@pytest.mark.parametrize("calls", range(7))
def test_a_full_disk_at_any_sync_leaves_the_folder_as_it_was(tmp_path, monkeypatch, calls):
    checkpoint.save(tmp_path, 1, state(1))
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    sync, left = os.fsync, [calls]

    def full(handle):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="could not write.*free disk"):
        checkpoint.save(tmp_path, 2, state(2), keep_last=1)
    monkeypatch.undo()
    if not (tmp_path / "step_000002").exists():  # the last sync comes after the rename
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert_equal(checkpoint.load(tmp_path, step=1), state(1))


def test_a_file_that_cannot_grow_leaves_nothing(tmp_path):
    """A real limit of the operating system, met inside the tensor writer."""
    checkpoint.save(tmp_path, 1, state(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="could not write"):
            checkpoint.save(tmp_path, 2, State({"big": {"x": torch.zeros(4096)}}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path, 1, state(1))
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom rlhf import checkpoint\n"
        "def die(path): os.kill(os.getpid(), 9)\n"
        "checkpoint._inventory = die\n"
        "checkpoint.save(Path(sys.argv[1]), 2, checkpoint.State({'a': {'x': torch.zeros(4)}}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9 and len(list(tmp_path.iterdir())) == 2
    assert_equal(checkpoint.load(tmp_path), state(1))
    checkpoint.save(tmp_path, 2, state(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_unstorable_state_is_refused_and_leaves_nothing(tmp_path):
    for meta in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(CheckpointError, match="cannot be stored"):
            checkpoint.save(tmp_path, 1, State({}, meta))
    assert not list(tmp_path.iterdir())


def kept(folder) -> list[int]:
    return [checkpoint.step_of(p) for p in checkpoint.completed(folder)]


def test_keep_last_and_keep_best(tmp_path):
    metrics = {1: 0.3, 2: 0.9, 3: 0.5, 4: None, 5: 0.9, 6: 0.1}
    for step, metric in metrics.items():
        checkpoint.save(tmp_path, step, state(step), keep_last=2, keep_best=2, metric=metric)
    assert kept(tmp_path) == [2, 5, 6]
    shutil.rmtree(tmp_path)
    for step in range(1, 5):
        checkpoint.save(tmp_path, step, state(step), keep_last=1)
    assert kept(tmp_path) == [4]
    with pytest.raises(CheckpointError, match="keep_last >= 1"):
        checkpoint.save(tmp_path, 9, state(), keep_last=0)


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, state(0))
    assert kept(tmp_path) == [999_999, 1_000_000]
