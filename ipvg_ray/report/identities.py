"""What the page shows of an identity: its pictures, the face that was found, and what the gates said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

from ipvg_ray.report import facts
from ipvg_ray.report.embed import Budget, Picture, picture

_REFERENCE_SIDE, _MATTE_SIDE, _OTHER_SIDE = 400, 200, 96  # pixels: about twice the places they fill on the page
_OTHERS = 8
"""Further reference pictures shown at most."""

_NEAR = 0.2
"""Share of the picture's width from which a face is wide enough for its landmarks not to hide it."""

GATES = {"too_small": "too small", "blurred": "blurred", "turned_away": "turned away", "odd_one_out": "odd one out"}
"""Names of the gates as the row has them, and as people read them."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Other:
    """A further reference picture; `odd` where it does not seem to show the same person."""

    picture: Picture
    label: str
    odd: bool


@dataclass
class IdentityFacts:
    """One identity.

    Attributes:
        identity_id: its name.
        reference, matte, cutout: its first picture, the matte, and the person on grey.
        box: the face on the reference as x, y, width, height, each a share of 0 to 1.
        points, keypoints: 106 and 5 landmarks as x, y pairs, shares of 0 to 1; empty where the face is too small.
        gates: (what the gate found, whether it passed) in words, in the order of `GATES`; empty before faces is done.
        others: further reference pictures, `hidden` more of which are not shown.
        facts: figures, each a short text.
        notes: what is wrong with further reference pictures.
    """

    identity_id: str
    reference: Picture
    matte: Picture
    cutout: Picture
    box: tuple[float, float, float, float] | None
    points: list[tuple[float, float]]
    keypoints: list[tuple[float, float]]
    gates: list[tuple[str, bool]]
    others: list[Other]
    hidden: int
    facts: list[str]
    notes: list[str]


def describe(identity_id: str, own: Mapping[str, Row], absent: str, budget: Budget) -> IdentityFacts:
    """What the page shows of one identity.

    Args:
        own: table to its row; {} where it has none.
        absent: why there is no matte, where there is none.
    """
    given, face, matting = own["identities"], own.get("faces", {}), own.get("matting", {})
    size = given.get("image_width"), given.get("image_height")
    box = _box(face.get("face_box"), *size)
    near = box is not None and box[2] >= _NEAR
    return IdentityFacts(
        identity_id=identity_id,
        reference=picture(given.get("image"), _REFERENCE_SIDE, budget, sha256=given.get("image_sha256")),
        matte=picture(matting["matte"], _MATTE_SIDE, budget, grey=True) if matting else Picture(None, absent),
        cutout=picture(matting["id_picture"], _MATTE_SIDE, budget) if matting else Picture(None, absent),
        box=box,
        points=_shares(face.get("landmarks_106"), *size) if near else [],
        keypoints=_shares(face.get("landmarks_5"), *size) if near else [],
        gates=_gates(face),
        others=_others(given, face, budget),
        hidden=max(0, len(given.get("more_images") or ()) - _OTHERS),
        facts=[*_picture_facts(given, face, matting), *_face_facts(face), *_reference_facts(face)],
        notes=[facts.clean(note) for note in face.get("reference_notes") or ()],
    )


def pixels(width: Any, height: Any) -> str:
    """A size as `640 × 480`; nothing where it is not known."""
    return f"{width} \N{MULTIPLICATION SIGN} {height}" if width and height else ""


def _shares(values: Sequence[float] | None, width: int | None, height: int | None) -> list[tuple[float, float]]:
    """x, y pairs in pixels as shares of the picture, those on it; landmarks are all 0 only where they were left out."""
    if not values or not width or not height or not any(values):
        return []
    pairs = ((x / width, y / height) for x, y in zip(values[0::2], values[1::2], strict=True))
    return [(round(x, 4), round(y, 4)) for x, y in pairs if 0 <= x <= 1 and 0 <= y <= 1]


def _box(
    corners: Sequence[float] | None, width: int | None, height: int | None
) -> tuple[float, float, float, float] | None:
    if not corners or not width or not height:
        return None
    x0, x1 = (min(max(corner / width, 0.0), 1.0) for corner in (corners[0], corners[2]))
    y0, y1 = (min(max(corner / height, 0.0), 1.0) for corner in (corners[1], corners[3]))
    return x0, y0, x1 - x0, y1 - y0


def _gates(face: Row) -> list[tuple[str, bool]]:
    flaws = face.get("flaws")
    if flaws is None:  # not made yet, or by a version without gates
        return []
    return [(words, name not in flaws) for name, words in GATES.items() if name != "odd_one_out" or name in flaws]


def _others(given: Row, face: Row, budget: Budget) -> list[Other]:
    numbers, odd = face.get("reference_numbers"), face.get("odd_references") or ()
    if numbers is not None and face.get("reference_used") is not None:  # not known in tables of version 2
        numbers = list(compress(numbers, face["reference_used"]))
    pictures = list(zip(given.get("more_images") or (), given.get("more_images_sha256") or (), strict=True))
    shown = []
    for number, (cell, sha256) in enumerate(pictures[:_OTHERS], 1):
        label = str(number)
        if number in odd:
            label += ", odd"
        elif numbers is not None and number not in numbers:
            label += ", unused"
        shown.append(Other(picture(cell, _OTHER_SIDE, budget, sha256=sha256), label, number in odd))
    return shown


def _picture_facts(given: Row, face: Row, matting: Row) -> list[str]:
    found = []
    if size := pixels(given.get("image_width"), given.get("image_height")):
        found.append(size)
    if face.get("target"):
        found.append(f"“{face['target']}”")
    if count := face.get("face_count"):
        found.append(f"{count} face{'s' if count > 1 else ''} found")
    if (score := facts.number(face.get("face_score"))) is not None:
        found.append(f"confidence {score:.2f}")
    if (share := facts.number(matting.get("person_share"))) is not None:
        found.append(f"matte covers {share:.0%}")
    return found


def _face_facts(face: Row) -> list[str]:
    found = []
    if (probability := facts.number(face.get("gender_probability"))) is not None:
        found.append(f"{face.get('gender')} {probability:.0%}")
    if (size := facts.number(face.get("face_size"))) is not None:
        found.append(f"face {size:.0f} px")
    if (sharpness := facts.number(face.get("sharpness"))) is not None:
        found.append(f"sharpness {sharpness:.3f}")
    yaw, pitch = facts.number(face.get("yaw")), facts.number(face.get("pitch"))
    if yaw is not None and pitch is not None:
        found.append(f"yaw {yaw:.0f}°, pitch {pitch:.0f}°")
    if (norm := facts.number(face.get("embedding_norm"))) is not None:
        found.append(f"embedding norm {norm:.1f}")
    return found


def _reference_facts(face: Row) -> list[str]:
    spread = facts.number(face.get("reference_spread"))
    if spread is None:
        return []
    return [f"{len(face.get('reference_numbers') or ())} references, spread {spread:.2f}"]
