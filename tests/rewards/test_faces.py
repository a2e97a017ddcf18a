import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import linear_sum_assignment

from rewards.backbones.face_models import InsightFaces, OpenCvFaces, to_bgr
from rewards.backbones.faces import Face, FaceJudge, assign, confidence, identity, ramp
from rewards.errors import JudgeError, RewardConfigError
from rewards.judge import run_judge
from rewards.types import Sample

SIZE = (200, 200)


def face(*vector, box=(10, 10, 80, 80), score=0.9) -> Face:
    box = tuple(float(n) for n in box)
    return Face(box=box, score=score, vector=np.array(vector, dtype=np.float64))


# --- pure parts -----------------------------------------------------------------------------------


def test_the_ramp_saturates():
    cosines = (-1.0, 0.2, 0.45, 0.7, 1.0)
    assert [ramp(c) for c in cosines] == pytest.approx([0, 0, 0.5, 1, 1])
    assert ramp(0.5, low=0.0, high=1.0) == 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 3), (4, 7), (9, 6), (20, 20)])
def test_matching_has_the_largest_total_cosine(shape):
    for seed in range(5):
        table = np.random.default_rng(seed).uniform(-1, 1, shape)
        pairs = assign(table)
        rows, columns = linear_sum_assignment(-table)
        assert sum(table[i, j] for i, j in pairs) == pytest.approx(table[rows, columns].sum())
        assert len(pairs) == min(shape)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == min(shape)


def test_people_who_changed_places_are_themselves_and_a_greedy_match_would_be_wrong():
    anna, ben = face(1, 0, 0), face(0, 1, 0)
    assert identity([anna, ben], [ben, anna], SIZE).value == 1.0
    # greedy takes 0.9 first and is left with 0: the best total is 0.8 + 0.7
    table = np.array([[0.9, 0.8], [0.7, 0.0]])
    assert assign(table) == [(0, 1), (1, 0)]


def test_states():
    anna, ben = face(1, 0, 0), face(0, 1, 0)
    none = identity([], [anna], SIZE)
    assert (none.state, none.reason, none.value) == ("na", "src_no_face", None)
    lost = identity([anna], [], SIZE)
    assert (lost.state, lost.value, lost.flags) == ("ok", 0.0, ("lost_face",))
    other = identity([anna], [ben], SIZE)
    assert (other.state, other.value, other.flags) == ("ok", 0.0, ())
    half = identity([anna, ben], [anna], SIZE)
    assert (half.value, half.flags, half.parts["lost"]) == (0.5, ("lost_face",), 1.0)
    more = identity([anna], [ben, anna], SIZE)
    assert (more.value, more.flags) == (1.0, ("extra_face",))


def test_small_and_unsure_faces_weigh_less_and_only_by_the_source():
    large, small = face(1, 0, 0), face(0, 1, 0, box=(0, 0, 32, 32))
    assert confidence(large, *SIZE) == 1.0
    assert confidence(small, *SIZE) == 0.5
    assert confidence(face(1, 0, score=0.3), *SIZE) == pytest.approx(0.5)
    assert confidence(face(1, 0), 2000, 2000) == pytest.approx(0.16)
    kept_large = identity([large, small], [large], SIZE)
    assert kept_large.value == pytest.approx(1 / 1.5)
    assert kept_large.parts["weight"] == 0.75
    assert set(kept_large.flags) == {"lost_face", "low_confidence"}
    shrunk = face(0, 0, 1, box=(0, 0, 4, 4))  # a stranger, small in the edit
    assert identity([large], [shrunk], SIZE).parts["weight"] == 1.0


# --- the judge ------------------------------------------------------------------------------------


class Stub:
    """A picture's first pixel says who is on it: 0 nobody, 1 to 3 a person, 9 breaks down, 8 gives
    a vector of nothing.
    """

    name, revision, licence, commercial = "stub", "1", "Apache-2.0", True

    def __init__(self):
        self.looked: list[int] = []

    def faces(self, image):
        who = int(image[0, 0, 0])
        self.looked.append(who)
        if who == 9:
            raise RuntimeError("the detector broke down")
        if who == 0:
            return []
        return [face(*([0.0] * 3 if who == 8 else np.eye(3)[who - 1]))]


def shot(who: int) -> np.ndarray:
    return np.full((3, 200, 200), who, dtype=np.uint8)


def edit(source: int, result: int, **columns) -> Sample:
    return Sample(
        image=shot(result),
        prompt="make it red",
        category="portraits",
        sources=(shot(source),),
        columns=columns,
    )


