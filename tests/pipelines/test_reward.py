"""`rlhf reward collect` and `rlhf reward train`, at the smallest size."""

import json
from dataclasses import replace

import numpy as np
import pytest

from pipelines.data.aspects import Aspects
from pipelines.reward import TrainConfig, train
from pipelines.reward_collect import CollectConfig, collect
from rewards.backbones.towers import Shape
from rewards.errors import DataError
from rewards.judge import load_judge, run_judge
from rewards.training.heads import HeadConfig
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable, load_judgements, write_judgements
from rlhf.errors import ConfigError
from rlhf.learner import LearnerConfig
from rlhf.training import Pace
from tests.rewards.towers_tiny import sample_of
from tests.rewards.vlm_tiny import write_base

SHAPE = Shape(width=32, layers=1, text_width=32, text_layers=1, words=300)
SMALL = HeadConfig(width=32, depth=1)


@pytest.fixture(scope="module")
def judgements(tmp_path_factory):
    out = tmp_path_factory.mktemp("judgements") / "set"
    drawn = {"train": 24, "dev": 10, "test": 8}
    result = collect(
        CollectConfig(out=str(out), drawn=drawn, sampled={"dev": 2}, per_prompt=4, workers=1)
    )
    assert result["metrics"]["judgements/dev/aesthetics/rank"]["value"] == 12
    return out


def config(judgements, tmp_path, **fields):
    pace = Pace(steps=4, log_every=1, save_every=2, ema=0.9)
    base = TrainConfig(
        name="judge",
        runs=str(tmp_path),
        data=str(judgements),
        judges=("fidelity", "aesthetics"),
        towers="",
        trained="full",
        new=SHAPE,
        heads={"fidelity": SMALL, "aesthetics": replace(SMALL, text=False)},
        aspects=Aspects(batch=4, steps=1, after=2),
        batch=3,
        held=6,
        pace=pace,
        learner=LearnerConfig(lr=1e-3),
    )
    return replace(base, **fields)


# --- collect --------------------------------------------------------------------------------------


def test_training_rows_hold_no_gold_and_the_others_do(judgements):
    train_rows, dev_rows = (load_judgements(judgements, s) for s in ("train", "dev"))
    assert not any({"gold", "origin", "target"} & set(r.columns) for r in train_rows)
    for row in dev_rows:
        assert len(row.columns["gold"]) == len(row.columns["origin"]) or row.axis == "face"
        assert not any(o.startswith("canary") for o in row.columns["origin"])
    assert any("model:scenes" in r.columns["origin"] for r in dev_rows)
    assert {r.axis for r in train_rows} >= {"aesthetics", "fidelity", "instruction", "consistency"}


def test_annotators_agree_with_gold_as_noisy_people_do(judgements):
    agreement = {}
    for split in ("dev", "test"):  # nine annotators, and one
        rows = [r for r in load_judgements(judgements, split) if r.axis == "fidelity"]
        points = [(r.columns["gold"][0], r.ratings[0]) for r in rows if r.kind == "point"]
        gold, rating = np.array(points).T
        agreement[split] = np.corrcoef(gold, rating)[0, 1]
    assert set(rating) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert 0.7 < agreement["test"] < agreement["dev"] < 0.999


def test_a_second_collection_is_the_same_and_never_overwrites(judgements, tmp_path):
    again = CollectConfig(
        out=str(tmp_path / "again"), drawn={"train": 4}, sampled={}, per_prompt=4, workers=1
    )
    collect(again)
    first = load_judgements(tmp_path / "again", "train")
    collect(replace(again, out=str(tmp_path / "third")))
    third = load_judgements(tmp_path / "third", "train")
    assert [r.ratings for r in first] == [r.ratings for r in third]
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, third, strict=True))
    with pytest.raises(ConfigError, match="holds judgements"):
        collect(again)


# --- train ----------------------------------------------------------------------------------------


