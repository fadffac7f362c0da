"""A face detector without neural weights: a trained MB-LBP cascade as an ONNX graph that speaks SCRFD's language.

The cascade is OpenCV's frontal face, which scikit-image ships; the outputs are those of SCRFD with key points
(Guo et al., arXiv 2105.04714) as insightface decodes them.

The picture is shrunk to a pyramid, whose levels lie below each other in one mosaic with one integral image. Windows of
24 × 24 pixels of a level go through the cascade's stages in a few batches, each of which keeps those still alive; then
the same with the mirrored cascade. Around a face many overlapping windows pass in both looks; by chance few do. So the
support of a window, from which its score is made, is the geometric mean of the two looks' counts of windows overlapping
it, times the sum of their margins, less where the windows' contrast is as fine as noise's; their mean is the box.

The cascade knows frontal faces only. Where it finds none, and the picture is a person cut out on white, as VIP-200K's
are, the skin-coloured square stands in for it (`_portrait`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ipvg_ray.models.mini.lbp_cascade import BITS, WINDOW, Cascade
from ipvg_ray.models.mini.onnx_graph import Graph, Output

FINEST = 0.4375
"""Scale of the finest level; the smallest face is WINDOW / FINEST = 55 pixels of the input."""
FACTOR = 1.1
"""How much smaller each level is than the one before."""
LEVELS = 26
"""The coarsest level's window is 600 pixels of the input: a face as large as a 640 × 640 input."""
PHASES = (1, 3, 6, 11, 20)
"""Stages done after each batch; few at first, when all windows are alive."""
MAX_WINDOWS = 1024
"""Windows that support each other at most: those with the best margins."""
OVERLAP = 0.45
"""Intersection over union from which two windows mean the same face."""
COARSE = 0.4
"""Share of a window's variance that lies between blocks of 6 × 6 pixels: about 0.5 in faces, seldom 0.3 in noise."""
HALF_SUPPORT = 32.0
"""Support that makes a score of 0.5 where the box's side is LARGE pixels or more. Calibrated on sample pictures of
scikit-image and insightface, whose frontal faces have from 55 to thousands, and on noise, where few reach 20."""
LARGE = 96.0
"""Below this side the support needed grows with its fourth power: the smaller, the more windows there are to err in."""
STRIDES = (8, 16, 32)
"""SCRFD's strides; faces below 64 pixels are reported at the first, faces of 128 and more at the last."""
KEYPOINTS = np.array([[0.32, 0.37], [0.68, 0.37], [0.50, 0.59], [0.36, 0.78], [0.64, 0.78]], dtype=np.float32)
"""Eyes, nose and mouth corners as shares of the box, x and y: where an average frontal face has them."""
OUTPUTS = ("448", "471", "494", "451", "474", "497", "454", "477", "500")
"""det_10g's names of the scores, boxes and key points at each stride."""


def write_detector(path: Path, cascade: Cascade) -> None:
    """Write the detector.

    Its input is `input.1`, float32 (1, 3, H, W), RGB as (value - 127.5) / 128. Its nine outputs are SCRFD's: scores
    (n, 1), box distances (n, 4) and key point offsets (n, 10) for each stride, where n is two anchors for each of
    H // stride × W // stride places and the unit is the stride.
    """
    g = Graph()
    rgb = g.op("Add", g.op("Mul", "input.1", 128.0), 127.5)
    size = g.op("Shape", rgb, start=2)
    mosaic = _Mosaic(g, rgb, size)
    looks = [_look(g, look, mosaic) for look in (cascade, cascade.mirrored())]
    boxes, scores = _support(g, mosaic, looks)
    boxes, scores = _portrait(g, rgb, size, boxes, scores)
    outputs = _scrfd_outputs(g, boxes, scores, size)
    g.save(path, {"input.1": [1, 3, "height", "width"]}, outputs)


