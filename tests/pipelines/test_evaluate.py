"""`rlhf evaluate` on a model of random weights: every figure is there, and where it should be."""

import json

import pytest

from pipelines import evaluate
from rewards import images
from rlhf.errors import ConfigError

FEW = dict(n=4, per_prompt=2, steps=2, rows=8)


def test_a_model_is_measured_into_a_folder(tiny_base, tmp_path):
    config = evaluate.Config(
        model=str(tiny_base), out=str(tmp_path), levels=(2, 1), guidances=(2.0, 4.0), **FEW
    )
    result = evaluate.run(config)
    assert json.loads((tmp_path / "evaluate.json").read_text()) == result
    names = set(result["metrics"])
    for kind in ("objects/level2", "objects/level1", "portraits", "text", "edits"):
        kinds = (f"{m}{s}" for m in ("strict", "soft") for s in ("", "/w1", "/steps4"))
        assert {f"heldout/{kind}/{name}" for name in kinds} | {f"chance/{kind}/strict"} <= names
    assert {f"recon/{k}/strict" for k in ("objects/level2", "portraits", "text")} <= names
    assert {"recon/psnr", "recon/psnr_pca64", "heldout/edits/instruction/strict/w1"} <= names
    assert {f"sweep/objects/level2/strict/guidance{w}" for w in (2, 4)} <= names
    assert result["metrics"]["sweep/best_guidance"]["value"] in (2.0, 4.0)
    assert not any("level3" in n for n in names if n.startswith("heldout"))
    for name, metric in result["metrics"].items():
        if name.startswith(("heldout", "recon", "chance")):
            assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] >= 4
    sheets = {p.name for p in (tmp_path / "evaluate").glob("*.png")}
    assert sheets == {
        f"{name}.png"
        for name in ("recon", "objects-level2", "objects-level1", "portraits", "text", "edits")
    }
    assert images.load_image(tmp_path / "evaluate" / "edits.png").std() > 0


def test_a_run_is_measured_into_its_evaluations(tiny_run):
    few = dict(parts=("text",), settings=("w1",), **FEW)
    trained = evaluate.run(evaluate.Config(model=str(tiny_run.root), **few))
    base = evaluate.run(evaluate.Config(model=str(tiny_run.root), slot="reference", **few))
    older = evaluate.run(evaluate.Config(model=str(tiny_run.root), checkpoint=2, **few))
    found = {p.stem for p in tiny_run.evaluations.glob("*.json")}
    assert found == {"evaluate", "evaluate-reference", "evaluate-step2"}
    assert [r["step"] for r in (trained, base, older)] == [4, None, 2]
    soft = [r["metrics"]["heldout/text/soft/w1"]["value"] for r in (trained, base, older)]
    assert len(set(soft)) == 3


def test_it_measures_the_same_twice(tiny_base, tmp_path):
    config = evaluate.Config(
        model=str(tiny_base), out=str(tmp_path), parts=("objects",), levels=(2,), **FEW
    )
    assert evaluate.run(config)["metrics"] == evaluate.run(config)["metrics"]


@pytest.mark.ray
def test_two_processes_measure_what_one_does(tiny_run, ray_head, tmp_path):
    few = dict(model=str(tiny_run.root), parts=("edits",), settings=("guided",), **FEW)
    one = evaluate.run(evaluate.Config(out=str(tmp_path / "1"), **few))
    two = evaluate.run(evaluate.Config(out=str(tmp_path / "2"), workers=2, **few))
    assert one["metrics"] == two["metrics"]


@pytest.mark.parametrize("changes", [{"n": 1}, {"levels": (4,)}, {"rows": 0}, {"settings": ()}])
def test_what_cannot_be_measured_is_refused(changes):
    with pytest.raises(ConfigError, match="expected"):
        evaluate.Config(**changes).check()


def test_the_plan_counts_forwards():
    config = evaluate.Config(parts=("text",), n=8, per_prompt=4, steps=10, guidances=(2.0,))
    text = evaluate.plan(config)
    assert "8 pictures" in text and f"{8 * (20 + 10 + 4) + 8 * 20} forwards" in text