def _weights(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_a_killed_run_ends_in_the_same_judges(judgements, tmp_path):
    whole = train(config(judgements, tmp_path / "whole"))
    assert set(whole["metrics"]) == {"dev/fidelity/accuracy", "dev/aesthetics/accuracy"}
    half = config(judgements, tmp_path / "half")
    train(replace(half, pace=replace(half.pace, steps=2)))
    train(half, resume=tmp_path / "half" / "judge")
    folders = [tmp_path / name / "judge" / "judges" for name in ("whole", "half")]
    first, second = map(_weights, folders)
    assert first == second and "towers/open_clip_model.safetensors" in first
    cards = [json.loads((f / "fidelity" / "card.json").read_text()) for f in folders]
    assert cards[0] == cards[1]
    judge = load_judge(str(folders[0] / "fidelity"))
    scores = run_judge(judge, [sample_of("objects", 1), sample_of("edits", 1)])
    assert [s.state for s in scores] == ["ok", "na"]
    assert "fidelity" in (folders[0] / "fidelity" / "README.md").read_text()


def test_heads_alone_leave_the_towers_as_they_were(judgements, tmp_path):
    train(config(judgements, tmp_path))
    towers = tmp_path / "judge" / "judges" / "towers"
    before = _weights(towers)
    one = config(
        judgements,
        tmp_path,
        name="one",
        judges=("instruction",),
        towers=str(towers),
        trained="heads",
        heads={"instruction": replace(SMALL, source=True)},
    )
    train(one)
    assert _weights(towers) == before
    judge = load_judge(str(tmp_path / "one" / "judges" / "instruction"))
    assert judge.score([sample_of("edits", 1)])[0].state == "ok"


def test_a_vision_language_judge_is_trained_by_the_same_program(judgements, tmp_path):
    base = write_base(tmp_path / "base")
    one = config(
        judgements,
        tmp_path,
        family="vlm",
        judges=("fidelity",),
        aspects=Aspects(),
        heads={},
    )
    one = replace(one, vlm=replace(one.vlm, base=str(base), rank=2), batch=1, held=2)
    train(replace(one, pace=Pace(steps=2, log_every=1, save_every=2)))
    judge = load_judge(str(tmp_path / "judge" / "judges" / "fidelity"))
    assert judge.score([sample_of("objects", 1)])[0].state == "ok"


def test_prompts_in_two_splits_are_refused(judgements, tmp_path):
    rows = [r for r in load_judgements(judgements, "train", "fidelity")][:4]
    plain = [replace(r, columns={}) for r in rows]
    for split in ("train", "dev"):
        write_judgements(tmp_path / "leak", split, plain)
    with pytest.raises(DataError, match="one split each"):
        train(config(tmp_path / "leak", tmp_path, aspects=Aspects(), judges=("fidelity",)))


def test_what_cannot_be_trained_is_refused(judgements, tmp_path):
    for fields, hint in (
        ({"judges": ()}, "one or more"),
        ({"trained": "heads"}, "fresh towers know nothing"),
        ({"family": "vlm"}, "one judge a run"),
    ):
        with pytest.raises(ConfigError, match=hint):
            config(judgements, tmp_path, **fields).check()
    with pytest.raises(DataError, match="expected train rows"):
        train(config(judgements, tmp_path, judges=("beauty",), heads={}, aspects=Aspects()))


def test_an_own_axis_needs_no_code(judgements, tmp_path):
    rows = list(JudgementTable(judgements, "train", "aesthetics"))
    own = [replace(r, axis="calm", columns={}) for r in rows]
    assert isinstance(own[0], Judgement)
    write_judgements(tmp_path / "own", "train", own)
    dev = [
        replace(r, axis="calm", columns={}) for r in JudgementTable(judgements, "dev", "aesthetics")
    ]
    write_judgements(tmp_path / "own", "dev", dev)
    heads = {"calm": replace(SMALL, text=False)}
    result = train(
        config(
            tmp_path / "own",
            tmp_path,
            judges=("calm",),
            heads=heads,
            aspects=Aspects(),
        )
    )
    assert "dev/calm/accuracy" in result["metrics"]
    assert load_judge(str(tmp_path / "judge" / "judges" / "calm")).card.name == "calm"
