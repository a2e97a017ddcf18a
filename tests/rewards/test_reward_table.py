import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from rewards import images
from rewards.errors import DataError
from rewards.training import rows, table
from rewards.training.schema import Judgement
from rewards.training.splits import split_of
from rewards.training.table import JudgementTable, load_judgements, write_judgements


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What `datasets` keeps goes where the test is."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(seed, size=(6, 5)):
    return np.random.default_rng(seed).integers(0, 256, (3, *size), dtype=np.uint8)


def pair(i, axis="aesthetics", **other):
    return Judgement(
        kind="pair",
        axis=axis,
        prompt=f"prompt {i}",
        images=(picture(2 * i), picture(2 * i + 1, (7, 9))),
        ratings=(0.75,),
        **other,
    )


def same(a: Judgement, b: Judgement):
    for name in Judgement.__dataclass_fields__:
        one, two = getattr(a, name), getattr(b, name)
        if name in ("images", "sources"):
            assert len(one) == len(two)
            for p, q in zip(one, two, strict=True):
                np.testing.assert_array_equal(p, q)
        else:
            assert one == two, name


KINDS = [
    pair(
        0,
        category="portrait",
        sources=(picture(50),),
        group="g",
        annotator="a7",
        confidence=0.8,
        columns={"gold": [0.25, 0.5], "origin": ["render", "model:x"], "target": "{}", "n": 3},
    ),
    Judgement(
        kind="point",
        axis="fidelity",
        prompt="p",
        images=(picture(9),),
        ratings=(72.5,),
        low=0.0,
        high=100.0,
    ),
    Judgement(
        kind="rank",
        axis="fidelity",
        prompt="q",
        images=tuple(picture(i) for i in (20, 21, 22)),
        ratings=(1.0, 3.0, 1.0),
        columns={"gold": [1.0, 0.0, 1.0]},
    ),
]


def test_a_judgement_comes_back_as_it_was(tmp_path):
    paths = write_judgements(tmp_path, "dev", KINDS)
    assert [p.name for p in paths] == ["dev-00000-of-00001.parquet"]
    assert sorted(os.listdir(tmp_path)) == [p.name for p in paths]
    back = load_judgements(tmp_path, "dev")
    assert len(back) == 3
    for wrote, read in zip(KINDS, back, strict=True):
        same(wrote, read)


def test_pictures_are_png_bytes_that_any_reader_of_parquet_opens(tmp_path):
    row = pq.read_table(write_judgements(tmp_path, "test", KINDS)[0]).to_pylist()[0]
    assert row["images"][0].startswith(b"\x89PNG")
    np.testing.assert_array_equal(
        images.from_pil(images.decode(row["images"][1])[0]), KINDS[0].images[1]
    )
    assert row["ratings"] == [0.75] and row["gold"] == [0.25, 0.5] and row["axis"] == "aesthetics"


def test_axis_and_limit_choose_rows_and_columns_open_no_picture(tmp_path, monkeypatch):
    write_judgements(tmp_path, "train", (pair(i, "ab"[i % 2], group="") for i in range(9)))
    assert [j.prompt for j in load_judgements(tmp_path, "train", axis="b")] == [
        f"prompt {i}" for i in (1, 3, 5, 7)
    ]
    assert [j.prompt for j in load_judgements(tmp_path, "train", limit=2)] == [
        "prompt 0",
        "prompt 1",
    ]
    opened = []
    decode = images.decode
    monkeypatch.setattr(images, "decode", lambda data: opened.append(1) or decode(data))
    rows = JudgementTable(tmp_path, "train", axis="a")
    assert len(rows) == 5 and rows.column("axis") == ["a"] * 5
    assert rows.column("group") == [f"prompt {i}" for i in (0, 2, 4, 6, 8)]
    assert rows.column("kind") == ["pair"] * 5 and not opened
    same(rows[-1], pair(8, "a"))
    assert len(opened) == 2
    assert len(list(rows)) == 5
    with pytest.raises(IndexError):
        rows[5]
    with pytest.raises(DataError, match="got 'colour'"):
        rows.column("colour")
    with pytest.raises(DataError, match=r"axes \['a', 'b'\]"):
        JudgementTable(tmp_path, "train", axis="c")


