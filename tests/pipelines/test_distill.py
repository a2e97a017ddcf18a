"""`rlhf distill`: what a run leaves, what the stock pipeline makes of it, and that it continues."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pipelines import distill, evaluate, generate
from pipelines.cli import main
from pipelines.distill import FewstepConfig, OpdConfig
from rlhf import checkpoint, config
from rlhf.distill.bundles import Bundles
from rlhf.distill.trajectories import student_states
from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.open import Opening, open_policy
from rlhf.prompts import Part, PromptSet, load_prompts
from rlhf.run import Run
from rlhf.sampling import Sampler, sample
from tests.pipelines.conftest import make_run
from tests.rlhf.tiny import arguments as align_arguments
from tests.rlhf.tiny import close_pictures, drawn, judge_spec, prompt_file, same, stock_pipeline

TEXT = "a red circle number 1"


def arguments(base, folder, *more):
    prompts = prompt_file(folder)
    return [
        "name=tiny",
        f"runs={folder / 'runs'}",
        f"student.model={base}",
        "student.lora.rank=4",
        "student.lora.alpha=8",
        f"prompts.source={prompts}",
        "prompts.count=0",
        f"shown.source={prompts}",
        "shown.count=2",
        "teacher_steps=6",
        "per=2",
        "copies=2",
        "pace.steps=4",
        "pace.save_every=2",
        "pace.log_every=1",
        "learner.lr=1e-2",
        *more,
    ]


def few(base, folder, *more):
    return config.load(
        FewstepConfig, None, arguments(base, folder, "save_dtype=float32", *more), "distill"
    )


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_stock_pipeline_makes_the_students_pictures_in_its_steps(tiny_base, tmp_path, train):
    lr = "learner.lr=1e-3" if train == "full" else "learner.lr=1e-2"
    grid = "grid=[1,0.8,0.5,0.2]"
    result = distill.fewstep(few(tiny_base, tmp_path, f"student.train={train}", grid, lr))
    run = tmp_path / "runs" / "tiny"
    assert result["teachers_unchanged"] and json.loads((run / "result.json").read_text()) == result
    assert {p.name for p in run.glob("samples/*.png")} == {"step_000002.png", "step_000004.png"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["heldout/distance"] == result["metrics"]["heldout/distance"]["after"]
    stock = stock_pipeline(run / "model")
    opened = open_policy(Opening(model=str(run))).policy
    assert opened.sigmas(4, (64, 64)) == (1.0, 0.8, 0.5, 0.2, 0.0)
    mine = sample(opened, Sampler(steps=4), TEXT, seeds=(7,))
    latent, pixels = drawn(stock, opened, TEXT, 7, (64, 64), 1.0, steps=4)
    assert (mine.x0_GNC[0] - latent).abs().max() <= 1e-4
    assert close_pictures(mine.pixels[0].numpy(), pixels)
    state = checkpoint.load(checkpoint.latest(run)).tensors["slots/train"]
    base = stock_pipeline(tiny_base).transformer.state_dict()
    made = stock.transformer.state_dict()
    assert made.keys() == base.keys() and any(not torch.equal(made[n], base[n]) for n in base)
    if train == "full":
        assert all(torch.equal(made[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("method", ["segments", "consistency", "dmd"])
def test_a_run_that_is_stopped_continues_bit_for_bit(tiny_base, tmp_path, method):
    more = [f"method={method}", "pace.ema=0.9", "matching.ratio=1", "grid=even-2", "noises=1"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    distill.fewstep(few(tiny_base, tmp_path / "whole", *more))
    distill.fewstep(few(tiny_base, tmp_path / "parts", *more, "pace.steps=2"))
    runs = [tmp_path / name / "runs" / "tiny" for name in ("whole", "parts")]
    assert main(["distill", "fewstep", "--resume", str(runs[1]), "pace.steps=4"]) == 0
    one, two = (checkpoint.load(checkpoint.latest(run)) for run in runs)
    assert one.tensors.keys() == two.tensors.keys() and one.meta == two.meta
    assert {"slots/train", "slots/ema", "optimiser"} <= one.tensors.keys()
    assert ("slots/fake" in one.tensors) == (method == "dmd")
    for part, tensors in one.tensors.items():
        assert same(dict(tensors), dict(two.tensors[part])), part


def test_a_full_student_of_a_lora_teacher_is_aligned_further(tiny_base, tmp_path):
    """From a LoRA run, beside a teacher that is a full one; then `rlhf align` with a ratio loss."""
    lora = make_run(tiny_base, tmp_path, "lora")
    full = make_run(tiny_base, tmp_path, "full", train="full")
    teachers = f"teachers={{signs: {{model: {lora.root}}}, all: {{model: {full.root}}}}}"
    more = ["student.train=full", f"start={lora.root}", teachers, "learner.lr=1e-3", "grid=even-2"]
    assert distill.fewstep(few(tiny_base, tmp_path, *more))["teachers_unchanged"]
    model = tmp_path / "runs" / "tiny" / "model"
    ratio = ["loss.name=grpo", "rollout.kernel=flow-sde", "rollout.window=[0,1]"]
    once = ["iterations=1", "loss.updates_per_rollout=1"]
    short = [*once, "rollout.steps=2", "rollout.guidance=1", "name=aligned"]
    assert main(align_arguments(model, tmp_path, *ratio, *short)) == 0
    (row,) = Run.open(tmp_path / "runs" / "aligned").rows()
    assert row["grad_norm"] > 0


def test_a_run_from_full_weights_under_a_lora_continues_bit_for_bit(tiny_base, tmp_path):
    """What is frozen under the LoRA is the start's: read again when the run is."""
    full = make_run(tiny_base, tmp_path, "full", train="full")
    more = [f"start={full.root}", "steps=2"]
    runs = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        steps = ["pace.steps=2"] if name == "parts" else []
        made = arguments(tiny_base, tmp_path / name, *more, *steps)
        distill.opd(config.load(OpdConfig, None, made, "distill"))
        runs.append(tmp_path / name / "runs" / "tiny")
    assert main(["distill", "opd", "--resume", str(runs[1]), "pace.steps=4"]) == 0
    one, two = (stock_pipeline(run / "model").transformer.state_dict() for run in runs)
    assert same(one, two)


