"""Reference picture to matte and id picture: a network's person, or the face polygon of the released code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext

if TYPE_CHECKING:
    from torch import Tensor

    from ipvg_ray.models.matte_network import MatteNetwork


@dataclass(frozen=True)
class _Picture:
    """One reference picture of one identity: the row's number in the call, the picture's in its identity (0 is the
    first), cell and hash, and where its face is."""

    row: int
    number: int
    cell: Mapping[str, Any]
    sha256: str
    landmarks: Sequence[float]
    face_box: Sequence[float]


@dataclass(frozen=True)
class Reference:
    """A decoded picture: whether it is its identity's first, uint8 RGB (H, W, 3), landmarks (106, 2), the face's box,
    the network's input where one runs."""

    first: bool
    rgb: np.ndarray
    landmarks: np.ndarray
    face_box: Sequence[float]
    prepared: Tensor | None


class MattingStage(Stage):
    """Cuts the person from the reference picture by `matting.method`; `none` keeps the whole picture.

    Of further reference pictures those that the stage faces marks as used give an id picture each; all other columns
    are of the first.

    While the network works on one batch, threads decode the next one and finish the one before. Pictures that the
    network sees at equal size go through it together; a row's matte depends on the others by rounding alone, on a CPU
    not at all.

    Failures: the kinds of `images.ImageError`; `bad_landmarks` where the face's landmarks span no box. A further
    picture that faces could read and this stage cannot fails its identity: the set has changed under the run.
    """

    name = "matting"
    grain = "identity"
    needs = (
        *("image", "image_sha256", "more_images", "more_images_sha256"),
        *("reference_numbers", "reference_used", "reference_boxes", "reference_landmarks"),
    )
    version = 3

    def models(self) -> Mapping[str, Path]:
        if self.config.matting.method != "hrnet":
            return {}
        return {"model": self.config.models.path(self.config.matting.model)}

    def fingerprint_settings(self) -> dict[str, Any]:
        settings = super().fingerprint_settings()
        del settings["network_batch"]
        # The other methods read nothing of the network: changing it must not undo their results.
        return settings if self.models() else {field: settings[field] for field in ("method", "cutout")}

    def setup(self, context: StageContext) -> None:
        self._network: MatteNetwork | None = None
        self._workers = context.threads + 1  # while one reads, another finishes
        import cv2

        cv2.setNumThreads(context.threads)  # or each of the stage's threads would take every core
        if self.config.matting.method == "hrnet":
            import torch

            from ipvg_ray.models import matte_network

            torch.set_num_threads(context.threads)
            section = self.config.matting
            self._network = matte_network.load(self.models()["model"], context.device, section.input_size)

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        step = self.config.matting.network_batch
        pictures = [picture for number, row in enumerate(rows) for picture in _pictures(number, row)]
        batches = [pictures[start : start + step] for start in range(0, len(pictures), step)]
        results: list[Row | RowError] = []
        finishing: list[Future[Row | RowError]] = []
        with ThreadPoolExecutor(self._workers) as pool:
            for references in self._read_ahead(pool, batches):
                alphas = self._run(references)
                # Three batches of pictures are in memory at most: read ahead, in the network, being finished.
                results += [future.result() for future in finishing]
                finishing = [
                    pool.submit(self._finish, item, alpha) for item, alpha in zip(references, alphas, strict=True)
                ]
            results += [future.result() for future in finishing]
        return _by_row(pictures, results, len(rows))

    def _read_ahead(
        self, pool: ThreadPoolExecutor, batches: Sequence[Sequence[_Picture]]
    ) -> Iterator[list[Reference | RowError]]:
        """Each batch decoded, the next one already on its way."""
        reading: list[Future[Reference | RowError]] = []
        for batch in [*batches, []]:
            following = [pool.submit(self._read, picture) for picture in batch]
            if reading:
                yield [future.result() for future in reading]
            reading = following

    def _read(self, picture: _Picture) -> Reference | RowError:
        try:
            data = images.image_bytes(picture.cell, picture.sha256)
            rgb = images.decode(data, self.config.dataset.max_image_pixels)
        except images.ImageError as error:
            return RowError(error.kind, str(error))
        landmarks = np.asarray(picture.landmarks, np.float64).reshape(-1, 2)
        prepared = self._network.prepare(rgb) if self._network else None
        return Reference(picture.number == 0, rgb, landmarks, picture.face_box, prepared)

    def _run(self, references: Sequence[Reference | RowError]) -> list[np.ndarray | None]:
        """The network's alpha of each, at the size that it saw; None for errors and where no network runs."""
        alphas: list[np.ndarray | None] = [None] * len(references)
        if self._network is None:
            return alphas
        import torch

        of_size: dict[tuple[int, ...], list[int]] = {}
        inputs: dict[int, Tensor] = {}
        for i, item in enumerate(references):
            if isinstance(item, Reference) and item.prepared is not None:
                inputs[i] = item.prepared
                of_size.setdefault(tuple(item.prepared.shape), []).append(i)
        for together in of_size.values():
            found = self._network.run(torch.stack([inputs[i] for i in together]))
            for i, alpha in zip(together, found, strict=True):
                alphas[i] = alpha
        return alphas

    def _finish(self, reference: Reference | RowError, alpha: np.ndarray | None) -> Row | RowError:
        from ipvg_ray.models import matte_refine, matting

        if isinstance(reference, RowError):
            return reference
        section = self.config.matting
        try:
            matte = self._matte(reference, alpha)
            person, share = matting.id_crop(reference.rgb, matte, reference.landmarks)
        except matting.LandmarkError as error:
            return RowError("bad_landmarks", str(error))
        if section.method == "hrnet":
            # The polygon's rim is not the person's own: the released code blends it with grey as it is.
            person = matte_refine.foreground(person, share)
        id_picture = images.encode(matting.on_grey(person, share))
        if not reference.first:
            return {"id_picture": id_picture}
        return {
            "matte": images.encode(np.round(matte * 255).astype(np.uint8)),
            "id_picture": id_picture,
            "cutout": images.encode(matting.rgba(person, share)) if section.cutout else None,
            "matting_method": section.method,
            "person_share": float(matte.mean(dtype=np.float64)),
            "face_share": matte_refine.share_in(matte, reference.face_box),
        }

    def _matte(self, reference: Reference, alpha: np.ndarray | None) -> np.ndarray:
        """float32 (H, W), 0 background to 1 person, from the network's alpha where one ran."""
        from ipvg_ray.models import matte_refine, matting

        section, (height, width) = self.config.matting, reference.rgb.shape[:2]
        if section.method == "none":
            return np.ones((height, width), np.float32)
        if self._network is None or alpha is None:
            return matting.landmark_mask((height, width), reference.landmarks)
        if section.refine and self._network.coarse:
            rough = self._network.full_size(alpha, *matte_refine.work_size(height, width))
            matte = matte_refine.refine(reference.rgb, rough, reference.face_box)
        else:
            matte = matte_refine.one_person(self._network.full_size(alpha, height, width), reference.face_box)
        return matte_refine.feathered(matte, section.feather * max(height, width))


