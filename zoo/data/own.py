"""What data modules of users' files share: files of class folders, classes of a table, and held-out parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.data.audio import Part, split_off
from zoo.data.checks import DataError, warn_once
from zoo.data.delimited import TableFile, listed
from zoo.data.lists import split_note
from zoo.data.walk import Files, check_spelling, class_folders, parts, scan, scan_like
from zoo.support.quoting import is_printable, shown

__all__ = ["check_classes", "class_files", "classes_of", "hold_out", "read_plain"]

_MAX_NAME = 200  # characters of a class name
Parts = dict[Any, tuple[list[Any], list[int]]]  # by part: samples and targets


def read_plain(path: Path, limit: int, what: str) -> str:
    """The content of a text file.

    Args:
        path: The file, UTF-8, with or without a byte order mark.
        limit: Most bytes.
        what: What the file is called in messages, with its article.

    Raises:
        DataError: It is not a regular file, too large, not UTF-8, or has zero bytes.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path} cannot be read as {what}: it is not a regular file")
        if path.stat().st_size > limit:
            raise DataError(f"{path} is larger than {limit // 10**6} MB, which is too large for {what}")
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read as {what} ({error.strerror or error})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8, so it cannot be read as {what} in "
            "UTF-8: save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a zero byte, so it cannot be read as {what}")
    return text


# ---- classes -------------------------------------------------------------------------------------------------


def class_files(root: Path, files: Files) -> tuple[list[str], Parts]:
    """Names of the class folders; paths and targets of each part that has a folder, the training part first.

    Raises:
        DataError: A folder is missing or empty, or the parts have different classes.
    """
    where = parts(root)
    names = class_folders(where["train"], files)
    found: Parts = {"train": scan(where["train"], names, files)}
    for part in [part for part in where if part != "train"]:
        found[part] = scan_like(where[part], where["train"], names, files)
    return names, found


def classes_of(
    table: TableFile, column: int, lines: Sequence[int], cells: Sequence[str], names: Sequence[str] = ()
) -> tuple[list[str], list[int]]:
    """Names of the classes in a column of a table, sorted (numbers by their value), and the class of each row.

    Args:
        table: The table.
        column: Index of the column, for messages.
        lines: Line number of each row.
        cells: The column's cells.
        names: The classes, if another table has told them.

    Raises:
        DataError: A cell is empty, cannot be the name of a class, or is none of `names`; two classes look the same; or
            most rows have a class of their own.
    """
    where = f"column {table.name(column)}"
    for line, cell in zip(lines, cells, strict=True):
        if problem := _problem(cell, names):
            raise DataError(f"{table.path}, line {line}, {where}: {problem}")
    if not names:
        names = _sorted(set(cells), f"{table.path}, {where}")
        if len(names) > max(2, len(cells) // 2):
            raise DataError(
                f"{table.path}, {where}: {len(names)} classes for {len(cells)} rows, such as {listed(names, 3)}; a "
                "class needs several rows: name another column"
            )
        check_spelling(names, f"{table.path}, {where}", "classes")
    place = {name: i for i, name in enumerate(names)}
    return list(names), [place[cell] for cell in cells]


def _problem(cell: str, names: Sequence[str]) -> str | None:
    """Why a cell cannot be a class; None if it can."""
    if not cell:
        return "there is no class: fill it in, or remove the row"
    if len(cell) > _MAX_NAME:
        return f"{cell[:40]!r}... has more than {_MAX_NAME} characters, which is no name of a class"
    if not is_printable(cell):
        return f"the class {cell!r} has characters that cannot be printed"
    return f"the class {cell!r} is none of the training part: {listed(names)}" if names and cell not in names else None


def _sorted(classes: set[str], where: str) -> list[str]:
    """Classes sorted by name, or by value if all are numbers."""
    try:
        values = {name: float(name) for name in classes}
    except ValueError:
        return sorted(classes)
    if not all(map(math.isfinite, values.values())):
        return sorted(classes)
    names = sorted(classes, key=lambda name: (values[name], name))
    for one, other in itertools.pairwise(names):
        if values[one] == values[other]:
            raise DataError(f"{where}: the classes {one!r} and {other!r} are the same number: write it in one way")
    return names


def check_classes(
    parts: Mapping[Any, tuple[Sequence[Any], Sequence[int]]], names: Sequence[str], where: object
) -> None:
    """Check that there are two classes, all of them in the training part; warn if another part lacks one.

    Args:
        parts: Samples and targets of each part.
        names: Names of the classes.
        where: The files, for messages.

    Raises:
        DataError: There is only one class, or one has no sample for training.
    """
    if len(names) < 2:
        raise DataError(f"{where}: the only class is {shown(names[0], keep='')!r}; two are needed to tell them apart")
    for part, (_, targets) in parts.items():
        if lost := [shown(names[i], keep="") for i in sorted(set(range(len(names))) - set(targets))]:
            if part == "train":
                raise DataError(f"{where}: nothing is left to train on of {listed(lost, 5)}")
            warn_once(f"{where}: the {part} part has nothing of {listed(lost, 5)}")


def hold_out(parts: Parts, test_share: float, val_share: float) -> list[str]:
    """Take a test and a validation part from the training part where there is none; lines that say so."""
    shares: tuple[tuple[Part, float], ...] = (("test", test_share), ("val", val_share))
    notes = []
    for name, share in shares:
        if name not in parts:
            split_off(parts, name, share)
            notes += [split_note(name, share)] if name in parts else []
    return notes
