"""The curriculum: which stage a step belongs to, and a run that is killed anywhere in it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines import pretrain
from pipelines.data.stages import Phase, Stage, span_at
from rlhf.config import load
from rlhf.errors import ConfigError
from rlhf.learner import Learner, LearnerConfig
from rlhf.training import Pace

PHASES = (
    Phase(
        name="pretraining",
        edits=0.1,
        stages=(
            Stage(name="S1", share=3.0, resolutions=(32,), edits=0.0, captions={}),
            Stage(name="S2", share=4.0, resolutions=(32, 64)),
        ),
    ),
    Phase(name="continual", rate=0.2, edits=0.3, stages=(Stage(name="S4", resolutions=(64, 96)),)),
    Phase(
        name="sft",
        rate=0.1,
        edits=0.3,
        stages=(Stage(name="S6", share=1.0, mixture={"text": 0.5, "edits": 0.5}),),
    ),
)


def settled(steps, **changes):
    known = dict(
        start="tiny", phases=PHASES, pace=Pace(steps=steps), learner=LearnerConfig(lr=1e-3)
    )
    return pretrain.Config(**(known | changes))


def test_stages_follow_each_other_in_their_shares():
    found = settled(90).spans()
    assert [(s.name, s.first, s.last) for s in found] == [
        ("S1", 1, 30),
        ("S2", 31, 70),
        ("S4", 71, 80),
        ("S6", 81, 90),
    ]
    assert [s.settings.edits for s in found] == [0.0, 0.1, 0.3, 0.3]
    assert [s.rate for s in found] == [1.0, 1.0, 0.2, 0.1]
    assert found[0].settings.captions == {} and found[1].settings.captions == {"rich": 0.15}
    assert [span_at(found, step).name for step in (1, 30, 31, 80, 81, 500)] == [
        *("S1", "S1", "S2", "S4", "S6", "S6")
    ]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.0, 1.0])
def test_edits_come_in_their_share_at_every_step(share):
    phases = (Phase(name="one", edits=share, stages=(Stage(name="S"),)),)
    (span,) = settled(1000, phases=phases).spans()
    kinds = [span.is_edit(step) for step in range(1, 1001)]
    assert sum(kinds) == round(1000 * share)
    assert all(abs(sum(kinds[:n]) - n * share) <= 0.5 + 1e-9 for n in range(1000))
    for kind in (True, False):  # batches are counted without a gap
        seen = [
            span.batches_before(step, kind) for step in range(1, 1001) if span.is_edit(step) == kind
        ]
        assert seen == list(range(len(seen)))


def test_the_rate_of_a_phase_multiplies_the_learners(tiny_base, tmp_path):
    config = settled(
        9, start=str(tiny_base), runs=str(tmp_path), examples=60, shown=1, batch=4, copies=1
    )
    config = replace(config, pace=Pace(steps=9, log_every=1, save_every=99))
    pretrain.run(config)
    rows = pretrain.Run.open(tmp_path / "pretrain").rows()
    rates = Counter(row["lr"] for row in rows[:-1])  # of the step after the row's
    assert rates == {1e-3: 6, 1e-3 * 0.2: 1, 1e-3 * 0.1: 1}


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    """A run through four stages and three phases, and its configuration."""
    runs = tmp_path_factory.mktemp("runs")
    config = settled(
        9, start=str(tiny_base), runs=str(runs), examples=60, shown=1, batch=4, copies=2
    )
    pace = Pace(steps=9, log_every=1, save_every=3, ema=0.9)
    config = replace(config, name="whole", pace=pace)
    pretrain.run(config)
    return config, runs


class Killed(BaseException):
    """Stands in for a signal that ends the process."""


@pytest.mark.parametrize(
    "at", [2, 4, 8, 9], ids=["S1", "first of S2", "first of S4", "first of S6"]
)
def test_a_run_killed_in_any_phase_or_at_its_border_ends_as_an_unkilled_one(whole, monkeypatch, at):
    config, runs = whole
    firsts = [span.first for span in config.spans()]
    assert firsts == [1, 4, 8, 9]
    name = f"killed{at}"
    make = pretrain.Batches.__call__

    def dying(self, draw):
        if draw.step == at:
            raise Killed
        return make(self, draw)

    monkeypatch.setattr(pretrain.Batches, "__call__", dying)
    with pytest.raises(Killed):
        pretrain.run(replace(config, name=name))
    monkeypatch.undo()
    pretrain.run(replace(config, name=name), resume=runs / name)
    for slot in ("slots/train", "slots/ema", "optimiser"):
        one, other = (
            load_file(runs / n / "checkpoints" / "step_000009" / f"{slot}.safetensors")
            for n in ("whole", name)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    rows = [pretrain.Run.open(runs / n).rows() for n in ("whole", name)]
    keys = ("step", "loss", "lr", "heldout/flow")
    assert [[r.get(k) for k in keys] for r in rows[0]] == [
        [r.get(k) for k in keys] for r in rows[1]
    ]


def test_a_cache_on_disk_changes_nothing_and_is_used_again(whole, monkeypatch):
    config, runs = whole
    folder = str(runs / "cache")
    for name in ("cold", "warm"):
        pretrain.run(replace(config, name=name, cache=folder))
        if name == "cold":  # from now on nothing may be encoded
            monkeypatch.setattr(pretrain.Encoder, "_one", None)
    one, *others = (
        load_file(runs / n / "checkpoints" / "step_000009" / "slots/train.safetensors")
        for n in ("whole", "cold", "warm")
    )
    assert all(torch.equal(one[k], other[k]) for other in others for k in one)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pace": Pace(steps=3)}, "at least one step, got none of 3"),
        (
            {"phases": (Phase(name="x", stages=(Stage(name="a", resolutions=(48,)),)),)},
            "squares of",
        ),
        ({"aspects": (0.5, 1.0)}, "aspects .*: write data=DIR"),
        (
            {"phases": (), "size": 32, "batch": 3, "pace": Pace(steps=9, micro_batches=4)},
            "room for 4 pictures",
        ),
        ({"phases": (), "mixture": {"text": 1.0}}, "expected a mixture for a share of edits"),
        ({"phases": (), "mixture": {"edits": 1.0}}, "expected a mixture for a share of edits"),
        ({"phases": (), "edits": 1.5}, "share of edits of 0 to 1, got 1.5"),
        ({"copies": 0}, "copies and examples of at least 1"),
        ({"learner": LearnerConfig(total_steps=50)}, "at least pace.steps, 90, got 50"),
        ({"batch": 2}, "room for 1 pictures of 36 latent tokens, got 32"),
    ],
    ids=str,
)
def test_impossible_curricula_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settled(**({"steps": 90} | changes)).check()
    with pytest.raises(ConfigError, match="expected stages and a rate"):
        Phase(name="x", stages=()).check()
    with pytest.raises(ConfigError, match="a share above 0"):
        Phase(name="x", stages=(Stage(name="a", share=0.0),)).check()


def test_edits_of_a_phase_are_the_programs_where_it_says_nothing():
    phases = (Phase(name="x", stages=(Stage(name="a"), Stage(name="b", edits=0.1))),)
    found = settled(phases=phases, edits=0.6, steps=90).spans()
    assert [span.settings.edits for span in found] == [0.6, 0.1]


@pytest.mark.parametrize("name", ["pretrain/ladder", "pretrain/qwen"])
def test_the_rate_of_the_shipped_curricula_falls_by_phase_alone(name):
    config = load(pretrain.Config, name, [], "pretrain")
    weights = {"w": torch.nn.Parameter(torch.zeros(1))}
    learner = Learner(weights, config.learner)
    for span in config.spans():
        learner.steps = max(span.first - 1, config.learner.warmup_steps)
        assert learner.rate() == pytest.approx(config.learner.lr)
