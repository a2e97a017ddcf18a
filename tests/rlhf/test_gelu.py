"""The GELU and scale-shift transformer: its size, its place in the pipeline, its caches."""

import inspect

import pytest
import torch

from rlhf.models import tiny
from rlhf.models.gelu import GeluShiftTransformer2DModel, QwenImage21Transformer2DModel
from rlhf.policies.config import PolicyConfig
from rlhf.policies.qwen_image21 import QwenImage21Pipeline, QwenImage21Policy
from tests.rlhf.tiny import TEXTS, picture

SIZE = dict(layers=2, heads=2, head_dim=32, context=64)


def count(model):
    return sum(p.numel() for p in model.parameters())


def make(seed=0):
    torch.manual_seed(seed)
    return tiny.make_transformer(**SIZE, block="gelu")


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):
    """The tiny pipeline with this transformer in place, on disk."""
    folder = tmp_path_factory.mktemp("gelu")
    pipeline = QwenImage21Pipeline.from_pretrained(tiny_base, transformer=make())
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(saved):
    return QwenImage21Policy(
        QwenImage21Pipeline.from_pretrained(saved), PolicyConfig(train="full", model=str(saved))
    )


@pytest.mark.parametrize("layers", [1, 6])
def test_it_has_the_weights_of_the_stock_one_and_three_squares_of_shifts(layers):
    size = dict(layers=layers, heads=6, head_dim=32)
    stock, mine = (tiny.make_transformer(**size, block=block) for block in ("swiglu", "gelu"))
    assert count(mine) - count(stock) == 3 * 192**2
    mlps = [count(model.transformer_blocks[0].img_mlp) for model in (stock, mine)]
    assert mlps[0] == mlps[1]
    assert type(stock) is QwenImage21Transformer2DModel


def test_its_interface_is_the_stock_ones():
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(QwenImage21Transformer2DModel, method)).parameters
        mine = inspect.signature(getattr(GeluShiftTransformer2DModel, method)).parameters
        assert [(p.name, p.default) for p in mine.values()] == [
            (p.name, p.default) for p in theirs.values()
        ]
    assert "transformer_blocks.*.img_mlp.gate_layer" not in GeluShiftTransformer2DModel._tp_plan


def test_saving_and_loading_keeps_weights_and_configuration(tmp_path):
    model = make(1)
    model.save_pretrained(tmp_path)
    again = GeluShiftTransformer2DModel.from_pretrained(tmp_path)
    for one, two in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    assert again.config.num_layers == model.config.num_layers == 2
    assert len(again.transformer_blocks) == 2


def test_the_stock_pipeline_makes_pictures_with_it(saved):
    pipeline = QwenImage21Pipeline.from_pretrained(saved)
    assert isinstance(pipeline.transformer, GeluShiftTransformer2DModel)
    pipeline.set_progress_bar_config(disable=True)
    drawn = {
        cached: pipeline(
            prompt="a red circle",
            num_inference_steps=2,
            height=64,
            width=96,
            output_type="latent",
            use_kv_cache=cached,
            generator=torch.Generator().manual_seed(0),
        ).images
        for cached in (True, False)
    }
    torch.testing.assert_close(drawn[True], drawn[False], atol=1e-4, rtol=0)


@pytest.mark.parametrize("edit", [False, True], ids=["text", "edit"])
def test_a_cached_prefix_changes_neither_velocity_nor_gradient(policy, edit):
    condition = policy.encode(TEXTS[0], [picture(1, 64, 96)] if edit else [])
    draw = torch.Generator().manual_seed(3)
    x, sigma = torch.randn(4, 16, 64, generator=draw), torch.tensor([0.95, 0.7, 0.4, 0.1])
    seen, slopes = [], []
    for cached in (False, True):
        policy.transformer.zero_grad()
        prefix = policy.prefix(condition) if cached else None
        v = policy.velocity(x, sigma, condition, size=(64, 64), prefix=prefix)
        v.pow(2).mean().backward()
        seen.append(v.detach())
        slopes.append({n: p.grad.clone() for n, p in policy.slots.parameters.items()})
    assert seen[0].std() > 0.1
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)
    scale = max(float(g.abs().max()) for g in slopes[0].values())
    for name, slope in slopes[0].items():
        torch.testing.assert_close(slope, slopes[1][name], rtol=1e-3, atol=1e-5 * scale)


def test_the_condition_does_not_depend_on_the_time_of_the_target(policy):
    """Shifts of condition tokens are those of t = 0: the last row of the modulation."""
    block, norm = policy.transformer.transformer_blocks[0], policy.transformer.norm_out
    rows = torch.randn(3, 3 * 64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([False, False, True])
    x = torch.zeros(2, 3, 64)
    moved, gate = block._modulate(x, rows, target)
    shift = rows[:, :64]
    assert torch.equal(moved[:, :2], shift[2].expand(2, 2, 64))
    assert torch.equal(moved[:, 2], shift[:2]) and torch.equal(gate[:, 2], rows[:2, 128:])
    early, late = (norm(x, torch.full((3, 64), t), target) for t in (0.1, 0.9))
    assert not torch.equal(early, late)


def test_activations_computed_again_give_the_same_gradient():
    model, slopes = make(2).train(), []
    draw = torch.Generator().manual_seed(5)
    inputs = dict(
        hidden_states=torch.randn(1, 16, 64, generator=draw),
        encoder_hidden_states=torch.randn(1, 3, 64, generator=draw),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        img_mask=torch.tensor([[False] * 3 + [True] * 4]),
        return_dict=False,
    )
    for again in (False, True):
        if again:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs)[0].pow(2).mean().backward()
        slopes.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *slopes))
