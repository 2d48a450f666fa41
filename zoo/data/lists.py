"""Files and their classes: class folders, or a list, which is a table with a column of file names and one of classes.

>>> listing = read_list(Path("photos.csv"), IMAGES, {"file": "file", "class": "species", "group": "camera"})
>>> names, parts, notes = divided(listing, {"test": 0.0, "val": 0.1})
>>> parts["train"]                             # paths, and the index of each one's class in `names`
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.data.checks import DataError, extends, warn_once
from zoo.data.delimited import listed, read_table
from zoo.data.image import ImageDataModule, Part, Share
from zoo.data.sampling import stratified_split
from zoo.data.sources import SPLIT_SEED
from zoo.data.walk import PARTS, Files, check_spelling, class_folders, parts, scan, scan_like
from zoo.support.values import leads_out

__all__ = ["LIST_WORDS", "FileParts", "Listing", "divided", "group_split", "is_list", "read_list"]

#: Arguments of a module that are about lists.
LIST_WORDS = ("folder", "file_column", "class_column", "part_column", "group_column", "test_fraction")

SUFFIXES = (".csv", ".tsv", ".txt")
Found = tuple[list[str], list[int]]  # paths, and the index of each one's class
_PROBED = 1000  # files that are opened before training; of more, as many evenly spaced ones


def is_list(path: Path) -> bool:
    """Whether the user's data is a list of files, not a folder."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


