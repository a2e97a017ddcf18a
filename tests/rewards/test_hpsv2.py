import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards.backbones.hpsv2 import ARCHITECTURE, STATISTICS, HpsJudge, hpsv2_package, letterbox
from rewards.backbones.limits import count_flags
from rewards.errors import RewardConfigError
from rewards.judge import load_judge, run_judge
from rewards.types import Sample

import open_clip  # isort: skip  # only now: rewards mends torchvision

SIDE, PROMPT = 32, "a red circle above a blue square"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": SIDE,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 16,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 2,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(architecture, its model, a checkpoint of it)."""
    folder = tmp_path_factory.mktemp("hps")
    (folder / "tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-hps.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-hps").eval()
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pt")
    return "tiny-hps", model, folder / "weights.pt"


@pytest.fixture(scope="module")
def judge(tiny):
    name, _, path = tiny
    return HpsJudge(path, architecture=name, batch=4)


def sample(height=SIDE, width=SIDE, prompt=PROMPT, seed=0) -> Sample:
    image = np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8)
    return Sample(image=image, prompt=prompt, category="any")


def reference(model, sample: Sample) -> float:
    """The published arithmetic, written out: floats scaled, on black, CLIP statistics, cosine."""
    ratio = SIDE / max(sample.image.shape)
    height, width = (round(length * ratio) for length in sample.image.shape[1:])
    canvas = np.zeros((SIDE, SIDE, 3))
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    for k, channel in enumerate(sample.image.astype(np.float32)):
        scaled = Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC)
        canvas[top : top + height, left : left + width, k] = scaled
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor(
        ((canvas / 255 - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32
    )
    with torch.no_grad():
        a = model.encode_image(pixels)[0].double().numpy()
        b = model.encode_text(open_clip.tokenize([sample.prompt]))[0].double().numpy()
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (20, 20), (40, 90), (97, 33), (32, 16)])
def test_the_score_is_the_letterboxed_cosine_off_the_square_too(judge, tiny, shape):
    asked = sample(*shape)
    assert judge.score([asked])[0].value == pytest.approx(reference(tiny[1], asked), abs=2e-6)


def test_golden_scores_of_the_published_package(tmp_path):
    """What hpsv2x 1.2.0 with torch 2.15.0 answers to these pictures and prompts, with weights that
    are waves: `hpsv2.score(picture, prompt, hps_version="v2.1")`.
    """
    (tmp_path / "wave-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "wave-hps.json")
    model = open_clip.create_model("wave-hps")
    norms = ("ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight", "ln_final.weight")
    with torch.no_grad():
        for k, (name, part) in enumerate(sorted(model.named_parameters())):
            wave = 0.2 * np.sin((1.1 + 0.37 * k) * np.arange(part.numel()) + k)
            part.copy_(torch.tensor(wave.reshape(part.shape) + name.endswith(norms)))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "waves.pt")
    judge = HpsJudge(tmp_path / "waves.pt", architecture="wave-hps")
    golden = {
        (32, 32): (0.0589355, 0.0397194),
        (64, 64): (0.0593316, 0.0400782),
        (40, 90): (0.0652609, 0.0454705),
        (97, 33): (0.0655110, 0.0456989),
    }
    for (height, width), wanted in golden.items():
        c, y, x = np.mgrid[:3, :height, :width]
        image = ((x * 7 + y * 5 + c * 85 + x * y) % 256).astype(np.uint8)
        asked = [Sample(image=image, prompt=p, category="any") for p in (PROMPT, "a cat")]
        assert [s.value for s in judge.score(asked)] == pytest.approx(wanted, abs=2e-6)


def test_what_the_filter_overshoots_is_kept():
    image = np.zeros((3, 40, 64), np.uint8)
    image[:, :, 30:] = 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS)
    seen = letterbox(image, 32) * std + mean
    assert seen.shape == (3, 32, 32) and seen.max() > 1.01 and seen.min() < -0.01


def test_samples_of_any_size_and_prompt_score_as_they_do_alone(judge):
    many = [sample(20 + 9 * i, 64, PROMPT + "!" * (i % 3), seed=i) for i in range(7)]
    together = [score.value for score in judge.score(many)]
    alone = [judge.score([one])[0].value for one in many]
    assert together == pytest.approx(alone, abs=1e-6)
    assert len({round(value, 4) for value in together}) == 7


def test_cost_is_linear_in_the_number_of_samples(judge, monkeypatch):
    seen = {"image": 0, "text": 0}
    for tower in seen:
        real = getattr(judge._model, f"encode_{tower}")

        def counted(rows, tower=tower, real=real, **kwargs):
            seen[tower] += len(rows)
            return real(rows, **kwargs)

        monkeypatch.setattr(judge._model, f"encode_{tower}", counted)
    judge.score([sample(seed=i, prompt=f"number {i}") for i in range(9)])
    assert seen == {"image": 9, "text": 9}
    judge.score([sample(seed=i) for i in range(9)])
    assert seen == {"image": 18, "text": 9 + 3}  # one prompt, three batches


