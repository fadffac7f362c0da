"""Video files: frames to H.264 MP4, the same bytes every time; and back, refusing what does not decode whole."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

import av
import av.error
import numpy as np
import pyarrow.fs as pafs
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from av.video.stream import VideoStream

from ipvg_ray.media import images

METADATA_KEYS = frozenset({"title", "artist", "comment", "copyright", "date", "description", "genre", "synopsis"})
"""What an MP4 file can say about itself in fields that players show; FFmpeg drops any other key without a word."""

_CONTAINERS = "mov,mp4,m4a,matroska,webm,avi"  # no playlists or picture sequences: those make FFmpeg open further files
_RESAMPLING = Interpolation.BICUBIC | 0x40000 | 0x2000  # SWS_ACCURATE_RND, SWS_FULL_CHR_H_INT: no rounding drift


class VideoError(ValueError):
    """Frames that cannot be encoded, or a file that is missing, empty, broken or no video."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds, found by decoding all of it.

    Attributes:
        width, height: pixels.
        frames: frames that decode.
        fps: frames per second.
        seconds: frames / fps.
        metadata: the container's own texts (title, comment and so on).
    """

    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    metadata: dict[str, str] = field(default_factory=dict)


def encode_mp4(
    frames: np.ndarray,
    fps: int,
    crf: int,
    metadata: Mapping[str, str] | None = None,
    *,
    encoder: Literal["x264", "nvenc", "auto"] = "x264",
) -> bytes:
    """Encode to an H.264 MP4 (yuv420p, BT.709, index in front so that browsers play it while it loads).

    With x264: one encoder thread, no CPU-dependent shortcuts and no timestamps, so that the bytes depend on the
    arguments and the versions of FFmpeg and x264 only, not on the machine. NVENC, the encoder of NVIDIA cards, is
    faster; its bytes depend on card and driver.

    Args:
        frames: RGB, uint8, (N, H, W, 3), N ≥ 1, H and W even.
        fps: frames per second, ≥ 1.
        crf: x264's constant rate factor, 0 to 51; 18 looks lossless. 0 is lossless, which browsers do not play.
            NVENC takes it as its constant quality.
        metadata: texts for the container; keys from `METADATA_KEYS`.
        encoder: `auto` takes NVENC where `has_nvenc`, else x264.

    Raises:
        VideoError: for any argument outside these bounds, or NVENC where there is none.
    """
    _check_frames(frames)
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"frames are {width}x{height}; H.264 in yuv420p needs an even width and height")
    if fps < 1 or not 0 <= crf <= 51:
        raise VideoError(f"fps is {fps} and crf {crf}; fps must be at least 1 and crf 0 to 51")
    if unknown := set(metadata or {}) - METADATA_KEYS:
        raise VideoError(f"MP4 has no metadata {sorted(unknown)}; known: {', '.join(sorted(METADATA_KEYS))}")
    if encoder == "nvenc" and not has_nvenc():
        raise VideoError("there is no NVENC encoder on this machine; use encoder x264 or auto")
    codec = _nvenc(crf) if encoder != "x264" and has_nvenc() else _x264(crf)
    with tempfile.TemporaryDirectory() as folder:  # moving the index to the front needs a file that can be reopened
        path = Path(folder) / "video.mp4"
        _write(path, frames, fps, codec, dict(metadata or {}))
        return path.read_bytes()


@lru_cache
def has_nvenc() -> bool:
    """Whether this machine's card and FFmpeg encode H.264; found by encoding one frame."""
    if "h264_nvenc" not in av.codecs_available:
        return False
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder) / "one.mp4", np.zeros((1, 256, 256, 3), np.uint8), 1, _nvenc(18), {})
    except (av.error.FFmpegError, OSError):
        return False
    return True


def strip(frames: np.ndarray, count: int = 8, width: int = 160) -> np.ndarray:
    """Frames side by side, evenly spaced from the first to the last.

    Args:
        frames: RGB, uint8, (N, H, W, 3).
        count: how many at most.
        width: of each at most, pixels.

    Returns:
        RGB, uint8, (h, n·w, 3).
    """
    _check_frames(frames)
    places = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    return np.concatenate([images.shrunk(frames[place], _longer_side(frames, width)) for place in places], axis=1)


