"""The three stages that make an embedded base: autoencoder, condition encoder, transformer."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline
from safetensors.torch import load_file

from pipelines import pretrain, vae
from pipelines.data.loader import Batches, Draws, Encoder, Noising, token_counts
from pipelines.data.scenes import PICTURES, mixture, pictures, rgba
from rlhf.errors import ConfigError
from rlhf.flow import flow_matching, mixed_precision
from rlhf.learner import LearnerConfig
from rlhf.models import autoencoder as ae
from rlhf.models.reconstruction import pca_psnr, psnr, reconstruct
from rlhf.policies.config import PolicyConfig
from rlhf.policies.families import load_policy
from rlhf.training import Pace


class Killed(BaseException):
    """Stands in for a signal that ends the process."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Directories of an autoencoder at its start and of a barely trained condition encoder."""
    runs = str(tmp_path_factory.mktemp("parts"))
    start = vae.Config(name="vae", runs=runs, pictures=300, batch=8, pace=Pace(steps=0))
    result = vae.run(start)
    few = Pace(steps=2, log_every=1, save_every=2)
    pretrain.run(
        pretrain.Config(stage="condition", name="c", runs=runs, examples=64, batch=4, pace=few)
    )
    return {"runs": runs, "vae": f"{runs}/vae/vae", "condition": f"{runs}/c/condition"}, result


@pytest.fixture(scope="module")
def config(parts):
    where, _ = parts
    return pretrain.Config(
        **where,
        examples=120,
        shown=1,
        batch=4,
        copies=2,
        network=pretrain.Network(layers=1, heads=2, head_dim=32),
        pace=Pace(steps=4, log_every=1, save_every=2, ema=0.9),
        learner=LearnerConfig(lr=1e-3, warmup_steps=2, total_steps=8),
    )


def test_the_autoencoder_starts_as_the_principal_components(parts):
    _, result = parts
    value = {name: m["value"] for name, m in result["metrics"].items()}
    assert value["recon/psnr"] > 20
    assert value["recon/psnr"] == pytest.approx(value["recon/psnr_pca64"], abs=0.2)


def test_what_is_written_is_what_was_measured(parts):
    where, result = parts
    held = rgba(pictures(mixture(256, 2, "heldout", PICTURES), 64))
    again = reconstruct(AutoencoderKLQwenImage21.from_pretrained(where["vae"]), held)
    value = float(psnr(again[:, :3], held[:, :3]).mean())
    assert value == pytest.approx(result["metrics"]["recon/psnr"]["value"], abs=1e-3)


def test_training_everything_from_the_linear_start_only_improves():
    shown = rgba(pictures(mixture(512, 1, "train", PICTURES), 64))
    model = ae.tiny_autoencoder()
    ae.spectral_init(model, shown)
    linear = float(pca_psnr(shown, shown).mean())
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    for step in range(24):
        for group in optimiser.param_groups:
            group["lr"] = 1e-4 * (step + 1) / 24
        x = shown[torch.randint(len(shown), (16,), generator=torch.Generator().manual_seed(step))]
        error = ae.decode_raw(model, ae.encode_mode(model, x)) - x
        optimiser.zero_grad()
        (error.abs().mean() + error.pow(2).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    trained = float(psnr(reconstruct(model, shown)[:, :3], shown[:, :3]).mean())
    assert trained > linear - 1.0  # with the stream at the signal's own size it falls by 9


def test_a_killed_transformer_run_ends_as_an_unkilled_one(config, monkeypatch):
    pretrain.run(replace(config, name="whole"))

    make = pretrain.Batches.__call__

    def dying(self, draw):
        if draw.step == 4:
            raise Killed
        return make(self, draw)

    monkeypatch.setattr(pretrain.Batches, "__call__", dying)
    with pytest.raises(Killed):
        pretrain.run(replace(config, name="killed"))
    monkeypatch.undo()
    root = pretrain.Path(config.runs)
    pretrain.run(replace(config, name="killed"), resume=root / "killed")
    for slot in ("slots/train", "slots/ema", "optimiser"):
        one, other = (
            load_file(root / name / "checkpoints" / "step_000004" / f"{slot}.safetensors")
            for name in ("whole", "killed")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    rows = [[r["step"] for r in pretrain.Run.open(root / n).rows()] for n in ("whole", "killed")]
    assert rows[0] == rows[1] == [1, 2, 3, 4]


def test_the_result_is_a_stock_pipeline(config):
    result = pretrain.run(replace(config, name="stock", precision="bfloat16"))
    assert result["metrics"]["heldout/flow"]["value"] < 3
    pipeline = QwenImage21Pipeline.from_pretrained(
        f"{config.runs}/stock/model", dtype=torch.float32
    )
    picture = pipeline(
        "a red circle on white", num_inference_steps=2, height=64, width=64, output_type="np"
    )
    assert picture.images.shape == (1, 64, 64, 4)  # type: ignore[union-attr]


def test_bf16_products_agree_with_float32(tiny_base, config):
    policy = load_policy(PolicyConfig(model=str(tiny_base), train="full"))
    encoder = Encoder(policy, None)
    draws = Draws(config.spans(), config.ladder, 80, 5, token_counts(encoder))
    noising = Noising(seed=0, copies=2, dropout=0.1, shift=None)
    batch = Batches(draws, encoder, noising)(draws(1))
    losses = []
    for precision in ("float32", "bfloat16"):
        with mixed_precision(policy, precision):
            losses.append(flow_matching(policy, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2) and losses[0] != losses[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"vae": None}, "run `rlhf vae`"),
        ({"mixture": {"potraits": 1.0}}, "mixture: expected shares"),
        ({"mixture": {"text": 0.0}}, "mixture: expected shares"),
        ({"dropout": 1.0}, "expected a share below 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(config, changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(config, **changes).check()


@pytest.mark.parametrize("changes", [{"size": 70}, {"pictures": 4}])
def test_an_autoencoder_that_cannot_be_trained_is_refused(changes):
    with pytest.raises(ConfigError, match="expected"):
        replace(vae.Config(), **changes).check()
