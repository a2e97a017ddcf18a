"""Face detectors and embedders from files that you bring; nothing is downloaded here.

`OpenCvFaces` (YuNet and SFace) may be used commercially; `InsightFaces` may not.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rewards.backbones.faces import Face
from rewards.backbones.limits import digest_of
from rewards.errors import RewardConfigError
from rewards.images import to_pil

ZOO = "github.com/opencv/opencv_zoo"
DETECTOR = "models/face_detection_yunet/face_detection_yunet_2023mar.onnx"
EMBEDDER = "models/face_recognition_sface/face_recognition_sface_2021dec.onnx"


def to_bgr(image: UInt8[np.ndarray, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """RGB (3, H, W) -> BGR (H, W, 3), which both libraries expect. The only place that turns it."""
    return np.ascontiguousarray(np.asarray(to_pil(image))[:, :, ::-1])


def _file(path: str | os.PathLike[str], wanted: str) -> str:
    if not Path(path).is_file():
        raise RewardConfigError(
            f"expected an ONNX file at {path}, got none: fetch {wanted} from {ZOO} (Git LFS) once"
            " and write its path"
        )
    return str(path)


class OpenCvFaces:
    """YuNet finds faces, SFace describes each by 128 numbers, both through OpenCV.

    Faces below `min_score` are not reported. The published files have SFace's threshold for the
    same person at a cosine of 0.363.

    Raises:
        RewardConfigError: OpenCV is missing, or a file is missing or of another network.
    """

    licence, commercial = "Apache-2.0", True
    name = "yunet-sface"

    def __init__(
        self,
        detector: str | os.PathLike[str],
        embedder: str | os.PathLike[str],
        min_score: float = 0.5,
    ) -> None:
        try:
            import cv2
        except ImportError as error:
            raise RewardConfigError(
                "expected OpenCV for faces, got no module cv2: pip install 'image-rlhf[faces]'"
            ) from error
        found, described = _file(detector, DETECTOR), _file(embedder, EMBEDDER)
        self.revision = f"{digest_of(found)}-{digest_of(described)}"
        try:
            self._detector: Any = cv2.FaceDetectorYN.create(found, "", (64, 64), min_score)
            self._embedder: Any = cv2.FaceRecognizerSF.create(described, "")
            self.faces(np.zeros((3, 64, 64), dtype=np.uint8))
            self._embedder.feature(np.zeros((112, 112, 3), dtype=np.uint8))
        except cv2.error as error:
            raise RewardConfigError(
                f"expected YuNet in {detector} and SFace in {embedder}, got"
                f" {str(error).strip()}: fetch {DETECTOR} and {EMBEDDER} from {ZOO} (Git LFS: a"
                " file of 130 bytes is only a pointer)"
            ) from error

    def faces(self, image: UInt8[np.ndarray, "3 h w"]) -> list[Face]:
        """The faces of a picture at its own size, each turned upright before it is described."""
        bgr = to_bgr(image)
        self._detector.setInputSize((bgr.shape[1], bgr.shape[0]))
        rows = self._detector.detect(bgr)[1]
        out: list[Face] = []
        for row in [] if rows is None else rows:
            vector = self._embedder.feature(self._embedder.alignCrop(bgr, row))
            x, y, width, height = (float(number) for number in row[:4])
            out.append(
                Face(box=(x, y, width, height), score=float(row[14]), vector=vector.ravel().copy())
            )
        return out


class InsightFaces:
    """A model pack of insightface below `root`/models/. Its weights are for **non-commercial
    research only**, and the card of a judge says so.

    Raises:
        RewardConfigError: the package or the pack is missing.
    """

    licence, commercial = "insightface weights: non-commercial research only", False

    def __init__(self, root: str | os.PathLike[str], pack: str = "buffalo_l") -> None:
        try:
            from insightface.app import FaceAnalysis  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise RewardConfigError(
                "expected the package insightface, got none: its weights are for non-commercial"
                " research only; if that is your use, pip install 'image-rlhf[insightface]', else"
                " take OpenCvFaces"
            ) from error
        folder = Path(root) / "models" / pack
        files = sorted(folder.glob("*.onnx"))
        if not files:
            raise RewardConfigError(
                f"expected the pack's ONNX files in {folder}, got none: fetch {pack} from"
                " github.com/deepinsight/insightface and mind its licence"
            )
        self.name, self.revision = pack, "-".join(digest_of(path)[:6] for path in files)
        self._app = FaceAnalysis(name=pack, root=str(root), providers=["CPUExecutionProvider"])
        self._app.prepare(ctx_id=-1, det_size=(640, 640))

    def faces(self, image: UInt8[np.ndarray, "3 h w"]) -> list[Face]:
        """The faces of a picture, each by 512 numbers."""
        out: list[Face] = []
        for found in self._app.get(to_bgr(image)):
            left, top, right, bottom = (float(number) for number in found.bbox)
            out.append(
                Face(
                    box=(left, top, right - left, bottom - top),
                    score=float(found.det_score),
                    vector=np.asarray(found.normed_embedding, dtype=np.float32),
                )
            )
        return out
