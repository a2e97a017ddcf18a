"""The ablations: one change to an arm, resumption, what is not computed twice, and the table."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import ablation_measures, ablation_report, ablations
from benchmarks.ablations import ARMS, Study, perform, resolve, trained
from pipelines import vae
from rlhf import config
from rlhf.errors import ConfigError

DOCS = Path(__file__).parents[1] / "docs" / "ablations.md"
REFERENCE = ARMS[0]
BUDGET = ("pace", "learner", "pictures", "batch", "size")


def flat(data, prefix=""):
    out = {}
    for key, value in (data or {}).items():
        name = f"{prefix}{key}"
        out |= flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return out


def settings(arm, seed=0):
    codec, flow = (config.to_dict(c) if c else None for c in resolve(Study(), arm, seed))
    return flat(codec, "vae."), flat(flow, "flow.")


def changed(arm, base=REFERENCE):
    out = set()
    for mine, theirs in zip(settings(arm), settings(base), strict=True):
        out |= {k for k in mine if theirs and mine[k] != theirs[k]}
    return out - {"vae.name", "flow.name", "flow.vae"}


@pytest.mark.parametrize(
    "name, keys",
    [
        ("shortcut-none", {"vae.network.shortcut"}),
        ("shortcut-per-level", {"vae.network.shortcut"}),
        ("align-off", {"vae.loss.alignment"}),
        ("align-constant", {"vae.loss.margins.cosine", "vae.loss.margins.distance"}),
        ("kl", {"vae.loss.kl"}),
        ("gan", {"vae.loss.gan"}),
        ("direct", {"vae.curriculum.stages"}),
    ],
)
def test_an_arm_changes_one_thing(name, keys):
    (arm,) = (arm for arm in ARMS if arm.name == name)
    assert {k for k in changed(arm)} - {"vae.loss.margins.share"} == keys


def test_the_blocks_differ_in_nothing_but_the_block():
    swiglu, gelu = (arm for arm in ARMS if arm.name.startswith("block-"))
    assert changed(gelu, swiglu) == {"flow.network.block"}
    assert settings(gelu)[0] == {} and settings(gelu)[1]["flow.vae"].endswith("scenes/vae")


def test_every_step_of_an_autoencoder_costs_as_many_pixels():
    for arm in ARMS:
        codec, _ = resolve(Study(), arm, 0)
        if codec is None:
            continue
        assert {s.batch * s.size**2 for s in codec.curriculum.stages} == {8 * 64**2}
        assert codec.pace.steps == codec.learner.total_steps == 1000


def test_every_question_asks_about_arms_that_exist():
    names = {arm.name for arm in ARMS}
    asked = {q.base for q in ablation_report.QUESTIONS}
    asked |= {arm for q in ablation_report.QUESTIONS for arm in q.claims}
    assert asked == names


# --- resumption
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path):
    """A program that notes how it is called, and a configuration for it."""
    calls = []

    def run(wanted, resume=None):
        calls.append(resume)
        root = Path(wanted.runs) / wanted.name
        root.mkdir(parents=True, exist_ok=True)
        config.save_yaml(wanted, root / "config.yaml")
        (root / "result.json").write_text("{}")

    wanted = vae.Config(name="one", runs=str(tmp_path))
    return SimpleNamespace(run=run), wanted, calls, tmp_path / "one"


def test_a_finished_run_is_found_and_a_killed_one_continued(fake):
    program, wanted, calls, root = fake
    trained(program, wanted)
    trained(program, wanted)
    assert calls == [None]
    (root / "result.json").unlink()
    trained(program, wanted)
    assert calls == [None, root]


def test_a_run_killed_before_it_had_settings_starts_again(fake):
    program, wanted, calls, root = fake
    (root / "samples").mkdir(parents=True)
    assert trained(program, wanted).root == root
    assert calls == [None] and not (root / "samples").exists()


def test_other_settings_under_the_same_name_are_refused(fake):
    program, wanted, calls, _ = fake
    trained(program, wanted)
    with pytest.raises(ConfigError, match="remove the directory"):
        trained(program, replace(wanted, batch=16))
    assert calls == [None]


def test_seconds_of_training_are_those_of_the_steps(fake):
    program, wanted, _, root = fake
    run = trained(program, wanted)
    rows = [{"step": 50, "seconds/step": 0.2}, {"step": 60, "recon/psnr": 9.0}]
    rows += [{"step": 70, "seconds/step": 0.1}]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablations.training_seconds(run) == pytest.approx(12.0)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A study of a few steps."""
    monkeypatch.setattr(vae, "HELD", 4)
    monkeypatch.setattr(vae, "SAMPLE", 8)
    held = ablation_measures.Held(pictures=4, prompts=4, each=2, levels=2, steps=2)
    codec = ("network.encoder_width=4", "network.decoder_width=4", "pictures=16", "pace.steps=4")
    flow = ("network.layers=1", "network.heads=1", "examples=60", "batch=4", "pace.steps=2")
    return replace(
        Study(),
        runs=str(tmp_path / "runs"),
        results=tmp_path / "results",
        held=held,
        vae_overrides=(*codec, "pace.save_every=2"),
        transformer_overrides=flow,
    )


