"""Killed before any call of the file system, a writer leaves what was there or what it wrote, and never a mixture."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from zoo.support import whole
from zoo.support.files import CheckpointError, write_all, writer_of

WATCHED = ("open", "os.", "fcntl.", "shutil.")
NAMES = ("config.json", "model.safetensors", "notes.txt")
OLD, NEW, NEWEST = (
    {name: f"{version} {name}".encode() * 5000 for name in NAMES} for version in ("old", "new", "newest")
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def killed_at(k: int, act: Callable[[], Any]) -> bool:
    """Do something in a child that ends, as a power cut would end it, before its k-th call; whether it came so far."""
    if (child := os.fork()) == 0:
        left = k

        def count(event: str, *args: Any) -> None:
            nonlocal left
            if event.startswith(WATCHED):
                if not left:
                    os._exit(9)
                left -= 1

        try:
            os.fsync = lambda handle: count("os.fsync")  # type: ignore[assignment]
            sys.addaudithook(count)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), "the child failed"
    return code == 9


def every_moment(act: Callable[[], Any]) -> Iterator[int]:
    k = 0
    while killed_at(k, act):
        yield k
        k += 1


def in_halves(content: bytes) -> Callable[[BinaryIO], None]:
    """Writes half, does something that can be killed, and writes the rest."""

    def write(file: BinaryIO) -> None:
        file.write(content[: len(content) // 2])
        file.flush()
        os.fsync(file.fileno())
        file.write(content[len(content) // 2 :])

    return write


def save(folder: Path, files: dict[str, bytes]) -> None:
    whole.replace_all({folder / name: in_halves(content) for name, content in files.items()})


def found(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


def litter(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in NAMES)


def start(folder: Path, before: dict[str, bytes]) -> Path:
    folder.mkdir()
    save(folder, before) if before else None
    return folder


@pytest.mark.parametrize("before", [{}, OLD, {"model.safetensors": OLD["model.safetensors"]}], ids=len)
def test_files_of_a_folder_switch_together(before: dict[str, bytes], tmp_path: Path) -> None:
    def act() -> None:
        save(tmp_path / str(tried), NEW)

    tried, seen = 0, []
    start(tmp_path / "0", before)
    for tried in range(1000):
        folder = tmp_path / str(tried)
        start(folder, before) if tried else None
        if not killed_at(tried, act):
            break
        assert found(folder) in (before, NEW), f"killed before call {tried}"
        seen.append(found(folder) == NEW)
        whole.clean(folder)
        assert found(folder) == (NEW if seen[-1] else before)
        assert not litter(folder)
        assert not any(p.is_symlink() for p in folder.iterdir())
    assert len(seen) > 40
    assert seen == sorted(seen)
    assert len(set(seen)) == 2
    assert found(folder) == NEW
    assert not litter(folder)


def test_a_writer_goes_on_from_what_a_killed_one_left(tmp_path: Path) -> None:
    for first in range(3, 90, 17):
        for second in range(first % 5, 90, 13):
            folder = start(tmp_path / f"{first}-{second}", OLD)
            killed_at(first, lambda folder=folder: save(folder, NEW))  # type: ignore[misc]
            between = found(folder)
            killed_at(second, lambda folder=folder: save(folder, NEWEST))  # type: ignore[misc]
            assert found(folder) in (between, NEWEST), (first, second)
            save(folder, OLD)
            assert found(folder) == OLD
            assert not litter(folder)


def test_one_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    for k in every_moment(lambda: whole.replace_all({path: in_halves(b"new")})):
        assert path.read_bytes() in (b"old", b"new"), k
    assert path.read_bytes() == b"new"
    whole.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_link_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    link = tmp_path / "latest"
    link.symlink_to("first")
    for k in every_moment(lambda: whole.replace_link(link, "second")):
        assert os.readlink(link) in ("first", "second"), k
    assert os.readlink(link) == "second"


def test_left_overs_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".step=00000004.ckpt.0123456789ab.tmp").write_bytes(b"left over")
    (tmp_path / ".new.0123456789ab.tmp").mkdir()
    (tmp_path / ".new.0123456789ab.tmp" / "model.safetensors").write_bytes(b"left over")
    (tmp_path / ".mine.tmp").write_bytes(b"of somebody else")
    with whole.staging(tmp_path) as place:
        (place / "config.json").write_bytes(b"new")

        def write(file: BinaryIO) -> None:
            file.write(b"new")
            if (child := os.fork()) == 0:  # another process, while both are open
                whole.clean(tmp_path)
                os._exit(0)
            os.waitpid(child, 0)

        whole.replace_all({tmp_path / "notes.txt": write})
        assert litter(tmp_path) == [".mine.tmp", place.name]
    assert found(tmp_path) == {"config.json": b"new", "notes.txt": b"new"}
    assert litter(tmp_path) == [".mine.tmp"]


def test_a_failed_writer_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, os.strerror(28))

    save(tmp_path, OLD)
    with pytest.raises(CheckpointError, match=r"cannot write .*notes.txt: the disk is full"):
        write_all({tmp_path / "config.json": writer_of(b"new"), tmp_path / "notes.txt": full})
    assert found(tmp_path) == OLD
    assert not litter(tmp_path)


@pytest.mark.parametrize("broken", ["symlink", "replace", "link"])
def test_no_room_for_a_name_rolls_back(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a kind fails once, one after the other: the folder keeps the old files or has the new ones."""
    save(tmp_path, OLD)
    real, outcomes = getattr(os, broken), set()
    for nth in range(12):
        calls = 0

        def fail(*args: Any, nth: int = nth, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 == nth:
                raise OSError(28, os.strerror(28))
            real(*args, **kwargs)

        monkeypatch.setattr(os, broken, fail)
        try:
            save(tmp_path, NEW)
        except OSError:
            outcomes.add("refused")
        monkeypatch.setattr(os, broken, real)
        assert found(tmp_path) in (OLD, NEW)
        save(tmp_path, OLD)
        assert found(tmp_path) == OLD
        assert not litter(tmp_path)
    assert broken != "replace" or outcomes


def test_without_links_and_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(os, "symlink", missing)
    monkeypatch.setattr(os, "link", missing)
    monkeypatch.setattr(whole, "fcntl", None)
    save(tmp_path, OLD)
    save(tmp_path, NEW)
    assert found(tmp_path) == NEW
    assert not litter(tmp_path)
    old = tmp_path / ".step=00000004.ckpt.0123456789ab.tmp"
    old.write_bytes(b"perhaps being written")
    assert whole.clean(tmp_path) == []
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    assert whole.clean(tmp_path) == [old.name]


@contextmanager
def beside(act: Callable[[], Any]) -> Iterator[None]:
    """Another process that does something again and again."""
    if (child := os.fork()) == 0:
        try:
            while os.getppid() != 1:
                act()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path, OLD)
    with beside(lambda: save(tmp_path, NEW)):
        for _ in range(30):
            save(tmp_path, NEWEST)
    save(tmp_path, OLD)
    assert found(tmp_path) == OLD
    assert not litter(tmp_path)