class _Mosaic:
    """The pyramid's levels below each other, as wide as the first, and their integral image.

    Attributes:
        integral: int32, flat.
        pitch: int32 scalar, length of the integral image's rows.
        heights, widths, tops: int32 (levels,), each level's size and first row.
        windows: int32 (windows,) each: index of a window's upper left corner in the integral image, and its level.
    """

    def __init__(self, g: Graph, rgb: str, size: str) -> None:
        self._input_size = g.cast(size, np.float32)
        scales = (FINEST / FACTOR ** np.arange(LEVELS)).astype(np.float32)[:, None]
        sizes = g.op("Round", g.op("Mul", self._input_size, scales))
        self._sizes = g.cast(g.op("Max", sizes, 1.0), np.int32)  # (levels, 2): height, width
        self.heights, self.widths = (g.op("Gather", self._sizes, axis, axis=1) for axis in (0, 1))
        self.tops = g.op("CumSum", self.heights, 0, exclusive=1)
        self.pitch = g.op("Add", g.pick(self.widths, 0), np.array(1, np.int32))
        self.integral = self._integrate(g, rgb)
        self.windows = self._all_windows(g)

    def _integrate(self, g: Graph, rgb: str) -> str:
        luma = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
        grey = g.op("Conv", rgb, luma)
        width = g.cast(g.pick(self.widths, 0), np.int64)
        levels = g.op("Concat", *(self._level(g, grey, index, width) for index in range(LEVELS)), axis=2)
        pixels = g.cast(g.op("Round", levels), np.int32)  # float32 sums would lose whole units
        sums = g.op("CumSum", g.op("CumSum", pixels, 2), 3)
        sums = g.op("Pad", sums, np.array([0, 0, 1, 1, 0, 0, 0, 0]), np.array(0, np.int32))
        return g.op("Reshape", sums, np.array([-1]))

    def _level(self, g: Graph, grey: str, index: int, width: str) -> str:
        size = g.cast(g.op("Gather", self._sizes, index), np.int64)
        target = g.op("Concat", np.array([1, 1]), size, axis=0)
        small = g.op("Resize", grey, "", "", target, mode="linear", antialias=1)
        missing = g.op("Sub", width, g.pick(size, 1))
        return g.op("Pad", small, g.op("Concat", np.zeros(7, np.int64), g.column(missing, 0), axis=0))

    def _all_windows(self, g: Graph) -> tuple[str, str]:
        starts, levels = [], []
        zero, one, reach = (np.array(n, np.int32) for n in (0, 1, WINDOW - 1))
        for index in range(LEVELS):
            rows = g.op("Range", zero, g.op("Sub", g.pick(self.heights, index), reach), one)
            columns = g.op("Range", zero, g.op("Sub", g.pick(self.widths, index), reach), one)
            rows = g.op("Mul", g.op("Add", rows, g.pick(self.tops, index)), self.pitch)
            starts.append(g.flat(g.op("Add", g.column(rows), columns)))
            levels.append(g.op("Expand", np.array(index, np.int32), g.op("Shape", starts[-1])))
        return g.op("Concat", *starts, axis=0), g.op("Concat", *levels, axis=0)

    def boxes(self, g: Graph, start: str, level: str) -> str:
        """float32 (n, 4): x0, y0, x1, y1 of windows in pixels of the input."""
        row = g.op("Sub", g.op("Div", start, self.pitch), g.op("Gather", self.tops, level))
        corner = g.op("Concat", g.column(row), g.column(g.op("Mod", start, self.pitch)), axis=1)
        corner = g.cast(corner, np.float32)
        scale = g.op("Div", self._input_size, g.cast(g.op("Gather", self._sizes, level), np.float32))
        near, far = g.op("Mul", corner, scale), g.op("Mul", g.op("Add", corner, float(WINDOW)), scale)
        return g.op("Gather", g.op("Concat", near, far, axis=1), np.array([1, 0, 3, 2]), axis=1)