def test_many_rows_become_several_files_and_a_lazy_writer_holds_few(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_ROW_GROUP", 2)
    made, most = [], []
    original = table._row

    def counting(judgement):
        most.append(len(made))
        return original(judgement)

    monkeypatch.setattr(table, "_row", counting)

    def rows():
        for i in range(11):
            made.append(i)
            yield pair(i)

    paths = write_judgements(tmp_path, "train", rows(), rows_per_file=4)
    assert [p.name for p in paths] == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    assert max(at - i for i, at in enumerate(most)) <= 2  # rows made ahead of rows written
    assert [j.prompt for j in JudgementTable(tmp_path, "train")] == [
        f"prompt {i}" for i in range(11)
    ]


def test_a_split_is_replaced_whole_or_not_at_all(tmp_path):
    write_judgements(tmp_path, "train", [pair(i) for i in range(300)], rows_per_file=256)
    write_judgements(tmp_path, "dev", [pair(0)])

    def breaks():
        yield pair(1)
        raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_judgements(tmp_path, "train", breaks())
    assert len(JudgementTable(tmp_path, "train")) == 300
    write_judgements(tmp_path, "train", [pair(1)])
    assert sorted(os.listdir(tmp_path)) == [
        "dev-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    assert len(JudgementTable(tmp_path, "train")) == 1


def test_missing_files_are_noticed(tmp_path):
    paths = write_judgements(tmp_path, "train", [pair(i) for i in range(300)], rows_per_file=256)
    paths[1].unlink()
    with pytest.raises(DataError, match="expected all files of the split train"):
        JudgementTable(tmp_path, "train")
    with pytest.raises(DataError, match=r"expected dev-\*.parquet"):
        JudgementTable(tmp_path, "dev")
    with pytest.raises(DataError, match="train, dev, test, got 'val'"):
        JudgementTable(tmp_path, "val")
    with pytest.raises(DataError, match="cannot open"):
        JudgementTable(tmp_path / "absent", "dev")


def test_free_columns_keep_their_names_and_types(tmp_path):
    with pytest.raises(DataError, match="got none"):
        write_judgements(tmp_path, "dev", [])
    first = [pair(0, columns={"gold": [1.0]})]
    with pytest.raises(DataError, match=r"\['gold'\], got \['more'\]"):
        many = first + [pair(i) for i in range(260)] + [pair(2, columns={"more": 1})]
        write_judgements(tmp_path, "dev", many)
    with pytest.raises(DataError, match="other names, got"):
        write_judgements(tmp_path, "dev", [pair(0, columns={"kind": "x"})])
    with pytest.raises(DataError, match="'gold': expected values of one type"):
        write_judgements(tmp_path, "dev", [*first, pair(1, columns={"gold": "high"})])
    assert os.listdir(tmp_path) == []
    write_judgements(tmp_path, "dev", [*first, pair(1)])
    assert [j.columns for j in JudgementTable(tmp_path, "dev")] == [{"gold": [1.0]}, {}]


def change(path, **columns):
    whole = pq.read_table(path)
    for name, value in columns.items():
        values = whole[name].to_pylist()
        values[1] = value
        import pyarrow as pa

        field = whole.schema.field(name)
        whole = whole.set_column(
            whole.schema.get_field_index(name), field, pa.array(values, field.type)
        )
    pq.write_table(whole, path)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"ratings": [1.5]}, "1 ratings from 0 to 1"),
        ({"ratings": None}, "got no ratings"),
        ({"kind": "triple"}, "got 'triple'"),
        ({"images": [b"no picture", b""]}, "whole picture"),
        ({"confidence": 0.0}, "confidence"),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path, columns, says):
    paths = write_judgements(tmp_path, "dev", [pair(i) for i in range(260)], rows_per_file=256)
    change(paths[1], **columns)
    rows = JudgementTable(tmp_path, "dev")
    same(rows[256], pair(256))
    with pytest.raises(DataError, match=rf"dev-00001-of-00002.parquet row 2: .*{says}"):
        rows[257]


