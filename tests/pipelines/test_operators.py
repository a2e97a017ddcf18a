"""Each operator removes what it should, and measures what it says."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipelines.data import measures
from pipelines.data.operators import OperatorConfig, key_of, scorer_of, select
from rlhf.config import build
from rlhf.errors import ConfigError
from tests.pipelines.pictures import encoded, pixels, png, record, turned

SCORERS = "tests.pipelines.pictures"


def op(**settings) -> OperatorConfig:
    return build(OperatorConfig, settings)  # as from YAML, checked


def score(config: OperatorConfig, one):
    (got,) = scorer_of(config)([one])
    return got


def blurred(seed=1):
    return np.asarray(Image.fromarray(pixels(seed)).filter(ImageFilter.GaussianBlur(3)))


def noisy(seed=1):
    rng = np.random.default_rng(seed)
    return np.clip(blurred(seed) + rng.normal(0, 25, (48, 64, 1)), 0, 255).astype(np.uint8)


def smooth(height=64, width=64):
    """A diagonal slope with a slow wave, which strong JPEG compression breaks into blocks."""
    y, x = np.mgrid[:height, :width]
    grey = 90 + x + 0.6 * y + 20 * np.sin(x / 9) * np.cos(y / 7)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


FLAT = np.full((48, 64, 3), 128, np.uint8)
STATIC = np.random.default_rng(3).integers(0, 256, (48, 64, 1), dtype=np.uint8).repeat(3, axis=2)

CASES = [  # operator, what it keeps, what it removes
    (dict(use="files", low=1), png(), png()[:400]),
    (dict(use="min_side", low=48), png(), png(height=47)),
    (dict(use="aspect", high=2), png(height=32), png(height=31)),
    (dict(use="rotation", high=0), turned(0), turned(90)),
    (dict(use="entropy", low=3), png(), encoded(FLAT)),
    (dict(use="entropy", high=7.6), png(), encoded(STATIC)),
    (dict(use="sharpness", low=100), png(), encoded(blurred())),
    (dict(use="noise", high=10), encoded(blurred()), encoded(noisy())),
    (
        dict(use="blockiness", high=1.5),
        encoded(smooth(), "JPEG", quality=95),
        encoded(smooth(), "JPEG", quality=4),
    ),
    (
        dict(use="bytes_per_pixel", low=0.4),
        encoded(pixels(), "JPEG", quality=90),
        encoded(pixels(), "JPEG", quality=5),
    ),
    (
        dict(use="safety", high=0.6, scorer=f"{SCORERS}:redness"),
        encoded(FLAT),
        encoded(np.full((8, 8, 3), 200, np.uint8)),
    ),
]


@pytest.mark.parametrize(
    ("settings", "kept", "removed"), CASES, ids=lambda v: str(v)[:40] if isinstance(v, dict) else ""
)
def test_an_operator_keeps_and_removes(settings, kept, removed):
    config = op(**settings)
    for data, stays in ((kept, True), (removed, False)):
        got = score(config, record(data))
        assert got.value is not None and config.keeps(got.value) is stays, got


def test_measures_have_their_known_values():
    halves = FLAT.copy()
    halves[:, :32] = 0
    assert measures.entropy(record(encoded(halves))) == pytest.approx(1.0)
    assert measures.entropy(record(encoded(FLAT))) == 0.0
    assert measures.aspect(record(png(height=16))) == 4.0
    assert measures.sharpness(record(encoded(FLAT))) == measures.noise(record(encoded(FLAT))) == 0
    assert measures.blockiness(record(encoded(STATIC))) == pytest.approx(1.0, abs=0.15)
    assert measures.rotation(record(turned(270))) == 270
    y, x = np.mgrid[:48, :64]
    ramp = np.repeat((x + y).astype(np.uint8)[:, :, None], 3, axis=2)
    assert measures.sharpness(record(encoded(ramp))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("sigma", [4.0, 10.0])
def test_noise_is_the_standard_deviation_that_was_added(sigma):
    added = np.random.default_rng(0).normal(0, sigma, (256, 256))
    grey = np.clip(128 + added, 0, 255).round().astype(np.uint8)
    got = measures.noise(record(encoded(np.repeat(grey[:, :, None], 3, axis=2))))
    assert got == pytest.approx(sigma, rel=0.03)


def test_bytes_per_pixel_does_not_apply_to_what_has_no_loss():
    assert measures.bytes_per_pixel(record(png())) is None
    assert score(op(use="bytes_per_pixel", low=9), record(png())).state == "na"


def test_pictures_are_seen_upright():
    assert record(turned(90)).picture.size == (64, 48)
    assert record(turned(0)).picture.size == (48, 64)


def test_a_scorer_may_not_apply_and_may_fail():
    config = op(use="aesthetic", low=0.5, scorer=f"{SCORERS}:unsure")
    states = [score(config, record(caption=c)).state for c in ("fine", "none", "nan")]
    assert states == ["ok", "na", "failed"]


def test_safety_and_aesthetic_are_off_without_a_scorer():
    assert op(use="safety", low=0.5).off
    assert not op(use="safety", low=0.5, scorer="a:b").off
    assert not op(use="entropy", low=0.5).off


def test_tokens_are_counted_by_the_tokenizer_of_the_base(tiny_base):
    config = op(use="tokens", low=3, high=20, model=str(tiny_base))
    short, right, long = (
        score(config, record(caption=c)).value for c in ("a", "a red circle on white", "xyzq " * 20)
    )
    assert short == 1 and not config.keeps(short)
    assert config.keeps(right) and not config.keeps(long)


def tiny_clip(path):
    """A random open_clip model of one layer, as a local-dir."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    settings = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    path.mkdir()
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": {"size": [32, 32]}})
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return model.eval()