@dataclass(frozen=True)
class Listing:
    """Rows of a list, in its order.

    Attributes:
        path: The list.
        lines: Line of each row.
        files: File of each row.
        columns: Further cells by their role (`class`, `part`, `group`, `task`), a list each.
        names: Name of each role's column.
    """

    path: Path
    lines: list[int]
    files: list[str]
    columns: dict[str, list[str]]
    names: dict[str, str]

    def place(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def only(self, rows: Sequence[int]) -> Listing:
        """The listing of some rows."""
        columns = {role: [cells[i] for i in rows] for role, cells in self.columns.items()}
        return Listing(self.path, [self.lines[i] for i in rows], [self.files[i] for i in rows], columns, self.names)


def read_list(
    path: Path, kind: Files, columns: Mapping[str, str | None], folder: Path | None = None, whose: str = "data."
) -> Listing:
    """Read a list of files, each of which must exist.

    A file that is listed twice alike counts once.

    Args:
        path: The list, see :func:`zoo.data.delimited.read_table`; its first line names the columns.
        kind: Kind of the files.
        columns: Name of the column of each role: `file`, and optionally `class`, `part`, `group` and `task`.
        folder: Where relative names start, and out of which no name may lead; None: the folder of the list.
        whose: What comes before the names of options in messages.

    Raises:
        DataError: A column is missing, a cell empty, a file missing, of another kind or outside the folder, or a file
            is listed twice with different cells; the message names the line.
    """
    home = path.parent if folder is None else folder
    if not home.is_dir():
        raise DataError(f"there is no folder {home}, where the names of {path} start")
    table = read_table(path, header=True, what="list")
    given = {role: name for role, name in columns.items() if name is not None}
    missing = next(((role, name) for role, name in given.items() if name not in (table.header or ())), None)
    if missing:
        role, name = missing
        raise DataError(
            f"{path} has no column {name!r}; its columns are {listed(table.header or [])}: name the one of the {role} "
            f"with {f'--{role}-column' if whose == '--' else f'{whose}{role}_column=...'}"
        )
    lines, cells = table.cells([table.column(name) for name in given.values()])
    found = Listing(path, lines, [], dict(zip(given, cells, strict=True)), given)
    if not lines:
        raise DataError(f"{path} has no rows below its header")
    _check_cells(found)
    files = [_file_of(found, row, name, home, kind) for row, name in enumerate(found.columns["file"])]
    gone = [row for row, file in enumerate(files) if not os.path.isfile(file)]
    if gone:
        more = f", one of {len(gone):,} such files" if len(gone) > 1 else ""
        raise DataError(f"{found.place(gone[0])}: there is no file {files[gone[0]]}{more}")
    rest = {role: values for role, values in found.columns.items() if role != "file"}
    return _without_twins(Listing(path, lines, files, rest, given))


def _check_cells(listing: Listing) -> None:
    for role, values in listing.columns.items():
        if (row := next((i for i, cell in enumerate(values) if not cell), None)) is not None:
            raise DataError(f"{listing.place(row)}: {listing.names[role]} is empty")
    for row, cell in enumerate(listing.columns.get("part", [])):
        part = next((part for part, words in PARTS.items() if cell.lower() in (*words, part, f"{part}ing")), None)
        if part is None:
            raise DataError(f"{listing.place(row)}: {listing.names['part']} is {cell!r:.60}, not train, val or test")
        listing.columns["part"][row] = part


def _file_of(listing: Listing, row: int, name: str, home: Path, kind: Files) -> str:
    try:
        outside = leads_out(home / name, home)
    except (OSError, ValueError) as error:
        raise DataError(f"{listing.place(row)}: {name!r:.100} is no name of a file ({error})") from None
    if outside:
        raise DataError(
            f"{listing.place(row)}: {name!r:.100} leads out of {home}: list files in it, or give another folder=..."
        )
    if not name.lower().endswith(kind.suffixes):
        raise DataError(f"{listing.place(row)}: {name!r:.100} is no {kind.one} ({' '.join(kind.suffixes)})")
    return str(home / name)


def _without_twins(listing: Listing) -> Listing:
    """The rows without repeated ones.

    Raises:
        DataError: A file is listed twice, with different cells.
    """
    first: dict[str, int] = {}
    rows = []
    for row, file in enumerate(listing.files):
        before = first.setdefault(os.path.realpath(file), row)
        if before == row:
            rows.append(row)
            continue
        for role, cells in listing.columns.items():
            if cells[row] != cells[before]:
                raise DataError(
                    f"{listing.place(row)}: {file} has the {role} {cells[row]!r:.60}, and {cells[before]!r:.60} in "
                    f"line {listing.lines[before]}"
                )
    if len(rows) < len(listing.files):
        warn_once(f"{listing.path}: {len(listing.files) - len(rows)} rows repeat others and count once")
        return listing.only(rows)
    return listing


# ---- parts -------------------------------------------------------------------------------------------------


def divided(listing: Listing, shares: Mapping[str, float]) -> tuple[list[str], dict[Part, Found], list[str]]:
    """Divide the rows of a list into parts, as its column says, or else by shares of the training rows.

    Args:
        listing: With classes, and optionally parts and groups. No group is in two parts.
        shares: Share of the training rows for `test` and `val`, where the list has none; in [0, 1).

    Returns:
        Names of the classes, sorted; paths and classes of each part; and how they were divided, in lines.

    Raises:
        DataError: There are no training rows, a class or group is not in the parts where it must be.
    """
    labels, groups = listing.columns["class"], listing.columns.get("group")
    names = sorted(set(labels))
    check_spelling(names, f"{listing.path}, {listing.names['class']}", "classes")
    number = {name: i for i, name in enumerate(names)}
    targets = np.array([number[label] for label in labels])
    where = np.array(listing.columns.get("part", ["train"] * len(labels)), object)
    notes = []
    if "part" in listing.columns:
        _check_parts(listing, where)
        notes.append(f"parts by the column {listing.names['part']}")
    if groups is not None:
        notes.append(f"no {listing.names['group']} is in two parts")
    for part, share in shares.items():
        if part in where or not share:
            continue
        rows = np.flatnonzero(where == "train")
        if groups is None:
            chosen = stratified_split(targets[rows], share, SPLIT_SEED)[1]
        else:
            chosen = group_split(targets[rows], np.array(groups, object)[rows], share, SPLIT_SEED)
        where[rows[chosen]] = part
        if len(chosen):
            notes.append(split_note(part, share, listing.names.get("group")))
        elif groups is not None:
            notes.append(_undivided(part, [groups[i] for i in rows], listing.names["group"]))
    found: dict[Part, Found] = {}
    for part in ("train", "val", "test"):
        rows = np.flatnonzero(where == part)
        if len(rows):
            found[part] = [listing.files[i] for i in rows], targets[rows].tolist()  # type: ignore[index]
    return names, found, notes


def split_note(part: str, share: float, group: str | None = None) -> str:
    """How a part was split off, for a report."""
    what = f"whole groups of {group}, about" if group else "of each class,"
    return f"{part}: {what} {share:.0%} of the training part, the same for every seed"


def _undivided(part: str, groups: Sequence[str], name: str) -> str:
    """Why no group could be kept for a part."""
    if len(set(groups)) == 1:
        return f"no {part} part: all rows are of one {name}, {groups[0]!r:.60}, and no {name} is in two parts"
    return f"no {part} part: without any one {name}, training would lose a class"


def _check_parts(listing: Listing, where: np.ndarray) -> None:
    """Raise DataError unless all parts have the same classes, and each group one part."""
    if "train" not in where:
        raise DataError(f"{listing.path}: no row of {listing.names['part']} is train")
    held = {part: set(np.array(listing.columns["class"], object)[where == part]) for part in set(where)}
    for row, label in enumerate(listing.columns["class"]):
        without = next((part for part in sorted(held) if label not in held[part]), None)
        if without:
            raise DataError(
                f"{listing.place(row)}: the class {label!r:.60} is in the {where[row]} part and not in the {without} "
                "part; both need the same classes"
            )
    first: dict[str, int] = {}
    for row, group in enumerate(listing.columns.get("group", [])):
        before = first.setdefault(group, row)
        if where[row] != where[before]:
            raise DataError(
                f"{listing.place(row)}: {listing.names['group']} {group!r:.60} is in the {where[row]} part, and in the "
                f"{where[before]} part in line {listing.lines[before]}"
            )


def group_split(targets: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices (n,) of whole groups that make up about a fraction of the samples, in a random order of the groups.

    A group is left where it is if it would be more than is left to take, or holds all that remains of a class. If none
    is small enough, the smallest that may go is taken.

    Args:
        targets: Class of each sample (N,).
        groups: Group of each sample (N,).
        fraction: Share of the samples, in [0, 1).
        seed: Seed of the order.
    """
    members = [np.flatnonzero(groups == name) for name in sorted(set(groups.tolist()))]
    room, left = fraction * len(targets), np.bincount(targets)
    chosen: list[np.ndarray] = []

    def counts(rows: np.ndarray) -> np.ndarray:
        return np.bincount(targets[rows], minlength=len(left))

    def may_go(rows: np.ndarray) -> bool:
        return not ((counts(rows) > 0) & (counts(rows) == left)).any()

    for i in np.random.RandomState(seed).permutation(len(members)):
        if len(members[i]) <= room and may_go(members[i]):
            chosen.append(members[i])
            room, left = room - len(members[i]), left - counts(members[i])
    if not chosen and room > 0:
        chosen = sorted(filter(may_go, members), key=len)[:1]
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


# ---- the base of the modules ---------------------------------------------------------------------------------


class FileParts(ImageDataModule):
    """Base of data whose samples are files with a class: class folders, or a list.

    Args:
        path: The folder, or a list of files: a CSV or TSV file whose first line names its columns.
        folder: Of a list: where relative names start, and out of which none may lead; None: the list's own.
        file_column: Of a list: column of the names.
        class_column: Of a list: column of the classes.
        part_column: Of a list: column that says `train`, `val` or `test`; None: the parts are split off.
        group_column: Of a list: column of groups (a person, a place), none of which is in two parts; None: no groups.
        val_fraction: Share of the training files used for validation if there is no validation part.
        test_fraction: Share of the training files kept for testing if there is no test part.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.
    """

    kind: ClassVar[Files]

    @extends(ImageDataModule)
    def __init__(
        self,
        path: str | Path,
        folder: str | Path | None = None,
        file_column: str = "file",
        class_column: str = "class",
        part_column: str | None = None,
        group_column: str | None = None,
        val_fraction: Share = 0.1,
        test_fraction: Share = 0.0,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.path = Path(path).expanduser()
        self.folder = None if folder is None else Path(folder).expanduser()
        self.columns = {"file": file_column, "class": class_column, "part": part_column, "group": group_column}
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self._class_names: list[str] = []
        self._found: dict[Part, Found] = {}

    @functools.cached_property
    def _divided(self) -> tuple[list[str], dict[Part, Found], list[str]] | None:
        """Classes, parts and notes of a list, read once; None for a folder."""
        if not is_list(self.path):
            return None
        listing = read_list(self.path, self.kind, self.columns, self.folder)
        return divided(listing, {"test": self.test_fraction, "val": self.val_fraction})

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, by target: the class folders, or the classes of the list, sorted.

        Raises:
            DataError: If the data is missing or has no classes.
        """
        if self._divided is not None:
            return list(self._divided[0])
        if not self._class_names:
            self._class_names = class_folders(parts(self.path)["train"], self.kind)
        return list(self._class_names)

    def part(self, name: Part) -> Found | None:
        """Paths and classes of a part, listed once; None if there is none. Training files are listed only if needed."""
        if self._divided is not None:
            return self._divided[1].get(name)
        if name not in self._found:
            where = parts(self.path)
            if name != "train" and name in where:
                self._found[name] = scan_like(where[name], where["train"], self.class_names, self.kind)
            elif name == "train" or (self.test_fraction if name == "test" else self.val_fraction):
                self._split(where)
        return self._found.get(name)

    def _split(self, where: Mapping[str, Path]) -> None:
        """List the training files, and split off the parts that have no folder."""
        if "train" in self._found:
            return
        paths, targets = scan(where["train"], self.class_names, self.kind)
        left = np.arange(len(paths))
        shares: dict[Part, float] = {"test": self.test_fraction, "val": self.val_fraction}
        for part, share in shares.items():
            if part not in where and share:
                first, second = stratified_split([targets[i] for i in left], share, SPLIT_SEED)
                if len(second):
                    self._found[part] = [paths[i] for i in left[second]], [targets[i] for i in left[second]]
                left = left[first]
                self.notes.append(split_note(part, share))
        self._found["train"] = [paths[i] for i in left], [targets[i] for i in left]

    def describe(self) -> list[str]:
        """That of the base, and how the parts of a list were divided."""
        lines = super().describe()
        return [*lines, *self._divided[2]] if self._divided is not None else lines

    def check_files(self) -> None:
        """Open a file each, up to a thousand evenly spaced ones, before training begins.

        Raises:
            DataError: Some cannot be read; the message names the first ones.
        """
        paths = [path for name in ("train", "val", "test") for path in (self.part(name) or ([], []))[0]]
        step = max(1, len(paths) // _PROBED)
        problems = [problem for path in paths[::step] if (problem := self.problem_of(path))]
        if problems:
            checked = len(paths[::step])
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise DataError(f"{len(problems)} of {checked:,} files cannot be read: {'; '.join(problems[:3])}{more}")

    def problem_of(self, path: str) -> str | None:
        """Why a file cannot be read, by a look at its beginning; None if nothing is wrong there."""
        return None