def test_opd_learns_from_two_teachers_and_keeps_the_usual_grid(tiny_base, tmp_path):
    special = make_run(tiny_base, tmp_path, "special")
    result = distill.opd(
        config.load(
            OpdConfig,
            None,
            arguments(
                tiny_base,
                tmp_path,
                "steps=3",
                "weighting=path-kl",
                f"teachers={{base: {{by_step: [1, 0.5]}}, special: {{model: {special.root}}}}}",
                f"start={special.root}",
            ),
            "distill",
        )
    )
    assert result["teachers_unchanged"]
    stock = stock_pipeline(tmp_path / "runs" / "tiny" / "model")
    assert stock.config["sample_sigmas"] is None
    assert stock.scheduler.config == stock_pipeline(tiny_base).scheduler.config


@pytest.mark.parametrize("program", ["fewstep", "opd"])
def test_prompts_and_edits_of_several_sizes_are_learnt_in_one_run(tiny_base, tmp_path, program):
    pictures = tmp_path / "pictures"
    mixture = (
        "{scenes/text/1@train: {count: 3}, scenes/edits@train: {count: 3},"
        " scenes/objects/1@train: {count: 2, sizes: [[64, 96]]}}"
    )
    kind, more = (FewstepConfig, "grid=even-2") if program == "fewstep" else (OpdConfig, "steps=2")
    made = arguments(
        tiny_base,
        tmp_path,
        f"prompts={{sources: {mixture}, pictures: {pictures}}}",
        f"shown={{source: scenes/edits@heldout, count: 2, pictures: {pictures}}}",
        "pace.micro_batches=2",
        "pace.steps=3",
        more,
    )
    result = getattr(distill, program)(config.load(kind, None, made, "distill"))
    run = tmp_path / "runs" / "tiny"
    assert result["teachers_unchanged"] and (run / "samples" / "step_000003.png").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["grad_norm"] > 0 for row in rows)


