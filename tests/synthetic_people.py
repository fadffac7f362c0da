"""Drawn people with known alpha: a body with hair-thin strands, textured, on textured backgrounds."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "tiles", "leaves")


@dataclass(frozen=True)
class Drawing:
    """A picture and the person's own colours, uint8 RGB (H, W, 3), alpha, float32 (H, W), and the box of the face."""

    rgb: np.ndarray
    colours: np.ndarray
    alpha: np.ndarray
    face_box: tuple[float, float, float, float]

    def coarse(self, blur: float) -> np.ndarray:
        """Alpha as a segmentation network sees it: a Gaussian blur of `blur` pixels, float32 (H, W)."""
        return cv2.GaussianBlur(self.alpha, (0, 0), blur)


def draw(seed: int, background: str, side: int = 384) -> Drawing:
    """One person; equal arguments give equal drawings."""
    rng = np.random.default_rng(seed)
    alpha = _outline(rng, side)
    hair, skin, shirt, back = _colours(rng)
    person = _textured(rng, hair, "noise", side)
    y, x = np.mgrid[0:side, 0:side] / side
    face = ((x - 0.5) / 0.09) ** 2 + ((y - 0.36) / 0.13) ** 2 < 1
    person[face] = _textured(rng, skin, "noise", side)[face]
    person[y > 0.56] = _textured(rng, shirt, "stripes", side)[y > 0.56]
    scene = _textured(rng, back, background, side)
    mixed = person * alpha[..., None] + scene * (1 - alpha[..., None])
    noise = rng.normal(0, 2, mixed.shape)
    rgb = np.clip(np.round(mixed + noise), 0, 255).astype(np.uint8)
    centre = side / 2
    colours = np.clip(np.round(person + noise), 0, 255).astype(np.uint8)
    return Drawing(rgb, colours, alpha, (centre - side * 0.1, side * 0.22, centre + side * 0.1, side * 0.48))


def _outline(rng: np.random.Generator, side: int) -> np.ndarray:
    scale = 4  # drawn larger and shrunk, so that edges and strands have true fractions of a pixel
    big = np.zeros((side * scale, side * scale), np.float32)
    s = side * scale
    centre = s // 2
    cv2.ellipse(big, (centre, int(s * 0.95)), (int(s * 0.33), int(s * 0.38)), 0, 0, 360, 1.0, -1)
    cv2.rectangle(big, (int(centre - s * 0.06), int(s * 0.4)), (int(centre + s * 0.06), int(s * 0.65)), 1.0, -1)
    cv2.ellipse(big, (centre, int(s * 0.34)), (int(s * 0.13), int(s * 0.17)), 0, 0, 360, 1.0, -1)
    for _ in range(60):
        angle = rng.uniform(-np.pi, 0)
        start = np.array([centre + np.cos(angle) * s * 0.12, s * 0.34 + np.sin(angle) * s * 0.16])
        length, bend = rng.uniform(0.04, 0.1) * s, rng.uniform(-0.9, 0.9)
        steps = np.linspace(0, 1, 20)[:, None]
        directions = angle + bend * steps
        points = start + np.cumsum(np.hstack([np.cos(directions), np.sin(directions)]) * length / 20, axis=0)
        width = int(rng.integers(scale, 2 * scale + 1))  # one to two pixels of the picture
        cv2.polylines(big, [points.astype(np.int32)], False, 1.0, width)
    return cv2.resize(big, (side, side), interpolation=cv2.INTER_AREA)


def _colours(rng: np.random.Generator) -> np.ndarray:
    """Of hair, skin, shirt and scene; the person's are far enough from the scene's that an eye tells them."""
    while True:
        colours = rng.uniform(40, 215, (4, 3))
        if np.linalg.norm(colours[:3] - colours[3], axis=1).min() > 90:
            return colours


def _textured(rng: np.random.Generator, colour: np.ndarray, kind: str, side: int) -> np.ndarray:
    """A picture around one colour, float64 (side, side, 3)."""
    y, x = np.mgrid[0:side, 0:side]
    wave = {
        "plain": lambda: np.zeros((side, side)),
        "gradient": lambda: (x + y) / side - 1,
        "noise": lambda: _smooth(rng, side, 2.0),
        "stripes": lambda: np.sign(np.sin(x * 0.35 + y * 0.12)) * 0.8,
        "tiles": lambda: ((x // 24 + y // 24) % 2) * 1.6 - 0.8,
        "leaves": lambda: _smooth(rng, side, 5.0) + 0.5 * _smooth(rng, side, 1.0),
    }[kind]()
    tint = rng.uniform(0.5, 1.0, 3) * 25
    return colour + wave[..., None] * tint


def _smooth(rng: np.random.Generator, side: int, sigma: float) -> np.ndarray:
    field = cv2.GaussianBlur(rng.normal(0, 1, (side, side)), (0, 0), sigma)
    return np.clip(field / field.std(), -2, 2)
