"""Every layout gives the same records, and what is damaged is counted or stops with an error."""

import gzip
import json

import datasets
import pytest

from pipelines.data.records import Broken, Columns, Encoded, Record, records, row_of, schema
from pipelines.data.sources import SourceConfig, open_source
from rlhf.errors import ConfigError, DataError
from tests.pipelines.pictures import folder, png, tar

CAPTIONS = [f"picture {i}" for i in range(5)]


def read(path, layout, **options):
    source = open_source(SourceConfig(path=str(path), layout=layout, **options))
    return [item for unit in range(source.units) for item in source.read(unit)]


def good(items):
    return [item for item in items if isinstance(item, Record)]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Broken)]


def make(layout, path):
    """The same five records, the last an edit of the first, in one layout: its path and options."""
    edit = {"sources": [png(0)]}
    rows = [
        {
            "image": png(i),
            "text": CAPTIONS[i],
            "kind": "text",
            "score": i,
            **(edit if i == 4 else {}),
        }
        for i in range(5)
    ]
    if layout == "folder":
        listed = [
            (f"{i}.png", r["image"], {"text": r["text"], "kind": "text", "score": i})
            for i, r in enumerate(rows)
        ]
        listed[4][2]["sources"] = ["0.png"]
        return folder(path / "f", listed), {"unit_rows": 2}
    if layout == "webdataset":
        members = []
        for i, row in enumerate(rows):
            members += [(f"x/{i}.png", row["image"]), (f"x/{i}.txt", row["text"].encode())]
            members.append((f"x/{i}.json", json.dumps({"kind": "text", "score": i}).encode()))
            members += [(f"x/{i}.sources.0.png", png(0))] if i == 4 else []
        tar(path / "0.tar", members[:6])
        packed = tar(path / "1", members[6:])
        (path / "1.tar.gz").write_bytes(gzip.compress(packed.read_bytes()))
        return path / "*.tar*", {}
    picture = datasets.Image()
    whole = datasets.Dataset.from_list(
        [{"sources": [], **row} for row in rows],
        features=datasets.Features(
            image=picture,
            text=datasets.Value("string"),
            kind=datasets.Value("string"),
            score=datasets.Value("int64"),
            sources=datasets.List(picture),
        ),
    )
    if layout == "parquet":
        for i in range(2):
            part = whole.select(range(3 * i, min(5, 3 * i + 3)))
            part.to_parquet(path / f"{i}.parquet")
        return path / "*.parquet", {}
    whole.save_to_disk(path / "saved")
    return path / "saved", {"unit_rows": 2, "streaming": layout == "stream"}


@pytest.mark.parametrize("layout", ["folder", "webdataset", "parquet", "datasets", "stream"])
def test_every_layout_gives_the_same_records(layout, tmp_path):
    path, options = make(layout, tmp_path)
    items = read(path, "datasets" if layout == "stream" else layout, **options)
    assert reasons(items) == []
    assert [one.caption for one in items] == CAPTIONS
    assert [one.picture.data for one in items] == [png(i) for i in range(5)]
    assert {one.kind for one in items} == {"text"}
    assert [dict(one.columns) for one in items] == [{"score": i} for i in range(5)]
    assert [[s.data for s in one.sources] for one in items] == [[]] * 4 + [[png(0)]]
    assert len({one.id for one in items}) == 5


def test_columns_may_have_other_names(tmp_path):
    path = folder(tmp_path / "f", [("a.png", png(), {"caption": "a cell", "label": "structured"})])
    names = Columns(image="picture", caption="caption", kind="label")
    (one,) = read(path, "folder", columns=names)
    assert (one.caption, one.kind) == ("a cell", "structured")


