"""`rlhf reward collect` and `rlhf reward train`, at the smallest size."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines.data.aspects import AspectsObjective
from pipelines.reward import Groups, TrainConfig, agreement, train
from pipelines.reward_collect import CollectConfig, collect, specs
from pipelines.reward_towers import TowersConfig, explained, towers
from rewards.backbones.towers import WEIGHTS, open_towers
from rewards.errors import DataError
from rewards.judge import load_judge, run_judge
from rewards.scenes.specs import Edit
from rewards.trained import open_judge
from rewards.training.heads import HeadConfig
from rewards.training.schema import Judgement
from rewards.training.table import JudgementTable, load_judgements, write_judgements
from rlhf.errors import ConfigError
from rlhf.learner import LearnerConfig
from rlhf.training import Pace
from tests.rewards.towers_tiny import SHAPE, sample_of
from tests.rewards.vlm_tiny import write_base

SMALL = HeadConfig(width=32, depth=1)
FEW = Pace(steps=4, log_every=1, save_every=2, ema=0.9)


@pytest.fixture(scope="module")
def judgements(tmp_path_factory):
    out = tmp_path_factory.mktemp("judgements") / "set"
    drawn = {"train": 24, "dev": 10, "test": 8}
    result = collect(
        CollectConfig(out=str(out), drawn=drawn, sampled={"dev": 2}, per_prompt=4, workers=1)
    )
    assert result["metrics"]["judgements/dev/aesthetics/rank"]["value"] == 12
    return out


def small(runs, **fields):
    """Of towers."""
    base = TowersConfig(
        runs=str(runs), shape=SHAPE, prompts=40, batch=4, held=20, pace=replace(FEW, ema=0.0)
    )
    return replace(base, **fields)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    runs = tmp_path_factory.mktemp("towers")
    towers(small(runs))
    return runs / "towers" / "towers"


def config(judgements, made, tmp_path, **fields):
    base = TrainConfig(
        name="judge",
        runs=str(tmp_path),
        data=str(judgements),
        judges=("fidelity", "aesthetics"),
        towers=str(made),
        trained="full",
        heads={"fidelity": SMALL, "aesthetics": replace(SMALL, text=False)},
        batch=3,
        held=6,
        pace=FEW,
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


def test_a_second_collection_is_the_same_and_never_overwrites(judgements, made, tmp_path):
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


def test_an_edit_under_another_instruction_pleases_nobody(tmp_path):
    swapped = CollectConfig(
        out=str(tmp_path / "swapped"),
        shares={"edits": 1.0},
        drawn={"train": 4},
        sampled={},
        per_prompt=3,
        canaries=0.0,
        swapped=1.0,
        workers=1,
    )
    collect(swapped)
    rows = load_judgements(tmp_path / "swapped", "train", "instruction")
    groups = {r.group: [] for r in rows}
    for row in rows:
        if row.kind == "point":
            groups[row.group].append(row)
    assert len(groups) == 8  # each edit, and the same pictures under other words
    low = [np.mean([r.ratings[0] for r in found]) for found in groups.values()]
    assert max(low[::2]) < 4 and np.mean(low[::2]) < np.mean(low[1::2]) - 0.5
    for first, second in itertools.pairwise(list(groups.values())):
        if np.array_equal(first[0].sources[0], second[0].sources[0]):
            assert first[0].prompt != second[0].prompt


def test_a_share_may_name_a_level_or_a_kind_of_edit(tmp_path):
    found = CollectConfig(out=str(tmp_path / "kinds"), shares={"edits/word": 1.0, "objects/3": 1.0})
    for i, spec in enumerate(specs(found, "train", "drawn", 12)):
        assert spec.kind == "word" if isinstance(spec, Edit) else spec.level == 3, i
    assert len({type(spec) for spec in specs(found, "train", "drawn", 12)}) == 2
    for unknown in ("edits/2", "text/word", "cats"):
        with pytest.raises(ConfigError, match=f"shares.*{unknown}"):
            replace(found, shares={unknown: 1.0}).check()


def test_a_share_of_training_asks_in_more_words(tmp_path):
    asked = {}
    for rich in (0.0, 1.0):
        given = CollectConfig(
            out=str(tmp_path / str(rich)), drawn={"train": 3, "dev": 1}, sampled={}, rich=rich
        )
        collect(given)
        asked[rich] = [
            {r.prompt for r in load_judgements(given.out, split)} for split in ("train", "dev")
        ]
    assert min(map(len, asked[1.0][0])) > max(map(len, asked[0.0][0]))
    assert asked[1.0][1] == asked[0.0][1]


# --- train ----------------------------------------------------------------------------------------


def _weights(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def test_a_killed_run_ends_in_the_same_judges(judgements, made, tmp_path):
    whole = train(config(judgements, made, tmp_path / "whole"))
    assert set(whole["metrics"]) == {"dev/fidelity/accuracy", "dev/aesthetics/accuracy"}
    half = config(judgements, made, tmp_path / "half")
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
    assert 0 < cards[0]["card"]["noise_floor"] < 0.2
    assert "fidelity" in (folders[0] / "fidelity" / "README.md").read_text()


@pytest.mark.parametrize(
    ("trained", "moved"),
    [("full", {"visual", "text"}), ("locked", {"text"}), ("heads", set())],
)
def test_what_is_trained_of_the_towers(judgements, made, tmp_path, trained, moved):
    before = load_file(made / WEIGHTS)
    heads = {"instruction": replace(SMALL, source=True)}
    one = config(judgements, made, tmp_path, judges=("instruction",), trained=trained, heads=heads)
    train(one)
    judge = open_judge(tmp_path / "judge" / "judges" / "instruction")
    after = judge.model.towers.clip.state_dict()
    changed = {n for n, value in before.items() if not torch.equal(value, after[n])}
    assert {"visual" if n.startswith("visual.") else "text" for n in changed} == moved
    assert judge.score([sample_of("edits", 1)])[0].state == "ok"
    assert all(torch.equal(v, before[k]) for k, v in load_file(made / WEIGHTS).items())


def test_judges_are_calibrated_as_they_are_written(judgements, made, tmp_path):
    heads = {"aesthetics": replace(SMALL, text=False)}
    one = config(judgements, made, tmp_path, judges=("aesthetics",), trained="locked", heads=heads)
    found = train(replace(one, dtype="bfloat16"))["metrics"]["dev/aesthetics/accuracy"]["value"]
    folder = tmp_path / "judge" / "judges"
    for file in (folder / "towers" / WEIGHTS, folder / "aesthetics" / "heads.safetensors"):
        assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    judge = open_judge(folder / "aesthetics")
    rows = [r for r in load_judgements(judgements, "dev", "aesthetics") if r.kind != "point"]
    held = [r for r in rows if r.group in Groups(str(judgements), "dev", ["aesthetics"]).groups[:6]]
    assert agreement({"aesthetics": judge}, held)["dev/aesthetics/accuracy"] == found


# --- towers ---------------------------------------------------------------------------------------


def test_killed_towers_end_the_same_and_learn_to_see(tmp_path):
    more = replace(FEW, steps=12, save_every=6, ema=0.0)
    config = small(tmp_path / "whole", pace=more, batch=24, learner=LearnerConfig(lr=2e-3))
    found = towers(config)["metrics"]
    half = replace(config, runs=str(tmp_path / "half"))
    towers(replace(half, pace=replace(more, steps=6)))
    towers(half, resume=tmp_path / "half" / "towers")
    first, second = (tmp_path / n / "towers" / "towers" for n in ("whole", "half"))
    assert _weights(first) == _weights(second)
    fresh = towers(replace(config, name="fresh", pace=replace(more, steps=1)))["metrics"]
    assert found["held/objects/r2"]["value"] > fresh["held/objects/r2"]["value"] + 0.05


def test_a_form_is_scored_by_the_variance_that_it_explains(made):
    objective = AspectsObjective(open_towers(str(made)), 0)
    pictures, values, _ = objective.forms(3, 40, "heldout")
    objective.predict = lambda _: objective.standard(values)
    objective.forms = lambda *_: (pictures, values, np.ones(values.shape, bool))
    assert all(v == pytest.approx(1.0) for v in explained(objective, 40).values())
    flat = objective.standard(np.tile(values.mean(0), (len(values), 1)))
    objective.predict = lambda _: flat
    assert all(v == pytest.approx(0.0, abs=1e-4) for v in explained(objective, 40).values())


def test_towers_whose_features_are_no_form_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="one for each value"):
        towers(small(tmp_path, shape=replace(SHAPE, embed=40)))


def test_a_vision_language_judge_is_trained_by_the_same_program(judgements, made, tmp_path):
    base = write_base(tmp_path / "base")
    one = config(
        judgements,
        made,
        tmp_path,
        family="vlm",
        judges=("fidelity",),
        heads={},
    )
    one = replace(one, vlm=replace(one.vlm, base=str(base), rank=2), batch=1, held=2)
    train(replace(one, pace=Pace(steps=2, log_every=1, save_every=2)))
    judge = load_judge(str(tmp_path / "judge" / "judges" / "fidelity"))
    assert judge.score([sample_of("objects", 1)])[0].state == "ok"


def test_prompts_in_two_splits_are_refused(judgements, made, tmp_path):
    rows = [r for r in load_judgements(judgements, "train", "fidelity")][:4]
    plain = [replace(r, columns={}) for r in rows]
    for split in ("train", "dev"):
        write_judgements(tmp_path / "leak", split, plain)
    with pytest.raises(DataError, match="one split each"):
        train(config(tmp_path / "leak", made, tmp_path, judges=("fidelity",)))


def test_what_cannot_be_trained_is_refused(judgements, made, tmp_path):
    for fields, hint in (
        ({"judges": ()}, "one or more"),
        ({"towers": ""}, "rlhf reward towers"),
        ({"family": "vlm"}, "one judge a run"),
    ):
        with pytest.raises(ConfigError, match=hint):
            config(judgements, made, tmp_path, **fields).check()
    with pytest.raises(DataError, match="expected train rows"):
        train(config(judgements, made, tmp_path, judges=("beauty",), heads={}))


def test_an_own_axis_needs_no_code(judgements, made, tmp_path):
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
            made,
            tmp_path,
            judges=("calm",),
            heads=heads,
        )
    )
    assert "dev/calm/accuracy" in result["metrics"]
    assert load_judge(str(tmp_path / "judge" / "judges" / "calm")).card.name == "calm"
