"""Texts and point clouds of one's own: what is read, what is refused and where, and the page's commands as written."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zoo
from tests.conftest import ROOT, train_here
from tests.data.test_text import folder as tokenizer_folder  # noqa: F401 (a fixture)
from zoo.cli import main
from zoo.data import DataError, PointFolder, TextFolder
from zoo.data.points import drawn
from zoo.data.prepare import prepare, says_nothing
from zoo.data.sampling import SampleKey
from zoo.support import inputs

Files = Mapping[str, str | bytes]

ROWS = [
    f'"{"Good" if i % 2 else "Bad"} tea{"." * (i % 3)},\n{i}",{"five stars" if i % 2 else "one star"}'
    for i in range(40)
]
TABLE = "\n".join(["comment,stars", *ROWS]) + "\n"


def write(place: Path, files: Files) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return place


def texts(path: Path, cache: Path, **options: Any) -> TextFolder:
    if path.suffix:
        options = {"text": "comment", "target": "stars", **options}
    return TextFolder(path, cache=cache, download=False, **{"max_length": 8, **options})


def ready(data: Any) -> Any:
    data.prepare_data()
    data.setup()
    return data


def inputs_of(data: Any, part: str) -> torch.Tensor:
    return data.datasets[part].images([SampleKey(i) for i in range(len(data.datasets[part]))])


# ---- texts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The cache folder, with a tokenizer of eight words."""
    pytest.importorskip("tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tokenizer_folder))
    (tokenizer_folder / "kernel-zoo").mkdir()
    (tokenizer_folder / "minilm").rename(tokenizer_folder / "kernel-zoo" / "minilm")
    return tokenizer_folder / "kernel-zoo"


def test_a_table_of_texts(cache: Path, tmp_path: Path) -> None:
    place = write(tmp_path / "d", {"reviews.csv": TABLE})
    data = ready(texts(place / "reviews.csv", cache))
    assert data.class_names == ["five stars", "one star"]
    assert {part: len(rows) for part, rows in data.datasets.items()} == {"train": 28, "test": 8, "val": 4}
    for part in ("train", "val", "test"):
        ids, targets = inputs_of(data, part), data.datasets[part].targets
        assert ((ids == 4).any(1) == (targets == 0)).all(), "the word decides the class"
        assert set(targets.tolist()) == {0, 1}
    record = inputs.check(data.input_record())
    assert record["column"] == "comment"
    (answered,) = prepare(place / "reviews.csv", record, cache / "minilm")
    rows = {tuple(row) for row in answered.tolist()}
    assert len(answered) == 40
    assert all(tuple(row) in rows for part in data.datasets for row in inputs_of(data, part).tolist())
    write(place, {"other.csv": "stars;Comment\n5;Good tea\n", "one.txt": "Good tea"})
    (named,), (single,) = (prepare(place / name, record, cache / "minilm") for name in ("other.csv", "one.txt"))
    assert torch.equal(named, single)
    assert data.describe() == [
        "train: 28 texts: five stars 14, one star 14",
        "val: 4 texts: five stars 2, one star 2",
        "test: 8 texts: five stars 4, one star 4",
        "test: of each class, 20% of the training part, the same for every seed",
        "val: of each class, 10% of the training part, the same for every seed",
        "val: 4 of 4 are also in the training part: figures on them flatter",
        "test: 8 of 8 are also in the training part: figures on them flatter",
        "tokens: 7 in the middle, 8 at most; 0 of 40 (0.0%) are cut to 8 (data.max_length)",
    ]
    short = texts(place / "reviews.csv", cache, max_length=6)
    assert short.describe()[-1] == "tokens: 6 in the middle, 6 at most; 26 of 40 (65.0%) are cut to 6 (data.max_length)"
    again = ready(texts(place / "reviews.csv", cache, seed=5))
    assert torch.equal(inputs_of(again, "test"), inputs_of(data, "test")), "the same split for every seed"
    untested = ready(texts(place / "reviews.csv", cache, test_fraction=0, val_fraction=0))
    assert list(untested.datasets) == ["train"]
    assert len(untested.describe()) == 2


def test_texts_in_folders(cache: Path, tmp_path: Path) -> None:
    files = {
        f"{part}/{name}/{i}.txt": f"\ufeff{name} tea"
        for part in ("train", "test")
        for name in ("bad", "good")
        for i in range(4)
    }
    place = write(tmp_path / "d", files)
    data = ready(texts(place, cache, val_fraction=0.25))
    assert data.class_names == ["bad", "good"]
    assert {part: len(rows) for part, rows in data.datasets.items()} == {"train": 6, "test": 8, "val": 2}
    record = data.input_record()
    assert "column" not in record
    (alone,) = prepare(place / "test" / "bad" / "0.txt", record, cache / "minilm")
    assert torch.equal(alone, inputs_of(data, "test")[:1])
    write(place, {"list.csv": "text,note\nbad tea,x\ngood tea,y\n"})
    (listed,) = prepare(place / "list.csv", record, cache / "minilm")
    assert torch.equal(listed[:1], alone)
    flat = ready(texts(place / "train", cache))
    assert flat.class_names == data.class_names
    assert {part: len(rows) for part, rows in flat.datasets.items()} == {"train": 6, "test": 2}


def test_a_table_for_each_part(cache: Path, tmp_path: Path) -> None:
    rows = "".join(f"{'good' if i % 2 else 'bad'} tea,{10 if i % 2 else 9}\n" for i in range(8))
    place = write(
        tmp_path / "d", {"train.csv": f"comment,stars\n{rows}", "test.tsv": "stars\tcomment\n10\tgood\n9\tbad\n"}
    )
    words = {"text": "comment", "target": "stars"}
    data = ready(texts(place, cache, val_fraction=0, **words))
    assert data.class_names == ["9", "10"], "numbers by their value"
    assert data.datasets["test"].targets.tolist() == [1, 0]
    write(place, {"test.tsv": "stars\tcomment\n10\tgood\n8\tbad\n"})
    with pytest.raises(
        DataError, match=r"test\.tsv, line 3, column stars: the class '8' is none of the training part: 9, 10"
    ):
        texts(place, cache, **words).prepare_data()
    write(place, {"test.csv": "comment,stars\n"})
    with pytest.raises(DataError, match=r"holds test\.csv, test\.tsv: keep one table for a part"):
        texts(place, cache, **words).prepare_data()


def test_rows_without_a_known_word_are_told(tmp_path: Path) -> None:
    form = inputs.read({"kind": "text", "tokens": 4})
    known, unknown = [101, 2024, 102, 0], [101, 100, 102, 0]
    told = says_nothing(tmp_path / "x.csv", torch.tensor([known, unknown, known, unknown]), form)
    assert told is not None
    assert "2 of its 4 texts hold no word that the model knows (row 2, ...)" in told
    assert says_nothing(tmp_path / "x.csv", torch.tensor([known, known]), form) is None


MANY = "".join(f"tea {i},{i}\n" for i in range(30))
#: Files, arguments beside those of a table, and what is told.
BAD_TEXTS: dict[str, tuple[Files, dict[str, Any], str]] = {
    "nothing there": ({}, {}, "there is no file or folder .*: set data.path"),
    "no rows": ({"r.csv": "comment,stars\n"}, {}, "has no rows below its header"),
    "no column": ({"r.csv": TABLE}, {"text": "words"}, "no column 'words'; its columns are comment, stars"),
    "no column named": ({"r.csv": TABLE}, {"text": None}, "name that of the texts with data.text="),
    "no target named": ({"r.csv": TABLE}, {"target": None}, "name that of the classes with data.target="),
    "one column twice": ({"r.csv": TABLE}, {"target": "comment"}, "both name the column 'comment'"),
    "no text": ({"r.csv": "comment,stars\ngood,1\n ,2\n"}, {}, "line 3, column comment: there is no text"),
    "no class": ({"r.csv": "comment,stars\ngood,1\nbad,\n"}, {}, "line 3, column stars: there is no class"),
    "one class": ({"r.csv": "comment,stars\n" + "good,1\n" * 9}, {}, "the only class is '1'; two are needed"),
    "a class a row": ({"r.csv": f"comment,stars\n{MANY}"}, {}, "30 classes for 30 rows, such as 0, 1, 2 and 27 more"),
    "a number twice": ({"r.csv": "comment,stars\n" + "a,1\nb,1.0\n" * 9}, {}, "'1' and '1.0' are the same number"),
    "a long class": ({"r.csv": f"comment,stars\na,{'x' * 300}\n"}, {}, "line 2, .*'... has more than 200"),
    "an odd class": ({"r.csv": "comment,stars\na,\u202egood\n"}, {}, "line 2, .* cannot be printed"),
    "twins": ({"r.csv": "comment,stars\n" + "a,caf\u00e9\nb,cafe\u0301\n" * 9}, {}, "two classes that look the same"),
    "not UTF-8": ({"r.csv": b"comment,stars\ngood,1\nb\xe4d,2\n"}, {}, r"r\.csv, line 3: byte 0xe4 is not UTF-8"),
    "binary": ({"r.csv": b"comment,stars\ngood\0,1\nb,2\n" + b"c,1\n" * 40}, {}, "zero byte"),
    "a spreadsheet": ({"r.csv": b"PK\x03\x04abc"}, {}, "is a spreadsheet or a zip archive, not text"),
    "pickle": ({"r.csv": pickle.dumps([1])}, {}, r"r\.csv.*not (text|UTF-8)"),
    "ragged": ({"r.csv": "comment,stars\ngood, tea,1\nb,2\nc,1\n"}, {}, "line 2: 3 cells where the header has 2"),
    "columns of a folder": ({"a/x.txt": "a", "b/x.txt": "b"}, {"text": "comment"}, "is a folder without train.csv"),
    "no folders": ({"x.txt": "good"}, {}, "holds no class folders: put the texts of each class"),
    "one folder": ({"a/x.txt": "a"}, {}, "the only class is 'a'; two are needed"),
    "empty folder": ({"a/x.txt": "a", "b/x.doc": "b"}, {}, "class folder .*b holds no text"),
    "blank text": ({"a/x.txt": "a", "b/x.txt": " \n"}, {}, r"b/x\.txt holds no text"),
    "Latin text": ({"a/x.txt": "a", "b/x.txt": b"a\nb\xe4d"}, {}, r"b/x\.txt, line 2: byte 0xe4 is not UTF-8"),
    "a binary text": ({"a/x.txt": "a", "b/x.txt": b"a\n\0"}, {}, r"b/x\.txt, line 2: a zero byte"),
    "a large text": ({"a/x.txt": "a", "b/x.txt": b"a" * 10_000_001}, {}, r"b/x\.txt is larger than 10 MB"),
    "parts differ": ({f"{n}/x.txt": "a" for n in ("train/a", "train/b", "test/a")}, {}, "both need the same classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_told_with_their_place(case: str, cache: Path, tmp_path: Path) -> None:
    files, options, told = BAD_TEXTS[case]
    place = tmp_path / "d"
    write(place, files)
    table = place / "r.csv" if "r.csv" in files else place
    with pytest.raises(DataError, match=told) as caught:
        ready(texts(table, cache, **options))
    assert "\n" not in str(caught.value)


def test_texts_outside_of_the_folder_are_not_read(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, {"secret/x.txt": "secret", "secret/t.csv": TABLE, "d/a/x.txt": "a", "d/b/x.txt": "b"})
    (tmp_path / "d" / "b" / "y.txt").symlink_to(tmp_path / "secret" / "x.txt")
    data = texts(tmp_path / "d", cache, test_fraction=0, val_fraction=0)
    assert [part[0] for part in data.load().values()] == [["a", "b"]]
    (tmp_path / "d" / "train.csv").symlink_to(tmp_path / "secret" / "t.csv")
    with pytest.raises(DataError, match=r"train\.csv is a link that leads out of its folder"):
        texts(tmp_path / "d", cache, text="comment", target="stars").prepare_data()


def test_odd_names_are_escaped(cache: Path, tmp_path: Path) -> None:
    odd = "o\nd\u202ed\udcff"
    write(tmp_path, {f"d/{odd}/{i}.txt": "bad tea" for i in range(5)} | {f"d/b/{odd}.txt": " "})
    with pytest.raises(DataError, match="holds no text") as caught:
        texts(tmp_path / "d", cache).prepare_data()
    assert str(caught.value).isprintable()
    write(tmp_path, {f"d/b/{odd}.txt": "good tea"})
    data = texts(tmp_path / "d", cache, val_fraction=0)
    assert data.class_names == ["b", odd]
    assert all(line.isprintable() for line in data.describe())
    write(tmp_path, {f"c/{odd}/{odd}.xyz": "1 2", "c/a/x.xyz": FINE})
    with pytest.raises(DataError, match=r"holds an array of \(1, 2\)") as caught:
        PointFolder(tmp_path / "c").prepare_data()
    assert str(caught.value).isprintable()


def test_a_missing_encoder_is_one_sentence(tmp_path: Path) -> None:
    place = write(tmp_path, {"r.csv": TABLE})
    with pytest.raises(DataError, match=r"is not in .*empty and download=false: place .* or set download=true"):
        texts(place / "r.csv", tmp_path / "empty").prepare_data()
    with pytest.raises(ValueError, match=r"max_length=600\): input should be less than or equal to 512"):
        TextFolder(place / "r.csv", max_length=600)


# ---- point clouds --------------------------------------------------------------------------------------------


def cloud(i: int, kind: str, points: int = 40, far: float = 0.0) -> np.ndarray:
    """Points of a rod or of a ball, (points, 3)."""
    draw = np.random.default_rng([i, len(kind)]).normal(size=(points, 3))
    return far + draw * ([3, 0.1, 0.1] if kind == "rod" else [1, 1, 1])


def as_text(rows: np.ndarray, mark: str = " ") -> str:
    return "".join(mark.join(f"{v!r}" for v in row) + "\n" for row in rows.tolist())


def ply(rows: np.ndarray) -> str:
    """Vertices with y first, and a face."""
    head = "ply\nformat ascii 1.0\ncomment y first\nelement vertex {n}\n"
    head += "property float y\nproperty float x\nproperty float z\n"
    head += "element face 1\nproperty list uchar int vertex_indices\nend_header\n"
    return head.format(n=len(rows)) + as_text(rows[:, [1, 0, 2]]) + "3 0 1 2\n"


def clouds(place: Path, count: int = 10) -> Path:
    """Folders of rods and balls, in every format."""
    for kind in ("ball", "rod"):
        for i in range(count):
            rows = cloud(i, kind)
            forms = {
                "xyz": as_text(rows),
                "csv": "x,y,z\n" + as_text(rows, ","),
                "txt": "# a comment\n" + as_text(rows, ","),
                "ply": ply(rows),
            }
            (place / kind).mkdir(parents=True, exist_ok=True)
            if i % 5 == 4:
                np.save(place / kind / f"{i}.npy", rows)
            else:
                suffix, content = list(forms.items())[i % 5]
                (place / kind / f"{i}.{suffix}").write_text(content)
    return place


def test_clouds_are_the_same_in_every_format(tmp_path: Path) -> None:
    rows = cloud(0, "rod", far=5e6)  # coordinates of a map, which float32 would round
    np.save(tmp_path / "x.npy", rows)
    forms = {
        "x.xyz": as_text(rows),
        "x.txt": as_text(rows, ", "),
        "x.csv": "x;y;z\n" + as_text(rows, ";"),
        "x.ply": ply(rows),
    }
    write(tmp_path, {**forms, "y.xyz": "X Y Z\n" + as_text(rows, "\t"), "x.tsv": as_text(rows, "\t")})
    record = {"kind": "points", "points": 16, "channels": 3, "fit": "sphere"}
    (wanted,) = prepare(tmp_path / "x.npy", record)
    for path in tmp_path.iterdir():
        assert torch.equal(prepare(path, record)[0], wanted), path
    assert wanted.shape == (1, 16, 3)
    assert float(wanted.norm(dim=2).max()) == pytest.approx(1)
    moved = drawn(2 * (rows - 5e6) + 7, inputs.read(record), tmp_path)
    torch.testing.assert_close(moved, wanted[0], atol=1e-5, rtol=0)
    few = drawn(rows[:5], inputs.read(record), tmp_path)
    assert len(few.unique(dim=0)) == 5
    assert few.shape == (16, 3)


def test_names_of_columns_are_honoured_in_every_format(tmp_path: Path) -> None:
    rows = cloud(0, "rod")
    forms = {"a.csv": "x,y,z\n" + as_text(rows, ","), "b.csv": "Z,y,X\n" + as_text(rows[:, ::-1], ",")}
    forms |= {"c.txt": "z y x\n" + as_text(rows[:, ::-1]), "d.tsv": "y\tz\tx\n" + as_text(rows[:, [1, 2, 0]], "\t")}
    write(tmp_path, forms | {"u.csv": "u,v,w\n" + as_text(rows, ","), "v.xyz": "x y x\n" + as_text(rows)})
    record = {"kind": "points", "points": 16, "channels": 3, "fit": "sphere"}
    (wanted,) = prepare(tmp_path / "a.csv", record)
    for name in forms:
        assert torch.equal(prepare(tmp_path / name, record)[0], wanted), name
    for name in "u.csv", "v.xyz":
        with pytest.raises(DataError, match="a point cloud needs x, y and z"):
            prepare(tmp_path / name, record)


def test_further_values_are_matched_by_their_names(tmp_path: Path) -> None:
    for kind in "ball", "rod":
        (tmp_path / "d" / kind).mkdir(parents=True)
        for i in range(3):
            rows = np.concatenate([cloud(i, kind), np.full((len(cloud(i, kind)), 2), [1.0, 9.0])], 1)
            text = "x,y,z,hot,cold\n" + as_text(rows, ",")
            if i:
                text = "cold,x,y,z,Hot\n" + as_text(rows[:, [4, 0, 1, 2, 3]], ",")
            (tmp_path / "d" / kind / f"{i}.csv").write_text(text)
    data = ready(PointFolder(tmp_path / "d", num_points=8, test_fraction=0, val_fraction=0))
    record = inputs.check(data.input_record())
    assert (record["mean"][3:], record["further"]) == ([1, 9], ["hot", "cold"])
    first, second = (prepare(tmp_path / "d" / "rod" / f"{i}.csv", record)[0][..., 3:] for i in range(2))
    assert torch.equal(first, second)
    odd = write(tmp_path, {"odd.csv": "x,y,z,hot,wet\n1,2,3,4,5\n2,2,3,4,5\n"})
    with pytest.raises(DataError, match="has the values hot, wet after x, y and z, the model takes hot, cold"):
        prepare(odd / "odd.csv", record)


def test_a_folder_of_clouds(tmp_path: Path) -> None:
    place = clouds(tmp_path / "d")
    data = ready(PointFolder(place, num_points=32, val_fraction=0.25, batch_size=4))
    assert data.class_names == ["ball", "rod"]
    assert (data.in_chans, data.input_size) == (3, (3, 1, 32))
    assert {part: len(rows) for part, rows in data.datasets.items()} == {"train": 12, "test": 4, "val": 4}
    assert inputs.check(data.input_record()) == {
        "kind": "points", "points": 32, "channels": 3, "fit": "sphere", "mean": [0.0], "std": [1.0]
    }  # fmt: skip
    held = {tuple(map(tuple, x.tolist())) for part in ("val", "test") for x in inputs_of(data, part)}
    read = {tuple(map(tuple, prepare(p, data.input_record())[0][0].tolist())) for p in place.rglob("*.*")}
    assert held < read, "a file is prepared by the same function"
    points, targets = next(iter(data.train_dataloader()))
    assert points.shape == (4, 32, 3)
    assert targets.dtype == torch.int64
    assert data.describe() == [
        "train: 12 point clouds: ball 6, rod 6",
        "val: 4 point clouds: ball 2, rod 2",
        "test: 4 point clouds: ball 2, rod 2",
        "test: of each class, 20% of the training part, the same for every seed",
        "val: of each class, 25% of the training part, the same for every seed",
        "points: 40 to 40 in a file, 40 in the middle, of 3 values; 32 of them are used",
    ]
    assert "repeated in 20 smaller files" in PointFolder(place, num_points=64).describe()[-1]
    kept = ready(PointFolder(place, num_points=32, normalize=False))
    assert kept.input_record()["extent"] == float(kept.datasets["train"].points.abs().max())
    assert "fit" not in kept.input_record()


def test_a_list_of_clouds(tmp_path: Path) -> None:
    place = clouds(tmp_path / "d", 5)
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*.*"))
    rows = "".join(f"{name},{name.partition('/')[0]},{'test' if '4' in name else 'train'}\n" for name in names)
    write(place, {"clouds.csv": f"file,kind,part\n{rows}"})
    data = ready(
        PointFolder(place / "clouds.csv", class_column="kind", part_column="part", num_points=32, val_fraction=0)
    )
    assert data.class_names == ["ball", "rod"]
    assert {part: rows.targets.tolist() for part, rows in data.datasets.items()} == {
        "train": [0] * 4 + [1] * 4,
        "test": [0, 1],
    }
    assert torch.equal(inputs_of(data, "test")[:1], prepare(place / "ball" / "4.npy", data.input_record())[0])


def test_further_values_are_standardised_and_not_moved(tmp_path: Path) -> None:
    place = tmp_path / "d"
    for kind in ("ball", "rod"):
        (place / kind).mkdir(parents=True)
        for i in range(4):
            colour = np.random.default_rng(i).uniform(0, 255, (40, 1))
            np.save(place / kind / f"{i}.npy", np.concatenate([cloud(i, kind), colour, np.ones((40, 1))], 1))
    data = ready(PointFolder(place, num_points=40, test_fraction=0.25, val_fraction=0, seed=1))
    record = data.input_record()
    assert (record["mean"][:3], record["std"][:3], record["mean"][4], record["std"][4]) == ([0] * 3, [1] * 3, 1, 1)
    still = data.datasets["train"].points
    torch.testing.assert_close(still[..., 3].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(still[..., 3].std(correction=0), torch.tensor(1.0))
    moved = inputs_of(data, "train")
    assert torch.equal(moved[..., 3:], still[..., 3:])
    assert not torch.equal(moved[..., :3], still[..., :3])
    (alone,) = prepare(place / "ball" / "0.npy", record)
    assert any(torch.equal(alone[0], x) for x in [*still, *inputs_of(data, "test")])


FINE, PLY = as_text(cloud(0, "ball")), ply(cloud(0, "rod"))
#: A file beside good ones, and what is told.
BAD_CLOUDS: dict[str, tuple[str, str | bytes, str]] = {
    "not a number": ("x.xyz", "1 2 3\n1 two 3\n", r"x\.xyz, line 2: 'two' is not a number"),
    "nan": ("x.xyz", "1 2 3\n\n1 nan 3\n", r"x\.xyz, line 3: 'nan' is not a finite number"),
    "infinity": ("x.csv", "x,y,z\n1,2,3\n1,inf,3\n", r"x\.csv, line 3: y is 'inf', not a number that is finite"),
    "too far": ("x.xyz", "1 2 3\n1 1e300 3\n", r"line 2: '1e300' is too large for a coordinate"),
    "ragged": ("x.xyz", "1 2 3\n1 2\n", r"x\.xyz, line 2: 2 numbers where the lines before have 3"),
    "ragged commas": ("x.csv", "1,2,3\n1,2\n", r"x\.csv, line 2: .*2 cells where the first line has 3"),
    "no points": ("x.xyz", "# nothing\n", r"x\.xyz holds an array of \(0, 1\)"),
    "names only": ("x.csv", "x,y,z\n", r"x\.csv holds an array of \(0, 3\)"),
    "one point": ("x.xyz", "1 2 3\n", r"all of its points \(1\) are in one place, so it has no shape"),
    "one place": ("x.xyz", "0.1 0.2 0.3\n" * 50, r"all of its points \(50\) are in one place"),
    "two columns": ("x.xyz", "1 2\n3 4\n", r"holds an array of \(2, 2\), .* has rows of 3 numbers"),
    "six columns": ("x.xyz", "1 2 3 4 5 6\n", r"holds an array of \(1, 6\), .*0\.xyz has rows of 3 numbers"),
    "not UTF-8": ("x.xyz", b"1 2 3\n\xff\n", r"x\.xyz, line 2: byte 0xff is not UTF-8"),
    "junk": ("x.txt", b"1 2\0 3\n", r"x\.txt, line 1: a zero byte"),
    "words": ("x.txt", "read me\nplease\n", r"x\.txt, line 2: 'please' is not a number"),
    "no array": ("x.npy", b"junk", r"x\.npy cannot be read as a point cloud"),
    "a pickle": ("x.npy", pickle.dumps(np.ones((3, 3))), r"x\.npy cannot be read as a point cloud"),
    "binary ply": ("x.ply", b"ply\nformat binary_little_endian 1.0\n\xff", "binary PLY file: save it as ASCII"),
    "no ply": ("x.ply", "1 2 3\n", r"x\.ply .*no header of a PLY file"),
    "ply without z": ("x.ply", PLY.replace("float z", "float w"), "need the properties x, y and z"),
    "ply of faces": ("x.ply", PLY.replace("element vertex 40", "element face 40"), "must be the vertices"),
    "ply of lists": ("x.ply", PLY.replace("property float z", "property list uchar int z"), "is no property of one"),
    "short ply": ("x.ply", PLY.replace("vertex 40", "vertex 400"), "4 numbers where the lines before have 3"),
    "long ply": ("x.ply", PLY.replace("vertex 40", "vertex 30"), r"x\.ply, line \d+: 10 lines more than the 3\d that"),
    "ply of no number": ("x.ply", PLY.replace("end_header", "element face\nend_header"), "no number of elements"),
    "large": ("x.xyz", b"1 2 3\n" * 3_400_000, r"x\.xyz is larger than 20 MB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CLOUDS)
def test_bad_clouds_are_told_with_their_place(case: str, tmp_path: Path) -> None:
    name, content, told = BAD_CLOUDS[case]
    write(tmp_path, {"ball/0.xyz": FINE, "ball/1.xyz": FINE, "rod/0.xyz": FINE, f"rod/{name}": content})
    with pytest.raises(DataError, match=told) as caught:
        PointFolder(tmp_path).prepare_data()
    assert "\n" not in str(caught.value)
    record = {"kind": "points", "points": 8, "channels": 3, "fit": "sphere"}
    with pytest.raises(DataError):
        prepare(tmp_path / "rod" / name, record)


def test_bad_folders_of_clouds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        PointFolder(tmp_path / "none").prepare_data()
    write(tmp_path, {"a/x.xyz": FINE})
    with pytest.raises(DataError, match="the only class is 'a'"):
        PointFolder(tmp_path).prepare_data()
    write(tmp_path, {"b/x.jpg": b"x"})
    with pytest.raises(DataError, match=r"class folder .*b holds no point cloud"):
        PointFolder(tmp_path).prepare_data()
    np.save(tmp_path / "a" / "x.npy", cloud(0, "rod").T)
    (tmp_path / "a" / "x.xyz").rename(tmp_path / "b" / "x.xyz")
    with pytest.raises(DataError, match=r"x\.npy holds an array of \(3, 40\): a point cloud has a row for each point"):
        PointFolder(tmp_path).prepare_data()


# ---- the page ------------------------------------------------------------------------------------------------


def page(section: str) -> list[str]:
    """The commands of a section of the page."""
    text = (ROOT / "docs" / "own-data.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\$ (.*)$", text, re.MULTILINE)


#: With the commands that take long, or without them.
SLOW = pytest.mark.parametrize("left_out", ["export", pytest.param("", marks=pytest.mark.slow)])


def follow(
    section: str, place: Path, small: list[str], left_out: str, capsys: pytest.CaptureFixture[str]
) -> dict[str, str]:
    """Run the commands of a section as they are written, the training with further words that keep it small."""
    told = {}
    for line in page(section):
        words = shlex.split(line)
        if left_out in words:
            continue
        if words[:2] == ["python", "train.py"]:
            told["train"] = train_here(place, *words[2:], "logger=csv", "trainer.max_epochs=1", *small).stdout
            continue
        assert words[:3] == ["python", "-m", "zoo"]
        capsys.readouterr()
        assert main(words[3:]) == 0, (line, capsys.readouterr().err)
        told[words[3]] = capsys.readouterr().out
        if words[3] == "predict":
            assert main([*words[3:], "--json"]) == 0
            told["json"] = capsys.readouterr().out
    return told


@SLOW
def test_the_commands_for_texts(
    left_out: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder: Any = zoo.create_model("test_minilm", tuning="head").bert
    save_file(encoder.state_dict(), cache / "minilm" / "model.safetensors")
    place = write(tmp_path / "d", {"reviews.csv": TABLE, "letter.txt": "Good tea"})
    write(place, {"new.csv": "comment,stars\nGood tea,\nbad bad tea,\n"})
    monkeypatch.chdir(place)
    told = follow("Texts", place, ["model.model_name=test_minilm", "model.tuning_args=null"], left_out, capsys)
    assert "test/acc" in told["train"]
    found = json.loads(told["json"])
    assert [(entry["file"], entry.get("row")) for entry in found] == [
        ("new.csv", 1),
        ("new.csv", 2),
        ("letter.txt", None),
    ]
    assert {p["class"] for entry in found for p in entry["predictions"]} == {"five stars", "one star"}
    assert found[0]["predictions"] == found[2]["predictions"]
    assert [line.split(",")[:2] for line in (place / "answers.csv").read_text().splitlines()] == [
        ["file", "row"], ["new.csv", "1"], ["new.csv", "2"], ["letter.txt", ""]
    ]  # fmt: skip
    assert told["validate"].endswith("reproduced\n")
    assert "NOT" not in told["validate"]
    assert (place / "reviews-model" / "tokenizer.json").is_file()
    assert str(tmp_path) not in (place / "reviews-model" / "README.md").read_text()
    assert main(["predict", "local-dir:reviews-model", "letter.txt"]) == 0


@SLOW
def test_the_commands_for_point_clouds(
    left_out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "d"
    clouds(place / "clouds")
    np.save(place / "cloud.npy", cloud(77, "rod"))
    write(place, {"cloud.xyz": as_text(cloud(77, "rod"))})
    monkeypatch.chdir(place)
    small = ["model.backbone=test_unireplknet", "model.backbone_args=null", "model.size=14"]
    told = follow("Point clouds", place, small, left_out, capsys)
    assert "test/acc" in told["train"]
    found = json.loads(told["json"])
    assert [entry["file"] for entry in found] == ["cloud.npy", "cloud.xyz"]
    assert {p["class"] for p in found[0]["predictions"]} == {"ball", "rod"}
    assert found[0]["predictions"] == found[1]["predictions"]
    assert "NOT" not in told["validate"]
    assert str(tmp_path) not in (place / "clouds-model" / "README.md").read_text()
    write(place, {"list.csv": "file,note\ncloud.npy,a\nclouds/rod/1.csv,b\n"})
    assert main(["predict", "local-dir:clouds-model", "clouds/rod", "list.csv", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in found[-2:]] == ["cloud.npy", "clouds/rod/1.csv"]
    assert len(found) == 12
    assert not any("row" in entry for entry in found), "a table of points is one cloud"
