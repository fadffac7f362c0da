"""Encoding, probing and reading videos."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from ipvg_ray.media import images, videos


def smooth(frames: int = 17, height: int = 96, width: int = 176) -> np.ndarray:
    """Gradients in all three channels that move: what a codec keeps well."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    return np.stack([x * 255 / width, y * 255 / height, (x + y + 4 * t) * 0.7], -1).clip(0, 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_round_trip_keeps_size_count_rate_and_picture(tmp_path):
    frames = smooth()
    data = videos.encode_mp4(frames, fps=16, crf=18)
    info = videos.probe(data)
    assert (info.width, info.height, info.frames, info.fps) == (176, 96, 17, 16.0)
    assert info.seconds == pytest.approx(17 / 16)

    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    for source in (path, str(path), path.as_uri(), data):
        back = videos.read_frames(source)
        assert back.shape == frames.shape
        assert back.dtype == np.uint8
        assert psnr(back, frames) > 40


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 90), (255, 255, 255), (0, 0, 0)])
def test_flat_colours_come_back_exactly(colour):
    frames = np.full((3, 32, 32, 3), colour, np.uint8)
    back = videos.read_frames(videos.encode_mp4(frames, fps=8, crf=18))
    assert np.abs(back.astype(int) - frames).max() <= 1


def test_colours_are_bt709_limited_range_and_say_so():
    red = np.zeros((1, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    with av.open(io.BytesIO(videos.encode_mp4(red, fps=8, crf=18))) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "yuv420p"
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    luma = frame.to_ndarray()[:32, :32]
    assert np.abs(luma.astype(int) - round(16 + 219 * 0.2126)).max() <= 1  # BT.601 would give 81


def test_the_index_stands_before_the_pictures():
    data = videos.encode_mp4(smooth(3), fps=8, crf=18)
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_same_frames_same_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    metadata = {"title": "a/prompt1", "comment": "synthetic"}
    assert videos.encode_mp4(noise, 16, 18, metadata) == videos.encode_mp4(noise.copy(order="F"), 16, 18, metadata)


def test_crf_trades_size_for_fidelity():
    frames = smooth()
    fine, coarse = (videos.encode_mp4(frames, 16, crf) for crf in (10, 40))
    assert len(fine) > 1.3 * len(coarse)
    assert psnr(videos.read_frames(fine), frames) > psnr(videos.read_frames(coarse), frames) + 3


def test_metadata_is_in_the_file():
    info = videos.probe(videos.encode_mp4(smooth(1), 8, 18, {"title": "é/提示 1", "comment": "synthetic; seed 3"}))
    assert info.metadata["title"] == "é/提示 1"
    assert info.metadata["comment"] == "synthetic; seed 3"
    with pytest.raises(videos.VideoError, match="seed"):
        videos.encode_mp4(smooth(1), 8, 18, {"seed": "3"})


def test_one_frame_is_a_video():
    info = videos.probe(videos.encode_mp4(smooth(1), fps=24, crf=18))
    assert (info.frames, info.fps) == (1, 24.0)


@pytest.mark.parametrize(("height", "width"), [(95, 176), (96, 175), (1, 1)])
def test_odd_sizes_are_refused(height, width):
    with pytest.raises(videos.VideoError, match=f"{width}x{height}.*even"):
        videos.encode_mp4(smooth(1, height, width), 16, 18)


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 3), np.uint8)]
)
def test_arrays_that_are_no_frames_are_refused(frames):
    with pytest.raises(videos.VideoError, match="uint8"):
        videos.encode_mp4(frames, 16, 18)


@pytest.mark.parametrize(("fps", "crf"), [(0, 18), (16, 52), (16, -1)])
def test_rates_out_of_bounds_are_refused(fps, crf):
    with pytest.raises(videos.VideoError, match=str(fps if fps < 1 else crf)):
        videos.encode_mp4(smooth(1), fps, crf)


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _cut_a_little(data: bytes) -> bytes:
    return data[:-20]


def _cut_between_frames(data: bytes) -> bytes:
    with av.open(io.BytesIO(data)) as container:
        return data[: max(packet.pos for packet in container.demux(video=0) if packet.size)]


def _blank_the_end(data: bytes) -> bytes:
    return data[:-300] + bytes(300)


def _picture(_: bytes) -> bytes:
    return bytes(images.encode(smooth(1)[0])["bytes"])


def _text(_: bytes) -> bytes:
    return b"no video at all\n" * 100


def _playlist(_: bytes) -> bytes:
    return b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "damage", [_cut, _cut_a_little, _cut_between_frames, _blank_the_end, _picture, _text, _playlist, lambda _: b""]
)
def test_broken_files_are_video_errors(damage):
    data = damage(videos.encode_mp4(smooth(), 16, 18))
    with pytest.raises(videos.VideoError):
        videos.probe(data)
    with pytest.raises(videos.VideoError):
        videos.read_frames(data)


def test_a_damaged_frame_is_named():
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    data = bytearray(videos.encode_mp4(noise, 16, 18))
    data[2000:3000] = bytes(1000)
    with pytest.raises(videos.VideoError, match=r"frame 0 of the video is damaged"):
        videos.probe(bytes(data))


def test_a_file_with_sound_only_is_refused():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(videos.VideoError, match="no video stream"):
        videos.probe(buffer.getvalue())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(videos.VideoError, match="gone"):
        videos.read_frames(tmp_path / "gone.mp4")


def test_s3_is_read(monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    frames = smooth(3)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="run")
        client.put_object(Bucket="run", Key="videos/a.mp4", Body=videos.encode_mp4(frames, 8, 18))
        at = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        assert videos.read_frames(f"s3://run/videos/a.mp4{at}").shape == frames.shape
        with pytest.raises(videos.VideoError, match="gone"):
            videos.read_frames(f"s3://run/videos/gone.mp4{at}")
    finally:
        server.stop()


def test_a_strip_shows_the_video_from_end_to_end():
    frames = np.zeros((17, 96, 176, 3), np.uint8)
    frames[0], frames[-1] = 255, 128
    strip = videos.strip(frames, count=4, width=88)
    assert strip.shape == (48, 4 * 88, 3)
    assert (strip[:, :88] == 255).all()
    assert (strip[:, -88:] == 128).all()
    assert (strip[:, 88:-88] == 0).all()
    assert videos.strip(frames[:2], count=8).shape == (87, 2 * 160, 3), "no frame twice"


def test_a_poster_is_the_middle_frame():
    frames = np.zeros((5, 960, 1280, 3), np.uint8)
    frames[2] = 200
    assert videos.poster(frames).shape == (480, 640, 3)
    assert (videos.poster(frames) == 200).all()
    assert videos.poster(np.zeros((3, 35, 41, 3), np.uint8)).shape == (35, 41, 3), "odd sides are others' to have"
    assert videos.poster(smooth()).shape == (96, 176, 3), "none is enlarged"
    assert videos.poster(np.zeros((1, 1280, 704, 3), np.uint8)).shape[1] == 640, "portraits too"


def test_without_a_card_nvenc_is_refused_and_auto_is_x264(monkeypatch):
    monkeypatch.setattr(videos, "has_nvenc", lambda: False)
    with pytest.raises(videos.VideoError, match="no NVENC"):
        videos.encode_mp4(smooth(3), 8, 18, encoder="nvenc")
    assert videos.encode_mp4(smooth(3), 8, 18, encoder="auto") == videos.encode_mp4(smooth(3), 8, 18)


def test_looking_for_nvenc_never_fails():
    assert videos.has_nvenc() in (True, False)
