"""Prompts and edits, of several sizes, in one run: judged and measured by category."""

import json

import numpy as np
import pytest
import torch

from pipelines.cli import main
from rewards import images
from rewards.scenes.render import render
from rewards.scenes.specs import parse
from rewards.types import JudgeCard, Score, Scores
from rlhf import config
from rlhf.alignment import AlignmentLearner
from rlhf.evaluation import _figures
from rlhf.plan import Config, Plan
from rlhf.prompts import PromptSet, load_prompts
from rlhf.rollout import RolloutWorker
from rlhf.types import Advantages, Prompt
from tests.pipelines.test_align import fails
from tests.rlhf.test_resume import rows
from tests.rlhf.tiny import alignment, arguments, judge_spec, make_policy, picture, shake

BRIGHT, DARK = judge_spec("brightness"), judge_spec("darkness")


def write_set(folder):
    """Two prompts of a size each, an edit of one picture and an edit of two of other shapes."""
    for i, size in enumerate(((64, 64), (64, 96), (32, 64))):
        images.save_png(folder / f"s{i}.png", picture(i, *size))
    path = [str(folder / f"s{i}.png") for i in range(3)]
    lines = [
        {"prompt": "a red circle", "category": "plain", "height": 64, "width": 96},
        {"prompt": "a blue circle", "category": "plain", "height": 96, "width": 64},
        {"prompt": "make it red", "category": "edits", "source_images": path[:1]},
        {"prompt": "put one into the other", "category": "edits", "source_images": path[1:]},
    ]
    (folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "mixed.jsonl"


def mixed(base, folder, *more):
    source = write_set(folder)
    return arguments(
        base,
        folder,
        *[f"prompts.source={source}", f"evaluation.prompts.source={source}"],
        *["evaluation.prompts.count=4", "prompts_per_iteration=4", "evaluation.per_prompt=2"],
        f"judges=[{BRIGHT},{DARK}]",
        f"weights={{plain: {{{BRIGHT}: 1.0}}, edits: {{{DARK}: 1.0}}}}",
        *more,
    )


NFT, GRPO = (), ("loss.name=grpo", "rollout.kernel=flow-sde", "rollout.window=[0,2]")


@pytest.mark.parametrize("loss", [NFT, GRPO])
def test_a_mixed_run_trains_and_has_a_curve_for_each_category(tiny_base, tmp_path, loss):
    assert main(mixed(tiny_base, tmp_path, "iterations=2", *loss)) == 0
    run = tmp_path / "runs" / "tiny"
    for row in rows(run):
        assert row["samples"] == 16 and row["advantage/live"] == 1
        for category, judge in (("plain", BRIGHT), ("edits", DARK)):
            assert row[f"reward/total/{category}"] == row[f"reward/{judge}/mean/{category}"]
            assert row[f"advantage/live/{category}"] == 1
    result = json.loads((run / "result.json").read_text())["metrics"]
    assert result[f"heldout/edits/{DARK}"]["n"] == result[f"heldout/plain/{BRIGHT}"]["n"] == 4
    sheet = images.load_image(run / "samples" / "after.png")
    assert sheet.shape == (3, 4 * (96 + 2) + 2, 4 * (96 + 2) + 2)  # two sources and two pictures
    cell = sheet[:, 2 * 98 + 2 :, 2:][:, :64, :64]
    assert np.array_equal(cell, picture(0, 64, 64))
    assert (sheet[:, 98 * 2 + 2 : 98 * 3, 100:196] == 255).all()  # no second source
    assert (sheet[:, : 98 * 2, :196] == 255).all()  # nor any of the first two prompts


def test_a_mixed_run_that_is_stopped_ends_as_one_that_is_not(tiny_base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    assert main(mixed(tiny_base, whole)) == 0
    assert main(mixed(tiny_base, parts, "iterations=2")) == 0
    run = parts / "runs" / "tiny"
    assert main(["align", "--resume", str(run), "iterations=4"]) == 0
    assert rows(run) == rows(whole / "runs" / "tiny")


def test_every_group_is_sampled_and_trained_at_its_own_size_with_its_own_sources(
    tiny_base, tmp_path
):
    prompts = load_prompts(PromptSet(source=str(write_set(tmp_path)), count=0))
    made = config.load(Config, None, ["prompts_per_iteration=4", "group_size=2"], "align")
    plan, policy = Plan.of(made, prompts), make_policy(tiny_base)
    shake(policy)
    learner, worker = AlignmentLearner(policy, alignment("nft")), RolloutWorker(policy)
    handover = learner.publish("behaviour")
    worker.bind(handover)
    request = plan.request(1)
    rollouts = [worker.rollout(ref, request) for ref in request.refs(handover.version)]
    shapes = {r.ref.prompt.text: tuple(r.pixels.shape[2:]) for r in rollouts}
    assert shapes == {
        "a red circle": (64, 96),
        "a blue circle": (96, 64),
        "make it red": (64, 64),
        "put one into the other": (64, 64),
    }
    assert request.forwards == sum(int(r.stats["nfe"]) for r in rollouts)
    value = torch.tensor([[1.0, -1.0]] * 4)
    report = learner.update(rollouts, Advantages(value_PG=value, live_PG=value != 0))
    assert np.isfinite(report.metrics["loss"]) and report.metrics["grad_norm"] > 0


@pytest.mark.parametrize(
    "change, words",
    [
        ("prompts.sizes=[[64,65]]", "expected a height and width that are multiples of 32"),
        ("evaluation.prompts.sizes=[[48,64]]", "size of"),
    ],
)
def test_sizes_that_the_model_cannot_make_are_refused(change, words, tiny_base, tmp_path, capsys):
    argv = arguments(tiny_base, tmp_path, change)
    code, text = fails(capsys, argv)
    assert code == 2 and words in text and not (tmp_path / "runs").exists()


def test_a_source_picture_that_the_model_cannot_read_is_refused_by_name(
    tiny_base, tmp_path, capsys
):
    images.save_png(tmp_path / "odd.png", picture(0, 64, 64)[:, :, :50])
    line = {"prompt": "make it red", "source_images": [str(tmp_path / "odd.png")]}
    argv = arguments(tiny_base, tmp_path, "prompts_per_iteration=1")
    (tmp_path / "odd.jsonl").write_text(json.dumps(line))
    code, text = fails(capsys, [*argv, f"prompts.source={tmp_path / 'odd.jsonl'}"])
    assert code == 2 and "source picture of" in text and "odd.jsonl#0" in text
    assert not (tmp_path / "runs").exists()


def test_edits_are_refused_for_a_base_that_reads_no_pictures(tiny_sd3, tmp_path, capsys):
    code, text = fails(capsys, mixed(tiny_sd3, tmp_path))
    assert code == 2 and "expected a prompt without source pictures for a" in text
    assert not (tmp_path / "runs").exists()


def test_the_shipped_mixture_has_edits_with_their_judges(tmp_path):
    made = config.load(Config, "align/mixed", [f"prompts.pictures={tmp_path}"], "align")
    plan = Plan.of(made, load_prompts(made.prompts))
    request = plan.request(1)
    kinds = [p.category for p in request.prompts]
    assert kinds == ["objects"] * 4 + ["edits"] * 4 + ["portraits"] * 2 + ["text"] * 2
    for prompt in request.prompts:
        assert len(prompt.sources) == (prompt.category == "edits")
    assert set(made.weights) == set(kinds)


# --- what is measured of edits --------------------------------------------------------------------


def test_an_edit_is_right_where_both_axes_say_so():
    names = ("oracle/fidelity", "oracle/instruction", "oracle/consistency")
    cards = tuple(JudgeCard(name=n, revision="1", preprocessing="none") for n in names)
    prompts = [Prompt(id=f"x#{i}", text="t", category=c) for i, c in enumerate(("edits", "text"))]
    ok = lambda value, strict: Score(value=value, parts={"strict": float(strict)})  # noqa: E731
    na = Score(state="na", reason="no edit")
    table = {
        names[0]: ((ok(0.9, 1), ok(0.8, 1)), (ok(0.7, 1), ok(0.5, 0))),
        names[1]: ((ok(1.0, 1), ok(0.2, 0)), (na, na)),
        names[2]: ((ok(0.6, 0), ok(0.9, 1)), (na, na)),
    }
    found = _figures(Scores(judges=cards, table=table), prompts, "/w1")
    values = {name: measured.values.tolist() for name, measured in found.items()}
    assert values == {
        "heldout/edits/oracle/fidelity/w1": [0.9, 0.8],
        "heldout/edits/oracle/instruction/w1": [1.0, 0.2],
        "heldout/edits/oracle/consistency/w1": [0.6, 0.9],
        "heldout/edits/soft/w1": [0.6, 0.2],
        "heldout/edits/strict/w1": [0.0, 0.0],
        "heldout/text/soft/w1": [0.7, 0.5],
        "heldout/text/strict/w1": [1.0, 0.0],
    }
    alone = Scores(judges=cards[:1], table={names[0]: table[names[0]]})
    assert "heldout/edits/strict" not in _figures(alone, prompts, "")


def test_the_world_says_of_a_perfect_edit_that_it_is_right(tmp_path):
    """The whole path: prompts of edits, their pictures as the target, the oracle's judges."""
    from rewards.judge import load_judge
    from rlhf.cluster.base import samples_of

    made = PromptSet(source="scenes/edits@heldout", count=6, pictures=str(tmp_path))
    for prompt in load_prompts(made):
        edit = parse(prompt.target)
        right, wrong = (render(spec, 64)[None] for spec in (edit.target, edit.source))
        for axis, of_source in (("instruction", 0.0), ("consistency", 1.0)):
            judge = load_judge(f"oracle/{axis}")
            (score,), (other,) = (judge.score(samples_of(prompt, p)) for p in (right, wrong))
            assert score.parts["strict"] == 1.0 and other.parts["strict"] == of_source, prompt
