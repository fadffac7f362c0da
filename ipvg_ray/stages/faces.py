"""Reference pictures to the face on them: box, landmarks, embeddings, gender, quality, how prompts call the person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

if TYPE_CHECKING:
    from ipvg_ray.models.faces import FaceAnalyser
    from ipvg_ray.models.portraits import Portrait

TARGETS = {"female": "A woman", "male": "A man", None: "A person"}
"""How prompts begin, by the gender found."""

GPU_BATCH = 8
"""Pictures that go through a network at once on a GPU. On a CPU one does: several gain nothing there."""

REFUSALS = {"too_small": "face_too_small", "blurred": "face_blurred", "turned_away": "face_turned_away"}
"""Kinds of the failures of the gates that look at one picture."""


@dataclass(frozen=True)
class _Reference:
    """One picture of one identity: the row's number in the batch, the picture's number there, cell and hash."""

    row: int
    number: int
    cell: Mapping[str, Any]
    sha256: str


class FacesStage(Stage):
    """Finds the faces with the evaluation pack, chooses one, and embeds it with both packs.

    Pictures are decoded, detected and embedded by as many threads as the worker was given, and on a GPU several at
    once. The identity's first picture makes its row; further ones add their embeddings, boxes and landmarks, and are
    left out, with a note, where they cannot be used. Those that agree with the first are marked for the stages after.

    Failures: the kinds of `images.ImageError`; `no_face`; `several_faces` where `faces.choose` is error;
    `bad_landmarks`; `face_too_small`, `face_blurred`, `face_turned_away` and `odd_reference` where that gate refuses.

    Raises:
        FileNotFoundError: in `setup`, where a pack is missing or lacks a model that the stage needs.
        ValueError: in `setup`, where `faces.onnx_provider` cannot run on this machine.
    """

    name = "faces"
    grain = "identity"
    needs = ("image", "image_sha256", "more_images", "more_images_sha256")
    version = 3

    def models(self) -> Mapping[str, Path]:
        section = self.config.faces
        return {"pack": self.config.models.path(section.pack), "id_pack": self.config.models.path(section.id_pack)}

    def fingerprint_settings(self) -> dict[str, Any]:
        # What the networks run on changes their last bits at most.
        return {key: value for key, value in super().fingerprint_settings().items() if key != "onnx_provider"}

    def setup(self, context: StageContext) -> None:
        import cv2

        from ipvg_ray.models.portraits import Portraits

        # Pictures side by side keep cores busier than threads inside a network do; those get what is left over.
        workers = max(1, min(context.threads, self.resources().batch_size))
        within = context.threads // workers
        cv2.setNumThreads(within)  # OpenCV's own choice is every core of the machine
        self._batch = GPU_BATCH if context.device.startswith("cuda") else 1
        analyser = self._load("pack", context.device, within, ("landmark_2d_106", "recognition"), ("genderage",))
        id_analyser = self._load("id_pack", context.device, within, ("recognition",))
        self._portraits = Portraits(analyser, id_analyser, self.config.faces.choose)
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="faces")

    def teardown(self) -> None:
        self._pool.shutdown()

    def _load(
        self, field: str, device: str, threads: int, needed: Sequence[str], welcome: Sequence[str] = ()
    ) -> FaceAnalyser:
        from ipvg_ray.models.faces import FaceAnalyser

        section, pack = self.config.faces, self.models()[field]
        analyser = FaceAnalyser(
            pack,
            det_sizes=section.det_sizes,
            det_threshold=section.det_threshold,
            modules=("detection", *needed, *welcome),
            device=device,
            threads=threads,
            provider=section.onnx_provider,
            batch=self._batch,
        )
        if missing := set(needed) - analyser.modules:
            raise FileNotFoundError(
                f"{pack} has no model for {', '.join(sorted(missing))}; set faces.{field} to a whole pack"
            )
        return analyser

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        references = [reference for number, row in enumerate(rows) for reference in _references(number, row)]
        # No larger than leaves work for every thread: while one decodes, another detects.
        size = max(1, min(self._batch, -(-len(references) // self._workers)))
        parts = [references[start : start + size] for start in range(0, len(references), size)]
        found: list[dict[int, Portrait | RowError]] = [{} for _ in rows]
        for part, outcomes in zip(parts, self._pool.map(self._found, parts), strict=True):
            for reference, outcome in zip(part, outcomes, strict=True):
                found[reference.row][reference.number] = outcome
        return [self._row(outcomes) for outcomes in found]

    def _found(self, references: Sequence[_Reference]) -> list[Portrait | RowError]:
        """The portrait of each picture, or why there is none."""
        from ipvg_ray.models.portraits import PortraitError

        decoded: dict[int, np.ndarray] = {}
        outcomes: dict[int, Portrait | RowError] = {}
        for number, reference in enumerate(references):
            try:
                data = images.image_bytes(reference.cell, reference.sha256)
                decoded[number] = images.decode(data, self.config.dataset.max_image_pixels)
            except images.ImageError as error:
                outcomes[number] = RowError(error.kind, str(error))
        for number, portrait in zip(decoded, self._portraits.find(list(decoded.values())), strict=True):
            if isinstance(portrait, PortraitError):
                outcomes[number] = RowError(portrait.kind, str(portrait) + self._looked(portrait.kind))
            else:
                outcomes[number] = portrait
        return [outcomes[number] for number in range(len(references))]

    def _looked(self, kind: str) -> str:
        """How faces were looked for, to end the message that there is none."""
        if kind != "no_face":
            return ""
        section = self.config.faces
        sizes = ", ".join(str(size) for size in section.det_sizes)
        return f" (looked at detection sizes {sizes}; or lower faces.det_threshold, now {section.det_threshold:g})"

    def _row(self, outcomes: Mapping[int, Portrait | RowError]) -> Row | RowError:
        """The identity's row from what was found on its pictures, of which 0 is the first."""
        first = outcomes[0]
        if isinstance(first, RowError):
            return first
        flaws, refusal = self._gated(first)
        if refusal is not None:
            return refusal
        usable: dict[int, Portrait] = {0: first}
        notes = []
        for number, outcome in sorted(outcomes.items())[1:]:
            reason = outcome if isinstance(outcome, RowError) else self._gated(outcome)[1]
            if reason is not None:
                notes.append(f"reference {number}: {reason}")
            elif not isinstance(outcome, RowError):
                usable[number] = outcome
        added = self._compared(usable)
        odd, gate = added["odd_references"], self.config.faces.gates.odd_one_out
        if odd and gate.action == "refuse":
            return RowError(
                "odd_reference",
                f"reference pictures {_listed(odd)} (0 is the first) do not seem to show the person of the others; "
                f"remove them, or lower faces.gates.odd_one_out.cosine (now {gate.cosine:g})",
            )
        flaws += ["odd_one_out"] if odd else []
        return {**_described(first), "flaws": flaws, **added, "reference_notes": notes}

    def _gated(self, portrait: Portrait) -> tuple[list[str], RowError | None]:
        """The flaws to be named in the row, and the refusal where a gate asks for one."""
        from ipvg_ray.models.face_quality import flaws

        gates = self.config.faces.gates
        found = flaws(
            portrait.quality,
            size=gates.too_small.pixels,
            sharpness=gates.blurred.sharpness,
            yaw=gates.turned_away.yaw,
            pitch=gates.turned_away.pitch,
        )
        named = []
        for name, sentence in found:
            action = getattr(gates, name).action
            if action == "refuse":
                mend = f"{sentence}; use a better picture, or change faces.gates.{name}"
                return [], RowError(REFUSALS[name], mend)
            named += [name] if action == "warn" else []
        return named, None

    def _compared(self, usable: Mapping[int, Portrait]) -> Row:
        """The columns that hold all of an identity's pictures."""
        from ipvg_ray.models.face_quality import odd_ones, spread, used_ones

        section, numbers, portraits = self.config.faces, list(usable), usable.values()
        embeddings = np.stack([_normed(p.face) for p in portraits])
        gate = section.gates.odd_one_out
        odd = odd_ones(embeddings, gate.cosine) if gate.action != "off" else []
        return {
            "embeddings": embeddings.tolist(),
            "id_embeddings": [_normed(p.id_face).tolist() for p in portraits],
            "reference_numbers": numbers,
            "reference_boxes": [p.face.box.tolist() for p in portraits],
            "reference_landmarks": [_present(p.face.landmarks_106).ravel().tolist() for p in portraits],
            "reference_used": used_ones(len(numbers), odd, section.used_references),
            "reference_spread": spread(embeddings),
            "odd_references": [numbers[place] for place in odd],
        }