def _pictures(number: int, row: Row) -> list[_Picture]:
    """Those of the row's pictures that are used; the first always is."""
    cells = [row["image"], *(row.get("more_images") or ())]
    hashes = [row["image_sha256"], *(row.get("more_images_sha256") or ())]
    columns = [row[f"reference_{name}"] for name in ("numbers", "landmarks", "boxes", "used")]
    return [
        _Picture(number, n, cells[n], hashes[n], landmarks, box)
        for n, landmarks, box, used in zip(*columns, strict=True)
        if used
    ]


def _by_row(pictures: Sequence[_Picture], results: Sequence[Row | RowError], count: int) -> list[Row | RowError]:
    """The rows' columns, from those of their pictures."""
    found: list[dict[int, Row | RowError]] = [{} for _ in range(count)]
    for picture, result in zip(pictures, results, strict=True):
        found[picture.row][picture.number] = result
    return [_row(outcomes) for outcomes in found]


def _row(outcomes: Mapping[int, Row | RowError]) -> Row | RowError:
    """One identity's columns: the first picture's, and the id pictures of the others."""
    first, more = outcomes[0], []
    if isinstance(first, RowError):
        return first
    for number, outcome in list(outcomes.items())[1:]:
        if isinstance(outcome, RowError):
            return RowError(outcome.kind, f"reference picture {number} (0 is the first): {outcome.message}")
        more.append(outcome["id_picture"])
    return {**first, "more_id_pictures": more or None}
