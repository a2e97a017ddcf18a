"""`rlhf vae`: a few steps of every network with every loss, exact resumption, and refusals."""

from dataclasses import replace

import pytest
import torch

from pipelines import vae
from pipelines.data.curriculum import Curriculum, Stage
from rlhf import checkpoint, config
from rlhf.errors import ConfigError
from rlhf.learner import LearnerConfig
from rlhf.models import autoencoder as ae
from rlhf.models.codec import CodecLoss
from rlhf.models.vae2 import AutoencoderVAE2
from rlhf.training import Pace

NETWORK = vae.Network(
    kind="vae2", encoder_width=4, decoder_width=4, encoder_blocks=1, decoder_blocks=1
)
EVERY = CodecLoss(l1=1.0, mse=0.5, perceptual=0.1, alignment=0.1, kl=1e-3, gan=0.1)
STAGES = Curriculum(stages=(Stage(size=64), Stage(size=96, text=0.5)), aspects=(1.0, 0.75))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Fewer pictures for figures than a real run reads."""
    monkeypatch.setattr(vae, "HELD", 6)
    monkeypatch.setattr(vae, "SAMPLE", 8)


def settings(root, name, steps=4, **changes):
    known = dict(
        start="random",
        trained="all",
        network=NETWORK,
        loss=EVERY,
        curriculum=STAGES,
        pictures=8,
        batch=4,
        pace=Pace(steps=steps, log_every=1, save_every=2, ema=0.9),
        learner=LearnerConfig(lr=1e-3),
    )
    made = vae.Config(name=name, runs=str(root), **(known | changes))
    made.check()
    return made


def rows(run):
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds")}
        for row in vae.Run.open(run).rows()
    ]


def test_every_loss_through_two_stages_and_what_is_written(tmp_path):
    result = vae.run(settings(tmp_path, "all"))
    assert {"recon/psnr", "recon/ssim", "recon/psnr_pca64"} == set(result["metrics"])
    said = rows(tmp_path / "all")
    names = ("l1", "mse", "perceptual", "alignment", "kl", "gan", "discriminator")
    assert len(said) == 4 and {f"loss/{name}" for name in names} <= set(said[0])
    made = ae.load_autoencoder(tmp_path / "all" / "vae")
    assert isinstance(made, AutoencoderVAE2)
    assert len(set(made.config.latents_std)) > 32 and any(made.config.latents_mean)
    state = checkpoint.load(tmp_path / "all" / "checkpoints" / "step_000004")
    assert {"alignment.weight", "discriminator.0.weight"} <= set(state.tensors["slots/train"])


def test_a_run_cut_short_ends_where_an_unbroken_one_does(tmp_path):
    whole = settings(tmp_path, "whole")
    vae.run(whole)
    cut = settings(tmp_path, "cut")
    run = vae.Run.create(cut.runs, cut.name, cut, "vae")

    class Killed(Exception):
        pass

    def kill(data):
        def batch_of(step):
            if step == 4:
                raise Killed
            return data.batch_of(step)

        return replace(data, batch_of=batch_of)

    opened = vae.open_pictures
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(vae, "open_pictures", lambda config: kill(opened(config)))
        vae.run(cut, resume=run.root)
    vae.run(config.load(vae.Config, str(run.root / "config.yaml")), resume=run.root)
    assert rows(run.root) == rows(tmp_path / "whole")
    mine, theirs = (
        checkpoint.load(root / "checkpoints" / "step_000004").tensors
        for root in (run.root, tmp_path / "whole")
    )
    for part, tensors in theirs.items():
        assert all(torch.equal(value, mine[part][name]) for name, value in tensors.items()), part


def test_the_default_trains_the_decoder_of_the_stock_class(tmp_path):
    known = dict(network=vae.Network(), loss=CodecLoss(), curriculum=Curriculum())
    made = settings(tmp_path, "stock", steps=2, start="spectral", trained="decoder", **known)
    torch.manual_seed(made.seed)
    before = vae.build(made, vae.open_pictures(made).sample)
    vae.run(made)
    after = ae.load_autoencoder(tmp_path / "stock" / "vae")
    moved = {
        name.split(".")[0]
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert moved == {"decoder", "post_quant_conv"}
    assert len(set(after.config.latents_std)) == 1


def test_f32_reads_larger_cells(tmp_path):
    net = replace(NETWORK, setting="f32c192")
    curriculum = Curriculum(stages=(Stage(size=64),), aspects=(1.0, 0.5))
    result = vae.run(
        settings(tmp_path, "f32", steps=1, network=net, curriculum=curriculum, loss=CodecLoss())
    )
    assert set(result["metrics"]) == {"recon/psnr", "recon/ssim"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"start": "spectral"}, "no spectral start"),
        ({"network": replace(NETWORK, encoder_width=5)}, "divisor of 96"),
        ({"network": vae.Network(), "trained": "decoder"}, "shape the encoder"),
        ({"size": 512}, "up to 256"),
        ({"network": vae.Network(), "checkpointing": True}, "the stock class has none"),
        ({"pictures": 2}, "at least one batch"),
    ],
)
def test_impossible_combinations_are_refused_before_anything_loads(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config.build(vae.Config, config.to_dict(settings(tmp_path, "no")) | config_of(changes))


def config_of(changes):
    return {key: config.to_dict(value) for key, value in changes.items()}
