"""Video files: what is opened by content, upright, and how much memory a long one takes."""

from __future__ import annotations

import tracemalloc
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