def test_files_without_the_needed_columns_are_refused(tmp_path):
    path = write_judgements(tmp_path, "dev", [pair(0)])[0]
    pq.write_table(pq.read_table(path).drop_columns(["ratings"]), path)
    with pytest.raises(DataError, match="got no ratings"):
        JudgementTable(tmp_path, "dev")
    pq.write_table(pq.read_table(path).drop_columns(["axis"]), tmp_path / "test-0.parquet")
    with pytest.raises(DataError, match="got no axis, ratings"):
        JudgementTable(tmp_path, "test")


def lines(tmp_path, *given):
    images.save_png(tmp_path / "a.png", picture(1))
    images.save_png(tmp_path / "b.png", picture(2))
    path = tmp_path / "labels.jsonl"
    path.write_text("\n\n".join(g if isinstance(g, str) else json.dumps(g) for g in given) + "\n")
    return path


LINE = {"kind": "pair", "axis": "taste", "prompt": "p", "images": ["a.png", "b.png"]}


def test_lines_are_read_with_paths_from_their_file(tmp_path, monkeypatch):
    path = lines(tmp_path, {**LINE, "ratings": [1], "split": "dev", "note": "sharp"})
    monkeypatch.chdir("/")
    (read,) = load_judgements(path, "dev")
    np.testing.assert_array_equal(read.images[1], picture(2))
    assert read.ratings == (1.0,) and read.group == "p" and read.columns == {"note": "sharp"}
    rows = JudgementTable(path, "dev")
    assert rows.column("category") == ["general"] and rows.column("note") == ["sharp"]
    with pytest.raises(DataError, match="lines of split test, got none"):
        JudgementTable(path, "test")


def test_lines_without_a_split_are_split_by_prompt(tmp_path):
    given = [{**LINE, "prompt": f"prompt {i % 40}", "ratings": [0.5]} for i in range(80)]
    path = lines(tmp_path, *given)
    found = {s: set(JudgementTable(path, s).column("group")) for s in ("train", "dev", "test")}
    assert sum(map(len, found.values())) == 40 and len(set.union(*found.values())) == 40
    assert all(split_of(group) == split for split, groups in found.items() for group in groups)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{", "JSON"),
        ("[1]", "an object, got list"),
        ({**LINE, "ratings": [1], "split": "val"}, "got 'val'"),
        ({**LINE, "ratings": [1], "prompt": 3}, "prompt: expected text"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_read(tmp_path, bad, says):
    path = lines(tmp_path, {**LINE, "ratings": [1], "split": "dev"}, bad)
    with pytest.raises(DataError, match=rf"labels.jsonl row 3: .*{says}"):
        JudgementTable(path, "dev")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": ["a.png", "absent.png"]}, "absent.png"),
        ({"images": "a.png"}, "images: expected a list"),
        ({"ratings": ["good"]}, "expected numbers"),
        ({"confidence": "high"}, "expected numbers"),
        ({"axis": 3}, "axis: expected text"),
        ({"images": [1, 2]}, "got int"),
    ],
)
def test_a_bad_value_of_a_line_is_named(tmp_path, change, says):
    path = lines(tmp_path, {**LINE, "ratings": [1], "split": "dev", **change})
    with pytest.raises(DataError, match=rf"labels.jsonl row 1: .*{says}"):
        load_judgements(path, "dev")


def test_a_missing_file_of_lines_is_named(tmp_path):
    with pytest.raises(DataError, match="none.jsonl"):
        JudgementTable(tmp_path / "none.jsonl", "dev")


def test_a_picture_may_be_what_datasets_makes_of_it(tmp_path):
    path = images.save_png(tmp_path / "a.png", picture(1))
    for form in (
        path.read_bytes(),
        str(path),
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": "a.png"},
        images.to_pil(picture(1)),
    ):
        np.testing.assert_array_equal(rows.picture(form, tmp_path), picture(1))
