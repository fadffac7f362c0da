"""The networks of an insightface pack on several faces or pictures at once, with insightface's own numbers.

insightface runs every network on one face at a time. Here crops of several faces go through in one call where the
ONNX file lets its batch grow, and one by one where the file fixes it at 1, as the detectors of the published packs do.
Pictures are uint8 (H, W, 3) in BGR, as insightface takes them. Everything here may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np

T = TypeVar("T")
Found = tuple[np.ndarray, np.ndarray]
"""A picture's faces, best first: float32 (n, 5) of x0, y0, x1, y1, score, and float32 (n, 5, 2) key points."""

MARGIN = 1.5
"""The crops for landmarks, gender and age are this much larger than the longer edge of the face's box."""


def grows(model: Any) -> bool:
    """Whether a model's file lets several inputs go through at once: its first dimension has no fixed length."""
    return not isinstance(model.input_shape[0], int)


def chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Slices of `size` items, the last perhaps shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Detector:
    """SCRFD (Guo et al., arXiv 2105.04714) as insightface loads it.

    Args:
        model: insightface's detector; its `det_thresh` is the least score.
        batch: pictures that go through at once, where the file lets them.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.model = model
        # Without a batch axis in its outputs (SCRFD's older exports) a file cannot say whose face it found.
        self.batch = batch if getattr(model, "batched", False) and grows(model) else 1

    def detect(self, pictures: Sequence[np.ndarray], size: int) -> list[Found]:
        """The faces of each picture, fitted into a square of `size` pixels, a multiple of 32."""
        found: list[Found] = []
        for part in chunks(pictures, self.batch):
            found += self._together(part, size) if len(part) > 1 else [self._alone(part[0], size)]
        return found

    def _alone(self, picture: np.ndarray, size: int) -> Found:
        boxes, points = self.model.detect(picture, input_size=(size, size))
        return boxes, points

    def _together(self, pictures: Sequence[np.ndarray], size: int) -> list[Found]:
        model = self.model
        squares, scales = zip(*(_fitted(picture, size) for picture in pictures), strict=True)
        mean = (model.input_mean,) * 3
        blob = cv2.dnn.blobFromImages(list(squares), 1.0 / model.input_std, (size, size), mean, swapRB=True)
        outputs = model.session.run(model.output_names, {model.input_name: blob})
        return [self._decoded([o[i] for o in outputs], size, scale) for i, scale in enumerate(scales)]

    def _decoded(self, outputs: list[np.ndarray], size: int, scale: float) -> Found:
        """One picture's faces from its scores (n, 1), distances (n, 4) and offsets (n, 10) at each stride."""
        strides = self.model._feat_stride_fpn
        levels, anchors = len(strides), self.model._num_anchors
        candidates, keypoints = [], []
        for level, stride in enumerate(strides):
            scores = outputs[level][:, 0]
            chosen = np.flatnonzero(scores >= self.model.det_thresh)
            cell = chosen // anchors
            anchor = np.stack([cell % (size // stride), cell // (size // stride)], axis=1).astype(np.float32) * stride
            away = outputs[levels + level][chosen] * stride
            offsets = outputs[2 * levels + level][chosen].reshape(-1, 5, 2) * stride
            boxes = np.concatenate([anchor - away[:, :2], anchor + away[:, 2:]], axis=1) / scale
            candidates.append(np.concatenate([boxes, scores[chosen, None]], axis=1).astype(np.float32))
            keypoints.append((anchor[:, None] + offsets) / scale)
        found, points = np.concatenate(candidates), np.concatenate(keypoints)
        order = np.argsort(-found[:, 4], kind="stable")
        found, points = found[order], points[order]
        kept = self.model.nms(found)
        return found[kept], points[kept]


def _fitted(picture: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The picture in the upper left corner of a black square, and by how much it was scaled; insightface's rounding."""
    height, width = picture.shape[:2]
    ratio = height / width
    new_width, new_height = (int(size / ratio), size) if ratio > 1 else (size, int(size * ratio))
    square = np.zeros((size, size, 3), np.uint8)
    square[:new_height, :new_width] = cv2.resize(picture, (new_width, new_height))
    return square, new_height / height


def landmarks(model: Any, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """float32 (106, 2) for each face: insightface's 2d106det on a crop around each box (x0, y0, x1, y1)."""
    half = model.input_size[0] // 2
    crops, moves = _crops(model, pictures, boxes)
    result = []
    for move, values in zip(moves, _run(model, crops), strict=True):
        points = (values.reshape(-1, 2) + 1) * half
        back = cv2.invertAffineTransform(move)
        result.append((points @ back[:, :2].T + back[:, 2]).astype(np.float32))
    return result


def gender_age(model: Any, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (n, 2): how probable it is that each face is a man's, 0 to 1, and its age in years.

    insightface's genderage gives two values, for female and male, of which it takes the larger; their softmax is the
    probability.
    """
    values = _run(model, _crops(model, pictures, boxes)[0])
    male = 1 / (1 + np.exp(values[:, 0].astype(np.float64) - values[:, 1]))
    return np.stack([male, np.round(values[:, 2] * 100)], axis=1).astype(np.float32)


def embeddings(model: Any, pictures: Sequence[np.ndarray], points: Sequence[np.ndarray]) -> np.ndarray:
    """float32 (n, 512): ArcFace's raw embedding of each face, aligned by its five key points (5, 2)."""
    from insightface.utils import face_align

    side = model.input_size[0]
    crops = [face_align.norm_crop(p, kps, image_size=side) for p, kps in zip(pictures, points, strict=True)]
    return _run(model, crops)


def _crops(
    model: Any, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The square around each box at the model's input size, and the (2, 3) affine map that made it."""
    side = model.input_size[0]
    crops, moves = [], []
    for picture, (x0, y0, x1, y1) in zip(pictures, boxes, strict=True):
        scale = side / (max(x1 - x0, y1 - y0) * MARGIN)
        centre_x, centre_y = (x0 + x1) / 2 * scale, (y0 + y1) / 2 * scale
        move = np.array([[scale, 0, side / 2 - centre_x], [0, scale, side / 2 - centre_y]], np.float64)
        crops.append(cv2.warpAffine(picture, move, (side, side), borderValue=0.0))
        moves.append(move)
    return crops, moves


def _run(model: Any, crops: Sequence[np.ndarray]) -> np.ndarray:
    """A model's only output, float32 (n, width), for n crops."""
    scale, mean = 1.0 / model.input_std, (model.input_mean,) * 3
    parts = [crops] if grows(model) else chunks(crops, 1)
    blobs = [cv2.dnn.blobFromImages(list(part), scale, model.input_size, mean, swapRB=True) for part in parts]
    return np.concatenate([model.session.run(model.output_names, {model.input_name: blob})[0] for blob in blobs])
