"""From a segmentation's soft mask to a matte: one person, no holes, edges and hair as the picture shows them.

A network that works at a quarter of a reduced picture gives a mask whose rim is many pixels wide. The guided filter
(He, Sun, Tang, "Guided Image Filtering", TPAMI 2013) explains the mask around each pixel as a linear function of the
colours there. One pass keeps the mask's contrast, which the blur has lowered; so it is repeated with shrinking windows
and the contrast raised a little after each pass, until the rim is as narrow as the picture's own edge. All of it runs
at a bounded size; the last pass's coefficients are brought to the full picture and applied there (He, Sun, "Fast Guided
Filter", arXiv 1505.00996).

Pictures are uint8 RGB (H, W, 3); masks float32 (H, W), 0 background to 1 person.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from skimage.morphology import reconstruction

_WORK_SIDE = 1024
"""Longer side, pixels, at which regions are told apart and the filter's coefficients computed."""
_WINDOWS = (1 / 16, 1 / 24, 1 / 38, 1 / 64)
"""Half edges of the passes' windows, of the longer side: the first spans a network's rim, the last a lock of hair."""
_WINDOW_PIXELS = 8  # half edge of a window at the size that its pass is computed on
_EPSILON = 1e-4  # variance of a colour channel, 0 to 1, below which a window counts as flat
_CONTRAST = 1.15  # per pass; 1.0 would leave the rim as wide as it came
_CERTAIN = 0.02  # a mask this near to 0 or 1 for a whole window around is taken at its word
_STRAND = 2.5  # half the thickness, pixels of the working size, up to which what is detached may be hair
_REAL_GAP = 0.02  # of the person's area; larger holes are gaps, such as between arm and body


