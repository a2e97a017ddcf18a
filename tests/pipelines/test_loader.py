"""Records of `rlhf data` as batches: sizes, layouts, what is broken, and what is made ahead."""

import math
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipelines import pretrain
from pipelines.data import loader
from pipelines.data.buckets import Ladder
from pipelines.data.examples import RecordExamples, SceneItem
from pipelines.data.loader import (
    Ahead,
    Batches,
    Draw,
    Draws,
    Encoder,
    Noising,
    split_draw,
    token_counts,
)
from pipelines.data.records import row_of
from pipelines.data.scenes import mixture
from pipelines.data.sift import parquet
from pipelines.data.stages import Settings, Span
from rlhf.errors import ConfigError, DataError
from rlhf.flow import flow_matching, logit_normal
from rlhf.learner import LearnerConfig
from rlhf.schedule import shift_of
from rlhf.training import Pace
from tests.pipelines.pictures import png, record
from tests.rlhf.tiny import make_policy

LADDER = Ladder(resolutions=(64, 96), aspects=(2 / 3, 1.0, 1.5), budget=72)
BAD, EMPTY = 7, 9  # rows whose picture or caption is broken


def write(path, rows):
    path.mkdir()
    with parquet(path / "000000.parquet") as add:
        for row in rows:
            add(row)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty records of two sizes, every fourth an edit, every eighth from a source of another
    shape, numbers 12 and 36 from two sources; one picture and one caption are broken.
    """
    rows = []
    for n in range(40):
        data = png(n, 96, 96) if n % 3 else png(n, 64, 100)
        sources = () if n % 4 else (png(n + 50, 96, 96) if n % 8 else png(n + 50, 70, 64),)
        sources += (png(n + 90, 70, 64),) * (n in (12, 36))
        one = row_of(record(data, f"number {n}" + " of many" * (n % 2), sources=sources), {})
        if n == BAD:
            one["image"] = {"bytes": data[:300], "path": None}
        rows.append(one | ({"text": " "} if n == EMPTY else {}))
    return write(tmp_path_factory.mktemp("set") / "data", rows)


@pytest.fixture(scope="module")
def policy(tiny_base):
    return make_policy(tiny_base)


def batches_of(folder, policy, edits=0.25, dropout=0.0, **changes):
    settings = Settings(
        resolutions=LADDER.resolutions, edits=edits, data=str(folder), mixture={}, captions={}
    )
    span = Span(number=0, name="S", phase="P", first=1, last=99, rate=1.0, settings=settings)
    encoder = Encoder(policy, None)
    draws = Draws((span,), lambda sides: LADDER, 0, 3, token_counts(encoder))
    noising = Noising(seed=1, copies=2, dropout=dropout, shift=None)
    return Batches(draws, encoder, replace(noising, **changes))


def test_records_come_at_the_size_of_their_bucket_and_every_fiftieth_is_held_out(folder):
    found = RecordExamples(str(folder), LADDER)
    held = RecordExamples(str(folder), LADDER, held=True)
    assert (len(found.sizes), len(held.sizes)) == (39, 1)
    assert held.captions == ["number 0"] and found.captions[0] == "number 1 of many"
    assert found.edits.sum() == 9 and held.edits.all()
    target, sources = found[3].pictures((96, 96))  # number 4
    assert target.shape == (3, 96, 96) and [s.shape for s in sources] == [(3, 96, 96)]
    target, sources = found[7].pictures((96, 96))  # number 8, whose source has another shape
    assert target.shape == (3, 96, 96) and sources[0].shape[1:] in LADDER.rungs()[1]
    assert len(found[11].pictures((96, 96))[1]) == 2  # number 12
    assert len({found[i].content() for i in range(39) if i + 1 not in (EMPTY,)}) == 38


def test_batches_of_records_cover_them_and_count_what_is_broken(folder, policy):
    make = batches_of(folder, policy)
    seen, sizes = Counter(), set()
    for step in range(1, 60):
        draw = make.draws(step)
        batch = make(draw)
        seen.update(draw.index)
        sizes.add(batch.size)
        examples = make.draws.examples_of(0)
        broken = {BAD - 1, EMPTY - 1} & set(draw.index)
        left = len(draw.index) - sum(draw.index.count(i) for i in broken)
        assert (batch.rows, batch.weight) == ((2 * left, 1) if left else (2, 0))
        lengths = [p.condition.embeds_PLD.shape[1] for p in batch.parts]
        layouts = [p.condition.layout for p in batch.parts]
        assert len(set(layouts)) == len(layouts) and min(lengths) > 0
        kinds = {bool(examples.edits[i]) for i in draw.index}
        found = {part.condition.sources_PMC is not None for part in batch.parts}
        assert len(kinds) == 1 and (found == kinds or not left)
    assert seen.keys() == set(range(39)) and len(sizes) >= 2
    assert make.encoder.broken == seen[BAD - 1] + seen[EMPTY - 1] > 0


def test_a_batch_does_not_depend_on_how_it_is_split(folder, policy):
    make = batches_of(folder, policy, dropout=0.5)
    for step in range(1, 9):
        draw = make.draws(step)
        whole = make(draw)
        if len(draw.index) % 2 or {BAD - 1, EMPTY - 1} & set(draw.index):
            continue
        halves = [make(half) for half in split_draw(draw, 2)]
        rows = {}
        for batch in (whole, *halves):
            for part in batch.parts:
                for i, row in enumerate(part.noise):
                    kept = rows.setdefault(row.flatten()[:4].numpy().tobytes(), [])
                    kept.append((part.sigma[i], part.latents[i], part.condition.embeds_PLD[i // 2]))
        assert all(len(both) == 2 for both in rows.values()) and len(rows) == whole.rows
        for both in rows.values():
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
        weights = [half.rows / whole.rows for half in halves]
        losses = [flow_matching(policy, half).item() for half in halves]
        together = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        assert together == pytest.approx(flow_matching(policy, whole).item(), rel=1e-5)


def test_two_sources_train_beside_one_and_both_are_read(folder, policy):
    make = batches_of(folder, policy, edits=1.0)
    examples = make.draws.examples_of(0)
    step = next(s for s in range(1, 20) if {11, 35} & set(make.draws(s).index))
    batch = make(make.draws(step))
    counts_of = {len(examples[i].pictures(batch.size)[1]) for i in make.draws(step).index}
    assert 2 in counts_of and math.isfinite(flow_matching(policy, batch).item())
    longest = max(batch.parts, key=lambda part: part.condition.sources_PMC.shape[1])
    losses = []
    for sources in (longest.condition.sources_PMC, longest.condition.sources_PMC.roll(5, dims=1)):
        moved = replace(longest, condition=replace(longest.condition, sources_PMC=sources))
        losses.append(flow_matching(policy, replace(batch, parts=(moved,))).item())
    assert losses[0] != losses[1]


def test_dropped_prompts_keep_their_sources(folder, policy):
    kept, dropped = (batches_of(folder, policy, edits=1.0, dropout=p) for p in (0.0, 0.999))
    one, other = kept(kept.draws(1)), dropped(dropped.draws(1))
    for a, b in zip(one.parts, other.parts, strict=True):
        assert torch.equal(a.condition.sources_PMC, b.condition.sources_PMC)
        assert b.condition.embeds_PLD.shape[1] < a.condition.embeds_PLD.shape[1]
        assert torch.equal(a.latents, b.latents) and torch.equal(a.sigma, b.sigma)
    plain = batches_of(folder, policy, edits=0.0, dropout=0.999)
    part = plain(plain.draws(1)).parts[0]
    empty = policy.encode("").embeds_PLD
    assert torch.equal(part.condition.embeds_PLD[:1], empty)


def test_noise_levels_are_logit_normal_shifted_as_the_sampler_does(folder, policy):
    u = torch.linspace(-3, 3, 7)
    assert torch.allclose(logit_normal(u, 0.0), u.sigmoid())
    assert torch.allclose(logit_normal(u, 0.7), (u + 0.7).sigmoid())  # the shift moves the logit
    shifts = {}
    for shift in (None, 0.0):
        make = batches_of(folder, policy, edits=0.0, shift=shift)
        batch = make(make.draws(1))
        shifts[shift] = torch.cat([p.sigma for p in batch.parts]).logit(), batch.size
    (moved, size), (plain, _) = shifts[None], shifts[0.0]
    want = shift_of(size[0] * size[1] // 256, policy.pipeline.scheduler.config)
    assert torch.allclose(moved - plain, torch.full_like(plain, want), atol=1e-4)


def test_a_set_without_one_whole_picture_stops_the_run(tmp_path, policy, monkeypatch):
    rows = [row_of(record(png(n, 64, 64), f"{n}"), {}) for n in range(4)]
    for row in rows:
        row["image"] = {"bytes": row["image"]["bytes"][:100], "path": None}
    make = batches_of(write(tmp_path / "data", rows), policy, edits=0.0)
    batch = make(make.draws(1))
    assert batch.weight == 0 and flow_matching(policy, batch).item() == 0
    monkeypatch.setattr(loader, "ENOUGH", 20)
    with pytest.raises(DataError, match=r"at most 5% unreadable examples, got \d+ of \d+"):
        make(make.draws(2))


def test_what_is_missing_is_said_before_training(folder, tmp_path, tiny_base):
    known = dict(start=str(tiny_base), runs=str(tmp_path), batch=4, pace=Pace(steps=1))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="parquet files below"):
        pretrain.run(pretrain.Config(name="a", data=str(tmp_path / "none"), **known))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"x"], "text": ["y"]}), foreign / "a.parquet")
    with pytest.raises(DataError, match="none named height, n_sources, width"):
        pretrain.run(pretrain.Config(name="b", data=str(foreign), **known))
    cut = tmp_path / "cut"
    cut.mkdir()
    data = next(folder.glob("*.parquet")).read_bytes()
    (cut / "a.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot open"):
        pretrain.run(pretrain.Config(name="c", data=str(cut), **known))
    plain = write(tmp_path / "plain", [row_of(record(png(n), "x"), {}) for n in range(3)])
    with pytest.raises(ConfigError, match="got 0 edits of 2"):
        pretrain.run(pretrain.Config(name="d", data=str(plain), **known))


def test_a_run_on_records_trains_and_reports(folder, tmp_path, tiny_base):
    result = pretrain.run(
        pretrain.Config(
            start=str(tiny_base),
            runs=str(tmp_path),
            data=str(folder),
            aspects=(2 / 3, 1.0, 1.5),
            shown=1,
            batch=4,
            copies=1,
            pace=Pace(steps=12, log_every=4, save_every=99),
            learner=LearnerConfig(lr=1e-3),
        )
    )
    metrics = {name: m["value"] for name, m in result["metrics"].items()}
    assert {"heldout/flow", "activation/block0", "data/broken", "data/wait_seconds"} <= set(metrics)
    assert any(name.startswith("tokens/s/") for name in metrics)
    assert metrics["data/broken"] > 0 and np.isfinite(metrics["heldout/flow"])


def test_a_full_disk_stops_the_run_with_its_error(folder, tmp_path, tiny_base, monkeypatch):
    from pipelines.data import cache

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(cache, "atomic_write_bytes", full)
    config = pretrain.Config(
        start=str(tiny_base), runs=str(tmp_path), batch=4, examples=40, cache=str(tmp_path / "c")
    )
    with pytest.raises(OSError, match="no space left"):
        pretrain.run(replace(config, pace=Pace(steps=2)))


# --- ahead ----------------------------------------------------------------------------------------


def draw(step, first=0):
    return Draw(step=step, stage=0, size=(64, 64), index=(step,), first=first)


def test_the_next_batch_is_made_while_this_one_trains():
    made, threads = [], set()

    def make(one):
        import threading

        threads.add(threading.current_thread().name.partition("_")[0])
        time.sleep(0.05)
        made.append((one.step, one.first))
        return one

    def later(step):
        return [draw(step, 0), draw(step, 1)] if step <= 3 else []

    with Ahead(make, later) as ahead:
        for step in (1, 2, 3):
            for first in (0, 1):
                assert ahead.get(draw(step, first)) == draw(step, first)
            time.sleep(0.15)
        waited = ahead.waited
    assert sorted(made) == [(s, f) for s in (1, 2, 3) for f in (0, 1)]  # each once, no more
    assert threads == {"batches"} and 0.05 <= waited < 0.25  # the first step's alone


def test_looking_ahead_goes_on_after_a_jump():
    made = []

    def make(one):
        made.append(one.step)
        return one

    with Ahead(make, lambda step: [draw(step)]) as ahead:
        for step in (1, 2, 7, 8, 9):
            assert ahead.get(draw(step)) == draw(step)
            time.sleep(0.05)
    assert made == [1, 2, 3, 7, 8, 9, 10]


def test_tokens_are_counted_while_a_thread_encodes(policy):
    encoder, stop = Encoder(policy, None), threading.Event()
    item = SceneItem(next(e for e in mixture(40, 0, "train") if e.source is not None))
    count = token_counts(encoder)
    captions = ["a", "a red ring above a blue square on white"]
    wanted = count(captions)

    def encode():
        while not stop.is_set():
            with encoder.lock:  # what `values` does
                encoder._one(item, (64, 64))

    other = threading.Thread(target=encode)
    other.start()
    try:
        assert all(count(captions) == wanted for _ in range(200))
    finally:
        stop.set()
        other.join()


def test_held_out_batches_are_all_different_and_no_larger_than_a_part(policy):
    config = pretrain.Config(edits=0.45, batch=16, pace=Pace(steps=9, micro_batches=2))
    encoder = Encoder(policy, None)
    draws = Draws(config.spans(), config.ladder, 99, 3, token_counts(encoder)).held(0, 64)
    found = [draws(step).index for step in range(1, 9)]
    assert len({i for index in found for i in index}) == 64
    assert {len(index) for index in found} == {8}


def test_an_error_made_ahead_is_raised_where_the_batch_is_wanted():
    def make(one):
        if one.step == 2:
            raise DataError("spoilt")
        return one

    with Ahead(make, lambda step: [draw(step)]) as ahead:
        ahead.get(draw(1))
        with pytest.raises(DataError, match="spoilt"):
            ahead.get(draw(2))