def _look(g: Graph, cascade: Cascade, mosaic: _Mosaic) -> tuple[str, str, str]:
    """Starts, levels and margins (n,) of the windows that pass the whole cascade."""
    start, level = mosaic.windows
    margin = ""
    for first, end in zip((0, *PHASES), PHASES, strict=False):
        margins = _margins(g, cascade, range(first, end), mosaic, start)
        alive = g.flat(g.op("NonZero", g.op("GreaterOrEqual", margins, 0.0)))
        start, level, margin = (g.op("Gather", each, alive) for each in (start, level, margins))
    return start, level, margin


def _margins(g: Graph, cascade: Cascade, stages: range, mosaic: _Mosaic, start: str) -> str:
    """By how much each window passes the hardest of some stages, float32 (windows,); negative where it fails one."""
    chosen = np.isin(cascade.stage, stages)
    codes = _lbp_codes(g, cascade.rects[chosen], mosaic, start)
    places = g.op("Add", codes, (np.arange(chosen.sum()) * 256).astype(np.int32))
    values = g.op("Gather", cascade.tables[chosen].ravel(), places)
    membership = (cascade.stage[chosen][:, None] == np.array(stages)).astype(np.float32)
    sums = g.op("MatMul", values, membership)
    return g.op("ReduceMin", g.op("Sub", sums, cascade.thresholds[list(stages)]), np.array([1]), keepdims=0)


def _lbp_codes(g: Graph, rects: np.ndarray, mosaic: _Mosaic, start: str) -> str:
    """int32 (windows, features): which of the eight blocks around the middle one are at least as bright."""
    x, y, width, height = (rects[:, i, None, None] for i in range(4))
    corner, none = np.arange(4), np.zeros((4, 4), dtype=np.int64)
    down = (y + height * corner[:, None] + none).astype(np.int32)  # (features, 4, 4)
    right = (x + width * corner + none).astype(np.int32)
    offsets = g.op("Add", g.op("Mul", down, mosaic.pitch), right)
    corners = g.op("Gather", mosaic.integral, g.op("Add", g.op("Unsqueeze", start, np.array([1, 2, 3])), offsets))
    rows = g.op("Sub", g.slice(corners, 2, 1, 4), g.slice(corners, 2, 0, 3))
    blocks = g.op("Sub", g.slice(rows, 3, 1, 4), g.slice(rows, 3, 0, 3))
    middle = g.slice(g.slice(blocks, 2, 1, 2), 3, 1, 2)
    bits = g.cast(g.op("GreaterOrEqual", blocks, middle), np.float32)
    return g.cast(g.op("ReduceSum", g.op("Mul", bits, BITS), np.array([2, 3]), keepdims=0), np.int32)


def _support(g: Graph, mosaic: _Mosaic, looks: list[tuple[str, str, str]]) -> tuple[str, str]:
    """Mean box (n, 4) of the windows that overlap each window, and its score (n,)."""
    # The mosaic's first window joins them with margin 0, because MatMul refuses empty tensors.
    none = np.zeros(1, np.int32)
    start, level, margin = (
        g.op("Concat", *parts, none.astype(kind), axis=0)
        for parts, kind in zip(zip(*looks, strict=True), (np.int32, np.int32, np.float32), strict=True)
    )
    sides = [g.op("Expand", float(index), g.op("Shape", look[0])) for index, look in enumerate(looks)]
    second = g.op("Concat", *sides, none.astype(np.float32), axis=0)
    _, best = g.ops("TopK", 2, margin, g.op("Min", g.op("Shape", margin), np.array([MAX_WINDOWS])), axis=0)
    start, level, margin, second = (g.op("Gather", each, best) for each in (start, level, margin, second))
    boxes = mosaic.boxes(g, start, level)
    same = g.cast(g.op("GreaterOrEqual", _iou(g, boxes), OVERLAP), np.float32)
    each = (g.op("Sub", 1.0, second), second, margin, _coarse_share(g, mosaic, start))
    firsts, seconds, margins, coarse = g.ops(
        "Split", 4, g.op("MatMul", same, g.op("Concat", *(g.column(v) for v in each), axis=1)), axis=1, num_outputs=4
    )
    count = g.op("ReduceSum", same, np.array([1]))
    support = g.op("Mul", g.op("Sqrt", g.op("Mul", firsts, seconds)), margins)
    relative = g.op("Div", g.op("Div", coarse, count), COARSE)
    support = g.op("Mul", support, g.op("Mul", relative, relative))
    mean = g.op("Div", g.op("MatMul", same, boxes), count)
    side = g.op("Sub", g.slice(mean, 1, 2, 3), g.slice(mean, 1, 0, 1))
    needed = g.op("Mul", g.op("Pow", g.op("Max", g.op("Div", LARGE, side), 1.0), 4.0), HALF_SUPPORT)
    return mean, g.flat(g.op("Div", support, g.op("Add", support, needed)))


