"""`rlhf export`: stock diffusers loads what was written and makes the same velocities."""

import pytest
import torch
from diffusers import QwenImage21Pipeline, QwenImage21Transformer2DModel

from pipelines import export
from rlhf.errors import CheckpointError, ConfigError
from rlhf.policies.open import Opening, open_policy
from rlhf.policies.qwen_image21 import PolicyConfig, QwenImage21Policy


def velocity(policy):
    x = torch.randn((2, 16, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.velocity(
            x, torch.full((2,), 0.5), policy.encode("a red circle"), size=(64, 64)
        )


def stock(base, **parts):
    return QwenImage21Pipeline.from_pretrained(base, **parts)


def test_lora_loads_into_a_stock_pipeline(tiny_run, tiny_base, tmp_path):
    out = tmp_path / "lora"
    result = export.run(export.Config(run=str(tiny_run.root), out=str(out)))
    assert [p.name for p in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert result["step"] == 4 and result["metrics"]["export/megabytes"]["value"] > 0
    pipeline = stock(tiny_base)
    base = velocity(QwenImage21Policy(stock(tiny_base), PolicyConfig(train="none")))
    pipeline.load_lora_weights(str(out))
    got = velocity(QwenImage21Policy(pipeline, PolicyConfig(train="none")))
    trained = velocity(open_policy(Opening(model=str(tiny_run.root))).policy)
    torch.testing.assert_close(got, trained, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, base, atol=1e-3)


def test_the_lines_it_prints_run(tiny_run, tmp_path):
    out = tmp_path / "lora"
    result = export.run(export.Config(run=str(tiny_run.root), out=str(out), checkpoint=2))
    assert result["load"] in export.summarise(result) and len(result["load"].splitlines()) == 3
    space = {}
    exec(result["load"], space)
    assert space["pipeline"].get_list_adapters()


def test_full_weights_become_a_transformer(full_run, tiny_base, tmp_path):
    out = tmp_path / "full"
    result = export.run(export.Config(run=str(full_run.root), out=str(out)))
    transformer = QwenImage21Transformer2DModel.from_pretrained(out)
    got = QwenImage21Policy(stock(tiny_base, transformer=transformer), PolicyConfig(train="none"))
    trained = open_policy(Opening(model=str(full_run.root))).policy
    torch.testing.assert_close(velocity(got), velocity(trained), atol=1e-5, rtol=1e-5)
    assert "transformer=transformer" in result["load"]


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
