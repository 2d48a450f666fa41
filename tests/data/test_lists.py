"""Lists of files in the place of folders: parts of images, sounds and videos, and every bad row by its line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_walk import KINDS, fill, sizes
from zoo.data import AudioFolder, DataError, ImageFolder, VideoFolder
from zoo.data.lists import divided, group_split, read_list
from zoo.data.walk import Files

MODULES: dict[str, Any] = {"image": ImageFolder, "sound": AudioFolder, "video": VideoFolder}
SMALL: dict[str, dict[str, Any]] = {
    "image": {"image_size": 8, "num_workers": 0},
    "sound": {"sample_rate": 8000, "duration": 0.05},
    "video": {"frames": 2, "size": 8, "num_workers": 0},
}


def write_list(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("file", "class", "part")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def rows_of(folder: Path, suffix: str) -> list[list[str]]:
    """Rows of the files below a folder with parts, by `fill`."""
    files = sorted(folder.rglob(f"*{suffix}"))
    return [[str(f.relative_to(folder)), f.parent.name, f.relative_to(folder).parts[0]] for f in files]


@pytest.mark.parametrize("name", KINDS)
def test_a_list_gives_the_parts_of_a_folder(name: str, tmp_path: Path) -> None:
    if name == "sound":
        pytest.importorskip("soundfile")
    write, suffix, _ = KINDS[name]
    fill(tmp_path, write, suffix, "train val test")
    path = write_list(tmp_path / "list.csv", rows_of(tmp_path, suffix))
    whole, lean = (MODULES[name](p, part_column=c, **SMALL[name]) for p, c in ((tmp_path, None), (path, "part")))
    assert sizes(whole) == sizes(lean) == {"train": 6, "val": 6, "test": 6}
    assert whole.class_names == lean.class_names == ["a", "b"]
    for part, dataset in whole.datasets.items():
        assert dataset.targets.tolist() == lean.datasets[part].targets.tolist()
    if name == "image":
        assert whole.datasets["test"].paths.tolist() == lean.datasets["test"].paths.tolist()
    told = lean.describe()
    unit = {"image": "images", "sound": "recordings", "video": "videos"}[name]
    assert [line for line in told if line.startswith("train")] == [f"train: 6 {unit}: a 3, b 3"]
    assert "parts by the column part" in told


def test_columns_and_the_folder_are_named(tmp_path: Path) -> None:
    write, suffix, _ = KINDS["image"]
    fill(tmp_path / "far" / "away", write, suffix, "train", n=10)
    (tmp_path / "lists").mkdir()
    rows = [[cls, name] for name, cls, _ in rows_of(tmp_path / "far" / "away", suffix)]
    path = write_list(tmp_path / "lists" / "x.tsv", rows, ["species", "photo"])
    with pytest.raises(DataError, match=r"x.tsv has no column 'file'; its columns are species, photo: name the one of"):
        _ = ImageFolder(path).class_names
    options = {"file_column": "photo", "class_column": "species", "folder": tmp_path / "far" / "away"}
    assert sizes(ImageFolder(path, test_fraction=0.2, **options, **SMALL["image"])) == {
        "train": 14,
        "val": 2,
        "test": 4,
    }
    with pytest.raises(DataError, match=r"there is no folder .*gone, where the names of .*x\.tsv start"):
        _ = ImageFolder(path, **options | {"folder": tmp_path / "gone"}).class_names


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (["../x.png", "a", "train"], r"line 4: '\.\./x\.png' leads out of"),
        (["/etc/passwd.png", "a", "train"], "line 4: '/etc/passwd.png' leads out of"),
        (["out.png", "a", "train"], "line 4: 'out.png' leads out of"),
        (["x\0.png", "a", "train"], r"list\.csv is not text: it has zero bytes"),
        (["gone.png", "a", "train"], "line 4: there is no file .*gone.png"),
        (["notes.txt", "a", "train"], r"line 4: 'notes.txt' is no image \(\.jpg"),
        (["", "a", "train"], "line 4: file is empty"),
        (["2.png", "", "train"], "line 4: class is empty"),
        (["2.png", "a", "dev"], "line 4: part is 'dev', not train, val or test"),
        (["0.png", "b", "train"], "line 4: .*0.png has the class 'b', and 'a' in line 2"),
        (["0.png", "a", "test"], "line 4: .*0.png has the part 'test', and 'train' in line 2"),
        (["2.png", "a", "test"], "line 3: the class 'b' is in the train part and not in the test part"),
        (["2.png", "c", "test"], "line 2: the class 'a' is in the train part and not in the test part"),
    ],
)
def test_bad_rows_are_named_by_their_line(row: list[str], told: str, tmp_path: Path) -> None:
    write, _, _ = KINDS["image"]
    (tmp_path / "in").mkdir()
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png")
    write(tmp_path / "x.png")
    (tmp_path / "in" / "out.png").symlink_to(tmp_path / "x.png")
    (tmp_path / "in" / "notes.txt").write_text("x")
    path = write_list(tmp_path / "in" / "list.csv", [["0.png", "a", "train"], ["1.png", "b", "train"], row])
    with pytest.raises(DataError, match=told) as caught:
        _ = ImageFolder(path, part_column="part").class_names
    assert str(caught.value).count(str(path)) == 1
    assert "\n" not in str(caught.value)


def test_a_row_that_comes_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, suffix, _ = KINDS["image"]
    fill(tmp_path, write, suffix, "train")
    rows = rows_of(tmp_path, suffix)
    path = write_list(tmp_path / "list.csv", [*rows, rows[0], [f"./{rows[1][0]}", *rows[1][1:]]])
    assert sizes(ImageFolder(path, val_fraction=0, **SMALL["image"])) == {"train": 6}
    assert "2 rows repeat others and count once" in caplog.text


def test_no_group_is_in_two_parts(tmp_path: Path) -> None:
    write, suffix, _ = KINDS["image"]
    fill(tmp_path, write, suffix, "train", n=20)
    rows = [[name, cls, f"p{i % 7}"] for i, (name, cls, _) in enumerate(rows_of(tmp_path, suffix))]
    path = write_list(tmp_path / "list.csv", rows, ["file", "class", "person"])
    columns = {"file": "file", "class": "class", "group": "person"}
    listing = read_list(path, Files("image", "images", (suffix,)), columns)
    names, parts, notes = divided(listing, {"test": 0.3, "val": 0.2})
    assert names == ["a", "b"]
    group = dict(zip(listing.files, listing.columns["group"], strict=True))
    groups = {part: {group[file] for file in files} for part, (files, _) in parts.items()}
    assert sum(len(files) for files, _ in parts.values()) == 40
    assert not groups["train"] & groups["test"] | groups["train"] & groups["val"] | groups["val"] & groups["test"]
    assert 4 <= len(parts["test"][0]) <= 12
    assert all("whole groups of person" in note for note in notes[1:])
    assert divided(listing, {"test": 0.3, "val": 0.2})[1] == parts, "the same every time"
    told = [[*row, "test" if i % 2 else "train"] for i, row in enumerate(rows)]
    write_list(path, told, ["file", "class", "person", "part"])
    with pytest.raises(DataError, match=r"line \d+: person 'p\d' is in the \w+ part, and in the \w+ part in line \d+"):
        _ = ImageFolder(path, part_column="part", group_column="person").class_names


def test_groups_that_cannot_be_divided_are_told(tmp_path: Path) -> None:
    columns = {"file": "file", "class": "class", "group": "person"}
    notes = []
    for people in ("jo", "jo"), ("jo", "al"):
        rows = [[f"{i}.png", "ab"[i % 2], people[i % 2]] for i in range(8)]
        for name, *_ in rows:
            (tmp_path / name).touch()
        path = write_list(tmp_path / "list.csv", rows, ("file", "class", "person"))
        _, parts, told = divided(read_list(path, Files("picture", "pictures", (".png",)), columns), {"test": 0.3})
        assert list(parts) == ["train"]
        notes.append(told[-1])
    assert notes[0] == "no test part: all rows are of one person, 'jo', and no person is in two parts"
    assert notes[1] == "no test part: without any one person, training would lose a class"


def test_groups_leave_every_class_in_training() -> None:
    targets = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    own = group_split(targets, np.array([*"aaaabbbb"], object), 0.5, 0)
    assert not len(own), "a group holds a whole class"
    mixed = group_split(targets, np.array([*"abcdabcd"], object), 0.1, 0)
    assert len(mixed) == 2, "the smallest group, where none is small enough"
    assert len(group_split(targets, np.array([*"abcdabcd"], object), 0.0, 0)) == 0


def test_a_share_of_a_folder_is_kept_for_testing(tmp_path: Path) -> None:
    write, suffix, _ = KINDS["image"]
    fill(tmp_path, write, suffix, "train", n=10)
    data = ImageFolder(tmp_path, test_fraction=0.3, val_fraction=0.2, **SMALL["image"])
    assert sizes(data) == {"train": 12, "val": 2, "test": 6}
    paths = [path for rows in data.datasets.values() for path in rows.paths.tolist()]  # type: ignore[attr-defined]
    assert len(set(paths)) == 20, "no picture in two parts"
    assert [line for line in data.describe() if "also in the training part" not in line] == [  # all are alike
        "train: 12 images: a 6, b 6",
        "val: 2 images: a 1, b 1",
        "test: 6 images: a 3, b 3",
        "test: of each class, 30% of the training part, the same for every seed",
        "val: of each class, 20% of the training part, the same for every seed",
    ]


def test_files_that_cannot_be_read_are_named_before_training(tmp_path: Path) -> None:
    write, suffix, _ = KINDS["image"]
    fill(tmp_path, write, suffix, "train", n=6)
    data = ImageFolder(tmp_path, **SMALL["image"])
    data.setup()
    data.check_files()
    for name in "train/a/0.png", "train/b/3.png":
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(
        DataError, match=r"2 of 12 files cannot be read: .*a/0.png \(no known image format\); .*b/3.png"
    ):
        data.check_files()


def test_many_classes_are_told_by_the_smallest_and_the_largest(tmp_path: Path) -> None:
    for i in range(12):
        for k in range(i + 1):
            (tmp_path / f"c{i:02}").mkdir(exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / f"c{i:02}" / f"{k}.png")
    data = ImageFolder(tmp_path, val_fraction=0, **SMALL["image"])
    data.setup()
    assert data.describe() == ["train: 78 images: 12 classes, from c00 1 to c11 12"]


def test_published_data_takes_no_lists() -> None:
    from zoo.data import ImageNet, Prompts

    for module in (ImageNet, Prompts):
        with pytest.raises(TypeError, match="takes no folder"):
            module("x", folder="y")