def poster(frames: np.ndarray, width: int = 640) -> np.ndarray:
    """The middle frame, RGB, uint8, at most `width` pixels wide."""
    _check_frames(frames)
    return images.shrunk(frames[len(frames) // 2], _longer_side(frames, width))


def _longer_side(frames: np.ndarray, width: int) -> int:
    """The longer side of frames of that width."""
    return round(max(frames.shape[1:3]) * width / frames.shape[2])


def probe(data: bytes) -> VideoInfo:
    """Decode a whole video file and say what is in it.

    Damage that still decodes to some picture cannot be told from the picture: compare the file's SHA-256 for that.

    Raises:
        VideoError: where the bytes are empty, no video, visibly damaged or cut short.
    """
    with _open(data) as container:
        frames = sum(1 for _ in _decode(container))
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise VideoError("the video does not say its frame rate; make it again")
        fps = float(rate)
        return VideoInfo(stream.width, stream.height, frames, fps, frames / fps, dict(container.metadata))


def read_frames(source: str | Path | bytes) -> np.ndarray:
    """All frames of a video as RGB, uint8, (N, H, W, 3). Arguments and errors as of `read_video`."""
    return read_video(source)[0]


def read_video(source: str | Path | bytes) -> tuple[np.ndarray, float | None]:
    """All frames of a video as RGB, uint8, (N, H, W, 3), and its frames per second, None where it does not say.

    Args:
        source: a local path, an `s3://`, `gs://` or `file://` URI, or the file's bytes.

    Raises:
        VideoError: where nothing can be read there, or it is empty, no video, damaged or cut short.
    """
    with _open(source if isinstance(source, bytes) else _read(str(source))) as container:
        frames = [frame.to_ndarray(format="rgb24", interpolation=_RESAMPLING) for frame in _decode(container)]
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        return np.stack(frames), float(rate) if rate else None


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise VideoError(f"frames are {frames.dtype} {frames.shape}; uint8 (N, H, W, 3) with N ≥ 1 is needed")


_Codec = tuple[str, dict[str, str]]
"""FFmpeg's name of an encoder, and its options."""


def _x264(crf: int) -> _Codec:
    return "libx264", {"crf": str(crf), "preset": "medium", "x264-params": "threads=1:cpu-independent=1"}


def _nvenc(crf: int) -> _Codec:
    return "h264_nvenc", {"rc": "constqp", "qp": str(crf), "preset": "p5"}


def _write(path: Path, frames: np.ndarray, fps: int, codec: _Codec, metadata: dict[str, str]) -> None:
    with av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata.update(metadata)
        stream = cast(VideoStream, container.add_stream(codec[0], rate=fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.options = dict(codec[1])
        context = stream.codec_context
        # Untagged files are shown in other colours by other players, which guess from the picture's height.
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for index, array in enumerate(frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_RESAMPLING,
            )
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _read(uri: str) -> bytes:
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri) if "://" in uri else (pafs.LocalFileSystem(), uri)
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot read {uri}: {error}") from error


@contextmanager
def _open(data: bytes) -> Iterator[InputContainer]:
    """A file with a video stream; FFmpeg's errors inside the block become VideoError."""
    if not data:
        raise VideoError("the video file is empty; make it again")
    try:
        with av.open(io.BytesIO(data), mode="r", options={"format_whitelist": _CONTAINERS}) as container:
            if not container.streams.video:
                raise VideoError("the file holds no video stream")
            yield container
    except av.error.FFmpegError as error:
        raise VideoError(f"cannot decode the video ({error.strerror}); make it again") from error


def _decode(container: InputContainer) -> Iterator[VideoFrame]:
    """Every frame in order. FFmpeg itself only flags damage that it painted over, and may call a cut file finished."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # many workers share a machine; its default is all cores for each
    promised, found = stream.frames, 0
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError(f"frame {found} of the video is damaged; make it again")
        found += 1
        yield frame
    if not found or found < promised:
        raise VideoError(f"{found} of {promised} frames decode: the file is cut short; make it again")