@pytest.mark.slow
def test_an_arm_is_trained_measured_and_not_computed_twice(small, monkeypatch):
    arm = replace(REFERENCE, name="align-off", vae=("loss.alignment=0.0",))
    result = perform(small, arm, 1)
    held = {"psnr", "ssim", "psnr128", "kept", "soft", "chance", "flow", "peak", "peak_ratio"}
    assert set(result["metrics"]) == set(result["values"]) == held
    assert result["configs"]["vae"]["loss"]["alignment"] == 0.0
    assert result["configs"]["transformer"]["vae"].endswith("align-off-seed1-vae/vae")
    assert [step for step, _ in result["curve"]] == [2, 4]
    assert len(result["blocks"]["largest"]) == 1 and result["metrics"]["psnr"]["n"] == 4
    assert 0.5 < result["metrics"]["flow"]["value"] < 2
    monkeypatch.setattr(ablations, "trained", None)
    assert perform(small, arm, 1) == json.loads(small.file(arm, 1).read_text()) == result
    with pytest.raises(ConfigError, match="remove the file"):
        perform(small, replace(arm, vae=()), 1)


@pytest.mark.slow
def test_a_run_that_fails_is_counted_and_the_others_are_kept(small, tmp_path, capsys):
    small = replace(small, vae=str(tmp_path / "nowhere"))
    work = ablations.jobs(["block-gelu"], [0])
    assert ablations.perform_all(small, work, 1) == 1
    assert "failed: block-gelu seed 0" in capsys.readouterr().err


# --- the table
# -----------------------------------------------------------------------------------------------


def result(arm, seed, **means):
    draw = np.random.default_rng(0)
    noise = draw.normal(0, 1, 40)
    values = {name: (mean + noise).tolist() for name, mean in means.items()}
    return {
        "arm": arm,
        "seed": seed,
        "configs": {"vae": {}, "transformer": None},
        "values": values,
        "curve": [[100, 10.0], [200, means["psnr"]]],
    }


def folder(path, *results):
    path.mkdir()
    for one in results:
        (path / f"{one['arm']}-seed{one['seed']}.json").write_text(json.dumps(one))
    return path


def test_the_table_shows_differences_with_their_intervals(tmp_path):
    runs = [result("reference", s, psnr=24.0 + 0.01 * s) for s in (0, 1)]
    runs += [result("shortcut-none", s, psnr=22.0 - 0.01 * s) for s in (0, 1)]
    text = ablation_report.write(folder(tmp_path / "ablations", *runs))
    (line,) = (line for line in text.splitlines() if "shortcut-none" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["shortcut (global)", "shortcut-none", "2", "psnr"]
    value, low, high = map(float, re.findall(r"-?[\d.]+", cells[5]))
    assert value == pytest.approx(-2.01, abs=2e-3) and low < value < high < 0
    # the prompts are the same, so all that is uncertain is the seed: t(2) s sqrt(2 / 2)
    assert high - low == pytest.approx(2 * 4.3027 * 0.01 / 2**0.5, rel=0.1)
    assert cells[6] == ablation_report.AS_REPORTED
    assert (tmp_path / "ablations" / "table.md").read_text() == text
    assert (tmp_path / "ablations.png").stat().st_size > 10_000


def test_a_difference_within_the_spread_of_the_seeds_is_not_resolved(tmp_path):
    runs = [result("reference", s, psnr=24.0 + s) for s in (0, 1)]
    runs += [result("kl", 0, psnr=25.0)]
    text = ablation_report.write(folder(tmp_path / "ablations", *runs))
    assert ablation_report.UNRESOLVED in text
    arms = ablation_report.load(tmp_path / "ablations")
    gap = ablation_report.difference(arms, "reference", "kl", "psnr")
    assert gap.value == pytest.approx(0.5) and gap.low < 0 < gap.high and gap.freedom == 1


def test_a_difference_against_the_claim_is_called_so():
    gap = ablation_report.Interval(1.0, 0.5, 1.5, freedom=4)
    assert ablation_report.verdict(gap, -1) == ablation_report.AGAINST
    assert ablation_report.verdict(gap, None) == "resolved, nothing was reported"
    assert "not judged" in ablation_report.verdict(replace(gap, freedom=0), 1)


# --- the page and the command
# -----------------------------------------------------------------------------------------------


def test_the_page_names_every_arm_and_its_commands_can_be_given(tmp_path, capsys):
    text = DOCS.read_text()
    assert [arm.name for arm in ARMS if f"`{arm.name}`" not in text] == []
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.strip().splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "benchmarks.ablations"]
        where = ["--list", "--runs", str(tmp_path), "--results", str(tmp_path)]
        assert ablations.main([*words[3:], *where]) == 0
    assert "to do" in capsys.readouterr().out


def test_the_page_holds_the_table_of_the_results():
    found = ablations.RESULTS / "table.md"
    if found.is_file():
        assert found.read_text() in DOCS.read_text()


def test_a_page_is_filled_between_its_marks_and_only_there(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    for text in ("| one |\n", "| two |\n"):
        ablation_report.fill(page, text)
    assert page.read_text() == "before\n<!-- table -->\n| two |\n<!-- /table -->\nafter\n"


def test_an_unknown_arm_is_refused():
    with pytest.raises(ConfigError, match="expected some of reference"):
        ablations.jobs(["shortcut"], None)
