"""Which of several attempts at a picture of a person is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Attempt:
    """One finished try.

    Attributes:
        seed: what it was drawn with.
        picture: RGB uint8 (height, width, 3); None where the model gave none.
        refused: why it cannot be taken, or None.
        similarity: cosine of its largest face and the reference; None where it shows no face.
        detail: how the face detail pass went: done, no_face, too_small or off.
        faces: drawn anew by it.
    """

    seed: int
    picture: np.ndarray | None
    refused: str | None = None
    similarity: float | None = None
    detail: str = "off"
    faces: int = 0


@dataclass(frozen=True, eq=False)
class Best:
    """All attempts of a picture, the number of the one that was taken, and why."""

    attempts: list[Attempt]
    number: int
    reason: str

    @property
    def taken(self) -> Attempt:
        return self.attempts[self.number]


def is_similar(attempt: Attempt, threshold: float) -> bool:
    """Whether it can be taken and is more like the reference than `threshold` asks for."""
    return not attempt.refused and attempt.similarity is not None and attempt.similarity > threshold


def best_of(attempts: Sequence[Attempt], threshold: float) -> Best | None:
    """The first similar attempt (`similar`), else the most similar (`best`), else the first without a face (`no_face`).

    None where no attempt can be taken. The first wins a tie.
    """
    usable = [number for number, attempt in enumerate(attempts) if not attempt.refused]
    if not usable:
        return None
    for number in usable:
        if is_similar(attempts[number], threshold):
            return Best(list(attempts), number, "similar")
    seen = {n: similarity for n in usable if (similarity := attempts[n].similarity) is not None}
    if not seen:
        return Best(list(attempts), usable[0], "no_face")
    return Best(list(attempts), max(seen, key=lambda number: (seen[number], -number)), "best")
