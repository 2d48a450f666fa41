"""Video files: what is opened by content, upright, and how much memory a long one takes."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zoo.data import DataError
from zoo.data.video import _fitted, read_video

av = pytest.importorskip("av", reason="reads and writes video files")


def write(path: Path, frames: int = 10, form: str | None = None) -> Path:
    with av.open(str(path), "w", format=form) as container:
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        for i in range(frames):
            picture = np.full((32, 48, 3), i * 240 // frames, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return path


@pytest.mark.parametrize("form", ["mp4", "avi", "matroska", "mov"])
def test_listed_formats_are_read_by_content(form: str, tmp_path: Path) -> None:
    clip = read_video(write(tmp_path / "x.webm", form=form), 5, 16)
    assert clip.shape == (3, 5, 16, 16)
    assert (clip[0, :, 8, 8].float() - torch.tensor([24.0, 72, 120, 168, 216])).abs().max() < 8
    assert read_video(tmp_path / "x.webm", 2, (8, 16), channels=1).shape == (1, 2, 8, 16)


PLAYLISTS = {
    "an address": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    "another file": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n",
    "a list of files": "ffconcat version 1.0\nfile '{other}'\n",
    "a session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    "text": "hello",
    "nothing": "",
}


@pytest.mark.parametrize("what", PLAYLISTS)
def test_nothing_but_the_file_itself_is_opened(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connected(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr("socket.socket.connect", connected)
    other = write(tmp_path / "other.mp4")
    path = tmp_path / "x.mp4"
    path.write_text(PLAYLISTS[what].format(other=other))
    with pytest.raises(DataError, match=r"cannot read the video .*x\.mp4") as caught:
        read_video(path, 2, 8)
    assert "\n" not in str(caught.value)


def test_a_transport_stream_is_none_of_the_listed_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the video"):
        read_video(write(tmp_path / "x.mp4", form="mpegts"), 2, 8)


def test_a_long_video_needs_the_memory_of_its_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "x.mp4", 300)
    tracemalloc.start()
    read_video(path, 4, 8)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 300 * 32 * 48 * 3 / 4, "not all its frames at once"


def test_frames_are_cut_in_the_middle() -> None:
    frame = np.zeros((20, 60, 3), np.uint8)
    frame[:, 20:40] = 255
    assert (_fitted(frame, (20, 20)) == 255).all()
    assert (_fitted(np.rot90(frame), (20, 20)) == 255).all()
    assert _fitted(frame, (10, 30)).float().mean() == pytest.approx(85, abs=5)


def test_a_file_without_pictures_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    with pytest.raises(DataError, match="it holds no pictures"):
        read_video(path, 2, 8)


def test_every_frame_is_measured_not_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of pictures that are larger than its header says."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuvj420p"
        for size in ((32, 48), (320, 480)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = size[1], size[0], "yuvj420p"
            encoder.time_base = Fraction(1, 10)
            picture = av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), format="rgb24")
            for packet in encoder.encode(picture.reformat(format="yuvj420p")):
                packet.stream = video
                container.mux(packet)
    monkeypatch.setattr("zoo.data.video.MAX_PIXELS", 48 * 32)
    with pytest.raises(DataError, match=r"x\.mkv"):
        read_video(path, 2, 8)
    monkeypatch.undo()
    assert read_video(path, 2, 8).shape == (3, 2, 8, 8)


# ---- damaged files -----------------------------------------------------------------------------------------


def noisy(path: Path, times: Sequence[float], codec: str = "mpeg4", start: float = 0.0, **options: str) -> Path:
    """Write noise shown at `times`, seconds, so that the bytes of a file are those of its frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(times), 32, 48, 3), np.uint8)
    with av.open(str(path), "w", options=options) as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        for time, picture in zip(times, pixels, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(1000 * (time + start)), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
    return path


EVEN = [i / 10 for i in range(24)]
#: How a video is written: its name, the times of its frames, and the options of the container.
MADE: dict[str, tuple[str, Sequence[float], dict[str, Any]]] = {
    "mkv": ("x.mkv", EVEN, {}),
    "webm": ("x.webm", EVEN, {"codec": "libvpx"}),
    "mp4": ("x.mp4", EVEN, {"movflags": "faststart"}),
    "avi": ("x.avi", EVEN, {}),
}
VARIED = [0, 0.1, 0.2, 0.7, 0.75, 2, 3.9]
HEALTHY: dict[str, tuple[str, Sequence[float], dict[str, Any]]] = {
    **MADE,
    **{f"varied {form}": (f"x.{form}", VARIED, {}) for form in ("mp4", "mov", "mkv", "avi")},
    **{f"late {form}": (f"x.{form}", EVEN, {"start": 3.0}) for form in ("mp4", "mkv", "avi")},
    "edit list": ("x.mp4", EVEN, {"start": -2.0, "avoid_negative_ts": "disabled"}),
    "fragments": ("x.mp4", EVEN, {"movflags": "frag_keyframe+empty_moov"}),
    "streamed": ("x.webm", EVEN, {"codec": "libvpx", "live": "1"}),
    "one frame": ("x.mkv", [0], {}),
}


@pytest.mark.parametrize("how", HEALTHY)
def test_healthy_videos_are_read_without_a_word(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, times, options = HEALTHY[how]
    assert read_video(noisy(tmp_path / name, times, **options), 3, 8).shape == (3, 3, 8, 8)
    assert not caplog.records


@pytest.mark.parametrize("how", MADE)
def test_half_of_a_video_is_refused(how: str, tmp_path: Path) -> None:
    name, times, options = MADE[how]
    path = noisy(tmp_path / name, times, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot read the video .*x\.\w+: it is damaged or ") as caught:
        read_video(path, 3, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["mkv", "webm"])
def test_a_video_damaged_in_its_middle_is_refused(form: str, tmp_path: Path) -> None:
    name, _, options = MADE[form]
    path = noisy(tmp_path / name, EVEN, **options)
    content = path.read_bytes()
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.pos is not None and packet.size]
    header = (places[8], places[8 if form == "mkv" else 13] + 6)  # the next blocks of a WebM file are found again
    for first, last in header, (places[4], places[16]), (places[2] - 3, places[9]):
        damaged = bytearray(content)
        damaged[first:last] = bytes(255 - byte for byte in damaged[first:last])
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"it is damaged or cut off: \d+ of about 24 frames can be read"):
            read_video(path, 3, 8)


def test_a_video_without_permission_is_to_be_made_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "x.mp4").touch()
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(DataError, match=r"video .*x\.mp4 \(Permission denied\): make it readable$"):
        read_video(tmp_path / "x.mp4", 2, 8)


def test_a_video_that_lacks_a_little_is_used_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = noisy(tmp_path / "x.mkv", [i / 10 for i in range(60)])
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * 0.92)])
    for _ in range(2):
        assert read_video(path, 3, 8).shape == (3, 3, 8, 8)
    (record,) = caplog.records
    assert "x.mkv is used as it is, and it is damaged or cut off: 5" in record.message
