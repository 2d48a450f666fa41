"""Numeric arrays from users' files: `.npy`, or text with rows of numbers; point clouds also as `.csv` and `.ply`."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo.data.checks import DataError, remedy
from zoo.data.delimited import listed, read_table
from zoo.data.own import read_plain

__all__ = ["Cloud", "read_array", "read_cloud"]

_MAX_BYTES, _MAX_TEXT = 200_000_000, 20_000_000
_MAX_VALUE = 1e30  # whose squares are no infinity in float64, and which float32 holds


def read_array(path: Path, wanted: str, dtype: Any = np.float32) -> np.ndarray:
    """Read an array of finite numbers: a `.npy` file of any shape, or a text file with rows of equal length.

    Args:
        path: The file; at most 200 MB, text at most 20 MB.
        wanted: What the file should contain, for the error message.
        dtype: Type of the numbers.

    Raises:
        DataError: The file is damaged, too large, or holds anything but finite numbers.
    """
    binary = path.suffix.lower() == ".npy"
    try:
        if path.stat().st_size > (limit := _MAX_BYTES if binary else _MAX_TEXT):
            raise DataError(f"{path} is larger than {limit // 10**6} MB: split it first")
        if binary:  # memory-mapped: a forged header cannot allocate more than the file has
            if problem := _header_problem(path):
                raise DataError(f"{path} cannot be read as {wanted}: {problem}")
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            values = np.loadtxt(path, ndmin=2, encoding="utf-8")
    except Exception as error:  # numpy's readers raise errors of many kinds
        if isinstance(error, DataError):
            raise
        if isinstance(error, PermissionError):
            raise DataError(f"{path} cannot be read as {wanted} ({error.strerror}): {remedy(error)}") from None
        why = "its header is damaged" if binary else " ".join(str(error).split())[:100]
        raise DataError(f"{path} cannot be read as {wanted} ({why})") from None
    if values.dtype.kind not in "fiu":
        raise DataError(f"{path} cannot be read as {wanted}: its type is {values.dtype!s:.60}, not integers or floats")
    with np.errstate(over="ignore"):
        found = np.array(values, dtype)
    if np.isfinite(found).all():
        return found
    raise DataError(f"{path} cannot be read as {wanted}: it holds values that are not finite numbers")


def _header_problem(path: Path) -> str | None:
    """Why the header of a `.npy` file cannot be followed; None if nothing is wrong there.

    Raises:
        OSError: The file cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(6) != np.lib.format.MAGIC_PREFIX:  # of a pickle numpy tells how to trust it
            return "it is no .npy file (numpy.save writes one)"
        file.seek(0)
        try:
            with warnings.catch_warnings(action="ignore"):  # the header is parsed as Python literals
                first = np.lib.format.read_magic(file) == (1, 0)
                reader = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, _, dtype = reader(file)
            if min(shape, default=0) < 0:
                return "its header is damaged"
        except Exception:  # the parser of literals raises errors of many kinds
            return "its header is damaged"
        if dtype.hasobject or not dtype.itemsize:
            return f"its type is {dtype!s:.60}, not integers or floats"
        there = path.stat().st_size - file.tell()
    return "it is shorter than its header says" if math.prod(shape) * dtype.itemsize > there else None


# ---- point clouds --------------------------------------------------------------------------------------------

_FIRST = ("x", "y", "z")


class Cloud(NamedTuple):
    """A point cloud.

    Attributes:
        rows: One for a point, its coordinates first (P, C), float64.
        further: What the file calls the values after x, y and z, in small letters; None if it names none.
    """

    rows: np.ndarray
    further: list[str] | None