def _references(number: int, row: Row) -> list[_Reference]:
    """The pictures of the row of that number: its image, then those of more_images."""
    cells = [row["image"], *(row.get("more_images") or ())]
    hashes = [row["image_sha256"], *(row.get("more_images_sha256") or ())]
    return [_Reference(number, n, cell, sha) for n, (cell, sha) in enumerate(zip(cells, hashes, strict=True))]


def _described(portrait: Portrait) -> Row:
    """The columns that describe the face of the identity's first picture."""
    face, quality = portrait.face, portrait.quality
    return {
        "face_count": portrait.count,
        "face_box": face.box.tolist(),
        "face_score": face.score,
        "face_size": quality.size,
        "landmarks_5": face.landmarks_5.ravel().tolist(),
        "landmarks_106": _present(face.landmarks_106).ravel().tolist(),
        "yaw": quality.pose.yaw,
        "pitch": quality.pose.pitch,
        "roll": quality.pose.roll,
        "sharpness": quality.sharpness,
        "embedding": _normed(face).tolist(),
        "embedding_norm": face.embedding_norm,
        "id_embedding": _normed(portrait.id_face).tolist(),
        "id_embedding_norm": portrait.id_face.embedding_norm,
        "gender": face.gender,
        "gender_probability": face.gender_probability,
        "age": face.age,
        "target": TARGETS[face.gender],
    }


def _normed(face: Any) -> np.ndarray:
    return _present(face.normed_embedding)


def _present(array: np.ndarray | None) -> np.ndarray:
    """What `setup` made sure of: the pack has the model that makes it."""
    if array is None:
        raise RuntimeError("insightface gave a face without the values of a model that was loaded")
    return array


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