def test_an_unchanged_face_scores_one_and_a_swapped_source_zero():
    scores = FaceJudge(Stub()).score([edit(1, 1), edit(1, 2), edit(2, 2), edit(1, 0)])
    assert [s.value for s in scores] == [1.0, 0.0, 1.0, 0.0]
    assert [s.flags for s in scores] == [(), (), (), ("lost_face",)]


def test_a_broken_detector_is_never_another_person():
    scores = run_judge(FaceJudge(Stub()), [edit(1, 9), edit(9, 1), edit(1, 8), edit(1, 1)])
    assert [s.state for s in scores] == ["failed", "failed", "failed", "ok"]
    assert all(s.value is None for s in scores[:3])
    assert "broke down" in scores[0].reason and "not zero" in scores[2].reason
    for box, score in (((0.0, 0.0, np.nan, 9.0), 0.9), ((0.0, 0.0, 9.0, 9.0), np.nan)):
        with pytest.raises(JudgeError, match="a face at a place"):
            Face(box=box, score=score, vector=np.ones(3))


@pytest.mark.parametrize(
    "source, wish, states",
    [
        (1, "keep", ["ok", "ok", "ok"]),
        (1, None, ["ok", "ok", "ok"]),
        (0, "keep", ["na", "na", "na"]),
        (1, "remove", ["na", "na", "na"]),
        (1, "replace", ["na", "na", "na"]),
        (1, "anonymise", ["na", "na", "na"]),
        (1, "away", ["na", "na", "na"]),
        (1, "turn", ["failed", "failed", "failed"]),
    ],
)
def test_the_term_applies_to_a_whole_group_or_to_none_of_it(source, wish, states):
    """Whatever the edited pictures show: hiding the face does not escape."""
    judge = FaceJudge(Stub())
    scores = judge.score([edit(source, result, face=wish) for result in (0, 1, 2)])
    assert [s.state for s in scores] == states


def test_a_shared_source_is_looked_at_once():
    stub = Stub()
    FaceJudge(stub).score([edit(1, 2), edit(1, 3), edit(2, 1)])
    assert stub.looked == [1, 2, 3, 2, 1]


def test_the_card_carries_the_embedders_licence_and_needs():
    card = FaceJudge(Stub(), categories=("portraits",)).card
    assert card.needs == ("source", "face") and card.revision == "stub@1" and card.commercial
    assert not card.covers("objects")
    with pytest.raises(RewardConfigError, match="low < high"):
        FaceJudge(Stub(), low=0.7, high=0.2)
    prompt = Sample(image=shot(1), prompt="a face", category="portraits")
    assert FaceJudge(Stub()).score([prompt])[0].state == "na"


# --- OpenCV with networks made here ---------------------------------------------------------------

LANDMARKS = np.array([(38.3, 51.7), (73.5, 51.5), (56.0, 71.7), (41.5, 92.4), (70.7, 92.2)]) / 112


