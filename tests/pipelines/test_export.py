"""`rlhf export`: stock diffusers loads what was written and makes the same velocities."""

from dataclasses import replace

import pytest
import torch

from pipelines import export
from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.open import Opening, open_policy
from tests.pipelines.conftest import make_run
from tests.rlhf.tiny import noises, stock_pipeline


def velocity(policy):
    x = noises(policy, range(2))
    with torch.no_grad():
        return policy.velocity(
            x, torch.full((2,), 0.5), policy.encode("a red circle"), size=(64, 64)
        )


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, any_base, tmp_path_factory):
    """A run of either family, and its base."""
    root = tmp_path_factory.mktemp("runs")
    return make_run(any_base, root, "any", train=request.param), any_base, request.param


def test_the_lines_it_prints_load_the_export_into_a_stock_pipeline(trained, tmp_path):
    run, base, train = trained
    out = tmp_path / "out"
    result = export.run(export.Config(run=str(run.root), out=str(out)))
    assert result["step"] == 4 and result["metrics"]["export/megabytes"]["value"] > 0
    if train == "lora":
        assert [p.name for p in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert result["load"] in export.summarise(result) and len(result["load"].splitlines()) == 3
    space: dict = {}
    exec(result["load"], space)
    assert bool(space["pipeline"].get_list_adapters()) == (train == "lora")
    want = open_policy(Opening(model=str(run.root))).policy
    family, config = type(want), replace(want.config, train="none")
    torch.testing.assert_close(
        velocity(family(space["pipeline"], config)), velocity(want), atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(
        velocity(family(stock_pipeline(base), config)), velocity(want), atol=1e-3
    )


def test_nothing_is_overwritten_and_nothing_half_written(tiny_run, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="new or empty folder"):
        export.run(export.Config(run=str(tiny_run.root), out=str(full)))
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        export.run(export.Config(run=str(tiny_run.root), out=str(tmp_path / "a"), checkpoint=3))
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="directory of a run"):
        export.run(export.Config(run=str(tmp_path / "nothing"), out=str(tmp_path / "a")))
    with pytest.raises(ConfigError, match="add out="):
        export.run(export.Config(run=str(tiny_run.root)))
