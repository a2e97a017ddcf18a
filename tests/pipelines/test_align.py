"""`rlhf align` as a user meets it: a whole tiny run, and everything that can be wrong with one."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipelines.cli import main
from rlhf import checkpoint, config
from rlhf.errors import ConfigError
from rlhf.losses import LOSSES
from rlhf.plan import Config, Plan
from tests.rlhf.tiny import arguments, judge_spec


def fails(capsys, argv) -> tuple[int, str]:
    """Exit code and message of a command line that must not succeed."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    return ended.value.code, " ".join(capsys.readouterr().err.split())


def test_a_whole_run(any_base, tmp_path, capsys):
    assert main([*arguments(any_base, tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = tmp_path / "runs" / "tiny"
    assert result == json.loads((run / "result.json").read_text())
    name = f"heldout/general/{judge_spec('brightness')}"
    assert set(result["metrics"]) == {name, f"{name}/w1"}
    assert result["metrics"][name].keys() == {"before", "after", "gain", "low", "high", "n"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["policy_version"] for row in rows] == [1, 2, 3, 4]
    assert {f"seconds/{k}" for k in ("rollout", "reward", "train", "sync", "total")} <= set(rows[0])
    assert rows[0]["samples"] == 8 and rows[0]["nfe"] == 8 * 3 * 2 and rows[0]["reward_calls"] == 8
    assert [name in row for row in rows] == [False, True, False, True]
    assert checkpoint.step_of(checkpoint.latest(run)) == 4
    pictures = {p.name for p in (run / "samples").iterdir()}
    assert {"before.png", "after.png", "step_000002.png", "step_000004.png"} <= pictures
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert (run / "report.html").is_file() and (run / "config.yaml").is_file()
    code, text = fails(capsys, arguments(any_base, tmp_path))
    assert code == 2 and "exists" in text and "--resume" in text


def test_a_watching_judge_scores_everything_and_changes_nothing(tiny_base, tmp_path, capsys):
    rows = []
    for name, more in (("alone", ()), ("watched", (f"watch=[{judge_spec('named')}]",))):
        argv = arguments(tiny_base, tmp_path, *more, f"name={name}", "iterations=2")
        assert main([*argv, "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        assert ("heldout/general/named" in metrics) == bool(more)
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    for alone, watched in zip(*rows, strict=True):
        assert watched["watch/named/mean"] == watched[f"reward/{judge_spec('brightness')}/mean"]
        assert watched["reward_calls"] == 2 * alone["reward_calls"]
        same = [n for n in alone if not n.startswith("seconds/") and n != "reward_calls"]
        assert {n: alone[n] for n in same} == {n: watched[n] for n in same}


def test_a_mixed_set_trains_in_its_shares_and_is_measured_by_category(tiny_base, tmp_path, capsys):
    for name in ("simple", "hard"):
        lines = [{"prompt": f"a {name} circle number {i}", "category": name} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    simple, hard = (f"{tmp_path / name}.jsonl" for name in ("simple", "hard"))
    mixes = (
        f"prompts.sources={{{simple}: {{share: 2}}, {hard}: {{}}}}",
        f"evaluation.prompts.sources={{{simple}: {{count: 1}}, {hard}: {{count: 2}}}}",
    )
    argv = arguments(tiny_base, tmp_path, *mixes, "prompts_per_iteration=3", "iterations=1")
    assert main([*argv, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    judge = judge_spec("brightness")
    assert metrics[f"heldout/simple/{judge}"]["n"] == 2  # one prompt, two pictures
    assert metrics[f"heldout/hard/{judge}"]["n"] == 4
    row = json.loads((tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text())
    assert row["samples"] == 12


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny_base, tmp_path, capsys):
    assert main([*arguments(tiny_base, tmp_path), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 prompts x 4 samples = 8 pictures" in text and "= 48 forwards" in text
    assert not (tmp_path / "runs").exists()


GRPO = ("loss.name=grpo", "rollout.kernel=flow-sde", "rollout.steps=4")
BAD = {
    "a T5 too long": (("policy.t5_tokens=513",), "policy.t5_tokens: expected 0 to 512"),
    "missing checkpoint": (("policy.model=/nothing/here",), "policy.model: expected a directory"),
    "a file as a checkpoint": ((f"policy.model={__file__}",), "policy.model: expected a directory"),
    "unknown key": (("lerner.lr=1",), "did you mean 'learner'"),
    "unknown nested key": (("learner.rate=1",), "learner.rate"),
    "wrong type": (("iterations=many",), "iterations"),
    "no iterations": (("iterations=0",), "iterations: expected at least 1"),
    "no checkpoints": (("checkpoints.every=0",), "checkpoints.every: expected at least 1"),
    "a group of one": (("group_size=1",), "group_size: expected at least 2"),
    "guidance below one": (("rollout.guidance=0.5",), "guidance: expected 1"),
    "guided training of other guidance": (("train_guidance=2.0",), "train_guidance: expected 1"),
    "guided training of unguided rollouts": (
        ("rollout.guidance=1.0", "train_guidance=3.0"),
        "train_guidance: expected 1",
    ),
    "a guided reference that nothing is held near": (
        ("reference_guidance=3.0",),
        "reference_guidance: expected 1, or more with loss.kl above 0",
    ),
    "a reference of less guidance than none": (
        ("reference_guidance=0.5", "loss.kl=0.1"),
        "reference_guidance: expected 1",
    ),
    "guided evaluation below one": (("evaluation.guidance=0.2",), "guidance: expected 1"),
    "unknown loss": (("loss.name=ppo",), "loss.name: expected one of"),
    "ratio loss on an ode": (("loss.name=grpo",), "write rollout.kernel=flow-sde"),
    "guard on cps": (
        ("loss.name=guard", "rollout.kernel=cps", "rollout.window=[0,1]"),
        "loss.name guard is not defined here (kernel cps): it divides by the time step",
    ),
    "a gaussian kl of a forward loss": (
        ("loss.kl=0.1", "loss.kl_form=gaussian"),
        "write loss.kl_form=velocity",
    ),
    "replay of a forward loss": (("loss.old_logp=replay",), "no log-prob that could be computed"),
    "kl to an average that is not kept": (("loss.kl_ema=0.1",), "write ema=0.99"),
    "evaluation of an average that is not kept": (("evaluation.slot=ema",), "write ema=0.99"),
    "a rate that is down before the end": (
        ("iterations=4", "loss.updates_per_rollout=3", "learner.total_steps=11"),
        "the 12 updates",
    ),
    "a decay of one": (("ema=1.0",), "ema: expected a decay"),
    "more noise than there is": (
        ("loss.name=grpo", "rollout.kernel=cps", "rollout.window=[0,1]", "rollout.noise_level=1.2"),
        "at most 1 with kernel 'cps'",
    ),
    "ratio loss without a trajectory": (GRPO, "needs stored stochastic steps"),
    "window over the last step": ((*GRPO, "rollout.window=[0,4]"), "stop before the last"),
    "cps over the last two steps": (
        (*GRPO, "rollout.kernel=cps", "rollout.window=[0,3]"),
        "stop before the last 2 of 4 steps",
    ),
    "forward loss with a bad window": (
        ("rollout.kernel=flow-sde", "rollout.window=[2,1]"),
        "expected a window",
    ),
    "noise level zero": (
        (*GRPO, "rollout.window=[0,2]", "rollout.noise_level=0.0"),
        "noise_level > 0",
    ),
    "impossible size": (("rollout.height=65",), "rollout.height and rollout.width: expected"),
    "size not of the cell": (("rollout.width=48",), "write 64x64"),
    "unknown evaluation": (("evaluation.settings=[all]",), "evaluation.settings"),
    "full weights in bf16": (("policy.train=full", "policy.dtype=bfloat16"), "float32"),
    "no judges": (("judges=[]",), "judges: expected at least one"),
    "judge without a function": (("judges=[nowhere]",), "expected a judge such as"),
    "judge module that is not there": (("judges=[no_such:f]",), "no_such"),
    "oracle axis that is not there": (("judges=[oracle/fidelty]",), "did you mean"),
    "judge function that is not there": ((f"judges=[{judge_spec('absent')}]",), "absent"),
    "judge named twice": (
        (f"judges=[{judge_spec('brightness')},{judge_spec('brightness')}]",),
        "expected each once",
    ),
    "judge that watches too": (
        (f"watch=[{judge_spec('brightness')}]",),
        "watch: expected judges that have no say",
    ),
    "watching judge that weighs": (
        ("watch=[oracle/fidelity]", "weights={'*': {oracle/fidelity: 1.0}}"),
        "expected judges among",
    ),
    "unknown scheme": (("scheme=sum",), "scheme"),
    "weights of nobody": (("weights={'*': {other: 1.0}}",), "expected judges among"),
    "required nobody": (("required=[other]",), "expected judges among"),
    "weights that miss a category": (
        (f"weights={{text: {{{judge_spec('brightness')}: 1.0}}}}",),
        "['general']",
    ),
    "more prompts than there are": (("prompts_per_iteration=6",), "expected at least 6 prompts"),
    "shares that do not divide a batch": (
        (
            "prompts.sources={scenes/objects@train: {share: 2, count: 8},"
            " scenes/text@train: {count: 8}}",
        ),
        "prompts_per_iteration: expected a multiple of 3",
    ),
    "prompt file that is not there": (("prompts.source=gone.jsonl",), "there is no such file"),
    "bad scenes set": (("prompts.source=scenes/objects/9@train",), "expected scenes/"),
    "name with a slash": (("name=a/b",), "expected a run name"),
    "no workers": (("cluster.rollout_workers=0",), "at least one worker"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_nothing(case, tiny_base, tmp_path, capsys):
    changes, words = BAD[case]
    code, text = fails(capsys, arguments(tiny_base, tmp_path, *changes))
    assert code == 2, text
    assert words in text and "Traceback" not in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("{}", "row 2: expected a column 'prompt'"),
        ("not json", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object, got list"),
        ('{"prompt": "x", "category": 3}', "expected text in 'category'"),
        ('{"prompt": "x", "source_images": "a.png"}', "expected a list of paths"),
        ('{"prompt": "x", "source_images": ["a.png"]}', "expected a source picture at 'a.png'"),
    ],
)
def test_a_malformed_prompt_file_is_refused(line, words, tiny_base, tmp_path, capsys):
    argv = arguments(tiny_base, tmp_path)
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    code, text = fails(capsys, [*argv, f"prompts.source={path}"])
    assert code == 2 and words in text
    assert not (tmp_path / "runs").exists()


def test_another_model_class_is_refused(tiny_base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    index = other / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    code, text = fails(capsys, arguments(tiny_base, tmp_path, f"policy.model={other}"))
    assert code == 2 and "StableDiffusion3Pipeline, got a FluxPipeline" in text
    assert not (tmp_path / "runs").exists()


def test_forward_losses_are_refused_on_a_base_with_noise_levels_of_its_own(
    tiny_base, tmp_path, capsys
):
    other = tmp_path / "turbo"
    shutil.copytree(tiny_base, other)
    index = other / "model_index.json"
    levels = {"sample_sigmas": [1.0, 0.9, 0.7, 0.4]}
    index.write_text(json.dumps(json.loads(index.read_text()) | levels))
    code, text = fails(capsys, arguments(tiny_base, tmp_path, f"policy.model={other}"))
    assert code == 2 and "distilled to a few noise levels" in text
    assert not (tmp_path / "runs").exists()


def test_the_average_of_the_weights_is_what_is_evaluated_and_exported(tiny_base, tmp_path, capsys):
    slots = []
    more = ("ema=0.9", "evaluation.slot=ema", "iterations=2")
    assert main(arguments(tiny_base, tmp_path, *more)) == 0
    run = tmp_path / "runs" / "tiny"
    kept = checkpoint.load(checkpoint.latest(run)).tensors
    exported = load_file(run / "export" / "pytorch_lora_weights.safetensors")
    for slot in ("train", "ema"):
        slots.append({n.replace(".default", ""): t for n, t in kept[f"slots/{slot}"].items()})
    train, ema = ({f"transformer.{n}": t for n, t in slot.items()} for slot in slots)
    assert exported.keys() == ema.keys()
    assert all(torch.equal(exported[n], ema[n]) for n in ema)
    assert not all(torch.equal(exported[n], train[n]) for n in train)


def test_a_damaged_model_is_refused(any_base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(any_base, other)
    shutil.rmtree(other / "transformer")
    code, text = fails(capsys, arguments(any_base, tmp_path, f"policy.model={other}"))
    assert code == 2 and "could not open" in text
    assert not (tmp_path / "runs").exists()


def test_sizes_are_refused_by_the_family_before_anything_loads(tiny_sd3, tmp_path, capsys):
    for changes, words in (
        (("rollout.width=72",), "rollout.height and rollout.width: expected a height and width"),
        (("rollout.height=48", "rollout.width=1024"), "at most 512"),
    ):
        code, text = fails(capsys, arguments(tiny_sd3, tmp_path, *changes))
        assert code == 2 and words in text
        assert not (tmp_path / "runs").exists()


def test_resuming_what_is_no_run_is_refused(tmp_path, capsys):
    code, text = fails(capsys, ["align", "--resume", str(tmp_path)])
    assert code == 2 and "config" in text


def test_a_judge_that_fails_too_often_ends_the_run(tiny_base, tmp_path, capsys):
    bad = arguments(tiny_base, tmp_path, f"judges=[{judge_spec('always_raises')}]")
    code, text = fails(capsys, bad)
    assert code == 1 and "at lunch" in text or "no judge scored" in text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("full")])
def test_a_full_disk_ends_the_run_and_resuming_finishes_it(
    tiny_base, tmp_path, capsys, monkeypatch, error
):
    save, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > 5:  # four parts per checkpoint: inside the second
            raise error
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    code, text = fails(capsys, arguments(tiny_base, tmp_path, "iterations=3"))
    assert code == 1 and "free disk space" in text and "--resume" in text
    run = tmp_path / "runs" / "tiny"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_000001"]
    monkeypatch.undo()
    assert main(["align", "--resume", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert (run / "superseded" / "001" / "metrics.jsonl").is_file()


def test_a_judge_object_is_weighted_by_the_name_on_its_card(tiny_base, tmp_path, capsys):
    argv = arguments(tiny_base, tmp_path, f"judges=[{judge_spec('named')}]", "iterations=1")
    assert main(argv) == 0
    row = json.loads((tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text())
    assert row["advantage/live"] == 1.0 and "reward/named/mean" in row


# --- the configuration ----------------------------------------------------------------------------


def build(*changes):
    return config.load(Config, None, list(changes), "align")


def test_guided_training_of_equally_guided_rollouts_is_allowed():
    assert (
        build("rollout.guidance=3.0", "train_guidance=3.0").recipe().alignment.train_guidance == 3
    )


def test_every_loss_is_asked_for_what_it_requires():
    window = ("rollout.kernel=flow-sde", "rollout.window=[0,2]")
    for name, loss in LOSSES.items():
        if loss.form is None:
            continue
        with pytest.raises(ConfigError):
            build(f"loss.name={name}")
        made = build(f"loss.name={name}", *window, "prompts.count=12")
        from rlhf.prompts import load_prompts

        request = Plan.of(made, load_prompts(made.prompts)).request(1)
        assert request.store == loss.requires and request.train_guidance == 1.0
    assert build("loss.name=nft").loss.loss.form is None


def test_the_protocol_measures_unguided_where_that_is_another_thing():
    assert build("rollout.guidance=3.0").protocol().settings == ("guided", "w1")
    assert build("rollout.guidance=1.0").protocol().settings == ("guided",)
    only = build("rollout.guidance=1.0", "evaluation.settings=[w1]").protocol()
    assert only.settings == ("guided",)
    sde = build("loss.name=grpo", "rollout.kernel=flow-sde", "rollout.window=[0,2]").protocol()
    assert sde.sampler.kernel == "ode" and sde.sampler.window == (0, 0)


def test_requests_are_a_function_of_seed_and_iteration():
    from rlhf.prompts import load_prompts

    made = build("prompts.count=24")
    plan = Plan.of(made, load_prompts(made.prompts))
    first = plan.request(1)
    assert first == plan.request(1)
    seeds = {s for i in (1, 2, 3) for group in plan.request(i).seeds for s in group}
    assert len(seeds) == 3 * 12 * 8
    assert plan.request(2).prompts != first.prompts
    other = Plan.of(build("prompts.count=24", "seed=1"), plan.prompts).request(1)
    assert other.seeds != first.seeds and other.prompts != first.prompts
    assert torch.get_num_threads() == 1