def test_similarity_is_the_cosine_of_the_towers_of_a_local_model(tmp_path):
    import torch

    model = tiny_clip(tmp_path / "clip")
    config = op(use="similarity", low=0.2, model=str(tmp_path / "clip"))
    captions = ("a red circle", "two blue squares on pink", "something else")
    scores = scorer_of(config)([record(caption=c) for c in captions])
    import open_clip

    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(list(captions))
    preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'clip'}")[1]
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
        image = model.encode_image(preprocess(record().picture.pil)[None], normalize=True)
    assert [s.value for s in scores] == pytest.approx((text @ image[0]).tolist(), abs=1e-5)
    assert len({s.value for s in scores}) == 3
    edit = scorer_of(config)([record(sources=[png(1)])])
    assert edit[0].state == "na"
    own = op(use="similarity", low=0.4, scorer=f"{SCORERS}:redness")
    assert score(own, record()).state == "ok"


# --- the whole set --------------------------------------------------------------------------------


def kept(config, rows):
    return select(config, [key_of(config, 0)(row) for row in rows])


def test_the_same_file_is_kept_once_but_not_the_same_target_of_other_edits():
    edits = [record(png(1), caption=c, sources=[png(2)]) for c in ("one", "two", "one")]
    rows = [record(png(0)), record(png(0), caption="other"), record(png(1)), *edits]
    assert kept(op(use="same_file"), rows) == [True, False, True, True, True, False]


def test_the_same_look_is_kept_once():
    original = Image.fromarray(pixels(5, 96, 128))
    small = np.asarray(original.resize((80, 60)))
    brighter = np.clip(pixels(5, 96, 128) * 0.8 + 40, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    original.save(buffer, "JPEG", quality=70)
    copies = [encoded(small), encoded(brighter), buffer.getvalue()]
    rows = [record(encoded(np.asarray(original)))] + [record(c) for c in copies]
    others = [record(png(seed, 96, 128)) for seed in range(6, 16)]
    edit = record(copies[0], sources=[png(2)])
    got = kept(op(use="same_look", distance=5), [*rows, *others, edit])
    assert got == [True] + [False] * 3 + [True] * 10 + [True]


@pytest.mark.parametrize("distance", [0, 3, 7])
def test_bands_find_what_all_pairs_find(distance):
    rng = np.random.default_rng(distance)
    hashes = [int(h) for h in rng.integers(0, 2**63, 40)]
    for base in hashes[:20]:
        flips = rng.choice(64, rng.integers(0, 12), replace=False)
        hashes.append(base ^ sum(1 << int(b) for b in flips))
    want, kept_ones = [], []
    for one in hashes:
        want.append(all((one ^ old).bit_count() > distance for old in kept_ones))
        kept_ones += [one] if want[-1] else []
    got = select(op(use="same_look", distance=distance), hashes)
    assert got == want and not all(want)


def test_balance_caps_each_value_by_seed_and_not_by_place():
    config = op(use="balance", column="category", cap=3)
    rows = [record(id=str(i), category="ab"[i % 5 == 0]) for i in range(20)]
    rows.append(record(id="free"))
    chosen = {}
    for seed in (0, 1):
        keys = [key_of(config, seed)(row) for row in rows]
        stays = select(config, keys)
        chosen[seed] = {row.id for row, stay in zip(rows, stays, strict=True) if stay}
        assert sum(stays) == 7 and stays[-1]
        backwards = select(config, keys[::-1])[::-1]
        assert backwards == stays
    assert chosen[0] != chosen[1]
    kinds = op(use="balance", column="kind", cap=1)
    assert sum(kept(kinds, rows)) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(use="entropy"), "expected low, high or both"),
        (dict(use="same_file", low=1), "expected no bounds"),
        (dict(use="entropy", low=3, high=2), "low <= high"),
        (dict(use="entropy", low=3, cap=2), "'cap' belongs to balance"),
        (dict(use="similarity", low=0.2), "model=DIR or scorer=NAME"),
        (dict(use="balance", column="kind"), "cap >= 1"),
        (dict(use="same_look", distance=40), "0..16"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        op(**settings)


def test_scorers_and_models_that_are_not_there_are_refused(tmp_path):
    for settings in (
        dict(use="safety", low=0, scorer="nowhere:nothing"),
        dict(use="similarity", low=0, model=str(tmp_path)),
        dict(use="tokens", low=0, model=str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match=settings["use"] if "model" in settings else "scorer"):
            scorer_of(op(**settings))
