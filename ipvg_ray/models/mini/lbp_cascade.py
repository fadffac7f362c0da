"""Boosted cascades of multi-block local binary patterns (MB-LBP), as OpenCV writes them and scikit-image ships one.

Source: Zhang, Chu, Xiang, Liao, Li, "Face Detection Based on Multi-Block LBP Representation" (ICB 2007).
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW = 24
"""Side of the cascade's window, pixels."""
BITS = np.array([[128, 64, 32], [1, 0, 16], [2, 4, 8]], dtype=np.float32)
"""Weight of each block of the 3 × 3 in the code of a pattern: clockwise from the upper left; the middle has none."""


@dataclass(frozen=True, eq=False)
class Cascade:
    """A cascade of W stumps in the order of their stages.

    Attributes:
        rects: int (W, 4), x, y, width and height of the upper left one of the 3 × 3 blocks, pixels of the window.
        tables: float32 (W, 256), each stump's value for each code.
        stage: int (W,), the stage each stump belongs to.
        thresholds: float32 (stages,), what the sum of a stage's values must reach.
    """

    rects: np.ndarray
    tables: np.ndarray
    stage: np.ndarray
    thresholds: np.ndarray

    def mirrored(self) -> Cascade:
        """The cascade that says of a picture what this one says of its mirror image."""
        rects = self.rects.copy()
        rects[:, 0] = WINDOW - rects[:, 0] - 3 * rects[:, 2]
        codes, swapped = np.arange(256), np.zeros(256, dtype=np.int64)
        for bit, partner in zip(BITS.ravel().astype(int), BITS[:, ::-1].ravel().astype(int), strict=True):
            swapped += np.where(codes & bit, partner, 0)
        return Cascade(rects, self.tables[:, swapped], self.stage, self.thresholds)


def read_cascade(path: Path) -> Cascade:
    """Read OpenCV's XML format.

    Raises:
        ValueError: where the file is not a cascade of LBP stumps in a window of 24 × 24 pixels.
    """
    root = ET.parse(path).getroot()[0]
    if (_text(root, "featureType"), _text(root, "height"), _text(root, "width")) != ("LBP", str(WINDOW), str(WINDOW)):
        raise ValueError(f"{path} is not a cascade of LBP features in windows of {WINDOW} x {WINDOW} pixels")
    features = [[int(n) for n in _text(f, "rect").split()] for f in root.findall("features/_")]
    rects, tables, stage, thresholds = [], [], [], []
    for number, element in enumerate(root.findall("stages/_")):
        thresholds.append(float(_text(element, "stageThreshold")))
        for weak in element.findall("weakClassifiers/_"):
            feature, *subset = [int(n) for n in _text(weak, "internalNodes").split()][2:]
            inside, outside = (float(v) for v in _text(weak, "leafValues").split())
            words = np.array(subset, dtype=np.int64).astype(np.uint32)
            member = (words[:, None] >> np.arange(32, dtype=np.uint32)) & 1  # bit c % 32 of word c // 32 is code c
            rects.append(features[feature])
            tables.append(np.where(member.ravel() == 1, inside, outside))
            stage.append(number)
    return Cascade(np.array(rects), np.array(tables, np.float32), np.array(stage), np.array(thresholds, np.float32))


def _text(element: ET.Element, tag: str) -> str:
    found = element.findtext(tag)
    if found is None:
        raise ValueError(f"the cascade file lacks <{tag}>")
    return found.strip()