def test_a_reader_beside_a_writer_notices(tmp_path: Path) -> None:
    save(tmp_path, OLD)

    def act() -> None:
        save(tmp_path, NEW)
        save(tmp_path, OLD)

    whole_reads = 0
    with beside(act):
        end = time.monotonic() + 20
        while whole_reads < 50 and time.monotonic() < end:
            before = whole.still(tmp_path, NAMES)
            try:
                read = found(tmp_path)
            except FileNotFoundError:  # a name led to a folder that was on its way out
                continue
            if whole.still(tmp_path, NAMES) == before:
                assert read in (OLD, NEW)
                whole_reads += 1
    assert whole_reads == 50


def test_a_link_that_no_writer_made_costs_nothing(tmp_path: Path) -> None:
    """What a pointer leads to is removed: only a temporary folder of the same folder may be that."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    for k, target in enumerate(("../other", str(other), ".old.000000000000.tmp")):
        folder.mkdir()
        other.mkdir(exist_ok=True)
        (other / "config.json").write_bytes(b"precious")
        (folder / f".now.00000000000{k}.tmp").symlink_to(target)
        (folder / "config.json").symlink_to(f".now.00000000000{k}.tmp/config.json")
        if target.startswith(".old"):
            (folder / target).symlink_to("../other")
        save(folder, NEW)
        assert whole.clean(folder) == []
        assert found(folder) == NEW
        assert sorted(os.listdir(folder)) == sorted(NEW)
        assert (other / "config.json").read_bytes() == b"precious"
        assert (other / "config.json").stat().st_nlink == 1
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_names_go_in_the_same_step(tmp_path: Path) -> None:
    def act(folder: Path) -> None:
        with whole.staging(folder, without=("notes.txt", "config.json", "never.txt")) as place:
            for name in NAMES[:2]:
                (place / name).write_bytes(NEW[name])

    new = {name: NEW[name] for name in NAMES[:2]}
    folder, k = tmp_path / "0", 0
    folder.mkdir()
    for name, content in OLD.items():
        (folder / name).write_bytes(content)
    while killed_at(k, partial(act, folder)):
        assert found(folder) in (OLD, new), k
        whole.clean(folder)
        assert found(folder) in (OLD, new), k
        k += 1
        folder = tmp_path / str(k)
        folder.mkdir()
        for name, content in OLD.items():
            (folder / name).write_bytes(content)
    assert found(folder) == new
    assert sorted(os.listdir(folder)) == sorted(new)