def read_cloud(path: Path) -> Cloud:
    """Read a point cloud: one row for a point; x, y and z are moved to the front if the file names its columns.

    Args:
        path: A `.npy` array; text with numbers between blanks, commas, semicolons or tabs, with or without a line of
            names (`.xyz`, `.txt`, `.csv`, `.tsv`); or an ASCII `.ply`, of which the vertices are read.

    Raises:
        DataError: The file is damaged, too large, or holds anything but rows of finite numbers, or its names lack x, y
            or z; of a text the message names the line.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        values = read_array(path, "a point cloud", np.float64)
        if not (np.abs(values) <= _MAX_VALUE).all():
            raise DataError(f"{path} cannot be read as a point cloud: it holds values above {_MAX_VALUE:g}")
        return Cloud(values, None)
    if suffix == ".ply" and path.is_file():
        with path.open("rb") as file:
            if b"\nformat binary" in file.read(200):
                raise DataError(f"{path} is a binary PLY file: save it as ASCII")
    text = read_plain(path, _MAX_TEXT, "a point cloud")
    if suffix == ".ply":
        return _ply(path, text)
    if suffix in (".csv", ".tsv"):
        table = read_table(path, what="point cloud")
        return _in_order(path, table.numbers(range(table.width), limit=_MAX_VALUE), table.header)
    return _in_order(path, *_numbers(path, enumerate(text.splitlines(), 1)))


def _in_order(path: Path, values: np.ndarray, names: Sequence[str] | None) -> Cloud:
    """The columns of a text in the order x, y, z, and then as they are; without names, as they are."""
    if names is None:
        return Cloud(values, None)
    plain = [name.strip().lstrip("/").casefold() for name in names]  # some programs write //X Y Z
    if len(plain) < len(_FIRST):
        return Cloud(values, None)  # refused for its width
    if any(plain.count(name) != 1 for name in _FIRST) or len(set(plain)) < len(plain):
        raise DataError(
            f"{path} names its columns {listed(names)}: a point cloud needs x, y and z there, and every name once, or "
            "no line of names"
        )
    if values.shape[1:] != (len(plain),):
        raise DataError(f"{path} has {len(plain)} names ({listed(names)}) for columns, and rows of {values.shape[1]}")
    further = [name for name in plain if name not in _FIRST]
    return Cloud(values[:, [plain.index(name) for name in (*_FIRST, *further)]], further)


def _numbers(path: Path, lines: Iterable[tuple[int, str]]) -> tuple[np.ndarray, list[str] | None]:
    """The numbers of numbered lines, (rows, columns), between semicolons, else commas, else blanks, and the line of
    names above them if there is one; what follows a # is a comment.
    """
    values, width, names = array("d"), 0, None
    for number, line in lines:
        line = line.partition("#")[0].strip()
        cells = line.split(next((mark for mark in ";," if mark in line), None))
        if cells and not width and names is None and not any(map(_is_number, cells)):
            names = cells
            continue
        if width and cells and len(cells) != width:
            raise DataError(f"{path}, line {number}: {len(cells)} numbers where the lines before have {width}")
        width = width or len(cells)
        for cell in cells:
            try:
                values.append(float(cell))
            except ValueError:
                raise DataError(f"{path}, line {number}: {cell[:40]!r} is not a number") from None
            if not abs(values[-1]) <= _MAX_VALUE:
                why = "too large for a coordinate" if math.isfinite(values[-1]) else "not a finite number"
                raise DataError(f"{path}, line {number}: {cell[:40]!r} is {why}")
    rows = np.frombuffer(values, np.float64).reshape(-1, width or len(names or "-"))
    return rows.copy(), names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _ply(path: Path, text: str) -> Cloud:
    """The vertices of an ASCII PLY file; x, y and z are moved to the front."""
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if line.strip() == "end_header"), None)
    words = [line.split() for line in lines[: head or 0]]
    if head is None or words[:1] != [["ply"]]:
        raise DataError(f"{path} cannot be read as a point cloud: it has no header of a PLY file")
    words = [line for line in words[1:] if line and line[0] not in ("comment", "obj_info")]
    if words[:1] != [["format", "ascii", "1.0"]]:
        raise DataError(f"{path} is no ASCII PLY file: save it as ASCII")
    elements = [i for i, line in enumerate(words) if line[0] == "element"]
    element = words[elements[0]] if elements else []
    if len(element) != 3 or element[1] != "vertex" or not element[2].isdecimal() or len(element[2]) > 9:
        raise DataError(f"{path}: the first element of the PLY header must be the vertices (element vertex N)")
    own = words[elements[0] + 1 : elements[1] if len(elements) > 1 else None]
    if odd := next((line for line in own if len(line) != 3 or line[0] != "property"), None):
        raise DataError(f"{path}: {' '.join(odd)[:60]!r} in the PLY header is no property of one number")
    names, count = [line[2] for line in own], int(element[2])
    if not set(_FIRST) <= set(names) or len(set(names)) < len(names):
        raise DataError(f"{path}: the vertices need the properties x, y and z, each once")
    rows = _rows_of(path, words, elements)
    more = [number for number, line in enumerate(lines[head + 1 :], head + 2) if line.strip()][rows:]
    if more:
        raise DataError(f"{path}, line {more[0]}: {len(more):,} lines more than the {rows:,} that its header has")
    values, _ = _numbers(path, enumerate(lines[head + 1 : head + 1 + count], head + 2))
    if values.shape != (count, len(names)):
        found = f"{len(values)} vertices of {values.shape[1]} numbers"
        raise DataError(f"{path}: {found}, where its header has {count} of {len(names)}")
    return _in_order(path, values, names)


def _rows_of(path: Path, words: Sequence[Sequence[str]], elements: Sequence[int]) -> int:
    """Lines after the header of an ASCII PLY file: one for each of its elements."""
    counts = [words[i][2:] for i in elements]
    if odd := next((words[i] for i, n in zip(elements, counts, strict=True) if not _is_count(n)), None):
        raise DataError(f"{path}: {' '.join(odd)[:60]!r} in the PLY header has no number of elements")
    return sum(int(n[0]) for n in counts)


def _is_count(words: Sequence[str]) -> bool:
    return len(words) == 1 and words[0].isdecimal() and len(words[0]) <= 9
