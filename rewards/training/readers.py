"""Published sets of human judgements, read from their files as `Judgement`s, one after the other.

Nothing is downloaded, and a picture is opened when its judgement is reached. Layouts are those of
the data sets' cards; each reader says what of it the card does not settle. `write_judgements` makes
a table of what a reader yields, `splits.split_of` splits it.

    write_judgements("hpdv2", "test", readers.hpdv2("HPDv2/test.json", "HPDv2/test"))

Licences: HPDv2 and ImageRewardDB are Apache-2.0 by their cards, EditReward-Data CC BY-NC 4.0,
EditReward-Bench Apache-2.0; that of Pick-a-Pic is for you to look up.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from rewards.errors import DataError, ImageError
from rewards.training.rows import picture
from rewards.training.schema import Judgement

Source = str | os.PathLike[str]
Row = Mapping[str, Any]

_RANKED = {"aesthetics": "rank"}
_RATED = {"instruction": "image_text_alignment_rating", "fidelity": "fidelity_rating"}
_EDITED = {"instruction": "instruction_following_score", "aesthetics": "quality_aesthetic_score"}


def hpdv2(
    annotations: Source,
    pictures: Source,
    axis: str = "aesthetics",
    each_annotator: bool = False,
) -> Iterator[Judgement]:
    """HPDv2 (arXiv:2306.09341): `train.json` gives pairs, `test.json` ranks.

    The card has prompt, file_path and human_preference (1 for the preferred) in train.json; and
    prompt, image_path, rank (averaged over annotators) and raw_annotations (rank, user_hash) in
    test.json. It does not say that a low rank is good; that is read so. Either name of the paths is
    taken in both files. With `each_annotator`, a rank per annotator and not the average.
    """
    for where, row in _json(Path(annotations)):
        with_paths = row.get("file_path") or row.get("image_path")
        rows = [row]
        if each_annotator and row.get("raw_annotations"):
            rows = [{**row, **{"rank": None, "user_hash": ""}, **r} for r in row["raw_annotations"]]
        for one in rows:
            yield _built(where, _hpdv2, one, with_paths, Path(pictures), axis)


def _hpdv2(row: Row, paths: Sequence[str] | None, base: Path, axis: str) -> Judgement:
    images = tuple(picture(path, base) for path in _list("file_path", paths))
    if row.get("human_preference") is None:
        ratings = _dense(row.get("rank"))
    else:
        first, second = _list("human_preference", row["human_preference"])
        ratings = (_share(first, second),)
    return Judgement(
        kind="pair" if len(ratings) == 1 else "rank",
        axis=axis,
        prompt=row["prompt"],
        images=images,
        ratings=ratings,
        annotator=str(row.get("user_hash", "")),
    )


def pick_a_pic(source: Source, axis: str = "aesthetics") -> Iterator[Judgement]:
    """Pick-a-Pic v1 and v2 (arXiv:2305.01569): parquet, or a folder of it, pairs.

    The card has caption, jpg_0, jpg_1 (bytes), label_0, label_1, has_label, are_different,
    ranking_id, user_id, model_0 and model_1. Labels 0.5 and 0.5 are a tie. Rows without a label or
    with the same picture twice are left out.
    """
    names = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label", "are_different"]
    names += ["ranking_id", "user_id", "model_0", "model_1"]
    for where, row in _parquet(Path(source), names):
        if row["has_label"] and row["are_different"] is not False:
            yield _built(where, _pick_a_pic, row, axis)


def _pick_a_pic(row: Row, axis: str) -> Judgement:
    free = {name: row[name] for name in ("ranking_id", "model_0", "model_1")}
    return Judgement(
        kind="pair",
        axis=axis,
        prompt=row["caption"],
        images=(picture(row["jpg_0"]), picture(row["jpg_1"])),
        ratings=(_share(row["label_0"], row["label_1"]),),
        annotator=str(row["user_id"]),
        columns=free,
    )


def edit_reward_data(source: Source, axes: Mapping[str, str] = _EDITED) -> Iterator[Judgement]:
    """EditReward-Data (arXiv:2509.26346): parquet, pairs of edits, one judgement per axis.

    The card has key, instruction, source_img, left_output_image, right_output_image, left_model,
    right_model, vote_type and, for left and right, overall_score, instruction_following_score and
    quality_aesthetic_score. `axes` says which score an axis is; the higher one wins, equal ones
    tie. The card gives no values of vote_type; it is kept as a column. Judgements of one `key` are
    taken for one group.
    """
    sides = [f"{side}_{name}" for side in ("left", "right") for name in axes.values()]
    names = ["key", "instruction", "source_img", "left_output_image", "right_output_image"]
    free = ["left_model", "right_model", "vote_type"]
    for where, row in _parquet(Path(source), [*names, *free, *sides]):
        for axis, name in axes.items():
            if row[f"left_{name}"] is not None and row[f"right_{name}"] is not None:
                yield _built(where, _edit_pair, row, axis, name, free)


def _edit_pair(row: Row, axis: str, name: str, free: Sequence[str]) -> Judgement:
    left, right = float(row[f"left_{name}"]), float(row[f"right_{name}"])
    return Judgement(
        kind="pair",
        axis=axis,
        prompt=row["instruction"],
        category="edits",
        images=(picture(row["left_output_image"]), picture(row["right_output_image"])),
        sources=(picture(row["source_img"]),),
        ratings=(0.5 + 0.5 * ((left > right) - (left < right)),),
        group=row["key"] or "",
        columns={n: row[n] for n in free} | {"scores": [left, right]},
    )


def edit_reward_bench(source: Source, axis: str = "instruction") -> Iterator[Judgement]:
    """EditReward-Bench (arXiv:2509.26346): parquet of 2, 3 and 4 edits compared in pairs.

    Its evaluation code reads id, instruction, source_image, candidate_1, candidate_2, ranking
    ("A>B", "C>B", "A=B"), comparison_type ("AvsC" says who candidates 1 and 2 are), model_1 and
    model_2, and takes what is before the first "_" of an id as the group; so does this. The human
    ranking is of the edit as a whole, so `axis` is yours to name.
    """
    names = ["id", "instruction", "source_image", "candidate_1", "candidate_2", "ranking"]
    names += ["comparison_type", "model_1", "model_2"]
    for where, row in _parquet(Path(source), names):
        yield _built(where, _edit_bench, row, axis)


def _edit_bench(row: Row, axis: str) -> Judgement:
    first, _, second = (row["comparison_type"] or "AvsB").partition("vs")
    outcomes = {f"{first}>{second}": 1.0, f"{second}>{first}": 0.0}
    outcomes |= {f"{first}={second}": 0.5, f"{second}={first}": 0.5}
    ranking = str(row["ranking"]).replace(" ", "")
    if ranking not in outcomes:
        raise DataError(f"ranking: expected one of {list(outcomes)}, got {row['ranking']!r}")
    return Judgement(
        kind="pair",
        axis=axis,
        prompt=row["instruction"],
        category="edits",
        images=(picture(row["candidate_1"]), picture(row["candidate_2"])),
        sources=(picture(row["source_image"]),),
        ratings=(outcomes[ranking],),
        group=str(row["id"]).partition("_")[0],
        columns={name: row[name] for name in ("id", "model_1", "model_2")},
    )


def image_reward_db(
    annotations: Source,
    pictures: Source,
    ranks: Mapping[str, str] = _RANKED,
    points: Mapping[str, str] = _RATED,
    scale: tuple[float, float] = (1.0, 7.0),
) -> Iterator[Judgement]:
    """ImageRewardDB (arXiv:2304.05977): a rank per prompt, and points per picture.

    Its JSON and metadata tables have an entry per picture: image_path, prompt_id, prompt,
    classification, image_amount_in_total, rank, overall_rating, image_text_alignment_rating and
    fidelity_rating; `ranks` and `points` say which column an axis is. The file that the code comes
    with has an entry per prompt: id, prompt, generations, ranking. A low rank is good, equal ranks
    are ties, and ranks may skip numbers. The card does not state the `scale` of ratings; 1 to 7 is
    the paper's, and a rating beyond it is an error.
    """
    path, base = Path(annotations), Path(pictures)
    rows = _json(path) if path.suffix == ".json" else _parquet(path, None)
    prompts: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for where, row in rows:
        prompts[str(row.get("prompt_id") or row.get("id"))].append((where, row))
    for group, members in prompts.items():
        where, first = members[0]
        if "generations" in first:
            yield from (
                _built(where, _image_ranks, first, first["generations"], first["ranking"], a, base)
                for a in ranks
            )
            continue
        for axis, name in ranks.items():
            known = [row for _, row in members if row.get(name) is not None]
            if len(known) > 1:
                paths = [row["image_path"] for row in known]
                numbers = [row[name] for row in known]
                yield _built(where, _image_ranks, known[0], paths, numbers, axis, base)
        for axis, name in points.items():
            for at, row in members:
                if row.get(name) is not None:
                    yield _built(at, _image_point, row, group, axis, name, scale, base)


def _image_ranks(
    row: Row, paths: Sequence[str], numbers: Sequence[Any], axis: str, base: Path
) -> Judgement:
    return Judgement(
        kind="rank",
        axis=axis,
        prompt=row["prompt"],
        images=tuple(picture(path, base) for path in paths),
        ratings=_dense(numbers),
        group=str(row.get("prompt_id") or row["id"]),
    )


def _image_point(
    row: Row, group: str, axis: str, name: str, scale: tuple[float, float], base: Path
) -> Judgement:
    return Judgement(
        kind="point",
        axis=axis,
        prompt=row["prompt"],
        images=(picture(row["image_path"], base),),
        ratings=(float(row[name]),),
        group=group,
        low=scale[0],
        high=scale[1],
        columns={"classification": row.get("classification")},
    )


def _share(first: Any, second: Any) -> float:
    """P(first is better) of two labels; equal ones are a tie, two zeros nobody's judgement."""
    total = float(first) + float(second)
    if not total > 0:
        raise DataError(f"expected votes for one picture or both, got {first} and {second}")
    return float(first) / total