def _coarse_share(g: Graph, mosaic: _Mosaic, start: str) -> str:
    """Share of each window's variance that lies between its 4 × 4 blocks, float32 (n,)."""
    corner = np.arange(WINDOW + 1, dtype=np.int32)
    offsets = g.op("Add", g.op("Mul", corner[:, None], mosaic.pitch), corner)
    sums = g.op("Gather", mosaic.integral, g.op("Add", g.op("Unsqueeze", start, np.array([1, 2])), offsets))
    rows = g.op("Sub", g.slice(sums, 1, 1, WINDOW + 1), g.slice(sums, 1, 0, WINDOW))
    pixels = g.op("Sub", g.slice(rows, 2, 1, WINDOW + 1), g.slice(rows, 2, 0, WINDOW))
    pixels = g.column(g.cast(pixels, np.float32))  # (n, 1, 24, 24)
    blocks = g.op("AveragePool", pixels, kernel_shape=[6, 6], strides=[6, 6])
    return g.op("Div", _variance(g, blocks), g.op("Add", _variance(g, pixels), 1e-3))


def _variance(g: Graph, values: str) -> str:
    """Variance of each (n, 1, h, w), float32 (n,)."""
    away = g.op("Sub", values, g.op("ReduceMean", values, np.array([1, 2, 3])))
    return g.op("ReduceMean", g.op("Mul", away, away), np.array([1, 2, 3]), keepdims=0)


def _iou(g: Graph, boxes: str) -> str:
    """Intersection over union (n, n) of boxes (n, 4)."""
    near, far = g.slice(boxes, 1, 0, 2), g.slice(boxes, 1, 2, 4)
    low, high = g.op("Max", g.column(near), near), g.op("Min", g.column(far), far)
    common = _area(g, g.op("Max", g.op("Sub", high, low), 0.0))
    area = _area(g, g.op("Sub", far, near))
    return g.op("Div", common, g.op("Sub", g.op("Add", g.column(area), area), common))


def _area(g: Graph, extent: str) -> str:
    """Product over the last axis, which holds width and height."""
    return g.op("ReduceProd", extent, np.array([-1]), keepdims=0)


