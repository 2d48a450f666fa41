"""Arrays in files: clouds and patches, and what is no array of finite numbers."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import DataError, SpokenDigits, hyperspectral
from zoo.data.arrays import read_array
from zoo.data.prepare import prepare
from zoo.data.sources import load_mnist5k

CLOUD = {"kind": "points", "points": 3, "channels": 3}
PATCH = {"kind": "spectrum", "bands": 4, "patch": 3, "mean": [1.0], "std": [2.0]}


def test_clouds_and_patches(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3))
    np.save(tmp_path / "x.npy", rows)
    np.savetxt(tmp_path / "x.xyz", rows)
    (binary,), (text,) = prepare(tmp_path / "x.npy", CLOUD), prepare(tmp_path / "x.xyz", CLOUD)
    assert torch.equal(binary, text)
    assert binary.shape == (1, 3, 3)
    assert {tuple(row) for row in binary[0].tolist()} <= {tuple(row) for row in rows.astype(np.float32).tolist()}
    patch = np.arange(36.0).reshape(3, 3, 4)
    np.save(tmp_path / "p.npy", patch)
    np.testing.assert_allclose(prepare(tmp_path / "p.npy", PATCH)[0][0].permute(1, 2, 0), (patch - 1) / 2)
    for name, record, told in (
        ("x.npy", PATCH, r"an array of \(5, 3\), the model takes \(3, 3, 4\)"),
        ("p.npy", CLOUD, "the model takes rows of 3 numbers"),
        ("x.xyz", PATCH, "is a point cloud, the model takes a patch"),
    ):
        with pytest.raises(DataError, match=told):
            prepare(tmp_path / name, record)


class Opens:
    """Something that opens a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return open, ("canary", "w")


def test_nothing_but_finite_numbers_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([Opens()], object), allow_pickle=True)
    np.save("words.npy", np.array(["a"]))
    np.save("nan.npy", np.array([[np.nan]]))
    np.save("far.npy", np.array([[1e300]]))
    np.savez("several", x=np.ones(3))
    Path("several.npz").rename("several.npy")
    Path("cut.npy").write_bytes(Path("nan.npy").read_bytes()[:-4])
    header = Path("nan.npy").read_bytes().replace(b"(1, 1), }", b"(10**9,)}").replace(b"(10**9,)}", b"(99999,)}")
    Path("claims.npy").write_bytes(header)
    Path("empty.npy").write_bytes(b"")
    Path("ragged.xyz").write_text("1 2 3\n4 5\n")
    Path("text.xyz").write_text("one two three\n")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match="cannot be read as rows") as caught:
            read_array(path, "rows")
        assert "\n" not in str(caught.value)
        assert path.suffix != ".npy" or "unsafely" not in str(caught.value)
    assert not Path("canary").exists()


def test_a_damaged_header_is_told_in_plain_words(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3)))
    good = (tmp_path / "x.npy").read_bytes()
    damaged, short = "its header is damaged", "it is shorter than its header says"
    for content, told in {
        b"\x93NUMPY\x01\x00\x10\x00(((((((((((((((\n": damaged,
        b"\x93NUMPY\x01\x00\x10\x00[[1if 2else 3]]\n": damaged,
        b"\x93NUMPY\x09\x00" + good[8:]: damaged,
        good.replace(b"'<f8'", b"f(8) "): damaged,
        good.replace(b"(2, 3)", b"(2,-3)"): damaged,
        good.replace(b"(2, 3)", b"(9**9)"): damaged,
        good[:40]: damaged,
        good.replace(b"(2, 3)", b"(9, 9)"): short,
        good[:-1]: short,
    }.items():
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(DataError) as caught:
            read_array(tmp_path / "x.npy", "rows")
        assert str(caught.value).endswith(told), content
    for version in ((1, 0), (2, 0), (3, 0)):
        with (tmp_path / "x.npy").open("wb") as file:
            np.lib.format.write_array(file, np.ones((2, 3)), version)
        assert read_array(tmp_path / "x.npy", "rows").shape == (2, 3)


def test_a_damaged_header_of_a_fetched_file_is_told(tmp_path: Path) -> None:
    bad = b"\x93NUMPY\x01\x00\x10\x00(((((((((((((((\n"
    for name, member in (("mnist5k.npz", "images.npy"), ("spoken_digits.npz", "en+m4_0_3.npy")):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr(member.replace("_", "/"), bad)
    for member in hyperspectral._MEMBERS.values():
        (tmp_path / member).write_bytes(bad)
    scene = hyperspectral.IndianPines(cache=tmp_path, download=False)
    for read in (lambda: load_mnist5k(tmp_path), SpokenDigits(tmp_path, download=False).load, scene.setup):
        with pytest.raises(DataError, match=r"is damaged .*: delete it and run again"):
            read()


def test_an_array_of_another_type_is_told_its_type(tmp_path: Path) -> None:
    for values, told in ((np.ones((3, 3), bool), "its type is bool"), (np.ones((3, 3), complex), "type is complex128")):
        np.save(tmp_path / "x.npy", values)
        with pytest.raises(DataError, match=told):
            read_array(tmp_path / "x.npy", "rows")
    np.savez(tmp_path / "x.npz", x=np.ones(3))
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(DataError, match=r"it is no \.npy file"):
        read_array(tmp_path / "x.npy", "rows")
