"""Prompt sets: schema, the scenes world's splits, and batches as seeded permutations."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rewards import images
from rewards.scenes import world
from rewards.scenes.render import render
from rewards.scenes.specs import parse
from rlhf.errors import ConfigError, PromptError
from rlhf.prompts import Part, PromptSet, batch_of, load_prompts
from rlhf.types import Prompt

SPLITS = ("train", "heldout", "align-heldout")


def write(tmp_path, *rows):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    return PromptSet(source=str(path), count=0)


def test_every_column_arrives_and_free_ones_go_to_the_judges(tmp_path):
    source = tmp_path / "s.png"
    source.write_bytes(b"")
    row = {
        "prompt": "make it red",
        "category": "edits",
        "negative_prompt": "blurry",
        "source_images": [str(source)],
        "target": "{}",
        "answer": 42,
        "who": None,
    }
    full, bare = load_prompts(write(tmp_path, row, {"prompt": "a cat"}))
    assert full.text == "make it red" and full.category == "edits" and full.negative == "blurry"
    assert full.sources == (str(source),) and full.target == "{}"
    assert full.columns == {"answer": 42, "who": None}
    assert (bare.text, bare.category, bare.negative, bare.sources) == ("a cat", "general", "", ())
    assert bare.target is None and bare.columns == {} and full.id != bare.id


def test_count_takes_the_first(tmp_path):
    rows = [{"prompt": f"p{i}"} for i in range(5)]
    made = write(tmp_path, *rows)
    assert len(load_prompts(made)) == 5
    few = load_prompts(PromptSet(source=made.source, count=2))
    assert [p.text for p in few] == ["p0", "p1"]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "x"}, "row 2: expected a column 'prompt'.*columns: .'text'"),
        ({"prompt": "  "}, "expected a column 'prompt'"),
        ({"prompt": 3}, "expected a column 'prompt'"),
        ({"prompt": "x", "target": {"a": 1}}, "expected text in 'target', got dict"),
        ({"prompt": "x", "negative_prompt": 1}, "expected text in 'negative_prompt'"),
        ({"prompt": "x", "source_images": [1]}, "expected a list of paths"),
        ({"prompt": "x", "source_images": ["gone.png"]}, "there is no such file"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, words):
    with pytest.raises(PromptError, match=words):
        load_prompts(write(tmp_path, {"prompt": "fine"}, row))


def test_empty_absent_and_unreadable_sets_are_refused(tmp_path):
    with pytest.raises(PromptError, match="empty set"):
        load_prompts(write(tmp_path))
    with pytest.raises(PromptError, match="there is no such file"):
        load_prompts(PromptSet(source=str(tmp_path / "gone.jsonl")))
    with pytest.raises(PromptError, match="a path `datasets` can open"):
        load_prompts(PromptSet(source=str(tmp_path / "nothing")))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{oops\n')
    with pytest.raises(PromptError, match="line 2: expected a JSON object"):
        load_prompts(PromptSet(source=str(tmp_path / "bad.jsonl")))
    with pytest.raises(ConfigError, match="prompts.count"):
        PromptSet(count=-1).check()


# --- scenes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", ["objects", "portraits", "text"])
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_sets_are_distinct_prompts_with_their_specs(category, split):
    got = load_prompts(PromptSet(source=f"scenes/{category}/2@{split}", count=16))
    assert len({p.text for p in got}) == len({p.id for p in got}) == 16
    for prompt in got:
        spec = parse(prompt.target)
        assert prompt.category == category == world.category_of(spec)
        assert world.split_of(spec) == split and world.terse(spec) == prompt.text
    assert got[:8] == load_prompts(PromptSet(source=f"scenes/{category}/2@{split}", count=8))


def test_a_held_out_combination_is_never_trained_on():
    sets = {
        s: {
            parse(p.target).key
            for p in load_prompts(PromptSet(source=f"scenes/objects/2@{s}", count=n))
        }
        for s, n in zip(SPLITS, (512, 64, 64), strict=True)
    }
    for one, other in (("train", "heldout"), ("train", "align-heldout"), SPLITS[1:]):
        assert not sets[one] & sets[other]
    assert len(sets["train"]) > 64


@pytest.mark.parametrize("split", SPLITS)
def test_edits_come_with_what_they_start_from_drawn_once(split, tmp_path):
    made = PromptSet(source=f"scenes/edits@{split}", count=12, pictures=str(tmp_path / "p"))
    got = load_prompts(made)
    assert len({p.id for p in got}) == 12
    for prompt in got:
        edit = parse(prompt.target)
        assert prompt.category == "edits" == world.category_of(edit)
        assert world.split_of(edit) == split and prompt.text == edit.instruction
        (path,) = prompt.sources
        assert np.array_equal(images.load_image(path), render(edit.source, 64))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "p").iterdir()}
    assert load_prompts(made) == got
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "p").iterdir()}
    large = load_prompts(replace(made, count=2, sizes=((96, 128), (128, 192))))
    assert [images.size_of(p.sources[0]) for p in large] == [(96, 96)] * 2


def test_one_instruction_about_two_pictures_is_two_edits(tmp_path):
    made = PromptSet(source="scenes/edits@train", count=200, pictures=str(tmp_path))
    got = load_prompts(made)
    assert len({p.text for p in got}) < 200 == len({(p.text, p.sources) for p in got})


@pytest.mark.parametrize(
    "source, count, words",
    [
        ("scenes/animals@train", 4, "expected scenes/<objects"),
        ("scenes/objects/4@train", 4, "expected scenes/<objects"),
        ("scenes/objects/12@train", 4, "expected scenes/<objects"),
        ("scenes/objects", 4, "expected scenes/<objects"),
        ("scenes/objects@test", 4, "expected scenes/<objects"),
        ("scenes/objects@train", 0, "count >= 1"),
        ("scenes/objects/1@align-heldout", 100, "expected 100 different prompts, there are"),
    ],
)
def test_scenes_sets_that_do_not_exist_are_refused(source, count, words):
    with pytest.raises(PromptError, match=words):
        load_prompts(PromptSet(source=source, count=count))


def test_sizes_are_a_rows_own_or_those_of_its_set_in_turn(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "height": 32, "width": 64}, {"prompt": "c"}]
    made = write(tmp_path, *rows)
    assert [p.size for p in load_prompts(made)] == [None, (32, 64), None]
    sized = load_prompts(replace(made, sizes=((64, 64), (64, 96))))
    assert [p.size for p in sized] == [(64, 64), (32, 64), (64, 64)]
    assert all("height" not in p.columns for p in sized)
    mix = {made.source: Part(sizes=((96, 64),)), "scenes/text@train": Part(count=3)}
    found = {p.text: p.size for p in load_prompts(PromptSet(sources=mix))}
    assert found["a"] == (96, 64) and found["b"] == (32, 64) and None in found.values()
    for bad in ({"height": 64}, {"height": 64, "width": 0}, {"height": "64", "width": 64}):
        with pytest.raises(PromptError, match="'height' and 'width' in pixels, both or neither"):
            load_prompts(write(tmp_path, {"prompt": "x", **bad}))


# --- batches --------------------------------------------------------------------------------------


def numbered(n):
    return [Prompt(id=str(i), text=str(i), category="c") for i in range(n)]


def test_an_epoch_is_a_permutation_and_epochs_differ():
    prompts = numbered(12)
    epochs = [
        [p.id for i in range(3 * e + 1, 3 * e + 4) for p in batch_of(prompts, 4, i, seed=0)]
        for e in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch, key=int) == [p.id for p in prompts]
    assert len({tuple(e) for e in epochs}) == 3
    assert epochs[0] != [p.id for p in batch_of(prompts, 12, 1, seed=1)]


def test_batches_need_no_memory_and_no_prompt_is_lost_for_ever():
    prompts = numbered(10)
    assert batch_of(prompts, 4, 7, 3) == batch_of(prompts, 4, 7, 3)
    seen = Counter(p.id for i in range(1, 61) for p in batch_of(prompts, 4, i, 0))
    assert (
        len(seen) == 10 and min(seen.values()) > 15
    )  # two are left out of each epoch, not always the same
    assert all(len({p.id for p in batch_of(prompts, 4, i, 0)}) == 4 for i in range(1, 20))


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(PromptError, match="expected at least 5 prompts for one iteration, got 4"):
        batch_of(numbered(4), 5, 1, 0)


# --- several sources ------------------------------------------------------------------------------


def mixed(objects=12, portraits=4, text=6):
    return PromptSet(
        sources={
            "scenes/objects/2@train": Part(share=4, count=objects),
            "scenes/portraits/1@train": Part(count=portraits),
            "scenes/text/1@train": Part(count=text),
        }
    )


def test_every_batch_of_a_mixed_set_has_the_stated_shares_and_each_source_its_own_epochs():
    made = mixed()
    prompts = load_prompts(made)
    batches = [batch_of(prompts, 6, i, 3, made.shares()) for i in range(1, 13)]
    for batch in batches:
        assert [p.category for p in batch] == ["objects"] * 4 + ["portraits", "text"]
        assert len({p.id for p in batch}) == 6
    assert batches == [batch_of(prompts, 6, i, 3, made.shares()) for i in range(1, 13)]
    seen = Counter(p.id for batch in batches for p in batch)
    by = {c: {seen[p.id] for p in prompts if p.category == c} for c in ("objects", "portraits")}
    assert by == {"objects": {4}, "portraits": {3}}  # 12 iterations: 4 epochs of 12, 3 epochs of 4
    twelve = batch_of(prompts, 12, 1, 3, made.shares())
    assert Counter(p.category for p in twelve) == {"objects": 8, "portraits": 2, "text": 2}


def test_a_mixed_set_has_the_prompts_of_its_sources_evenly_interleaved():
    prompts = load_prompts(mixed(8, 4, 4))
    alone = load_prompts(PromptSet(source="scenes/objects/2@train", count=8))
    assert [p for p in prompts if p.category == "objects"] == alone
    assert Counter(p.category for p in prompts[:8]) == {"objects": 4, "portraits": 2, "text": 2}


def test_a_mixture_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="a multiple of 6.*got 8: write 6"):
        mixed().check_batch(8)
    mixed().check_batch(12)
    PromptSet().check_batch(5)
    with pytest.raises(ConfigError, match="a share of 1 or more"):
        Part(share=0).check()
    with pytest.raises(PromptError, match="at least 8 prompts of scenes/portraits/1@train.*got 4"):
        batch_of(load_prompts(mixed(40, 4, 8)), 48, 1, 0, mixed().shares())
    with pytest.raises(PromptError, match="count >= 1"):
        load_prompts(PromptSet(sources={"scenes/text/1@train": Part()}))