def _dense(numbers: object) -> tuple[float, ...]:
    """Numbers, low is best, as ranks 1, 2, ... without gaps; equal ones share a rank."""
    values = [float(number) for number in _list("rank", numbers)]
    order = {value: i + 1.0 for i, value in enumerate(sorted(set(values)))}
    return tuple(order[value] for value in values)


def _list(name: str, value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list, got {value!r:.60}")
    return value


def _built(where: str, build: Callable[..., Judgement], *values: Any) -> Judgement:
    """What `build` makes of a row; its complaints name the row."""
    try:
        return build(*values)
    except (DataError, ImageError) as error:
        raise DataError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: expected the layout of the data set's card, got"
            f" {type(error).__name__}: {error}"
        ) from error


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"expected a JSON file at '{path}', got {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"'{path}': expected a list of objects, got {type(rows).__name__}")
    return ((f"{path} row {i}", row) for i, row in enumerate(rows, 1))


def _parquet(source: Path, names: Iterable[str] | None) -> Iterator[tuple[str, Row]]:
    """Rows of a file, or of all files below a folder, a few at a time."""
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files:
        raise DataError(f"expected parquet files below '{source}', got none: download the set")
    for path in files:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ArrowException) as error:
            raise DataError(f"expected a parquet file at '{path}', got {error}") from error
        absent = sorted(set(names or ()) - set(file.schema_arrow.names))
        if absent:
            raise DataError(f"'{path}': expected columns {absent}, got {file.schema_arrow.names}")
        number = 0
        columns = None if names is None else list(names)
        for batch in file.iter_batches(batch_size=16, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
