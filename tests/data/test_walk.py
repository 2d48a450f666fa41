"""One walk for images, recordings and videos: links, hidden files, empty classes, parts that differ, spellings."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo
from zoo.data import AudioFolder, DataError, ImageFolder, VideoFolder
from zoo.data.audio import RECORDINGS
from zoo.data.folder import IMAGES
from zoo.data.pictures import FORMATS
from zoo.data.prepare import SUFFIXES
from zoo.data.video import VIDEOS
from zoo.data.walk import below, class_folders, parts, scan


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)


def sound(path: Path) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(400), 8000)


def video(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"listed, not opened")


def imported(path: Path) -> ImageFolder:
    return ImageFolder(path, image_size=8, num_workers=0)


def heard(path: Path) -> AudioFolder:
    return AudioFolder(path, sample_rate=8000, duration=0.05)


def seen(path: Path) -> VideoFolder:
    return VideoFolder(path, frames=2, size=8, num_workers=0)


KINDS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], Any]]] = {
    "image": (image, ".png", imported),
    "sound": (sound, ".wav", heard),
    "video": (video, ".mp4", seen),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[[Path], None], str, Callable[[Path], Any]]:
    if request.param == "sound":
        pytest.importorskip("soundfile")
    return KINDS[request.param]


def sizes(data: Any) -> dict[str, int]:
    data.prepare_data()
    data.setup()
    return {part: len(rows) for part, rows in data.datasets.items()}


def fill(root: Path, write: Callable[[Path], None], suffix: str, parts: str = "train test", n: int = 3) -> None:
    for part in parts.split():
        for name in ("a", "b"):
            for i in range(n):
                write(root / part / name / f"{i}{suffix}")


# ---- the same rules everywhere -----------------------------------------------------------------------------


def test_what_counts_and_what_does_not(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix)
    write(tmp_path / "train" / "a" / "deep" / "er" / f"x{suffix.upper()}")
    for junk in (
        f"a/._x{suffix}",
        f"a/.hidden/x{suffix}",
        "a/notes.txt",
        f"a/.ipynb_checkpoints/0{suffix}",
        f".cache/x{suffix}",
    ):
        write(tmp_path / "train" / junk) if junk.endswith(suffix) else (tmp_path / "train" / junk).write_text("x")
    data = build(tmp_path)
    assert data.class_names == ["a", "b"]
    found = sizes(data)
    assert sum(found.values()) - found["test"] == 7
    assert found["test"] == 6


def test_files_that_are_not_used_are_told(kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix)
    sizes(build(tmp_path))
    assert "not used" not in caplog.text
    for i in range(2):
        (tmp_path / "train" / "a" / f"{i}.GIF").write_bytes(b"GIF89a")
        (tmp_path / "train" / "b" / f".{i}.gif").write_bytes(b"hidden")
    (tmp_path / "train" / "b" / "deep").mkdir()
    (tmp_path / "train" / "b" / "deep" / "README").write_text("x")
    (tmp_path / "train" / "list.txt").write_text("x")  # not in a class: a list of the data, not a part of it
    write(tmp_path / "train" / f"loose{suffix}")
    (tmp_path / "test" / "a" / "x.heic").write_bytes(b"x")
    (tmp_path / "test" / "a" / "same.heic").symlink_to(tmp_path / "test" / "a" / f"0{suffix}")
    for _ in range(2):
        sizes(build(tmp_path))
    train, test = (r.message for r in caplog.records if "not used" in r.message)
    many = {".png": "images", ".wav": "recordings", ".mp4": "videos"}[suffix]
    told = (
        f"train: 4 file(s) beside the 6 {many} in class folders are not used: 2 .gif, 1 {suffix}, 1 no suffix, such as "
    )
    assert told in train
    assert f"test: 1 file(s) beside the 6 {many} in class folders are not used: 1 .heic, such as {tmp_path}" in test


def test_training_and_prediction_open_the_same_pictures() -> None:
    assert set(IMAGES.suffixes) == set(SUFFIXES["image"]) == set(FORMATS)
    assert set(RECORDINGS.suffixes) == set(SUFFIXES["sound"])
    assert set(VIDEOS.suffixes) == set(SUFFIXES["clip"])


def test_a_class_of_one_part_only_is_told(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix)
    write(tmp_path / "test" / "c" / f"x{suffix}")
    with pytest.raises(DataError, match=r"1 class folder\(s\) of .*test are missing in .*train: c; both need the same"):
        sizes(build(tmp_path))
    (tmp_path / "test" / "c").rename(tmp_path / "train" / "c")
    with pytest.raises(DataError, match=r"1 class folder\(s\) of .*train are missing in .*test: c; both need the same"):
        sizes(build(tmp_path))


def test_an_empty_class_is_told(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix)
    (tmp_path / "train" / "c" / "sub").mkdir(parents=True)
    write(tmp_path / "test" / "c" / f"x{suffix}")
    with pytest.raises(DataError, match=r"class folder .*train/c holds no .*: add some or remove the folder"):
        sizes(build(tmp_path))


def test_validation_by_any_name_and_classes_alone(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix, "train valid test")
    assert sizes(build(tmp_path)) == {"train": 6, "val": 6, "test": 6}
    assert sizes(build(tmp_path / "train"))["train"] in (4, 6), "what is split off is a share of each class"
    assert build(tmp_path / "train").class_names == ["a", "b"]


@pytest.mark.parametrize("name", ["image", "video"])
def test_without_a_test_part_the_validation_part_is_used_and_told(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write, suffix, build = KINDS[name]
    fill(tmp_path, write, suffix, "train", n=10)
    data = build(tmp_path)
    assert sizes(data) == {"train": 18, "val": 2, "test": 2}
    assert data.datasets["test"] is data.datasets["val"]
    assert "has no test part: the test is on the validation part" in caplog.text


# ---- links -------------------------------------------------------------------------------------------------


def test_links_out_of_a_class_and_cycles_are_not_followed(
    kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write, suffix, build = kind
    root = tmp_path / "root"
    fill(root, write, suffix)
    write(tmp_path / "elsewhere" / f"x{suffix}")
    (root / "train" / "a" / "up").symlink_to("..")
    (root / "train" / "a" / "self").symlink_to(".")
    (root / "train" / "a" / "out").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "a" / f"out{suffix}").symlink_to(tmp_path / "elsewhere" / f"x{suffix}")
    (root / "train" / "a" / f"gone{suffix}").symlink_to("nothing")
    (root / "train" / "c").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "d").symlink_to("a")
    (root / "train" / "e").symlink_to(root)
    data = build(root)
    assert data.class_names == ["a", "b"]
    found = sizes(data)
    assert sum(found.values()) - found["test"] == 6
    sizes(build(root))
    told = [record.message for record in caplog.records if "not followed" in record.message]
    assert len(told) == len(set(told)) == 2, "once each"
    assert any(message.endswith(f"gone{suffix}, out, out{suffix}, self, up") for message in told)
    assert any(message.endswith("c, d, e") for message in told)


def test_links_inside_are_followed_and_nothing_counts_twice(tmp_path: Path) -> None:
    image(tmp_path / "a" / "real" / "x.png")
    image(tmp_path / "a" / ".store" / "y.png")
    (tmp_path / "a" / "again").symlink_to("real")
    (tmp_path / "a" / "x.png").symlink_to("real/x.png")
    (tmp_path / "a" / "y.png").symlink_to(".store/y.png")
    found = [os.path.relpath(path, tmp_path) for path in below(tmp_path / "a", IMAGES)]
    assert found == ["a/real/x.png", "a/y.png"]


def test_class_folders_may_be_links_to_beside_the_part(tmp_path: Path) -> None:
    image(tmp_path / "pool" / "a" / "x.png")
    image(tmp_path / "train" / "b" / "x.png")
    (tmp_path / "train" / "a").symlink_to("../pool/a")
    assert class_folders(tmp_path / "train", IMAGES) == ["a", "b"]
    assert len(scan(tmp_path / "train", ["a", "b"], IMAGES)[0]) == 2
    image(tmp_path / "test" / "b" / "x.png")
    for name, place in (("c", "../test/b"), ("d", "../pool/a"), ("e", "../pool"), ("f", ".."), ("g", "b")):
        (tmp_path / "train" / name).symlink_to(place)
    assert class_folders(tmp_path / "train", IMAGES) == ["a", "b"], "no files with two classes, none of the test"
    (tmp_path / "test" / "a").symlink_to("../pool/a")
    with pytest.raises(DataError, match=r"test/a and .*train/a are the same folder"):
        sizes(imported(tmp_path))
    outside = tmp_path / "train"
    only = tmp_path / "only"
    only.mkdir()
    (only / "a").symlink_to(outside)
    with pytest.raises(DataError, match=r"holds no class folders.*links that lead out of the data.*not followed: a"):
        class_folders(only, IMAGES)


def test_parts_that_are_links_lead_to_data_of_their_own(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    root = tmp_path / "root"
    fill(root, write, suffix, "train")
    fill(tmp_path / "outside", write, suffix, "val")
    fill(root / "pool", write, suffix, "test")
    told = r"is a link that leads out of .*root, or to another part: put the folder itself there"
    for place in ("train", "train/a", "..", tmp_path / "outside" / "val"):
        (root / "val").symlink_to(place)
        with pytest.raises(DataError, match=told):
            sizes(build(root))
        (root / "val").unlink()
    (root / "test").symlink_to("pool/test")
    assert sizes(build(root))["test"] == 6
    (root / "train").rename(tmp_path / "moved")
    (root / "train").symlink_to(tmp_path / "moved")
    with pytest.raises(DataError, match=told):
        sizes(build(root))


# ---- spellings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [IMAGES, RECORDINGS, VIDEOS], ids=lambda f: f.one)
def test_names_that_look_the_same_are_told_apart(files: Any, tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for name in (composed, decomposed):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError) as caught:
        class_folders(tmp_path, files)
    assert r"two class folders that look the same, 'Caf\xe9' and 'Cafe\u0301'" in str(caught.value).replace(
        r"'Cafe\u0301' and 'Caf\xe9'", r"'Caf\xe9' and 'Cafe\u0301'"
    )


def test_parts_that_spell_a_class_differently_are_told(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix)
    for part, form in (("train", "NFC"), ("test", "NFD")):
        write(tmp_path / part / unicodedata.normalize(form, "Café") / f"x{suffix}")
    with pytest.raises(DataError, match=r"spelled differently in .*train and in .*test, 'Caf\\xe9' and 'Cafe\\u0301'"):
        sizes(build(tmp_path))


def test_names_that_differ_in_capitals_are_told(kind: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write, suffix, build = kind
    for name in "Aab":
        for i in range(2):
            write(tmp_path / "train" / name / f"{i}{suffix}")
    assert build(tmp_path).class_names == ["A", "a", "b"], "as of letters written by hand"
    assert [r.message for r in caplog.records] == [
        f"{tmp_path / 'train'}: the class folders 'A' and 'a' differ in capital letters only: two classes"
    ]


def test_names_that_cannot_be_printed_are_those_that_are_saved(kind: Any, tmp_path: Path) -> None:
    write, suffix, build = kind
    fill(tmp_path, write, suffix, n=2)
    for part in ("train", "test"):
        for i in range(2):
            write(tmp_path / part / "a\x1b[31m" / f"{i}{suffix}")
    names = build(tmp_path).class_names
    sizes(build(tmp_path))
    model = zoo.create_model("test_grbf", num_classes=3, in_chans=2)
    folder = zoo.save_pretrained(model, tmp_path / "model", class_names=names)
    assert "a\\u001b[31m" in json.loads((folder / "config.json").read_text())["label_names"]
    for part in ("train", "test"):
        write(tmp_path / part / "a\\u001b[31m" / f"x{suffix}")
    with pytest.raises(DataError, match="two class folders that look the same"):
        build(tmp_path).class_names  # noqa: B018


def test_a_folder_beside_the_parts_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "valid", "validation", "tset", ".cache"):
        (tmp_path / name).mkdir()
    assert set(parts(tmp_path)) == {"train", "val"}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "not used beside train/: tset, validation; the folders of the parts are train, val or valid" in told


def test_parts_without_a_training_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        image(tmp_path / "test" / name / "0.png")
        image(tmp_path / "valid" / name / "0.png")
    with pytest.raises(DataError, match="has test/ and valid/ and no train/: the classes are those of the training"):
        parts(tmp_path)
    image(tmp_path / "exam" / "0.png")
    assert parts(tmp_path) == {"train": tmp_path}
    assert "test/ is taken as a class, as there is no train/" in caplog.text