def _save(path, nodes, weights, inputs, outputs):
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
        [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_detector(path):
    """YuNet's outputs from averages of cells: a face is a 32 px cell that is blue, given BGR."""
    nodes, outputs = [], []
    weights: dict[str, np.ndarray] = {}
    for stride in (8, 16, 32):
        pool = dict(kernel_shape=[stride] * 2, strides=[stride] * 2)
        nodes.append(helper.make_node("AveragePool", ["input"], [f"cells_{stride}"], **pool))
        blue = np.array([[1, -1, -1]]) / 255 * (stride == 32)
        heads = {
            "cls": (blue, [0.0]),
            "obj": (np.zeros((1, 3)), [1.0]),
            "bbox": (np.zeros((4, 3)), [0.5, 0.5, 0.0, 0.0]),
            "kps": (np.zeros((10, 3)), LANDMARKS.reshape(-1)),
        }
        for head, (matrix, bias) in heads.items():
            name, size = f"{head}_{stride}", len(bias)
            weights[f"w_{name}"] = matrix.astype(np.float32)[:, :, None, None]
            weights[f"b_{name}"] = np.array(bias, dtype=np.float32)
            weights[f"s_{name}"] = np.array([1, -1, size], dtype=np.int64)
            pieces = [f"cells_{stride}", f"w_{name}", f"b_{name}"]
            nodes += [
                helper.make_node("Conv", pieces, [f"c_{name}"]),
                helper.make_node("Transpose", [f"c_{name}"], [f"t_{name}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"t_{name}", f"s_{name}"], [name]),
            ]
            outputs.append((name, [1, None, size]))
    return _save(path, nodes, weights, [("input", [1, 3, "h", "w"])], outputs)


MATRIX = np.random.default_rng(0).normal(size=(3, 128)).astype(np.float32)


def write_embedder(path):
    """SFace's shape: the mean colour of the face, given RGB, times a fixed matrix."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["rgb"]),
        helper.make_node("Gemm", ["rgb", "matrix"], ["fc1"]),
    ]
    shapes = [("data", [1, 3, 112, 112])], [("fc1", [1, 128])]
    return _save(path, nodes, {"matrix": MATRIX}, *shapes)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return write_detector(folder / "yunet.onnx"), write_embedder(folder / "sface.onnx")


def portrait(colour, row=1, column=2, height=96, width=128) -> np.ndarray:
    """A grey picture with one 32 px "face" of an RGB colour."""
    image = np.full((3, height, width), 128, dtype=np.uint8)
    square = np.s_[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
    image[square] = np.array(colour, dtype=np.uint8)[:, None, None]
    return image


def test_bgr_is_the_channels_the_other_way_round():
    assert to_bgr(portrait((1, 2, 3)))[40, 70].tolist() == [3, 2, 1]


def test_opencv_finds_a_face_where_it_is_and_reads_its_colours_in_the_right_order(networks):
    faces = OpenCvFaces(*networks)
    colour = np.array([20, 30, 250])
    (found,) = faces.faces(portrait(colour))
    assert found.box == pytest.approx((64, 32, 32, 32), abs=1)
    assert found.score == pytest.approx(np.sqrt((250 - 30 - 20) / 255), abs=0.02)
    wanted = colour @ MATRIX
    assert found.vector.shape == (128,)
    cosine = found.vector @ wanted / np.linalg.norm(found.vector) / np.linalg.norm(wanted)
    assert cosine > 0.999
    assert faces.faces(portrait(colour)[::-1].copy()) == []  # the same picture as BGR: no face


def test_opencv_takes_any_size_and_several_faces(networks):
    faces = OpenCvFaces(*networks)
    image = portrait((0, 0, 250), height=160, width=64, row=4, column=0)
    image[:, :32, 32:] = portrait((0, 0, 200), row=0, column=0)[:, :32, :32]
    boxes = sorted(f.box[:2] for f in faces.faces(image))
    assert np.allclose(boxes, [(0, 128), (32, 0)], atol=1)


def test_the_judge_over_opencv(networks):
    judge = FaceJudge(OpenCvFaces(*networks))
    source, same, gone = portrait((0, 0, 250)), portrait((0, 0, 250), row=0), portrait((250, 0, 0))
    samples = [
        Sample(image=image, prompt="move", category="any", sources=(source,))
        for image in (source, same, gone)
    ]
    scores = judge.score(samples)
    assert [s.value for s in scores] == pytest.approx([1.0, 1.0, 0.0])
    assert scores[2].flags == ("lost_face", "low_confidence")  # 32 px is below 64
    assert judge.card.licence == "Apache-2.0" and judge.card.commercial


def test_wrong_files_are_refused_with_the_place_to_get_the_right_ones(networks, tmp_path):
    detector, embedder = networks
    pointer = tmp_path / "pointer.onnx"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    for pair in (
        (tmp_path / "absent.onnx", embedder),
        (detector, tmp_path / "absent.onnx"),
        (pointer, embedder),
        (detector, pointer),
        (embedder, detector),
    ):
        with pytest.raises(RewardConfigError, match="opencv_zoo"):
            OpenCvFaces(*pair)


# --- insightface ----------------------------------------------------------------------------------

FAKE = """
class Found:
    bbox, det_score, normed_embedding = (10.0, 20.0, 40.0, 70.0), 0.8, None
class FaceAnalysis:
    def __init__(self, name, root, providers): pass
    def prepare(self, ctx_id, det_size): pass
    def get(self, bgr):
        found = Found()
        found.normed_embedding = bgr[0, 0].astype("float64")
        return [found]
"""


@pytest.fixture
def no_insightface():
    yield
    for name in ("insightface", "insightface.app"):
        sys.modules.pop(name, None)


def test_insightface_is_opt_in_and_not_for_commerce(tmp_path, monkeypatch, no_insightface):
    with pytest.raises(RewardConfigError, match="non-commercial"):
        InsightFaces(tmp_path)
    package = tmp_path / "insightface"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "app.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardConfigError, match="mind its licence"):
        InsightFaces(tmp_path)
    (tmp_path / "models" / "buffalo_l").mkdir(parents=True)
    (tmp_path / "models" / "buffalo_l" / "w600k.onnx").write_bytes(b"weights")
    embedder = InsightFaces(tmp_path)
    card = FaceJudge(embedder).card
    assert not card.commercial and "non-commercial" in card.licence
    (found,) = embedder.faces(portrait((1, 2, 3), row=0, column=0))
    assert found.vector.tolist() == [3, 2, 1] and found.box == (10, 20, 30, 50)
