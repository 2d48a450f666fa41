"""Recordings: what is read, at which cost, cut and filled the same everywhere, and lists that name paths."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.data import AudioFolder, DataError
from zoo.data.audio import fitted, prepare_sound, read_audio, resampled
from zoo.data.prepare import says_nothing
from zoo.data.sampling import SampleKey
from zoo.support import inputs
from zoo.tools.comparison import _check_inputs
from zoo.tools.errors import ToolError
from zoo.tools.info import example
from zoo.tools.prediction import predict

soundfile = pytest.importorskip("soundfile")


def write(path: Path, values: np.ndarray | None = None, rate: int = 8000, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(800) if values is None else values, rate, **options)
    return path


# ---- one preparation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["silence", "repeat"])
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_evaluation_and_prediction_answer_alike(fill: Any, seconds: float, tmp_path: Path) -> None:
    """A tone in the middle third: what is cut or filled decides the answer."""
    steps = np.arange(int(8000 * seconds)) / 8000
    wave = np.sin(2 * np.pi * 700 * steps) * (np.abs(steps - seconds / 2) < seconds / 6)
    for part in ("train", "test"):
        for name in ("hi", "lo"):
            write(tmp_path / part / name / "x.wav", 0.5 * wave)
    data = AudioFolder(tmp_path, sample_rate=8000, duration=1.0, fill=fill, val_fraction=0.0)
    data.setup()
    torch.manual_seed(0)
    model = zoo.create_model("test_unireplknet_audio", num_classes=2, sample_rate=8000, num_frames=98).eval()
    zoo.save_pretrained(
        model, tmp_path / "m", class_names=data.class_names, preprocessing=data.preprocessing,
        input_record=data.input_record(),
    )  # fmt: skip
    (answer,) = predict(f"local-dir:{tmp_path / 'm'}", [tmp_path / "test" / "hi" / "x.wav"])
    with torch.no_grad():
        shares = model(data.datasets["test"].images([SampleKey(0)])).softmax(-1)[0]
    found = {entry["class"]: entry["probability"] for entry in answer["predictions"]}
    assert found == pytest.approx(dict(zip(["hi", "lo"], shares.tolist(), strict=True)), abs=1e-5)
    long = write(tmp_path / "long.wav", np.zeros(601 * 100), 100)
    with pytest.raises(ToolError, match="longer than 600 seconds"):
        predict(f"local-dir:{tmp_path / 'm'}", [long])


def test_cutting_and_filling() -> None:
    clip = torch.arange(1, 6)
    assert fitted(clip, 3, "silence").tolist() == [2, 3, 4]
    assert fitted(clip, 3, "silence", place=0.0).tolist() == [1, 2, 3]
    assert fitted(clip, 8, "silence").tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert fitted(clip, 8, "silence", before=3).tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert fitted(clip, 8, "repeat").tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert fitted(clip[:0], 2, "repeat").tolist() == [0, 0]


def test_examples_and_comparisons_follow_the_record() -> None:
    model = zoo.create_model("test_unireplknet_audio", sample_rate=8000)
    assert example(model, 2).shape == (2, 1, model.adapter.samples)
    record = {"kind": "sound", "rate": 8000, "samples": 7200, "channels": 1, "cut": "middle", "fill": "repeat"}
    model.input_record = record  # type: ignore[assignment]
    assert example(model, 2).shape == (2, 7200), "what evaluation gives, and an export must take"
    _check_inputs(record, dict(record), "x")
    with pytest.raises(ToolError, match="x takes inputs with rate 16000, the data set has 8000"):
        _check_inputs(record, {**record, "rate": 16000}, "x")


# ---- the cost of another rate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "wanted"), [(22051, 8000), (11127, 8000), (44100, 16000), (8000, 44101), (999983, 8000), (48000, 8000)]
)
def test_any_rate_is_resampled_at_the_cost_of_the_result(rate: int, wanted: int) -> None:
    wave = 0.5 * torch.sin(2 * torch.pi * 400 * torch.arange(rate // 2) / rate)
    began = time.process_time()
    found = resampled(wave, rate, wanted).float() / 32767
    assert time.process_time() - began < 3, "38 s by one filter for each phase"
    assert abs(len(found) - wanted / 2) <= 1
    inner = slice(wanted // 20, -wanted // 20)
    expected = 0.5 * torch.sin(2 * torch.pi * 400 * torch.arange(len(found)) / wanted)
    assert (found - expected)[inner].abs().max() < 0.005


# ---- what is refused ---------------------------------------------------------------------------------------


def test_only_listed_formats_are_read_by_content(tmp_path: Path) -> None:
    for name, options in {
        "a.wav": {},
        "b.flac": {},
        "c.ogg": {},
        "d.wav": {"format": "FLAC"},
        "e.wav": {"subtype": "FLOAT"},
        "f.mp3": {},
    }.items():
        found = read_audio(write(tmp_path / name, 0.1 * np.ones(8000), **options), 8000)
        assert found is not None
        assert abs(len(found) - 8000) < 2500
    for name, form in (("a.wav", "AIFF"), ("b.wav", "AU"), ("c.wav", "CAF")):
        path = write(tmp_path / "other" / name, format=form)
        with pytest.raises(DataError, match="is none of WAV, FLAC, OGG and MP3"):
            read_audio(path, 8000)
    (tmp_path / "text.wav").write_text("RIFFRAFF")
    (tmp_path / "empty.wav").write_bytes(b"")
    write(tmp_path / "silent.wav", np.zeros(0))
    write(tmp_path / "nan.wav", np.full(10, np.nan), subtype="FLOAT")
    write(tmp_path / "slow.wav", np.zeros(10), 1)
    for name, told in (
        ("text.wav", "cannot read the recording"),
        ("empty.wav", "cannot read the recording"),
        ("silent.wav", "holds no samples"),
        ("nan.wav", "values that are not numbers"),
        ("slow.wav", "claims 1 samples a second"),
        ("none.wav", "not a regular file"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            read_audio(tmp_path / name, 8000)
        assert "\n" not in str(caught.value)


def test_many_channels_and_boastful_headers_need_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "x.wav", 0.5 * np.ones((2000, 64)))
    content = bytearray(path.read_bytes())
    size = content.index(b"data") + 4
    content[size : size + 4] = (2**31 - 64).to_bytes(4, "little")  # two gigabytes of samples
    path.write_bytes(bytes(content))
    tracemalloc.start()
    found = read_audio(path, 8000)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None
    assert len(found) == 2000
    assert most < 40_000_000
    with pytest.raises(DataError, match="150,000,000 samples are too many"):
        read_audio(boast(tmp_path / "long.flac", 150_000_000), 8000)


def boast(path: Path, samples: int) -> Path:
    """A FLAC file of a tenth of a second whose header claims another length."""
    content = bytearray(write(path, rate=384000).read_bytes())
    content[21] = content[21] & 0xF0 | samples >> 32
    content[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(bytes(content))
    return path


def test_a_class_that_loses_all_its_recordings_is_told(tmp_path: Path) -> None:
    for name, seconds in (("long", 2), ("short", 0.1)):
        for i in range(4):
            write(tmp_path / name / f"{i}.wav", np.zeros(int(8000 * seconds)))
    with pytest.raises(DataError, match="class 'short' has no recording for training of 1 to 60 seconds"):
        AudioFolder(tmp_path, sample_rate=8000, min_seconds=1.0).setup()


def test_an_empty_recording_is_one_of_the_short_ones(tmp_path: Path) -> None:
    for name in "ab":
        for i in range(8):
            write(tmp_path / name / f"{i}.wav", np.sin(np.arange(8000.0)))
    write(tmp_path / "a" / "none.wav", np.zeros(0))
    data = AudioFolder(tmp_path, sample_rate=8000, min_seconds=0.5)
    data.setup()
    assert "train: 1 recordings are not of 0.5 to 60 seconds and left out" in data.notes
    with pytest.raises(DataError, match=r"none\.wav: it holds no samples"):
        AudioFolder(tmp_path, sample_rate=8000).setup()


# ---- lists -------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    for name in ("turn left", "stop"):
        for i in range(3):
            write(tmp_path / name / f"{i}.wav")
    write(tmp_path / "_background_noise_" / "hum.wav")
    return tmp_path


def counts(root: Path) -> dict[str, list[int]]:
    data = AudioFolder(root, sample_rate=8000, val_fraction=0.0)
    data.setup()
    return {part: torch.bincount(rows.targets, minlength=2).tolist() for part, rows in data.datasets.items()}


def test_a_line_of_a_list_is_a_path(listed: Path) -> None:
    (listed / "testing_list.txt").write_text("turn left/0.wav\r\n\nstop/2.wav\n")
    assert counts(listed) == {"train": [2, 2], "test": [1, 1]}
    (listed / "validation_list.txt").write_text("./turn left/1.wav\nstop/1.wav")
    assert counts(listed) == {"train": [1, 1], "val": [1, 1], "test": [1, 1]}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("turn left/9.wav", "testing_list.txt, line 2: there is no recording 'turn left/9.wav'"),
        ("turn", "there is no recording 'turn'"),
        ("_background_noise_/hum.wav", "there is no recording '_background_noise_/hum.wav'"),
        ("../x.wav", r"there is no recording '\.\./x.wav'"),
        ("stop/1.wav", "line 2: 'stop/1.wav' is in validation_list.txt too"),
    ],
)
def test_lists_that_do_not_fit_are_told(line: str, told: str, listed: Path) -> None:
    (listed / "validation_list.txt").write_text("stop/1.wav\n")
    (listed / "testing_list.txt").write_text(f"stop/0.wav\n{line}\n")
    with pytest.raises(DataError, match=told):
        counts(listed)
    (listed / "testing_list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read the list"):
        counts(listed)


@pytest.mark.parametrize("kind", ["link", "pipe", "device", "broken", "empty"])
@pytest.mark.parametrize("name", ["testing_list.txt", "validation_list.txt"])
def test_a_list_is_a_file_of_the_folder(kind: str, name: str, listed: Path) -> None:
    place = listed / name
    place.unlink(missing_ok=True)
    outside = listed.parent / "secret.txt"
    outside.write_text("words of another file")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "empty":
        place.write_text("\n\n")
    else:
        place.symlink_to({"link": outside, "device": Path("/dev/zero"), "broken": listed / "gone"}[kind])
    with pytest.raises(DataError, match=name) as caught:
        AudioFolder(listed, sample_rate=8000, duration=0.1).setup()
    assert "words of" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_recording_cannot_mean_is_refused_or_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wave = 0.5 * np.sin(np.arange(8000) / 3)
    with pytest.raises(DataError, match=r"values up to 1\.638e\+04, where full scale is 1"):
        read_audio(write(tmp_path / "scale.wav", wave * 32768, subtype="FLOAT"), 8000)
    assert read_audio(write(tmp_path / "over.wav", wave * 3, subtype="FLOAT"), 8000) is not None
    with pytest.raises(DataError, match="convert it from GSM610 to PCM first"):
        read_audio(write(tmp_path / "phone.wav", wave, subtype="GSM610"), 8000)
    for name in "one.wav", "two.wav":
        read_audio(write(tmp_path / "apart" / name, np.stack([wave, -wave], 1)), 8000)
        cut = write(tmp_path / "cut" / name, wave)
        cut.write_bytes(cut.read_bytes()[:4000])
        assert read_audio(cut, 8000).shape == (1978,)  # type: ignore[union-attr]
    told = [record.message for record in caplog.records]
    assert len(told) == 3
    assert "over.wav: it goes beyond full scale (from -1 to 1), and is clipped there" in told[0]
    assert "one.wav: its channels cancel each other" in told[1]
    assert "one.wav: it is shorter than its header claims" in told[2]


def test_a_recording_without_permission_is_to_be_made_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.wav").write_bytes(b"cannot be read")  # for root nothing is denied
    monkeypatch.setattr("zoo.data.audio.os.access", lambda *_: False)
    with pytest.raises(DataError, match=r"recording .*x\.wav \(Permission denied\): make it readable$"):
        read_audio(tmp_path / "x.wav", 8000)


def test_a_recording_up_to_full_scale_is_not_clipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wave = np.sin(np.arange(8000) / 3)
    read_audio(write(tmp_path / "full.wav", wave / np.abs(wave).max(), subtype="FLOAT"), 8000)
    read_audio(write(tmp_path / "whole.wav", 0.9999 * wave), 8000)
    assert not caplog.records


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (b"", False),
        (b"LIST\x04\0\0\0INFO", False),
        (b"LIST\x04\0\0\0INFOid3 \x03\0\0\0abc\0", False),
        (b"TAG" + b"a song".ljust(125), False),
        (bytes(500), False),
        (None, True),
    ],
)
def test_a_header_that_claims_too_little_is_told(
    more: bytes | None, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.wav", 0.5 * np.sin(np.arange(8000) / 3))
    content = path.read_bytes()
    assert content[36:40] == b"data"
    claims = 1000 if more is None else len(content) - 44
    path.write_bytes(content[:40] + claims.to_bytes(4, "little") + content[44:] + (more or b""))
    assert read_audio(path, 8000).shape == (claims // 2,)  # type: ignore[union-attr]
    assert ("it is longer than its header claims" in caplog.text) == told


def test_a_cut_compressed_recording_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    path = write(tmp_path / "x.mp3", 0.5 * np.sin(np.arange(16000) / 3))
    whole = read_audio(path, 8000)
    assert whole is not None
    assert not caplog.records
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    found = read_audio(path, 8000)
    assert found is not None
    assert 0 < len(found) < 8000
    assert (found - whole[: len(found)])[:-1000].abs().max() < 100, "what is there, and nothing of the memory"
    assert "x.mp3: it is shorter than its header claims" in caplog.text
    assert not recwarn.list


def test_recordings_without_a_sound_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    form = inputs.read({"kind": "sound", "rate": 8000, "samples": 8000, "fill": "silence"})
    wave = 0.5 * np.sin(np.arange(4000) / 3)
    mute = {"antiphase": np.stack([wave, -wave], 1), "still": 0 * wave, "offset": 0 * wave + 0.5, "click": wave[1:2]}
    for name, values in {**mute, "wave": wave, "two": wave[1:3]}.items():
        path = write(tmp_path / "asked" / f"{name}.wav", values)
        told = says_nothing(path, prepare_sound(path, form)[0], form)
        assert ("are the same, so the prediction says nothing" in (told or "")) == (name in mute), name
    for i in range(4):
        write(tmp_path / "train" / "high" / f"{i}.wav", wave)
        write(tmp_path / "train" / "low" / f"{i}.wav", wave if i else mute["offset"])
    data = AudioFolder(tmp_path, sample_rate=8000, val_fraction=0, test_fraction=0)
    data.setup()
    told = f"{tmp_path}: nothing can be heard in 1 recordings of the train part, all samples of each are the same"
    assert [record for record in caplog.records if record.message.startswith(told)]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere names are text")
def test_a_name_need_not_be_text(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.wav"))
    write(tmp_path / "x.wav").rename(path)
    assert read_audio(path, 8000) is not None


def test_classes_that_a_part_lacks_are_told(listed: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = next(path for path in sorted(listed.rglob("*.wav")) if not path.parent.name.startswith("_"))
    (listed / "validation_list.txt").unlink(missing_ok=True)
    (listed / "testing_list.txt").write_text(f"{first.relative_to(listed).as_posix()}\n")
    AudioFolder(listed, sample_rate=8000, duration=0.1).setup()
    assert "the test part has no recording of" in caplog.text
