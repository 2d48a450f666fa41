"""The C loops are compiled once a machine, kept safely, and told about where they cannot be had."""

from __future__ import annotations

import ctypes
import logging
import shutil
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.ops import building, native

COMPILER = next((found for found in map(shutil.which, ("cc", "gcc", "clang")) if found), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

SOURCE = """
#ifdef _OPENMP
int threads(void) { return 2; }
#else
int threads(void) { return 1; }
#endif
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ZOO_NATIVE", "ZOO_NATIVE_ARCH", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of loops."""
    folder = tmp_path / "loops"
    folder.mkdir()
    (folder / "loops.c").write_text(SOURCE)
    return folder


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Put a compiler in place that keeps count; returns how often it has compiled."""
    log, script = tmp_path / "log", tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo "$*" >> {log}; sleep 0.1;; esac\nexec {COMPILER} "$@"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def refusing(tmp_path: Path, flag: str) -> str:
    """A compiler that knows no such flag."""
    script = tmp_path / "refusing"
    refusal = f'echo "loops.c: note" >&2; echo "error: unknown flag {flag}" >&2; exit 1'
    script.write_text(
        f'#!/bin/sh\nfor a in "$@"; do [ "$a" = "{flag}" ] && {{ {refusal}; }}; done\nexec {COMPILER} "$@"\n'
    )
    script.chmod(0o700)
    return str(script)


@needs_compiler
def test_it_compiles_once(source: Path, compiled: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    first, path = building.build(source)
    assert path is not None
    assert path.parent == building.cache_folder()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert building.build(source)[1] == path
    assert (first.threads(), compiled()) == (2, 1)
    monkeypatch.setenv("ZOO_NATIVE_ARCH", "x86-64" if "x86" in building.platform.machine() else "armv8-a")
    assert building.build(source)[1] != path
    (source / "loops.c").write_text(SOURCE + "int more(void) { return 3; }")
    assert building.build(source)[0].more() == 3
    (source / "other.c").write_text('#include "less.h"\nint less(void) { return LESS; }')
    for number in (4, 5):  # what is included counts too
        (source / "less.h").write_text(f"#define LESS {number}")
        assert building.build(source)[0].less() == number
    assert compiled() == 7
    assert {file.suffix for file in path.parent.iterdir()} == {".so", ".lock"}


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_damaged_file_is_compiled_again(source: Path, compiled: Callable[[], int], damage: bytes | None) -> None:
    folder = building._private_folder(building.cache_folder())
    path = building._compiled(source, building._compiler(), ["-fPIC"], folder)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + b"x" * 100 if damage is None else damage)
    again = building._compiled(source, building._compiler(), ["-fPIC"], folder)
    assert ctypes.CDLL(str(again)).threads() == 1
    assert compiled() == 2


@needs_compiler
def test_those_that_start_together_compile_once(source: Path, compiled: Callable[[], int]) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = {path for _, path in pool.map(building.build, [source] * 4)}
    assert len(paths) == 1
    assert compiled() == 1


@needs_compiler
def test_nobody_waits_for_ever(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_TIMEOUT", 2)
    folder = building._private_folder(building.cache_folder())
    flags = [*building.FLAGS, "-march=native", "-fopenmp"]
    with building.FileLock(folder / f"{building._key(source, building._compiler(), flags)}.lock"):
        loops, path = building.build(source)
    assert path is None
    assert loops.threads() == 2


@needs_compiler
def test_without_openmp_one_thread_does_all(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", refusing(tmp_path, "-fopenmp"))
    assert building.build(source)[0].threads() == 1
    monkeypatch.delenv("CC")
    (source / "loops.c").write_text("int absent(void);\n" + SOURCE.replace("return 2", "return absent()"))
    assert building.build(source)[0].threads() == 1  # compiled with it, but not loaded


@needs_compiler
def test_the_loops_themselves_need_no_openmp() -> None:
    assert COMPILER is not None
    command = [COMPILER, *building.FLAGS, "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-Werror"]
    files = map(str, sorted(native.SOURCES.glob("*.c")))
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@needs_compiler
@pytest.mark.parametrize("place", ["open", "file", "nowhere"])
def test_where_no_folder_is_safe_one_for_the_time_being_is_used(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = building.cache_folder()
    if place == "open":
        folder.mkdir(parents=True)
        folder.chmod(0o770)
    elif place == "file":
        folder.parent.write_text("")
    else:
        monkeypatch.setenv("ZOO_CACHE", "/proc/none")
    loops, path = building.build(source)
    assert (loops.threads(), path) == (2, None)
    if place == "open":
        assert not list(folder.iterdir())
        monkeypatch.setattr(building.os, "getuid", lambda: folder.stat().st_uid + 1)
        folder.chmod(0o700)
        assert building.build(source)[1] is None  # somebody else's


@needs_compiler
def test_what_fails_is_told_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "loops.c").write_text("int f(void) { return unknown; }")
    with caplog.at_level(logging.INFO):
        assert building.load(source) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "undeclared" in caplog.text
    assert "ZOO_NATIVE=0" in caplog.text
    monkeypatch.setenv("ZOO_NATIVE", "require")
    with pytest.raises(building.NativeError, match=r"error: .*undeclared"):
        building.load(source)


def test_what_is_wanted(source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert building.load(source) is None
    assert "no compiler 'no-such-compiler -O1'" in caplog.text
    caplog.clear()
    monkeypatch.setenv("ZOO_NATIVE", "0")
    assert building.load(source) is None
    assert not caplog.records
    monkeypatch.setenv("ZOO_NATIVE", "yes")
    with pytest.raises(RuntimeError, match="may be 0, 1 or require"):
        building.load(source)


@needs_compiler
def test_building_ahead_of_time(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "SOURCES", source)
    assert main(["build"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.is_file()
    path.parent.chmod(0o777)
    assert main(["build"]) == 1
    assert "cannot be used" in capsys.readouterr().err
    (source / "loops.c").write_text("wrong")
    assert main(["build"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