def test_a_folder_counts_what_is_missing_on_either_side(tmp_path):
    path = folder(
        tmp_path / "f",
        [
            ("a.png", png(0), {"text": "whole"}),
            ("b.png", None, {"text": "its picture is gone"}),
            ("c.png", png(1), {"text": "  "}),
            ("d.png", png(2), None),
            ("e.png", png(3), {"text": "odd", "kind": "poem"}),
            ("f.png", png(3), {"text": "an edit", "sources": ["gone.png"]}),
        ],
    )
    with open(path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "a.p')
    items = read(path, "folder")
    assert [one.caption for one in good(items)] == ["whole"]
    assert sorted(reasons(items)) == sorted(
        ["no picture file"] * 2
        + ["empty caption"] * 2
        + ["unknown caption kind", "no JSON object in metadata.jsonl"]
    )


def members(count):
    return [
        part
        for i in range(count)
        for part in ((f"{i}.png", png(i)), (f"{i}.txt", CAPTIONS[i].encode()))
    ]


def test_a_tar_cut_anywhere_loses_what_was_cut_and_says_so(tmp_path):
    end = sum(512 + -(-len(data) // 512) * 512 for _, data in members(5))  # then only zeros
    kept = set()
    for cut in range(-(-len(png(0)) // 512) * 512 + 512, end + 512, 512 + 100):
        items = read(tar(tmp_path / "cut.tar", members(5), cut), "webdataset")
        assert reasons(items) == ["truncated shard"], cut
        assert [one.caption for one in good(items)] == CAPTIONS[: len(good(items))]
        kept.add(len(good(items)))
    assert kept == set(range(6))


def test_a_tar_cut_between_two_members_is_seen(tmp_path):
    """Where `tarfile`, and so `datasets`, ends as if nothing were missing."""
    path = tar(tmp_path / "a.tar", members(3))
    sample = 512 + -(-len(png(0)) // 512) * 512 + 1024
    path.write_bytes(path.read_bytes()[:sample])
    stream = datasets.load_dataset(
        "webdataset", data_files=str(path), split="train", streaming=True
    )
    assert len(list(stream)) == 1
    items = read(path, "webdataset")
    assert [one.caption for one in good(items)] == CAPTIONS[:1]
    assert reasons(items) == ["truncated shard"]


def test_a_packed_tar_that_was_cut_is_seen(tmp_path):
    data = gzip.compress(tar(tmp_path / "x", members(5)).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(data[: len(data) * 2 // 3])
    items = read(tmp_path / "a.tar.gz", "webdataset")
    assert reasons(items) == ["truncated shard"] and 0 < len(good(items)) < 5


def test_samples_of_a_tar_that_miss_a_part_are_counted(tmp_path):
    parts = [("0.png", png(0)), ("1.txt", b"no picture"), ("2.png", png(2)), ("2.txt", b"whole")]
    parts += [
        ("3.png", png(3)),
        ("3.txt", b"x"),
        ("3.json", b"{"),
        ("4.png", png(4)),
        ("4.txt", b""),
    ]
    items = read(tar(tmp_path / "a.tar", parts), "webdataset")
    assert [one.caption for one in good(items)] == ["whole"]
    assert reasons(items) == [
        "empty caption",
        "no picture",
        "no JSON object in .json",
        "empty caption",
    ]


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_file_of_another_form_stops_with_its_name(layout, tmp_path):
    (tmp_path / "bad").write_bytes(b"neither tar nor parquet" * 100)
    with pytest.raises(DataError, match="bad"):
        read(tmp_path / "bad", layout)


def test_a_cut_parquet_file_stops_with_its_name(tmp_path):
    path, _ = make("parquet", tmp_path)
    last = tmp_path / "1.parquet"
    last.write_bytes(last.read_bytes()[:-50])
    with pytest.raises(DataError, match="1.parquet"):
        read(path, "parquet")


@pytest.mark.parametrize("layout", ["folder", "webdataset", "parquet", "datasets"])
def test_a_source_that_is_not_there_is_refused(layout, tmp_path):
    with pytest.raises(DataError, match="absent"):
        read(tmp_path / "absent", layout)


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ConfigError, match="streaming"):
        SourceConfig(layout="folder", streaming=True).check()
    with pytest.raises(ConfigError, match="unit_rows"):
        SourceConfig(unit_rows=0).check()


def test_a_written_record_reads_back_and_opens_as_pictures(tmp_path):
    one = Record(
        id="7",
        picture=Encoded(png(7)),
        caption="an edit",
        kind="knowledge",
        sources=(Encoded(png(8)),),
        columns={"category": "é", "n": [1, 2]},
    )
    rows = datasets.Dataset.from_list(
        [row_of(one, {"entropy": 4.5})], datasets.Features.from_arrow_schema(schema())
    )
    rows.to_parquet(tmp_path / "a.parquet")
    (back,) = read(tmp_path / "a.parquet", "parquet")
    assert (back.id, back.caption, back.kind, back.columns) == (
        "7",
        "an edit",
        "knowledge",
        one.columns,
    )
    assert (back.picture.data, back.sources[0].data) == (png(7), png(8))
    (again,) = records([row_of(one, {})])
    assert again.columns == one.columns and again.sources[0].size == (48, 64)
    shown = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path)
    )
    assert shown[0]["image"].size == (64, 48) and json.loads(shown[0]["scores"]) == {"entropy": 4.5}