def test_a_step_of_several_bundles_has_the_mean_of_their_losses(tiny_base, tmp_path):
    """Both bundles are full, so each has half a say, in what is logged as in what is learnt."""
    more = ["noises=1", "pace.steps=1", "grid=even-2"]
    losses = []
    for parts, per in ((1, 4), (2, 2)):
        folder = tmp_path / str(parts)
        folder.mkdir()
        split = [f"pace.micro_batches={parts}", f"per={per}", "prompts.count=4"]
        distill.fewstep(few(tiny_base, folder, *more, *split))
        rows = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(rows[0])["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.ray
def test_two_workers_make_the_trajectories_of_one(tiny_base, tmp_path, ray_head):
    """Bit for bit, by two teachers of which one is a policy of its own, and for a student on other
    weights; all of them before the first step.
    """
    full = make_run(tiny_base, tmp_path, "full", train="full")
    teachers = f"teachers={{base: {{}}, all: {{model: {full.root}, by_step: [0, 1]}}}}"
    prompts = prompt_file(tmp_path)
    more = [teachers, "grid=even-2", "noises=2", "pace.steps=4", f"start={full.root}"]
    more += [f"prompts.source={prompts}", f"shown.source={prompts}"]
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        distill.fewstep(few(tiny_base, folder, *more, f"workers={workers}"))
        run = folder / "runs" / "tiny"
        files = {p.name: p.read_bytes() for p in (run / "trajectories").iterdir()}
        found.append((files, checkpoint.load(checkpoint.latest(run)).tensors["slots/train"]))
    assert found[0][0] == found[1][0] and len(found[0][0]) > 3
    assert same(dict(found[0][1]), dict(found[1][1]))


@pytest.fixture(scope="module")
def student(tiny_base, tmp_path_factory):
    """A run of two levels of its own."""
    folder = tmp_path_factory.mktemp("student")
    distill.fewstep(few(tiny_base, folder, "grid=even-2", "pace.steps=1"))
    return folder / "runs" / "tiny"


def measured(student, **changes):
    small = dict(model=str(student), parts=("text", "edits"), n=4, per_prompt=2)
    return evaluate.Config(**(small | changes))


def test_a_student_is_measured_beside_its_teacher_and_its_base(student, tiny_base):
    base = str(tiny_base)
    judges = judge_spec("brightness"), judge_spec("darkness"), "scenes/portrait"
    beside = dict(teacher=base, teacher_steps=3, baseline=base, judges=judges)
    result = evaluate.run(measured(student, **beside))
    assert json.loads((student / "evaluations" / "evaluate.json").read_text()) == result
    assert (result["settings"]["steps"], result["settings"]["guidance"]) == (2, 1.0)
    assert result["settings"]["teacher_guidance"] == 2.0
    found = result["metrics"]
    assert not any(name.endswith(("/w1", "/steps4")) for name in found)
    for stem in ("fewstep/2/text", "fewstep/2/edits", "fewstep/2"):
        for name in ("diversity", "diversity/teacher", "diversity/baseline", "strict_gain"):
            assert f"{stem}/{name}" in found
        for suffix in ("", "/baseline"):
            assert found[f"{stem}/diversity_ratio{suffix}"]["value"] > 0
            bright, dark = (found[f"{stem}/preference/{j}{suffix}"] for j in judges[:2])
            assert bright["value"] == pytest.approx(1 - dark["value"])
            assert f"{stem}/preference/portrait{suffix}" not in found or stem != "fewstep/2/text"
    assert found["fewstep/2/text/preference/portrait/na"] == {"value": 4, "n": 4}
    assert found["heldout/text/strict/teacher"]["n"] == 4
    assert found["heldout/text/strict/baseline"]["n"] == 4
    assert found["fewstep/2/forwards_ratio"]["value"] == 3.0
    mine, theirs = (found[f"fewstep/2/seconds{s}"]["value"] for s in ("", "/teacher"))
    assert found["fewstep/2/seconds_ratio"]["value"] == pytest.approx(theirs / mine)
    assert found["fewstep/2/seconds/baseline"]["value"] > 0
    sheets = {path.name for path in (student / "evaluations" / "evaluate").glob("*.png")}
    assert sheets == {"text.png", "edits.png", "fewstep-text.png", "fewstep-edits.png"}


def test_its_pictures_have_its_own_steps(student, tmp_path):
    few = generate.Config(prompt=TEXT, model=str(student), seeds=(3,), out=str(tmp_path))
    said = generate.run(few)["made"]
    assert (said["steps"], said["guidance"]) == (2, 1.0)
    with pytest.raises(ConfigError, match="steps: expected 2"):
        generate.run(replace(few, steps=40))


def test_the_baseline_has_the_students_steps_no_guidance_and_the_teachers_noise(student, tiny_base):
    base = str(tiny_base)
    unguided = dict(teacher=base, teacher_steps=2, teacher_guidance=1.0, baseline=base)
    config = measured(student, id="same", parts=("text",), judges=(judge_spec("named"),))
    found = evaluate.run(replace(config, **unguided))["metrics"]
    assert found["fewstep/2/diversity_ratio/baseline"]["value"] == 1.0
    assert found["fewstep/2/preference/named/baseline"]["value"] == 0.5
    assert found["fewstep/2/diversity_ratio"]["value"] != 1.0
    guided = replace(config, **(unguided | {"teacher_guidance": 4.0}))
    found = evaluate.run(guided)["metrics"]
    assert found["fewstep/2/diversity_ratio/baseline"]["value"] != 1.0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 1}, "steps: expected 2, since .* leave it out, or distil a student of 1 steps"),
        ({"settings": ("steps4",)}, "steps4 of settings: expected 2"),
        ({"model": "scenes", "teacher": "STUDENT", "teacher_steps": 3}, "teacher_steps: expected"),
        (
            {"model": "scenes", "steps": 4, "teacher": "scenes", "baseline": "STUDENT"},
            "steps of the baseline: expected 2",
        ),
        ({"teacher": "scenes", "teacher_guidance": 0.5}, "guidance: expected 1"),
        ({"baseline": "scenes"}, "write teacher=scenes"),
        ({"judges": ("scenes/fidelity",)}, "write teacher=scenes"),
        ({"teacher": "scenes", "parts": ("recon",)}, "a kind of prompt to compare"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused_before_a_picture_is_made(student, changes, words):
    changes = {k: str(student) if v == "STUDENT" else v for k, v in changes.items()}
    config = measured(student, id="refused", **changes)
    with pytest.raises(ConfigError, match=words):
        config.check()
        evaluate.run(config)
    assert not (student / "evaluations" / "refused").exists()


def test_a_plan_counts_the_pictures_of_all_sides(student):
    config = measured(student, parts=("text",), teacher="scenes", baseline="scenes")
    assert f"{4 * (2 + 2 + 80 + 2)} forwards" in evaluate.plan(config)


@pytest.mark.parametrize(
    "more, words",
    [
        (["student.train=none"], "nothing would learn"),
        (["grid=even-5"], "expected one of even-1"),
        (["grid=[1,0.5,0.7]"], "strictly decreasing"),
        (["noises=0"], "write noises=2"),
        (["teachers={}"], "expected at least one"),
        (["workers=0"], "workers: expected at least 1, got 0"),
        (["teachers.base.guidance=0.5"], "expected 1 .unguided. or more"),
        (["teachers.base.categories={objects: 1}"], "a say on prompts of 'general'"),
        (["teachers.base.by_step=[0]"], "a say on prompts of 'general'"),
        (["teacher_steps=3"], "raise teacher_steps"),
        (["matching.ratio=0"], "at least 1 update"),
        (["student.model=nowhere"], "expected a directory with model_index.json"),
        (["start=nowhere"], "expected a complete checkpoint"),
        (["learner.total_steps=2"], "at least pace.steps"),
        (["prompts.sizes=[[64,50]]"], "size of .*prompts.jsonl#0: .*multiples of 32"),
    ],
    ids=str,
)
def test_what_cannot_be_distilled_is_refused_before_anything_is_written(
    tiny_base, tmp_path, more, words
):
    with pytest.raises((ConfigError, CheckpointError), match=words):
        distill.fewstep(few(tiny_base, tmp_path, *more))
    assert not (tmp_path / "runs").exists()


def test_a_student_that_has_levels_of_its_own_is_no_base(tiny_base, tmp_path):
    distill.fewstep(few(tiny_base, tmp_path, "pace.steps=1", "grid=even-1"))
    made = tmp_path / "runs" / "tiny" / "model"
    with pytest.raises(ConfigError, match="start=runs/<name>"):
        distill.fewstep(few(tiny_base, tmp_path, f"student.model={made}", "name=next"))
    again = few(tiny_base, tmp_path, f"start={made.parent}", "name=next", "pace.steps=1")
    assert distill.fewstep(again)["teachers_unchanged"]


def test_a_distilled_teacher_is_followed_at_its_own_levels(tiny_base, tmp_path):
    """Progressive distillation (arXiv:2202.00512): four steps into two, then those into one."""
    levels = [1.0, 0.9, 0.7, 0.4]
    distill.fewstep(few(tiny_base, tmp_path, f"grid={levels}", "name=four"))
    runs = tmp_path / "runs"
    teacher = f"teachers={{base: {{model: {runs / 'four'}, guidance: 1}}}}"
    two = few(tiny_base, tmp_path, teacher, "grid=[1,0.7]", "name=two", "per=1", "copies=1")
    assert distill.fewstep(two)["teachers_unchanged"]
    found = {p: load_file(p)["states"] for p in (runs / "two" / "trajectories").iterdir()}
    policy = open_policy(Opening(model=str(runs / "four"))).policy
    prompts = load_prompts(two.prompts)
    (bundle,) = Bundles(prompts, policy, (64, 64), per=1, copies=1, noises=2, seed=0, parts=1).at(1)
    x = bundle.noises(policy)
    way = student_states(policy, bundle, [*levels, 0.0], x, 4)
    expected = torch.stack([x, way[2], way[4]])
    assert sum(torch.allclose(states, expected, atol=1e-5) for states in found.values()) == 1

    def refused(words, *more):
        with pytest.raises(ConfigError, match=words):
            distill.fewstep(few(tiny_base, tmp_path, teacher, "name=no", *more))

    refused("some of the levels .* leave the others out", "grid=[1,0.5]")
    refused("since dmd asks them at any noise level", "grid=[1,0.7]", "method=dmd")
    guided = f"teachers={{base: {{model: {runs / 'four'}}}}}"
    with pytest.raises(ConfigError, match="its guidance is in its weights"):
        distill.fewstep(few(tiny_base, tmp_path, guided, "grid=[1,0.7]", "name=no"))
    both = f"teachers={{a: {{model: {runs / 'four'}, guidance: 1}}, b: {{model: {runs / 'two'}}}}}"
    with pytest.raises(ConfigError, match="the same noise levels"):
        distill.fewstep(few(tiny_base, tmp_path, both, "grid=even-1", "name=no"))
    own = config.load(
        OpdConfig, None, arguments(tiny_base, tmp_path, teacher, "name=no"), "distill"
    )
    with pytest.raises(ConfigError, match="whose states the student visits"):
        distill.opd(own)
    assert not (runs / "no").exists()


def test_plans_count_rows():
    text = distill.plan_fewstep(FewstepConfig(per=4, copies=2))
    assert "8 pictures at 4 noise levels; each 32 rows forward and backward" in text
    assert "fake score: 40" in distill.plan_fewstep(FewstepConfig(per=4, copies=2, method="dmd"))
    mixed = PromptSet(sources={"scenes/text/1@train": Part(count=3), "mine.jsonl": Part(count=2)})
    counted = distill.plan_fewstep(FewstepConfig(prompts=mixed, noises=2, copies=4))
    assert "40 trajectories of the teacher at most" in counted
    assert "80 rows forward and backward" in distill.plan_opd(OpdConfig(per=4, copies=2))
