"""Samples that are in two parts are told before training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from zoo.data import AudioFolder, ImageFolder, PointFolder, VideoFolder
from zoo.data.tabular import Tabular
from zoo.data.twins import twins
from zoo.data.video import VideoFiles


def files(place: Path, suffix: str) -> Path:
    """Three training files of each of two classes, two test files of each: one of them a copy, one of its size."""
    made = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for name in "ab":
            (place / part / name).mkdir(parents=True)
            for i in range(count):
                path = place / part / name / f"{part}{i}{suffix}"
                if suffix == ".bmp":
                    Image.fromarray(made.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
                elif suffix == ".wav":
                    wavfile.write(path, 8000, made.integers(-9000, 9000, 800).astype(np.int16))
                else:
                    np.save(path, made.normal(size=(40, 3)).astype(np.float32))
    shutil.copy(place / "train" / "a" / f"train1{suffix}", place / "test" / "b" / f"copy{suffix}")
    return place


def test_a_copied_file_is_told_in_every_kind_of_folder(tmp_path: Path) -> None:
    sounds = {"sample_rate": 8000, "duration": 0.1, "val_fraction": 0.0}
    for suffix, kind, options in (
        (".bmp", ImageFolder, {"val_fraction": 0.0}),
        (".wav", AudioFolder, sounds),
        (".npy", PointFolder, {"num_points": 16, "val_fraction": 0.0}),
    ):
        data = kind(files(tmp_path / suffix, suffix), **options)  # type: ignore[operator]
        data.prepare_data()
        data.setup()
        told = [line for line in data.describe() if "training part" in line]
        assert len(told) == 1
        assert told[0].startswith("test: 1 of 3 are also in the training part")
        assert ("copy.bmp" in told[0] and "train1.bmp" in told[0]) == (suffix == ".bmp")
        (tmp_path / suffix / "test" / "b" / f"copy{suffix}").unlink()
        again = kind(tmp_path / suffix, **options)  # type: ignore[operator]
        again.setup()
        assert not [line for line in again.describe() if "training part" in line]


def test_videos_are_compared_as_files(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"three"), ("d", b"two")):
        (tmp_path / f"{name}.mp4").write_bytes(content)
    train, test = (
        VideoFiles([str(tmp_path / f"{name}.mp4") for name in names], [0] * len(names), None, 0.0, None)  # type: ignore[arg-type]
        for names in ("abc", "d?c")
    )
    assert twins(train, test) == [(0, 1), (2, 2)]
    assert VideoFolder.kind.one == "video"


@pytest.mark.parametrize("target", ["y", "z"])
def test_equal_rows_of_a_table_are_told(tmp_path: Path, target: str) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2)).round(4)
    labels = np.where(rows[:, 0] > 0, "up", "down")
    lines = [f"{a},{b},{label},{a + b:.4f}" for (a, b), label in zip(rows.tolist(), labels, strict=True)]
    (tmp_path / "train.csv").write_text("\n".join(["a,b,y,z", *lines[:32]]))
    (tmp_path / "test.csv").write_text("\n".join(["a,b,y,z", *lines[30:]]))
    options = {"target": target, "drop": ["z" if target == "y" else "y"], "val_fraction": 0.0}
    data = Tabular(path=tmp_path / "train.csv", test_path=tmp_path / "test.csv", **options)  # type: ignore[arg-type]
    data.setup()
    assert "test: 2 of 10 are also in the training part: figures on them flatter" in data.describe()