def _portrait(g: Graph, rgb: str, size: str, boxes: str, scores: str) -> tuple[str, str]:
    """Boxes and scores with one more: the square fullest of skin, scored PORTRAIT_SCORE on a cut-out portrait, else 0.

    A cut-out portrait is a picture without another face, with a white ground, and with much skin in that square. Skin
    is a range of chroma (after Chai and Ngan, IEEE TCSVT 9(4), 1999).
    """
    small = g.op("Resize", rgb, "", "", np.array([1, 3, PORTRAIT_GRID, PORTRAIT_GRID]), mode="linear", antialias=1)
    excess = [_skin_excess(g, _skin(g, small), side) for side in PORTRAIT_SIDES]
    best = g.op("Concat", *(g.flat(each) for each in excess), axis=0)
    index = g.op("ArgMax", best, axis=0, keepdims=1)
    far_near = g.op("Gather", _portrait_squares(), index)  # (1, 4), shares of the input
    extent = g.op("Gather", g.cast(size, np.float32), np.array([1, 0, 1, 0]))
    others = g.op("ReduceSum", g.cast(g.op("GreaterOrEqual", scores, 0.5), np.float32), np.array([0]))
    checks = (
        g.op("Equal", others, 0.0),
        g.op("GreaterOrEqual", g.op("Gather", best, index), PORTRAIT_EXCESS),
        g.op("GreaterOrEqual", _white_share(g, rgb), PORTRAIT_WHITE),
    )
    score = g.op("Mul", g.cast(g.op("And", g.op("And", *checks[:2]), checks[2]), np.float32), PORTRAIT_SCORE)
    boxes = g.op("Concat", boxes, g.op("Mul", far_near, extent), axis=0)
    return boxes, g.op("Concat", scores, score, axis=0)


PORTRAIT_GRID = 64
"""Side of the small picture on which skin is sought."""
PORTRAIT_SIDES = tuple(range(20, 49, 4))
"""Sides of the squares tried, cells of the grid."""
PORTRAIT_EXCESS = 120.0
"""Cells of skin above 55 % that the best square must hold, less the price of a low place."""
PORTRAIT_WHITE = 0.2
"""Share of white among the picture's pixels; the black that insightface pads with does not count."""
PORTRAIT_SCORE = 0.6
"""Its score: enough to be used, below that of a good frontal face."""
LOW_PLACE = 20.0
"""Cells of skin that each cell down costs a square: heads are above necks."""


def _skin(g: Graph, small: str) -> str:
    """1 where the chroma is that of skin, else 0, float32 (1, 1, grid, grid)."""
    weights = np.array([[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]], np.float32)
    luma, blue, red = g.ops("Split", 3, g.op("Conv", small, weights.reshape(3, 3, 1, 1)), axis=1, num_outputs=3)
    mask = g.op("Greater", luma, 60.0)
    for channel, low, high in ((blue, -51.0, -1.0), (red, 8.0, 52.0)):
        mask = g.op("And", mask, g.op("And", g.op("Greater", channel, low), g.op("Less", channel, high)))
    return g.cast(mask, np.float32)


def _skin_excess(g: Graph, skin: str, side: int) -> str:
    """What each square of `side` cells has above 55 % of skin, less the price of its place."""
    share = g.op("AveragePool", skin, kernel_shape=[side, side])
    price = (LOW_PLACE * np.arange(PORTRAIT_GRID - side + 1, dtype=np.float32))[:, None]
    return g.op("Sub", g.op("Mul", g.op("Sub", share, 0.55), float(side * side)), price)


def _portrait_squares() -> np.ndarray:
    """float32 (squares, 4), x0, y0, x1, y1 as shares of the input, in the order of the concatenated excesses."""
    parts = []
    for side in PORTRAIT_SIDES:
        y, x = np.mgrid[: PORTRAIT_GRID - side + 1, : PORTRAIT_GRID - side + 1].reshape(2, -1)
        parts.append(np.stack([x, y, x + side, y + side], axis=1))
    return (np.concatenate(parts) / PORTRAIT_GRID).astype(np.float32)


def _white_share(g: Graph, rgb: str) -> str:
    """Share of white among the pixels that are not black, float32 (1,)."""
    darkest, brightest = (g.op(kind, rgb, np.array([1])) for kind in ("ReduceMin", "ReduceMax"))
    white = g.cast(g.op("Greater", darkest, 247.5), np.float32)
    shown = g.cast(g.op("Greater", brightest, 0.5), np.float32)
    ratio = g.op("Div", g.op("ReduceSum", white), g.op("Max", g.op("ReduceSum", shown), 1.0))
    return g.flat(ratio)


