"""Small files in the layouts that the cards of the data sets give."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rewards import images
from rewards.errors import DataError
from rewards.training import readers
from rewards.training.table import load_judgements, write_judgements


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (3, 8, 6), dtype=np.uint8)


def encoded(seed):
    buffer = io.BytesIO()
    images.to_pil(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def saved(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        images.save_png(folder / name, picture(seed))


def written(path, rows):
    path.write_text(json.dumps(rows))
    return path


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_hpdv2_pairs(tmp_path):
    saved(tmp_path / "train", "a.png", "b.png")
    row = {"prompt": "a cat", "human_preference": [0, 1]}
    rows = [
        {**row, "file_path": ["a.png", "b.png"]},
        {**row, "image_path": ["b.png", "a.png"], "human_preference": [1, 0]},
    ]
    first, second = readers.hpdv2(written(tmp_path / "train.json", rows), tmp_path / "train")
    assert (first.kind, first.ratings, first.axis) == ("pair", (0.0,), "aesthetics")
    assert second.ratings == (1.0,) and second.prompt == second.group == "a cat"
    np.testing.assert_array_equal(first.images[1], picture(1))
    np.testing.assert_array_equal(second.images[0], picture(1))


def test_hpdv2_ranks_of_all_and_of_each(tmp_path):
    saved(tmp_path, "a.png", "b.png", "c.png")
    row = {
        "prompt": "a dog",
        "image_path": ["a.png", "b.png", "c.png"],
        "rank": [3, 0, 1],
        "raw_annotations": [
            {"rank": [2, 1, 0], "user_hash": "u1"},
            {"rank": [1, 0, 0], "user_hash": "u2"},
        ],
    }
    path = written(tmp_path / "test.json", [row])
    (one,) = readers.hpdv2(path, tmp_path, axis="taste")
    assert (one.kind, one.ratings, one.axis, one.annotator) == ("rank", (3, 1, 2), "taste", "")
    each = list(readers.hpdv2(path, tmp_path, each_annotator=True))
    assert [(j.ratings, j.annotator) for j in each] == [((3, 2, 1), "u1"), ((2, 1, 1), "u2")]


def test_pick_a_pic_keeps_ties_and_leaves_out_what_was_not_judged(tmp_path):
    def row(label, **other):
        return {
            "are_different": True,
            "best_image_uid": "x",
            "caption": "a boat",
            "has_label": True,
            "jpg_0": encoded(0),
            "jpg_1": encoded(1),
            "label_0": label,
            "label_1": 1 - label,
            "model_0": "sdxl",
            "model_1": "dreamlike",
            "ranking_id": 7,
            "user_id": 33,
            "num_example_per_prompt": 4,
        } | other

    rows = [row(1.0), row(0.5), row(0.0, has_label=False), row(0.5, are_different=False)]
    table(tmp_path / "data" / "train-00000-of-00002.parquet", rows)
    table(tmp_path / "data" / "train-00001-of-00002.parquet", [row(0.0)])
    read = list(readers.pick_a_pic(tmp_path))
    assert [j.ratings for j in read] == [(1.0,), (0.5,), (0.0,)]
    assert read[0].annotator == "33" and read[0].group == "a boat"
    assert read[0].columns == {"ranking_id": 7, "model_0": "sdxl", "model_1": "dreamlike"}
    np.testing.assert_array_equal(read[0].images[1], picture(1))
    # and what was read can be written and read again
    write_judgements(tmp_path / "out", "train", iter(read))
    assert [j.ratings for j in load_judgements(tmp_path / "out", "train")] == [
        (1.0,),
        (0.5,),
        (0.0,),
    ]


def test_readers_open_a_picture_when_its_turn_comes(tmp_path):
    row = {"caption": "x", "label_0": 1.0, "label_1": 0.0, "has_label": True}
    row |= {"are_different": True, "ranking_id": 1, "user_id": 1, "model_0": "", "model_1": ""}
    rows = [{**row, "jpg_0": encoded(0), "jpg_1": encoded(1)}, {**row, "jpg_0": b"", "jpg_1": b""}]
    stream = readers.pick_a_pic(table(tmp_path / "a.parquet", rows))
    assert next(stream).ratings == (1.0,)
    with pytest.raises(DataError, match="a.parquet row 2: expected a whole picture"):
        next(stream)


def edit(**scores):
    def pic(seed):
        return {"bytes": encoded(seed), "path": None}

    return {
        "key": "k1",
        "unique_key": "k1_0",
        "pair_index": 0,
        "instruction": "make it night",
        "source_img": pic(0),
        "left_output_image": pic(1),
        "right_output_image": pic(2),
        "left_model": "m1",
        "right_model": "m2",
        "vote_type": "v",
        "left_overall_score": 6.0,
        "left_instruction_following_score": 4.0,
        "left_quality_aesthetic_score": 2.0,
        "right_overall_score": 6.0,
        "right_instruction_following_score": 1.0,
        "right_quality_aesthetic_score": 2.0,
    } | scores


def test_edit_reward_data_is_a_pair_per_axis_with_its_source(tmp_path):
    rows = [edit(), edit(key="k2", right_quality_aesthetic_score=None)]
    table(tmp_path / "data" / "train.parquet", rows)
    first, second, third = readers.edit_reward_data(tmp_path)
    assert (first.axis, first.ratings, first.category) == ("instruction", (1.0,), "edits")
    assert (second.axis, second.ratings) == ("aesthetics", (0.5,))
    assert first.group == "k1" and third.group == "k2"
    assert first.columns["scores"] == [4.0, 1.0] and first.columns["vote_type"] == "v"
    for read, seed in zip((*first.sources, *first.images), (0, 1, 2), strict=True):
        np.testing.assert_array_equal(read, picture(seed))
    lower = edit(left_overall_score=2.0)
    path = table(tmp_path / "one.parquet", [lower])
    (whole,) = readers.edit_reward_data(path, axes={"overall": "overall_score"})
    assert (whole.axis, whole.ratings) == ("overall", (0.0,))


@pytest.mark.parametrize(
    ("ranking", "who", "preference"),
    [
        ("A>B", "AvsB", 1.0),
        ("B>A", "AvsB", 0.0),
        ("A=B", "AvsB", 0.5),
        ("C>B", "BvsC", 0.0),
        ("A > C", "AvsC", 1.0),
    ],
)
def test_edit_reward_bench(tmp_path, ranking, who, preference):
    row = {
        "id": "17_AB",
        "dataset": "3pair",
        "instruction": "add a hat",
        "source_image": {"bytes": encoded(0), "path": None},
        "candidate_1": {"bytes": encoded(1), "path": None},
        "candidate_2": {"bytes": encoded(2), "path": None},
        "ranking": ranking,
        "comparison_type": who,
        "model_1": "m",
        "model_2": "n",
        "score_1": 3.0,
        "score_2": 1.0,
    }
    (read,) = readers.edit_reward_bench(table(tmp_path / "3pair" / "train.parquet", [row]).parent)
    assert read.ratings == (preference,) and read.group == "17" and len(read.sources) == 1
    np.testing.assert_array_equal(read.images[0], picture(1))
    row["ranking"] = "A>D"
    with pytest.raises(DataError, match="row 1: ranking: expected one of .* got 'A>D'"):
        list(readers.edit_reward_bench(table(tmp_path / "b.parquet", [row])))


def entry(i, rank, **other):
    return {
        "image_path": f"images/train/{i}.webp",
        "prompt_id": "000864-0061",
        "prompt": "a painting",
        "classification": "People",
        "image_amount_in_total": 3,
        "rank": rank,
        "overall_rating": 4,
        "image_text_alignment_rating": 7 - i,
        "fidelity_rating": 4,
    } | other


def webp(folder, count):
    for i in range(count):
        path = folder / f"images/train/{i}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        images.to_pil(picture(i)).save(path, "WEBP", lossless=True)


@pytest.mark.parametrize("form", ["train_1.json", "metadata-train.parquet"])
def test_image_reward_db_is_a_rank_per_prompt_and_points_per_picture(tmp_path, form):
    webp(tmp_path, 4)
    rows = [entry(0, 5), entry(1, 2), entry(3, 1, prompt_id="b", prompt="other"), entry(2, 2)]
    make = written if form.endswith("json") else table
    read = list(readers.image_reward_db(make(tmp_path / form, rows), tmp_path))
    (rank,) = [j for j in read if j.kind == "rank"]  # one picture alone has no rank
    assert rank.ratings == (2.0, 1.0, 1.0) and rank.group == "000864-0061"
    np.testing.assert_array_equal(rank.images[2], picture(2))
    points = [j for j in read if j.kind == "point"]
    assert len(points) == 8
    assert [j.ratings[0] for j in points if j.axis == "instruction"] == [7.0, 6.0, 5.0, 4.0]
    assert points[0].low == 1 and points[0].high == 7
    assert points[0].columns == {"classification": "People"}
    with pytest.raises(DataError, match=r"row 1: point: expected 1 ratings from 1 to 5"):
        list(readers.image_reward_db(tmp_path / form, tmp_path, scale=(1.0, 5.0)))


def test_image_reward_db_of_ranks_alone(tmp_path):
    webp(tmp_path, 3)
    paths = [f"images/train/{i}.webp" for i in range(3)]
    row = {"id": "005658-0040", "prompt": "a", "generations": paths, "ranking": [2, 5, 2]}
    (rank,) = readers.image_reward_db(written(tmp_path / "test.json", [row]), tmp_path)
    assert (rank.kind, rank.ratings, rank.group) == ("rank", (1, 2, 1), "005658-0040")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "p", "file_path": ["a.png", "b.png"]}], "row 1: rank: expected a list"),
        ([{"prompt": "p", "file_path": ["a.png"], "rank": [1, 2]}], "row 1: rank: expected 2"),
        (
            [{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [1, 0, 0]}],
            "row 1: .* ValueError: too many",
        ),
        ([{"file_path": ["a.png"] * 2, "human_preference": [1, 0]}], "row 1: .*KeyError: 'prompt'"),
        (
            [{"prompt": "p", "file_path": ["a.png"] * 2, "human_preference": [0, 0]}],
            "votes for one picture",
        ),
        ([{"prompt": "p", "file_path": ["x.png", "a.png"], "human_preference": [1, 0]}], "x.png"),
        ({"prompt": "p"}, "a list of objects, got dict"),
    ],
)
def test_what_does_not_fit_a_layout_is_named(tmp_path, rows, says):
    saved(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=says):
        list(readers.hpdv2(written(tmp_path / "train.json", rows), tmp_path))


def test_files_that_are_missing_or_of_another_layout_are_named(tmp_path):
    with pytest.raises(DataError, match="got none: download"):
        list(readers.pick_a_pic(tmp_path))
    with pytest.raises(DataError, match="none.parquet"):
        list(readers.pick_a_pic(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match="expected a JSON file"):
        list(readers.hpdv2(tmp_path / "none.json", tmp_path))
    table(tmp_path / "a.parquet", [{"caption": "x"}])
    with pytest.raises(DataError, match="a.parquet': expected columns"):
        list(readers.edit_reward_data(tmp_path))
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="expected a parquet file"):
        list(readers.edit_reward_data(tmp_path))


def test_a_transparent_or_grey_picture_becomes_colour(tmp_path):
    for name, mode in (("a.png", "LA"), ("b.png", "L")):
        Image.new(mode, (4, 4)).save(tmp_path / name)
    rows = [{"prompt": "p", "file_path": ["a.png", "b.png"], "human_preference": [1, 1]}]
    (read,) = readers.hpdv2(written(tmp_path / "train.json", rows), tmp_path)
    assert read.images[0].shape == (3, 4, 4) and read.ratings == (0.5,)
