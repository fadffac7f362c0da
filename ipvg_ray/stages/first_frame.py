"""Face and spatial prompt to the video's first frame: SDXL with the LoRA that HyperLoRA makes for the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ipvg_ray.media import images, provenance
from ipvg_ray.models import face_detail
from ipvg_ray.models.batcher import Batcher, BatcherEndedError, Procedure
from ipvg_ray.models.best_of import Attempt, Best, best_of, is_similar
from ipvg_ray.models.faces import Face, FaceAnalyser, choose
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext, WorkerBrokenError, derived_seed

if TYPE_CHECKING:
    from ipvg_ray.config import Config, FirstFrameConfig
    from ipvg_ray.models.painter import Identity, Painter
    from ipvg_ray.models.sdxl import DrawSettings

_SAFETY = "safety"
"""Key of the batcher's jobs that are no drawing."""


@dataclass(frozen=True, eq=False)
class Subject:
    """Who and what is to be drawn: the person, how its faces embed on average, the words, the ControlNet's picture."""

    identity: Identity
    embedding: np.ndarray
    prompt: str
    control: np.ndarray | None = None


class FirstFrameStage(Stage):
    """Draws a picture until one is like the reference, `attempts` times at most, each with its face drawn anew.

    Rows of all threads share the batches of one UNet, so that a row that asks again is served beside new ones. What is
    drawn depends on the row and its seed; what stands beside it in a batch changes no more than the last bits.

    Failures: `empty_prompt`; the kinds of `images.ImageError` for the pictures read; `bad_landmarks` with a Base LoRA;
    `unsafe` where the safety model lets no attempt pass; `bad_first_frame` where the model gives no picture (NaN).
    """

    name = "first_frame"
    grain = "sample"
    needs: ClassVar[tuple[str, ...]] = (
        *("id_picture", "more_id_pictures", "id_embeddings", "embeddings", "reference_used"),
        "image_prompt",
    )
    version = 3

    def __init__(self, config: Config) -> None:
        """Add to `needs` the columns that only some settings read."""
        super().__init__(config)
        section, more = self.settings, set()
        if section.reference.enhance != "none":
            more |= {"reference_prompt"}
        if section.controlnet is not None and section.control.source == "keypoints":
            more |= {"landmarks_5", "face_box"}
        if section.base_weight:
            more |= {"image", "image_sha256", "more_images", "more_images_sha256"}
            more |= {"reference_numbers", "reference_landmarks"}
        if more:
            self.needs = (*type(self).needs, *sorted(more))  # type: ignore[misc] # of this configuration

    @property
    def settings(self) -> FirstFrameConfig:
        return self.config.first_frame

    def models(self) -> Mapping[str, Path]:
        section, place = self.settings, self.config.models.path
        fields = ["checkpoint", "checkpoint_config", "hyperlora", "clip_vision"]
        fields += [f for f in ("vae", "controlnet", "safety_model") if getattr(section, f) is not None]
        if section.controlnet is not None and section.control.source == "picture":
            fields.append("control_picture")
        # The pack whose embedding of the reference the attempts are compared with.
        return {field: place(getattr(section, field)) for field in fields} | {"pack": place(self.config.faces.pack)}

    def fingerprint_settings(self) -> dict[str, Any]:
        section, settings = self.settings, super().fingerprint_settings()
        settings["runtime"] = {"vae_tiling": section.runtime.vae_tiling}  # the rest changes no pixel to speak of
        off = {
            "control": section.controlnet is None,
            "safety": section.safety_model is None,
            "detail": not section.detail.enabled,
            "reference": section.reference.enhance == "none",
        }
        return {field: value for field, value in settings.items() if not off.get(field)}

    # -- loading -----------------------------------------------------------------------------------------------------

    def setup(self, context: StageContext) -> None:
        from ipvg_ray.models.safety import SafetyCheck

        self._threads = context.threads
        section, places = self.settings, self.models()
        self._run_name = context.run_dir.rstrip("/").rpartition("/")[2]
        self._painter = self._load_painter(context.device)
        self._safety = None
        if section.safety_model is not None:
            self._safety = SafetyCheck.load(places["safety_model"], section.safety.labels, device=context.device)
        self._faces = FaceAnalyser(
            places["pack"],
            det_sizes=self.config.faces.det_sizes,
            det_threshold=section.detail.threshold,
            modules=("detection", "recognition"),
            device=context.device,
            threads=context.threads,
        )
        self._control_picture = None
        if "control_picture" in places:
            whole = images.decode(places["control_picture"].read_bytes())
            self._control_picture = images.resized(whole, section.width, section.height)
        self._batcher = Batcher(self._run, section.runtime.batch)

    def teardown(self) -> None:
        self._batcher.close()

    def _load_painter(self, device: str) -> Painter:
        import torch

        from ipvg_ray.models import sdxl_load
        from ipvg_ray.models.clip_vision import ClipVision
        from ipvg_ray.models.hyperlora import HyperLora
        from ipvg_ray.models.painter import Painter
        from ipvg_ray.models.sdxl import Sdxl

        section, places = self.settings, self.models()
        options, dtype = section.runtime, getattr(torch, section.dtype)
        pipeline = sdxl_load.load(
            places["checkpoint"],
            places["checkpoint_config"],
            dtype=dtype,
            device="cpu" if options.offload else device,
            vae=places.get("vae"),
            vae_dtype=getattr(torch, section.vae_dtype),
        )
        controlnet = None
        if section.controlnet is not None:
            controlnet = sdxl_load.load_controlnet(places["controlnet"], dtype=dtype, device=device)
        # They work once per identity: on a small card they leave it to SDXL (and half precision is slow on CPUs).
        beside = {"dtype": torch.float32, "device": "cpu"} if options.offload else {"dtype": dtype, "device": device}
        painter = Painter(
            Sdxl(pipeline, device, clip_skip=section.clip_skip, controlnet=controlnet),
            HyperLora.load(places["hyperlora"], **beside),
            ClipVision.load(places["clip_vision"], **beside),
            section.weight,
            section.base_weight,
            options.kept_identities,
        )
        memory = options.model_dump(include=set(sdxl_load.Memory.__dataclass_fields__))
        sdxl_load.tune(pipeline, sdxl_load.Memory(**memory), device)
        return painter

    # -- rows --------------------------------------------------------------------------------------------------------

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        results: list[Row | RowError] = []
        for end in self._batcher.work([self._row(row) for row in rows]):
            if isinstance(end, BatcherEndedError):
                raise WorkerBrokenError("the thread that draws has ended") from end
            if isinstance(end, Exception) and not isinstance(end, RowError):
                raise end
            results.append(end)
        return results

    def _run(self, key: Any, jobs: Sequence[Any]) -> Sequence[Any]:
        """What the batcher's thread does: all use of the networks is here."""
        import torch

        torch.set_num_threads(self._threads)  # which OpenMP keeps for each thread of its own
        if key == _SAFETY and self._safety is not None:
            return self._safety.scores(jobs)
        return self._painter.paint(jobs, key)

    def _row(self, row: Row) -> Procedure[Row]:
        from ipvg_ray.models.matting import LandmarkError

        try:
            return (yield from self._columns(row))
        except images.ImageError as error:
            raise RowError(error.kind, str(error)) from error
        except LandmarkError as error:
            raise RowError("bad_landmarks", str(error)) from error

    def _columns(self, row: Row) -> Procedure[Row]:
        section = self.settings
        if not row["image_prompt"].strip():
            raise RowError("empty_prompt", "the first frame's prompt is empty; give the sample a prompt")
        identity, embedding = person(row, self.config), _used(row, "embeddings").mean(axis=0)
        subject = Subject(identity, embedding, row["image_prompt"], self._control(row))
        frame = yield from self._best(subject, self._drawing(section.width, section.height), row["seed"])
        refused = [f"{number} {a.refused}" for number, a in enumerate(frame.attempts, 1) if a.refused]
        result = {
            "first_frame": self._encoded(frame.taken, row),
            "first_frame_width": section.width,
            "first_frame_height": section.height,
            "first_frame_attempt": frame.number + 1,
            "first_frame_reason": frame.reason,
            "first_frame_similarity": frame.taken.similarity,
            "first_frame_similarities": [attempt.similarity for attempt in frame.attempts],
            "first_frame_refused": "; ".join(refused) or None,
            "first_frame_seed": frame.taken.seed,
            "first_frame_detail": frame.taken.detail,
            "first_frame_faces": frame.taken.faces,
            "reference_picture": None,
            "reference_similarity": None,
        }
        if section.reference.enhance == "none":
            return result
        size = section.reference.width, section.reference.height
        portrait = Subject(identity, embedding, self._reference_prompt(row))
        best = yield from self._best(portrait, self._drawing(*size), derived_seed(row["seed"], "reference"))
        result["reference_picture"] = self._encoded(best.taken, row)
        result["reference_similarity"] = best.taken.similarity
        return result

    def _control(self, row: Row) -> np.ndarray | None:
        from ipvg_ray.models import pose

        section = self.settings
        if section.controlnet is None or self._control_picture is not None:
            return self._control_picture
        size, control = (section.height, section.width), section.control
        landmarks = np.asarray(row["landmarks_5"], np.float64).reshape(5, 2)
        box = np.asarray(row["face_box"], np.float64)
        points = pose.placed(landmarks, box, size, control.face_height, (control.face_x, control.face_y))
        return pose.keypoint_picture(points, size)

    def _reference_prompt(self, row: Row) -> str:
        """The appearance sentence (prompts.method: tpige), else the first frame's phrases, seen from further away."""
        from ipvg_ray.models.hyperlora import TRIGGER_WORDS

        looks = row["reference_prompt"]
        text = row["image_prompt"].removesuffix("close-up").rstrip(" ,") if not looks else f"{TRIGGER_WORDS}, {looks}"
        return f"{text.rstrip(' .')}, {self.settings.reference.suffix}"

    def _encoded(self, attempt: Attempt, row: Row) -> dict[str, Any]:
        section = self.settings
        marks = None
        if section.mark:
            text = provenance.statement(self._run_name, row, attempt.seed)
            marks = provenance.metadata(section.format, text)
        assert attempt.picture is not None  # only attempts with a picture are taken
        return images.encode(attempt.picture, section.format, section.quality, marks)

    def _drawing(self, width: int, height: int) -> DrawSettings:
        from ipvg_ray.models.sdxl import DrawSettings

        section = self.settings
        framed = section.controlnet is not None and (width, height) == (section.width, section.height)
        return DrawSettings(
            height,
            width,
            section.steps,
            section.guidance,
            section.negative_prompt,
            section.sampler,
            section.schedule,
            control_scale=section.control.scale if framed else 0.0,
            control_start=section.control.start,
            control_end=section.control.end,
        )

    # -- attempts ----------------------------------------------------------------------------------------------------

    def _best(self, subject: Subject, drawing: DrawSettings, seed: int) -> Procedure[Best]:
        """Try until an attempt is similar enough, then take it, else the best.

        Raises:
            RowError: `unsafe` or `bad_first_frame`, where none can be taken.
        """
        section, attempts = self.settings, []
        for number in range(section.attempts):
            attempt = yield from self._attempt(subject, drawing, derived_seed(seed, number) if number else seed)
            attempts.append(attempt)
            if is_similar(attempt, section.similarity):
                break
        best = best_of(attempts, section.similarity)
        if best is None:
            reasons = "; ".join(f"attempt {n}: {a.refused}" for n, a in enumerate(attempts, 1))
            if any(a.picture is not None for a in attempts):
                raise RowError("unsafe", f"the safety model let no attempt pass ({reasons}); change the prompt")
            raise RowError("bad_first_frame", reasons)
        return best

    def _attempt(self, subject: Subject, drawing: DrawSettings, seed: int) -> Procedure[Attempt]:
        from ipvg_ray.models.painter import Painting
        from ipvg_ray.models.sdxl_load import SdxlError

        job = Painting(subject.identity, subject.prompt, seed, control=subject.control)
        (picture,) = yield [(drawing, job)]
        if isinstance(picture, SdxlError):
            return Attempt(seed, None, str(picture))
        detail, count = "off", 0
        found = self._faces.faces(picture)
        if self.settings.detail.enabled:
            picture, count = yield from self._detailed(subject, drawing, picture, found, seed)
            detail = "done" if count else "too_small" if found else "no_face"
            found = self._faces.faces(picture) if count else found
        if self._safety is not None:
            (score,) = yield [(_SAFETY, picture)]
            if score >= self.settings.safety.threshold:
                return Attempt(seed, picture, f"unsafe ({score:.2f})", detail=detail, faces=count)
        return Attempt(seed, picture, None, _similarity(found, subject.embedding, picture.shape), detail, count)

    def _detailed(
        self, subject: Subject, drawing: DrawSettings, picture: np.ndarray, found: Sequence[Face], seed: int
    ) -> Procedure[tuple[np.ndarray, int]]:
        """The picture with its faces drawn anew, all at a time, and how many they were."""
        import dataclasses

        from ipvg_ray.models.painter import Painting
        from ipvg_ray.models.sdxl_load import SdxlError

        section = self.settings.detail
        fields = face_detail.Geometry.__dataclass_fields__
        geometry = face_detail.Geometry(**section.model_dump(include=set(fields)))
        crops = face_detail.crops([face.box for face in found], picture.shape[:2], geometry)
        jobs = []
        for number, crop in enumerate(crops):
            how = dataclasses.replace(
                drawing,
                width=crop.width,
                height=crop.height,
                steps=section.steps,
                denoise=section.denoise,
                control_scale=0.0,
            )
            own = derived_seed(seed, f"face {number}")
            job = Painting(subject.identity, subject.prompt, own, crop.cut(picture), crop.mask())
            jobs.append((how, job))
        drawn = yield jobs
        count = 0
        for crop, face in zip(crops, drawn, strict=True):
            if not isinstance(face, SdxlError):
                picture, count = crop.paste(picture, face, section.feather), count + 1
        return picture, count