def test_what_the_model_does_not_see_is_flagged_and_counted(judge):
    long, exact = "word " * 76, "word " * 75  # two tokens more: start and end
    asked = [
        sample(),
        sample(prompt=exact),
        sample(prompt=long),
        sample(33, 8),
        sample(33, 8, long),
    ]
    scores = judge.score(asked)
    assert [score.flags for score in scores] == [
        (),
        (),
        ("truncated",),
        ("downscaled",),
        ("truncated", "downscaled"),
    ]
    assert count_flags(scores) == {"truncated": 2, "downscaled": 2}
    assert (judge.card.text_tokens, judge.card.pixels) == (77, SIDE)


@pytest.mark.parametrize("form", ["plain", "parallel", "safetensors"])
def test_every_form_of_checkpoint_scores_alike(judge, tiny, form, tmp_path):
    name, model, _ = tiny
    path = tmp_path / "weights.pt"
    if form == "plain":
        torch.save(model.state_dict(), path)
    elif form == "parallel":
        torch.save({"state_dict": {f"module.{k}": t for k, t in model.state_dict().items()}}, path)
    else:
        path = tmp_path / "weights.safetensors"
        save_file(dict(model.state_dict()), path)
    other = HpsJudge(path, architecture=name)
    assert other.score([sample()]) == judge.score([sample()])
    assert other.card.revision != judge.card.revision


def test_the_published_architecture_has_the_published_limits():
    config = open_clip.get_model_config(ARCHITECTURE)
    assert config is not None and config["vision_cfg"]["image_size"] == 224
    assert open_clip.get_tokenizer(ARCHITECTURE).context_length == 77


def test_a_folder_with_the_published_name_is_enough(tiny, tmp_path):
    torch.save(tiny[1].state_dict(), tmp_path / "HPS_v2_compressed.pt")
    assert HpsJudge(tmp_path, version="v2", architecture="tiny-hps").card.name == "hpsv2"
    with pytest.raises(RewardConfigError, match="HPS_v2.1_compressed.pt"):
        HpsJudge(tmp_path, architecture="tiny-hps")


def test_wrong_checkpoints_are_refused_with_the_reason(tiny, tmp_path):
    name, model, _ = tiny
    path = tmp_path / "weights.pt"

    def refused(content, match):
        torch.save(content, path)
        with pytest.raises(RewardConfigError, match=match):
            HpsJudge(path, architecture=name)

    weights = dict(model.state_dict())
    refused({k: t for k, t in weights.items() if "ln_final" not in k}, "2 missing.*ln_final")
    refused(weights | {"head.bias": torch.zeros(1)}, "1 unknown.*head.bias")
    refused(weights | {"text_projection": torch.zeros(3, 3)}, "1 keys of another shape")
    refused([1, 2], "tensors by name")
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(RewardConfigError, match="download it again"):
        HpsJudge(path, architecture=name)
    for place in (tmp_path / "absent.pt", "nobody/absent.pt"):
        with pytest.raises(RewardConfigError, match="write the path"):
            HpsJudge(place)
    with pytest.raises(RewardConfigError, match="version"):
        HpsJudge(path, version="v3")


def test_features_that_are_not_finite_fail(tiny):
    broken = HpsJudge(tiny[2], architecture="tiny-hps")
    with torch.no_grad():
        broken._model.visual.proj.fill_(math.nan)
    assert [(s.state, s.value) for s in run_judge(broken, [sample()])] == [("failed", None)]


# --- the published package ------------------------------------------------------------------------

FAKE = """
calls = []
def score(pictures, prompt, hps_version="v2.0"):
    calls.append((len(pictures), prompt, hps_version))
    if prompt == "vocabulary":
        raise FileNotFoundError("bpe_simple_vocab_16e6.txt.gz")
    return [0.01 * picture.size[0] + picture.getpixel((0, 0))[0] for picture in pictures]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "hpsv2.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hpsv2", raising=False)
    yield
    sys.modules.pop("hpsv2", None)


def test_the_package_is_asked_once_per_prompt_and_answers_in_order(package):
    images = np.zeros((3, 3, 4, 4), dtype=np.uint8)
    images[:, 0] = np.arange(1, 4)[:, None, None]
    assert hpsv2_package(images, ["a", "b", "a"]) == pytest.approx([1.04, 2.04, 3.04])
    assert sys.modules["hpsv2"].calls == [(2, "a", "v2.1"), (1, "b", "v2.1")]
    judge = load_judge("rewards.backbones.hpsv2:hpsv2_package")
    assert judge.score([sample(4, 4)])[0].value is not None
    with pytest.raises(RewardConfigError, match="docs/hpsv2.md"):
        hpsv2_package(images[:1], ["vocabulary"])


def test_without_the_package_the_message_says_what_to_do():
    with pytest.raises(RewardConfigError, match="docs/hpsv2.md"):
        hpsv2_package(np.zeros((1, 3, 4, 4), dtype=np.uint8), ["a"])
