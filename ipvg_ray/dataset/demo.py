"""A small identity set from pictures that installed packages carry; nothing is downloaded.

Pictures: scikit-image's astronaut (NASA, public domain) and its cat (CC0), and insightface's sample pictures.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ipvg_ray.dataset.problems import DatasetError
from ipvg_ray.media.images import decode, encode

MARGIN = 2.4
"""Side of a cut, in sides of the face's box: hair, neck and shoulders stay in."""
_SURE = 15
"""Overlapping hits of the cascade from which a box is surely a face; chance hits have fewer."""
_LIKELY = 8

PROMPTS = {
    "id001": (
        "The engineer, in a dark blue overall with rolled-up sleeves, walks along the open hangar towards the camera, "
        "stops beside a propeller and wipes the oil off her hands with a cloth. She looks up, squints into the low "
        "evening sun that falls through the doors, and breaks into a broad, relieved smile.",
        "The teacher, wearing a cream blouse and a thin silver necklace, leans over a wooden desk and turns the pages "
        "of an old atlas. Dust floats in the light of a tall window. She finds what she was looking for, taps the page "
        "twice and raises her head with shining eyes.",
    ),
    "id002": (
        "The baker, dressed in a white cotton jacket dusted with flour, lifts a tray of round loaves out of a brick "
        "oven. Steam rises around his face while he breathes in the smell with closed eyes. He opens them, nods slowly "
        "and grins at somebody who stands beside the camera.",
        "The cyclist, in a red rain jacket and a grey scarf, waits at a crossing in a wet city street at dusk. Lights "
        "of passing cars slide over his cheeks. He brushes the drops from his forehead, looks around, and laughs "
        "as the rain grows stronger.",
    ),
    "id003": (
        "The gardener, wearing a green linen shirt and a straw hat, kneels between rows of tomato plants in a sunny "
        "greenhouse. She picks a ripe fruit, turns it in her fingers and holds it close to her face. Her brows rise in "
        "surprise, then she smiles and puts it into a basket.",
        "The violinist, in a plain black dress, sits on the edge of an empty stage and tunes her instrument under a "
        "single warm lamp. She draws the bow across one string, listens with her head tilted, and her tense face "
        "softens as the note fills the hall.",
    ),
    "id004": (
        "The captain, in a navy wool coat with brass buttons, stands at the rail of a ferry while gulls circle behind "
        "him. Wind moves his hair. He shades his eyes with one hand, watches the harbour come closer, and his serious "
        "look gives way to a quiet smile.",
        "The chess player, wearing a brown corduroy jacket, bends over a board in a park full of yellow leaves. He "
        "rubs his chin, reaches for a knight, hesitates, and moves it. He leans back, folds his arms and raises "
        "one eyebrow at his opponent.",
    ),
    "cat": (
        "The librarian, in a mustard cardigan, pushes a cart of books along a narrow aisle and stops to read a title. "
        "A lamp flickers above. The librarian looks up, waits until the light is steady again, and goes on with a "
        "small shrug.",
        "The postman, wearing a blue cap and a leather bag, climbs a stone stairway between white houses by the sea, "
        "stops to catch his breath, looks out over the water, and wipes his brow with a content face.",
    ),
}
"""Two prompts for each identity of the set."""


class Box(NamedTuple):
    """A face: x and y of the upper left corner, side; pixels."""

    x: int
    y: int
    side: int

    def middle_in(self, other: Box) -> bool:
        """Whether this box's middle lies in the other box."""
        x, y = self.x + self.side / 2, self.y + self.side / 2
        return other.x <= x <= other.x + other.side and other.y <= y <= other.y + other.side


def make_demo(out: Path) -> Path:
    """Write five identities in the VIP-200K layout: four faces, and a cat in which no face is to be found.

    Args:
        out: made where it is missing; files of an earlier demo set are replaced.

    Returns:
        `out`, ready for `dataset.path`.

    Raises:
        DatasetError: where the installed packages do not carry the pictures, or the faces are not found on them.
    """
    faces = _cut_faces(_sample("t1.jpg"))
    pictures = {
        "id001": _skimage("astronaut"),
        "id002": faces[0],
        "id003": faces[-1],
        "id004": _sample("Tom_Hanks_54745.png"),
        "cat": _skimage("cat"),
    }
    for identity_id, prompts in PROMPTS.items():
        folder = out / "raw" / identity_id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "image.png").write_bytes(encode(pictures[identity_id])["bytes"])
        for number, prompt in enumerate(prompts, 1):
            (folder / f"prompt{number}.txt").write_text(prompt + "\n", encoding="utf-8")
    return out


def find_faces(picture: np.ndarray, hits: int = _LIKELY) -> list[Box]:
    """Frontal faces on an RGB picture, uint8 (height, width, 3), from left to right, by scikit-image's LBP cascade.

    Args:
        hits: overlapping windows that make a face; fewer find more, chance hits among them.
    """
    shorter = min(picture.shape[:2])
    least = max(24, shorter // 12)
    found = _cascade().detect_multi_scale(
        img=picture,
        scale_factor=1.1,
        step_ratio=1,
        min_size=(least, least),
        max_size=(shorter, shorter),
        min_neighbor_number=hits,
    )
    boxes: list[Box] = []
    for box in sorted((Box(int(f["c"]), int(f["r"]), int(f["width"])) for f in found), key=lambda b: (-b.side, b)):
        if not any(box.middle_in(other) for other in boxes):  # the cascade reports a face at two sizes at times
            boxes.append(box)
    return sorted(boxes)


def _cut_faces(picture: np.ndarray) -> list[np.ndarray]:
    """Squares around the faces that are alone on their square, from left to right; two at least."""
    cuts = [_cut(picture, box) for box in find_faces(picture, _SURE)]
    alone = [cut for cut in cuts if len(find_faces(cut)) == 1]
    if len(alone) < 2:
        raise DatasetError(f"only {len(alone)} faces were found on insightface's sample picture; two are needed")
    return alone


def _cut(picture: np.ndarray, box: Box) -> np.ndarray:
    """A square around a face, smaller where the picture ends."""
    half = round(box.side * MARGIN / 2)
    x, y = box.x + box.side // 2, box.y + box.side // 2
    height, width = picture.shape[:2]
    return picture[max(0, y - half) : min(height, y + half), max(0, x - half) : min(width, x + half)]


@lru_cache
def _cascade() -> Any:
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade

    return Cascade(lbp_frontal_face_cascade_filename())


def _skimage(name: str) -> np.ndarray:
    from skimage import data

    picture: np.ndarray = getattr(data, name)()
    return picture


def _sample(name: str) -> np.ndarray:
    """A picture of the installed insightface package, which is not imported for it; RGB."""
    spec = find_spec("insightface")
    if spec is None or spec.origin is None:
        raise DatasetError("the demo set needs the package insightface; install it with pip install insightface")
    file = Path(spec.origin).parent / "data" / "images" / name
    if not file.is_file():
        raise DatasetError(f"the installed insightface carries no {name}; install version 2.1")
    return decode(file.read_bytes())
