"""First frame or reference picture and prompt to an MP4 file, with Wan or VACE."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ipvg_ray.media import images
from ipvg_ray.pipeline.stage import Row, RowError, Stage, StageContext
from ipvg_ray.storage import run_path

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ipvg_ray.config import Config
    from ipvg_ray.models.wan.guidance import Guidance
    from ipvg_ray.models.wan.state import Keeper
    from ipvg_ray.models.wan.video import Sample

_STRIP_QUALITY = 85


class VideoStage(Stage):
    """Generates, encodes, checks and publishes `videos/<identity>/<prompt>.mp4`; the row holds what the file measures.

    The GPU makes one batch of `video.together` rows at a time; frames are encoded on other threads meanwhile, so that
    several batches may be in work.

    Failures: `empty_prompt`; the kinds of `images.ImageError` for the pictures; `bad_video` where the model gives no
    picture (NaN) or the encoded file does not read back as configured.
    """

    name = "video"
    grain = "sample"
    needs: ClassVar[tuple[str, ...]] = ("first_frame", "text_states", "negative_uri")
    version = 2
    media = ("videos",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        section = config.video
        pictures: tuple[str, ...] = ("first_frame",) if section.task != "vace-r2v" else ()
        if section.task in ("vace-r2v", "vace-i2v+ref"):
            pictures += ("image", "image_sha256") if section.reference == "image" else ("id_picture",)
        text = ("video_prompt",) if section.text_in_worker else ("text_states", "negative_uri")
        self.needs = (*pictures, *text)  # type: ignore[misc] # of this configuration

    def models(self) -> Mapping[str, Path]:
        return {"model": self.config.models.path(self.config.video.model)}

    def fingerprint_settings(self) -> dict[str, Any]:
        """Without how often the state is kept, unless a cache is emptied then."""
        settings = super().fingerprint_settings()
        if self.config.video.cache.kind == "none":
            del settings["save_every"]
        return settings

    def setup(self, context: StageContext) -> None:
        import torch

        from ipvg_ray.models.wan import load, speed
        from ipvg_ray.models.wan.autoencoder import Autoencoder
        from ipvg_ray.models.wan.loop import Denoiser, evaluate_in_turn, evaluate_together
        from ipvg_ray.models.wan.tasks import TASKS
        from ipvg_ray.models.wan.video import VideoModel

        section, folder = self.config.video, self.models()["model"]
        torch.set_num_threads(context.threads)
        task, dtype = TASKS[section.task], getattr(torch, section.dtype)
        parts = load.load(folder, task, dtype=dtype, device=context.device, shift=section.shift)
        speed.speed_up(
            parts.transformers, attention=section.attention, compiled=section.compile, storage=section.storage
        )
        self._caches = [self._cache(transformer) for transformer in parts.transformers if section.cache.kind != "none"]
        denoiser = Denoiser(
            parts.transformers,
            parts.scheduler,
            boundary=section.boundary if task.experts == 2 else None,
            evaluate=evaluate_together if section.branches == "together" else evaluate_in_turn,
            reset=self._reset_caches,
        )
        self._video = VideoModel(task, denoiser, Autoencoder(parts.vae), scale=section.conditioning_scale)
        self._encoder = None
        if section.text_in_worker:
            self._encoder = load.load_text_encoder(folder, dtype=dtype, device=context.device)
        self._negatives: dict[str, Tensor] = {}
        self._context = context
        self._gpu = threading.Lock()

    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        results: list[Row | RowError | Future[Row | RowError]] = [_unfinished()] * len(rows)
        ready: list[tuple[int, Sample]] = []
        for place, row in enumerate(rows):
            try:
                ready.append((place, self._sample(row)))
            except (RowError, images.ImageError) as error:
                results[place] = _failure(error)
        keepers: list[Keeper] = []
        with ThreadPoolExecutor(1) as encoding:
            for start in range(0, len(ready), self.config.video.together):
                batch = ready[start : start + self.config.video.together]
                made = self._made([rows[place] for place, _ in batch], [sample for _, sample in batch], keepers)
                for (place, _), frames in zip(batch, made, strict=True):
                    if isinstance(frames, RowError):
                        results[place] = frames
                    else:
                        results[place] = encoding.submit(self._publish, rows[place], frames)
        finished = [result.result() if isinstance(result, Future) else result for result in results]
        for keeper in keepers:
            keeper.forget()
        return finished

    # -- on the GPU --------------------------------------------------------------------------------------------------

    def _made(
        self, rows: Sequence[Row], samples: Sequence[Sample], keepers: list[Keeper]
    ) -> list[np.ndarray | RowError]:
        """Frames of one batch, or why there are none; adds what keeps its state to `keepers`."""
        from ipvg_ray.models.wan.errors import WanError

        with self._gpu:
            try:
                latents = self._denoised(samples, self._negative(rows[0]), keepers)
            except WanError as error:
                return [RowError("bad_video", str(error))] * len(rows)
            frames: list[np.ndarray | RowError] = []
            for one in latents.split(1):
                try:
                    frames.append(self._video.decode(one))
                except WanError as error:
                    frames.append(RowError("bad_video", str(error)))
            return frames

    def _denoised(self, samples: Sequence[Sample], negative: Tensor, keepers: list[Keeper]) -> Tensor:
        """Latents of a batch, from where another worker left it, where one did."""
        from ipvg_ray.models.wan.state import Keeper, name_of
        from ipvg_ray.models.wan.tasks import Size

        section, scratch = self.config.video, self._context.scratch
        size = Size(section.frames, section.height, section.width)
        job = (samples, negative, size, self._guidance(), section.steps)
        if not section.save_every or scratch is None:
            return self._video.denoise(*job)
        device = self._video.autoencoder.device
        keeper = Keeper(scratch, name_of(samples, negative), section.save_every, device, self._reset_caches)
        keepers.append(keeper)
        return self._video.denoise(*job, on_step=keeper.on_step, start=keeper.start())

    def _guidance(self) -> Guidance:
        from ipvg_ray.models.wan.guidance import Cfg, Tpige, Window

        section = self.config.video
        cfg = Cfg(section.guidance, section.guidance_low, Window(section.guidance_start, section.guidance_end))
        if section.guide == "cfg":
            return cfg
        tpige = section.tpige
        return Tpige(cfg, tpige.scale, tpige.mode, tpige.skip, Window(tpige.start, tpige.end))

    def _cache(self, transformer: Any) -> Any:
        from ipvg_ray.models.wan.cache import FirstBlock, TaylorSeer

        cache = self.config.video.cache
        if cache.kind == "taylorseer":
            return TaylorSeer(transformer, cache.interval, cache.start)
        return FirstBlock(transformer, cache.threshold, cache.start, cache.max_skips)

    def _reset_caches(self) -> None:
        for cache in self._caches:
            cache.reset()

    # -- a row's inputs ----------------------------------------------------------------------------------------------

    def _sample(self, row: Row) -> Sample:
        from ipvg_ray.models.wan.tasks import Pictures
        from ipvg_ray.models.wan.text import unpack
        from ipvg_ray.models.wan.video import Sample

        first = reference = None
        limit = self.config.dataset.max_image_pixels
        if "first_frame" in self.needs:
            first = images.decode(images.image_bytes(row["first_frame"]), limit)
        if "image" in self.needs:
            reference = images.decode(images.image_bytes(row["image"], row["image_sha256"]), limit)
        elif "id_picture" in self.needs:
            reference = images.decode(images.image_bytes(row["id_picture"]), limit)
        if self._encoder is None:
            text = unpack(row["text_states"])
        elif row["video_prompt"].strip():
            with self._gpu:
                text = self._encoder.states(row["video_prompt"])
        else:
            raise RowError("empty_prompt", "the video's prompt is empty; give the sample a prompt")
        return Sample(Pictures(first, reference), text, row["seed"])

    def _negative(self, row: Row) -> Tensor:
        """States of the run's negative prompt, read or encoded once."""
        from ipvg_ray.models.wan.text import unpack

        if self._encoder is not None:
            return self._encoder.states(self.config.video.negative_prompt)
        uri = row["negative_uri"]
        if uri not in self._negatives:
            self._negatives[uri] = unpack((run_path(self._context.run_dir) / uri).read_bytes())
        return self._negatives[uri]

    # -- on the CPU --------------------------------------------------------------------------------------------------

    def _publish(self, row: Row, frames: np.ndarray) -> Row | RowError:
        from ipvg_ray.media import videos

        section = self.config.video
        try:
            marks = _marks(row, self._context.run_dir)
            data = videos.encode_mp4(frames, section.fps, section.crf, marks, encoder=section.encoder)
            info = videos.probe(data)
        except videos.VideoError as error:
            return RowError("bad_video", str(error))
        found = (info.frames, info.height, info.width, info.fps)
        if found != (section.frames, section.height, section.width, section.fps):
            return RowError("bad_video", f"the encoded file reads back as {info}, not as configured; try the row again")
        uri = self._context.media.publish("videos", row["identity_id"], row["prompt_id"], ".mp4", data)
        return {
            "video_uri": uri,
            "video_bytes": len(data),
            "video_sha256": hashlib.sha256(data).hexdigest(),
            "video_width": info.width,
            "video_height": info.height,
            "video_frames": info.frames,
            "video_fps": info.fps,
            "video_seconds": info.seconds,
            "video_poster": images.encode(videos.poster(frames), "jpeg", _STRIP_QUALITY),
            "video_strip": images.encode(videos.strip(frames), "jpeg", _STRIP_QUALITY),
        }


def _unfinished() -> RowError:
    return RowError("bad_video", "no video was made of this row")


def _failure(error: Exception) -> RowError:
    if isinstance(error, images.ImageError):
        return RowError(error.kind, f"a picture of the row: {error}")
    assert isinstance(error, RowError)
    return error


def _marks(row: Mapping[str, Any], run_dir: str) -> dict[str, str]:
    """What the file says of itself to whoever meets it outside the run."""
    run = run_dir.rstrip("/").rpartition("/")[2]
    return {
        "title": f"Synthetic video {row['sample_id']}",
        "comment": f"AI-generated, synthetic; made by ipvg_ray in run {run} from row {row['sample_id']} "
        f"with seed {row['seed']}",
    }