def person(row: Row, config: Config) -> Identity:
    """Whom HyperLoRA is to draw, by all reference pictures that the stage faces marks as used.

    Args:
        row: with the columns of the identity that the stage needs.
        config: says whether a Base LoRA is made too.

    Raises:
        ImageError: where a picture cannot be read.
        LandmarkError: where landmarks span no box, with a Base LoRA.
    """
    from ipvg_ray.models.painter import Identity

    cells = [row["id_picture"], *(row["more_id_pictures"] or ())]
    pictures = tuple(_decoded(f"id picture {number} (0 is the first)", cell) for number, cell in enumerate(cells))
    if config.first_frame.grayscale:
        pictures = tuple(images.grey(picture) for picture in pictures)
    base = _base_pictures(row, config.dataset.max_image_pixels) if config.first_frame.base_weight else ()
    return Identity(row["identity_id"], pictures, _used(row, "id_embeddings"), base)


def _base_pictures(row: Row, max_pixels: int) -> tuple[np.ndarray, ...]:
    """The used reference pictures with their faces blurred out, for a Base LoRA."""
    from ipvg_ray.models.base_picture import base_picture
    from ipvg_ray.models.matting import LandmarkError

    cells = [row["image"], *(row["more_images"] or ())]
    hashes = [row["image_sha256"], *(row["more_images_sha256"] or ())]
    made = []
    known = zip(row["reference_numbers"], row["reference_landmarks"], strict=True)
    for number, points in compress(known, row["reference_used"]):
        what = f"reference picture {number} (0 is the first)"
        rgb = _decoded(what, cells[number], hashes[number], max_pixels)
        try:
            made.append(base_picture(rgb, np.asarray(points, np.float64).reshape(-1, 2)))
        except LandmarkError as error:
            raise LandmarkError(f"{what}: {error}") from error
    return tuple(made)


def _decoded(what: str, cell: Row, sha256: str | None = None, max_pixels: int = images.MAX_PIXELS) -> np.ndarray:
    """The picture in a cell; an ImageError calls it `what`."""
    try:
        return images.decode(images.image_bytes(cell, sha256), max_pixels)
    except images.ImageError as error:
        raise images.ImageError(error.kind, f"{what}: {error}") from error


def _used(row: Row, column: str) -> np.ndarray:
    """float32 (n, 512): the embeddings in that column, of the reference pictures that are used."""
    return np.asarray(list(compress(row[column], row["reference_used"])), np.float32)


def _similarity(found: Sequence[Face], reference: np.ndarray, shape: Sequence[int]) -> float | None:
    """Cosine of the largest face's embedding and `reference`, of any length."""
    if not found:
        return None
    embedding = choose(found, "largest", (shape[1], shape[0])).normed_embedding
    return None if embedding is None else float(embedding @ reference / max(float(np.linalg.norm(reference)), 1e-12))
