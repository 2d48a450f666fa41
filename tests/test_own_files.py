"""The page on own data: its commands on images, sounds, series, videos and streams run as they stand."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, train_here
from zoo.cli import main

PAGE = (ROOT / "docs" / "own-data.md").read_text()
#: What makes a training short; the page's own words stay.
SHORT = ["logger=csv", "++data.num_workers=0"]
EPOCHS = "trainer.max_epochs=1"


def commands(section: str) -> list[list[str]]:
    """Command lines of a section of the page."""
    text = re.split(r"^## ", PAGE.partition(f"\n## {section}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^\$ (.*)$", text, re.MULTILINE)]
    assert lines
    return lines


def run(section: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a section's commands in a folder; returns what they print."""
    monkeypatch.chdir(folder)
    told = []
    for program, *words in commands(section):
        assert program == "python"
        if words[0] == "train.py":
            fixed = [word for word in words[1:] if word.startswith(("experiment=split", "experiment=permuted"))]
            if fixed:  # of published sets, which are fetched
                continue
            short = SHORT if not any(w.startswith(("resume=", "experiment=own_tasks")) for w in words) else SHORT[:1]
            epochs = [] if any("own_tasks" in word for word in words) else [EPOCHS]
            done = train_here(folder, *words[1:], *short, *epochs)
            told.append(done.stdout)
            continue
        assert words[:2] == ["-m", "zoo"]
        code = main(words[2:])
        out = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}\n{out.out}\n{out.err}"
        told.append(out.out)
    return "\n".join(told)


def picture(path: Path, shade: int, side: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(len(str(path)) + shade).randint(0, 60, (side, side + 4, 3))
    noise[..., shade % 3] += 150
    Image.fromarray(noise.astype(np.uint8)).save(path)


def pictures(folder: Path) -> None:
    """`photos/` with parts, `photos.csv` with parts and cameras, `sites/` with tasks, and `photo.jpg`."""
    rows = []
    for k, name in enumerate(("fox", "hare")):
        for part, count in (("train", 18), ("test", 6)):
            for i in range(count):
                place = Path("photos") / part / name / f"{i}.jpg"
                picture(folder / place, k)
                camera = ("north", "south", "east", "west")[i % 4]
                rows.append([place.as_posix(), name, part, camera])
                picture(folder / "sites" / f"site{k}" / ("pale", "dark")[i % 2] / f"{part}{i}.jpg", k + i % 2)
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class", "part", "camera"], *rows])
    picture(folder / "photo.jpg", 0)


def sounds(folder: Path) -> None:
    import soundfile

    for k, name in enumerate(("low", "high")):
        for i in range(16):
            path = folder / "sounds" / name / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.5 * np.sin(np.arange(8000) * (0.1 + 0.4 * k + 0.01 * i)), 8000)
    soundfile.write(folder / "sound.wav", 0.5 * np.sin(np.arange(8000) * 0.5), 8000)


def series(folder: Path) -> None:
    (folder / "shops").mkdir()
    for k, path in enumerate(("sales.csv", "shops/north.csv", "shops/south.csv")):
        days = np.arange("2023-01-01", "2023-12-31", dtype="datetime64[D]")
        bread = 20 + 5 * np.sin(np.arange(len(days)) / 3 + k)
        lines = [f"{day},{one:.3f},{30 - one:.3f}" for day, one in zip(days, bread, strict=True)]
        (folder / path).write_text("\n".join(["day,bread,milk", *lines]) + "\n")


def videos(folder: Path) -> None:
    import av

    for k, name in enumerate(("left", "right")):
        for part, count in (("train", 32), ("test", 2)):
            for i in range(count):
                path = folder / "clips" / part / name / f"{i}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                with av.open(str(path), "w") as file:
                    stream = file.add_stream("mpeg4", rate=8)
                    stream.width = stream.height = 32
                    for t in range(4):
                        pixels = np.full((32, 32, 3), (60 * t, 120 * k, i)[k], np.uint8)
                        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
                    file.mux(stream.encode())
    (folder / "clip.mp4").write_bytes((folder / "clips" / "test" / "left" / "0.mp4").read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "make", "needs", "reported"),
    [
        ("Images", pictures, "PIL", ["train: 32 images: fox 16, hare 16", "no camera is in two parts"]),
        ("Sounds", sounds, "soundfile", ["train: 22 recordings: high 11, low 11"]),
        ("Series", series, "numpy", ["shops/north.csv: 364 steps every 1 day", "2 variables: bread, milk"]),
        ("Videos", videos, "av", ["test: 4 videos: left 2, right 2"]),
        ("Streams of tasks", pictures, "PIL", ["task 0 (site0)", "task 3 (west)"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_commands_of_the_page_run_as_they_stand(
    section: str,
    make: Callable[[Path], None],
    needs: str,
    reported: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    make(tmp_path)
    told = run(section, tmp_path, capsys, monkeypatch)
    for line in reported:
        assert line in told
    assert "reproduced" in told
    for card in tmp_path.glob("published/README.md"):
        assert str(tmp_path) not in card.read_text()


def test_every_section_of_files_has_commands() -> None:
    for section in ("Images", "Sounds", "Series", "Videos", "Streams of tasks"):
        verbs = [words[3] if words[1] == "-m" else "train" for words in commands(section)]
        assert {"train", "report", "predict", "validate"} <= set(verbs), section
