"""First frame or reference picture and prompt to an MP4 file, with Wan or VACE."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ipvg_ray.media import images
from ipvg_ray.models.rendezvous import TorchRendezvous
from ipvg_ray.pipeline.stage import RankContext, Ranks, Resources, Row, RowError, Stage, StageContext
from ipvg_ray.storage import run_path

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ipvg_ray.config import Config, VideoConfig
    from ipvg_ray.models.wan.errors import WanError
    from ipvg_ray.models.wan.video import Sample

    Make = Callable[..., Sequence[np.ndarray | WanError]]

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
            pictures += ("image", "image_sha256") if section.reference == "image" else (section.reference,)
        text = ("video_prompt",) if section.text_in_worker else ("text_states", "negative_uri")
        self.needs = (*pictures, *text)  # type: ignore[misc] # of this configuration

    def models(self) -> Mapping[str, Path]:
        section, path = self.config.video, self.config.models.path
        loras = {f"loras.{i}": path(lora.path) for i, lora in enumerate(section.loras)}
        return {"model": path(section.model), **loras}

    def resources(self) -> Resources:
        """On a pool with GPUs as many as the group has."""
        asks, cards = super().resources(), self.config.video.group.gpus
        return dataclasses.replace(asks, gpus=cards) if asks.gpus and cards > 1 else asks

    def _section(self) -> VideoConfig:
        """The section as whoever loads the model needs it: LoRA files named by their whole paths."""
        section = self.config.video
        whole = [lora.model_copy(update={"path": str(self.config.models.path(lora.path))}) for lora in section.loras]
        return section.model_copy(update={"loras": tuple(whole)})

    def ranks(self) -> Ranks | None:
        section = self.config.video
        group = section.group
        if group.gpus == 1:
            return None
        make = functools.partial(_make_rank, self._section(), self.models()["model"])
        return Ranks(
            group.gpus,
            make,
            group.across_nodes,
            group.stall_s,
            group.rebuilds,
            stage=type(self)(self.config),
            rendezvous=TorchRendezvous(),
            warm=_import_ahead if group.reserve else None,
        )

    def notes(self) -> Sequence[str]:
        """What is lossy; which layouts of cards make most videos an hour, and which a video soonest."""
        lossy = self.config.video.lossy
        said = [f"lossy: {', '.join(lossy)}; compare the scores of a run without"] if lossy else []
        if not self.settings.pool.gpus:
            return said
        from ipvg_ray.models.wan import layouts

        section, group = self.config.video, self.config.video.group
        usual = {"ti2v-5B": "ti2v-5B", "i2v-A14B": "i2v-A14B"}.get(section.task, "vace-14B")
        shape = layouts.read_shape(self.models()["model"], "vace-1.3B" if "1.3B" in section.model else usual)
        size = (section.frames, section.height, section.width)
        references = int(section.task in ("vace-r2v", "vace-i2v+ref"))
        job = layouts.Job(shape, *size, section.steps, section.most_branches, references)
        card = layouts.CARDS.get(section.pool.accelerator_type or "", layouts.CARDS["H100"])
        return [*said, *layouts.advice(job, card, max(8, group.gpus), (group.cfg, group.ring, group.ulysses))]

    def fingerprint_settings(self) -> dict[str, Any]:
        """Without how often the state is kept, unless a cache is emptied then, and without who shares the work."""
        settings = super().fingerprint_settings()
        del settings["group"]
        for lora in settings["loras"]:
            del lora["path"]  # what is in the file counts
        if self.config.video.cache.kind == "none":
            del settings["save_every"]
        return settings

    def setup(self, context: StageContext) -> None:
        import torch

        section, folder = self.config.video, self.models()["model"]
        torch.set_num_threads(context.threads)
        if context.group is None:
            from ipvg_ray.models.wan.maker import VideoMaker

            self._maker = VideoMaker(self._section(), folder, context.device)
            self._make: Make = self._maker.make
        else:
            self._make = functools.partial(context.group.run, "make")
        self._encoder = None
        if section.text_in_worker:
            from ipvg_ray.models.wan.load import load_text_encoder

            dtype = getattr(torch, section.dtype)
            self._encoder = load_text_encoder(folder, dtype=dtype, device=context.device)
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
        kept: list[str] = []
        with ThreadPoolExecutor(1) as encoding:
            for start in range(0, len(ready), self.config.video.together):
                batch = ready[start : start + self.config.video.together]
                made = self._made([rows[place] for place, _ in batch], [sample for _, sample in batch], kept)
                for (place, _), frames in zip(batch, made, strict=True):
                    if isinstance(frames, RowError):
                        results[place] = frames
                    else:
                        results[place] = encoding.submit(self._publish, rows[place], frames)
        finished = [result.result() if isinstance(result, Future) else result for result in results]
        if self._context.scratch is not None:
            for name in kept:
                self._context.scratch.remove(name)
        return finished

    # -- on the GPU --------------------------------------------------------------------------------------------------

    def _made(self, rows: Sequence[Row], samples: Sequence[Sample], kept: list[str]) -> list[np.ndarray | RowError]:
        """Frames of one batch, or why there are none; adds the name of its state to `kept`."""
        from ipvg_ray.models.wan.errors import WanError
        from ipvg_ray.models.wan.state import name_of

        with self._gpu:
            negative = self._negative(rows[0])
            if self.config.video.save_every:
                kept.append(name_of(samples, negative))
            made = self._make(samples, negative, self._context.scratch)
        return [RowError("bad_video", str(one)) if isinstance(one, WanError) else one for one in made]

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
        elif (name := self.config.video.reference) in self.needs:
            reference = images.decode(images.image_bytes(row[name]), limit)
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


def _make_rank(section: VideoConfig, folder: Path, context: RankContext) -> Any:
    from ipvg_ray.models.wan.maker import VideoRank

    return VideoRank(section, folder, context)


def _import_ahead() -> None:
    from ipvg_ray.models.wan.load import import_ahead

    import_ahead()


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
