"""A picture of how many GPUs each stage keeps busy over time: SVG for a browser, a line of blocks for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

_BLOCKS = " ▁▂▃▄▅▆▇█"
_COLOURS = ("#4878cf", "#6acc65", "#d65f5f", "#b47cc7", "#c4ad66", "#77bedb", "#8c8c8c", "#e17a2d")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 360, 56, 28, 34


def spark(levels: np.ndarray, top: float, columns: int = 60) -> str:
    """A line of blocks.

    Args:
        levels: (n,) values at equal distances in time.
        top: the value of a full block.
    """
    means = [chunk.mean() if len(chunk) else 0.0 for chunk in np.array_split(levels, columns)]
    steps = [
        min(len(_BLOCKS) - 1, int(np.ceil(mean / top * (len(_BLOCKS) - 1) - 1e-9))) if top else 0 for mean in means
    ]
    return "".join(_BLOCKS[step] for step in steps)


def draw(busy: Mapping[str, np.ndarray], held: np.ndarray, seconds: float, title: str) -> str:
    """An SVG: GPUs busy by stage, stacked, under the line of the GPUs that were there.

    Args:
        busy: per stage (n,) GPUs busy, at equal distances in time.
        held: (n,) GPUs that were there.
        seconds: that the n values span.
    """
    total = sum(busy.values(), np.zeros_like(held))
    top = max(float(held.max()), float(total.max()), 1.0)
    wide, high = _WIDTH - _LEFT - 10, _HEIGHT - _TOP - _BOTTOM
    xs = _LEFT + np.linspace(0, wide, len(held))

    def ys(levels: np.ndarray) -> np.ndarray:
        return _TOP + high * (1 - levels / top)

    def points(x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    shapes, legend, floor = [], [], np.zeros_like(held)
    for number, (name, levels) in enumerate(busy.items()):
        colour, ceiling = _COLOURS[number % len(_COLOURS)], floor + levels
        outline = points(np.concatenate([xs, xs[::-1]]), np.concatenate([ys(ceiling), ys(floor)[::-1]]))
        shapes.append(f'<polygon points="{outline}" fill="{colour}"/>')
        legend.append(f'<tspan fill="{colour}">■</tspan> {escape(name)} ')
        floor = ceiling
    line = f'<polyline points="{points(xs, ys(held))}" fill="none" stroke="#333" stroke-dasharray="4 3"/>'
    days = seconds > 3 * 86400
    unit, scale = ("days", 86400.0) if days else ("hours", 3600.0) if seconds > 7200 else ("minutes", 60.0)
    foot = _HEIGHT - 14
    ticks = "".join(
        f'<text x="{_LEFT + wide * k / 6:.0f}" y="{foot}" text-anchor="middle">{seconds * k / 6 / scale:.3g}</text>'
        for k in range(7)
    )
    marks = "".join(
        f'<text x="{_LEFT - 6}" y="{_TOP + high * (1 - k / 4) + 4:.0f}" text-anchor="end">{top * k / 4:.3g}</text>'
        for k in range(5)
    )
    head = f"{escape(title)}, GPUs over {unit}: {''.join(legend)}- - there"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{_LEFT}" y="16">{head}</text>{"".join(shapes)}{line}{ticks}{marks}</svg>\n'
    )