def _scrfd_outputs(g: Graph, boxes: str, scores: str, size: str) -> dict[str, Output]:
    """Each face at the anchor in its middle; of several that want one anchor, the best has it."""
    _, order = g.ops("TopK", 2, scores, g.op("Shape", scores), axis=0)
    boxes, scores = g.op("Gather", boxes, order), g.op("Gather", scores, order)
    near, far = g.slice(boxes, 1, 0, 2), g.slice(boxes, 1, 2, 4)
    extent = g.op("Sub", far, near)
    middle = g.op("Mul", g.op("Add", near, far), 0.5)
    points = g.op("Add", g.column(near), g.op("Mul", g.column(extent), KEYPOINTS))  # (n, 5, 2)
    side = g.flat(g.op("ReduceMax", extent, np.array([1])))
    columns: list[list[Output]] = [[], [], []]
    for stride in STRIDES:
        slot, anchor, slots = _slots(g, middle, side, size, stride)
        distances = g.op("Concat", g.op("Sub", anchor, near), g.op("Sub", far, anchor), axis=1)
        offsets = g.op("Reshape", g.op("Sub", points, g.column(anchor)), np.array([-1, 10]))
        values = (g.column(scores), *(g.op("Div", each, float(stride)) for each in (distances, offsets)))
        for column, value, width in zip(columns, values, (1, 4, 10), strict=True):
            column.append((_scatter(g, slot, value, slots, width), [f"anchors_{stride}", width]))
    # insightface reads the outputs by place: all scores, all boxes, all key points.
    return dict(zip(OUTPUTS, [output for column in columns for output in column], strict=True))


def _slots(g: Graph, middle: str, side: str, size: str, stride: int) -> tuple[str, str, str]:
    """For faces sorted by score: the row of the outputs each may write, its anchor (n, 2), and the number of rows.

    A face that belongs to another stride, or whose row a better one has, gets the row after the last.
    """
    grid = g.op("Gather", g.op("Div", size, stride), np.array([1, 0]))  # columns, rows
    cell = g.cast(g.op("Floor", g.op("Div", middle, float(stride))), np.int64)
    cell = g.op("Min", g.op("Max", cell, 0), g.op("Sub", grid, 1))
    slots = g.op("Mul", g.op("ReduceProd", grid, np.array([0])), 2)
    place = g.op("Add", g.op("Mul", g.op("Gather", cell, 1, axis=1), g.pick(grid, 0)), g.op("Gather", cell, 0, axis=1))
    larger = g.cast(g.op("Greater", side, stride * 2**2.5), np.int64)  # the second anchor has the larger half
    place = g.op("Add", g.op("Mul", place, 2), larger)
    low, high = (0.0 if stride == STRIDES[0] else stride * 4.0), (np.inf if stride == STRIDES[-1] else stride * 8.0)
    mine = g.op("And", g.op("GreaterOrEqual", side, low), g.op("Less", side, high))
    place = g.op("Where", mine, place, slots)
    rank = g.op("CumSum", g.op("Expand", 1, g.op("Shape", place)), 0)
    earlier = g.op("And", g.op("Equal", g.column(place), place), g.op("Greater", g.column(rank), rank))
    beaten = g.op("Greater", g.op("ReduceSum", g.cast(earlier, np.float32), np.array([1]), keepdims=0), 0.0)
    anchor = g.op("Mul", g.cast(cell, np.float32), float(stride))
    return g.op("Where", beaten, slots, place), anchor, slots


def _scatter(g: Graph, slot: str, values: str, slots: str, width: int) -> str:
    """Zeros (slots, width) with each face's values in its row; the row after the last is cut off."""
    shape = g.op("Concat", g.op("Add", slots, 1), np.array([width]), axis=0)
    filled = g.op("ScatterND", g.op("ConstantOfShape", shape), g.column(slot), values)
    return g.op("Slice", filled, np.array([0]), slots, np.array([0]))