def work_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which a picture of that size is refined."""
    scale = min(1.0, _WORK_SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def refine(rgb: np.ndarray, rough: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    """The matte of the person to whom the face belongs.

    Args:
        rgb: the picture.
        rough: mask of the whole picture, best of its `work_size`.
        face_box: x0, y0, x1, y1 of the face, pixels of the picture; may reach beyond it.

    Returns:
        float32 (H, W) of the picture, 0 to 1.
    """
    height, width = work_size(*rgb.shape[:2])
    small = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    box = _scaled(face_box, rgb.shape, (height, width))
    return _without_islands(_guided(rgb, small, _clean(_sized(rough, height, width), box)), box)


def one_person(alpha: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    """A matte that needs no refinement, without other people and holes; regions are told apart at `work_size`.

    Args:
        face_box: x0, y0, x1, y1 of the face, pixels of the picture; may reach beyond it.
    """
    height, width = alpha.shape
    small = _sized(alpha, *work_size(height, width))
    clean = _clean(small, _scaled(face_box, alpha.shape, small.shape))
    dropped, filled = clean < small, clean > small
    result = np.where(_sized(dropped.astype(np.float32), height, width) > 0.5, np.float32(0), alpha)
    raised = _sized(np.where(filled, clean, np.float32(0)), height, width)
    return np.maximum(result, raised)


def feathered(matte: np.ndarray, sigma: float) -> np.ndarray:
    """The matte after a Gaussian blur of that standard deviation, pixels; 0 for none."""
    if sigma <= 0:
        return matte
    result: np.ndarray = cv2.GaussianBlur(matte, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return result


def keep_person(mask: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    """Drop other people: zero where the nearest region above 0.5 is not the one that holds most of the face.

    The soft rim of the kept region stays soft. Where no region overlaps the face box the largest is kept; where there
    is none at all nothing is dropped.

    Args:
        face_box: x0, y0, x1, y1; may reach beyond the picture.
    """
    solid = mask > 0.5
    if not solid.any():
        return mask
    nearest = _nearest_region(solid)
    return np.where(nearest == _person(nearest, solid, face_box), mask, np.float32(0))


def fill_holes(mask: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    """Raise what the person encloses to the height of its rim, except for real gaps.

    A hole is background (at most 0.5) that does not reach the picture's edge. One of more than 2 % of the person's
    area stays, since it is likely to be seen through, unless it touches the face.
    """
    solid = mask > 0.5
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~solid).astype(np.uint8), connectivity=4)
    edge = set(np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])).tolist())
    enclosed = [label for label in range(1, count) if label not in edge]
    if not enclosed:
        return mask
    on_face = set(np.unique(labels[_inside(solid, face_box)]).tolist())
    limit = _REAL_GAP * solid.sum()
    gaps = [label for label in enclosed if stats[label, cv2.CC_STAT_AREA] > limit and label not in on_face]
    # Water rises from everywhere but the picture's edge and the gaps, where it runs off.
    seed = np.ones_like(mask)
    drains = np.isin(labels, gaps)
    drains[[0, -1]] = drains[:, [0, -1]] = True
    seed[drains] = mask[drains]
    return reconstruction(seed, mask, method="erosion").astype(np.float32)


def foreground(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The person's own colours where the background shines through, uint8 (H, W, 3).

    By blur fusion (Forte, "Approximate Fast Foreground Colour Estimation", ICIP 2021): local means of person and
    background, corrected so that the mixture is the picture again; first over wide windows, then over narrow ones.
    """
    image, share = rgb.astype(np.float32), alpha.astype(np.float32)[..., None]
    person, scene = image, image
    longer = max(rgb.shape[:2])
    for window in (max(3, longer // 11), max(3, longer // 85)):
        person, scene = _mean_where(person, share, window), _mean_where(scene, 1 - share, window)
        person = np.clip(person + share * (image - share * person - (1 - share) * scene), 0, 255)
    # Where the picture is all person it is right already, whatever the means say.
    return np.where(share >= 1, rgb, np.round(person).astype(np.uint8))


def share_in(matte: np.ndarray, box: Sequence[float]) -> float:
    """The matte's mean within a box (x0, y0, x1, y1), as far as it lies in the picture; 0 where it does not."""
    y, x = _slices(box)
    inside = matte[y, x]
    return float(inside.mean(dtype=np.float64)) if inside.size else 0.0


def _nearest_region(solid: np.ndarray) -> np.ndarray:
    """The number of the nearest connected region, at each pixel; some region must be."""
    _, nearest = cv2.distanceTransformWithLabels(
        (~solid).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
    )
    return nearest


def _person(nearest: np.ndarray, solid: np.ndarray, face_box: Sequence[float]) -> int:
    """The number of the region that holds most of the face, else of the largest."""
    face = _inside(solid, face_box)
    chosen = face if (solid & face).any() else np.ones_like(solid)
    return int(np.bincount(nearest[solid & chosen]).argmax())


def _without_islands(matte: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    """Drop what colours have pulled in beside the person: regions detached from it and thicker than hair."""
    height, width = matte.shape
    small = _sized(matte, *work_size(height, width))
    solid = small > 0.5
    if not solid.any():
        return matte
    nearest = _nearest_region(solid)
    depth = cv2.distanceTransform(solid.astype(np.uint8), cv2.DIST_L2, 5)
    thickness = np.zeros(nearest.max() + 1)
    np.maximum.at(thickness, nearest[solid], depth[solid])
    thickness[_person(nearest, solid, face_box)] = 0
    island = thickness[nearest] > _STRAND
    if not island.any():
        return matte
    return np.where(_sized(island.astype(np.float32), height, width) > 0.5, np.float32(0), matte)


def _clean(mask: np.ndarray, face_box: Sequence[float]) -> np.ndarray:
    return fill_holes(keep_person(mask, face_box), face_box)


def _sized(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    shrunk = height * width < mask.size
    result: np.ndarray = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR)
    return result


def _scaled(box: Sequence[float], shape: Sequence[int], onto: Sequence[int]) -> list[float]:
    """A box of a picture of one shape on the same picture at another."""
    sides = (onto[1] / shape[1], onto[0] / shape[0])
    return [value * sides[i % 2] for i, value in enumerate(box)]


def _inside(mask: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """True in the box, as far as it lies in the picture."""
    inside = np.zeros(mask.shape, bool)
    inside[_slices(box)] = True
    return inside


def _slices(box: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns that a box touches."""
    x0, y0 = (max(0, math.floor(value)) for value in box[:2])
    x1, y1 = (max(0, math.ceil(value)) for value in box[2:])
    return slice(y0, y1), slice(x0, x1)


def _guided(rgb: np.ndarray, small: np.ndarray, rough: np.ndarray) -> np.ndarray:
    radii = [share * max(rough.shape) for share in _WINDOWS]
    matte = rough
    for radius in radii[:-1]:
        matte = _raised(_pass(small, small, matte, radius))
    return _certain(rough, _raised(_pass(rgb, small, matte, radii[-1])), round(radii[0]))


def _pass(rgb: np.ndarray, small: np.ndarray, mask: np.ndarray, radius: float) -> np.ndarray:
    """One pass of the guided filter over a mask of the small picture, applied to the large one.

    The wider its windows, the smaller the picture that it is computed on.
    """
    scale = min(1.0, _WINDOW_PIXELS / radius)
    size = (math.ceil(mask.shape[1] * scale), math.ceil(mask.shape[0] * scale))
    guide, mask = (cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in (small, mask))
    slopes, offset = _coefficients(guide.astype(np.float32) / 255, mask, max(1, round(radius * scale)))
    return _applied(rgb, slopes, offset)


def _coefficients(guide: np.ndarray, mask: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Slopes (H, W, 3) and offset (H, W) of the mask as a linear function of colour, mean of all windows at a pixel."""
    mean, mask_mean = _box(guide, radius), _box(mask, radius)
    shared = _box(guide * mask[..., None], radius) - mean * mask_mean[..., None]
    slopes = _solved(guide, mean, shared, radius)
    offset = mask_mean - (slopes * mean).sum(axis=2)
    return _box(slopes, radius), _box(offset, radius)


def _solved(guide: np.ndarray, mean: np.ndarray, shared: np.ndarray, radius: int) -> np.ndarray:
    """(covariance + epsilon)⁻¹ · shared at each pixel, (H, W, 3), by the 3x3 matrix's cofactors."""
    (r, g, b), (mr, mg, mb) = (np.moveaxis(x, 2, 0) for x in (guide, mean))
    rr, gg, bb = (_box(x * x, radius) - m * m + _EPSILON for x, m in ((r, mr), (g, mg), (b, mb)))
    rg, rb, gb = _box(r * g, radius) - mr * mg, _box(r * b, radius) - mr * mb, _box(g * b, radius) - mg * mb
    c_rr, c_gg, c_bb = gg * bb - gb * gb, rr * bb - rb * rb, rr * gg - rg * rg
    c_rg, c_rb, c_gb = gb * rb - rg * bb, rg * gb - gg * rb, rb * rg - rr * gb
    determinant = rr * c_rr + rg * c_rg + rb * c_rb
    x, y, z = np.moveaxis(shared, 2, 0)
    rows = (c_rr * x + c_rg * y + c_rb * z, c_rg * x + c_gg * y + c_gb * z, c_rb * x + c_gb * y + c_bb * z)
    return np.stack([row / determinant for row in rows], axis=2)


def _applied(rgb: np.ndarray, slopes: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """The linear functions, found at a smaller size, on the full picture; channel by channel, to save memory."""
    size = (rgb.shape[1], rgb.shape[0])
    result: np.ndarray = cv2.resize(offset, size, interpolation=cv2.INTER_LINEAR)
    for channel in range(3):
        slope = cv2.resize(slopes[..., channel], size, interpolation=cv2.INTER_LINEAR)
        result += slope * (rgb[..., channel] * np.float32(1 / 255))
    return result


def _certain(rough: np.ndarray, matte: np.ndarray, radius: int) -> np.ndarray:
    """The matte, set to 0 or 1 where the rough mask is sure of it for a window around: colours cannot mislead there."""
    window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    size = (matte.shape[1], matte.shape[0])
    person = cv2.erode(rough, window) > 1 - _CERTAIN
    nothing = cv2.dilate(rough, window) < _CERTAIN
    for where, value in ((person, 1.0), (nothing, 0.0)):
        large = cv2.resize(where.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
        matte[large] = value
    return matte


def _raised(matte: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.clip((matte - 0.5) * _CONTRAST + 0.5, 0, 1)
    return result


def _mean_where(image: np.ndarray, share: np.ndarray, window: int) -> np.ndarray:
    """The mean colour of a window around each pixel, weighted by `share` (H, W, 1)."""
    weight = cv2.blur(share, (window, window))[..., None]
    total = cv2.blur(image * share, (window, window))
    return total / (weight + 1e-5)


def _box(values: np.ndarray, radius: int) -> np.ndarray:
    """The mean of the window of 2 · radius + 1 pixels around each."""
    edge = 2 * radius + 1
    result: np.ndarray = cv2.blur(values, (edge, edge), borderType=cv2.BORDER_REFLECT)
    return result
