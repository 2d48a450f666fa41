"""Delimited text tables (CSV, TSV), read by the same code for training, evaluation and prediction.

>>> table = read_table("wine.csv")            # detects separator, encoding and header line
>>> table.header, table.separator             # ["alcohol", ...], ";"
>>> values = table.numbers([0, 2])            # (rows, 2) float64; an error names line and column of a bad cell

Ambiguous files are refused: every row must have the same number of cells, and all cells the same decimal mark.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import ClassVar, NoReturn

import numpy as np

from zoo.data.checks import DataError
from zoo.support.quoting import is_printable

__all__ = ["SEPARATORS", "Match", "TableFile", "is_missing", "is_number", "is_time", "read_table"]

#: Supported separators, in order of preference where several fit.
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
MAX_BYTES = 200_000_000
_SAMPLE = 200  # rows used to detect the separator
_MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "nat"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_COMMA = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?", re.ASCII)
_LONG = re.compile(r"[+-]?\d{4,}", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)  # 1,234: a thousand or a decimal comma
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark begins with UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = {
    b"PK\x03\x04": "a spreadsheet or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet",
    b"\x1f\x8b": "compressed",
    b"PAR1": "a Parquet file",
    b"SQLite": "a data base",
}


@dataclass(frozen=True)
class Match:
    """Requested columns found in a file.

    Attributes:
        places: Index of each column, in the requested order.
        notes: Messages for the user: names spelled differently, columns that are not used.
    """

    places: list[int]
    notes: list[str]


@dataclass(frozen=True)
class TableFile:
    """A delimited text file of known layout; rows are read on demand.

    Attributes:
        path: The file.
        separator: Character between cells.
        encoding: Encoding of the text.
        header: Names of the columns, stripped; None if the first line holds values.
        width: Number of columns.
        skip: Lines before the header.
    """

    path: Path
    separator: str
    encoding: str
    header: list[str] | None
    width: int
    skip: int = 0
    unit: ClassVar[str] = "line"  # what the rows are numbered by

    def where(self, line: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}, {self.unit} {line}"

    def name(self, column: int) -> str:
        """Name of a column for messages."""
        named = self.header[column] if self.header else ""
        return named or f"column {column + 1}"

    def column(self, name: str) -> int:
        """Index of a named column.

        Raises:
            DataError: There is no such column, or no header.
        """
        if self.header is None:
            raise DataError(f"{self.path} has no header line, so it has no column {name!r}")
        if name not in self.header:
            raise DataError(f"{self.path} has no column {name!r}; its columns are {listed(self.header)}")
        return self.header.index(name)

    def match(self, wanted: Sequence[str], whose: str = "the model", also: Sequence[str] = ()) -> Match:
        """Find columns by name, in any order.

        Names that differ only in case, blanks, underscores or hyphens match if the match is unique. Columns are never
        matched by position.

        Args:
            wanted: Names of the columns.
            whose: Who wants them, for messages.
            also: Further columns of the file that need no note.

        Raises:
            DataError: A column is missing or ambiguous.
        """
        assert self.header is not None
        exact = {name: i for i, name in enumerate(self.header)}
        taken = {exact[name] for name in wanted if name in exact}
        alike: dict[str, list[int]] = {}
        for i, name in enumerate(self.header):
            if i not in taken and name:
                alike.setdefault(_normalised(name), []).append(i)
        shared = Counter(_normalised(name) for name in wanted if name not in exact)
        places, missing, renamed = [], [], []
        for name in wanted:
            found = [exact[name]] if name in exact else alike.get(_normalised(name), [])
            if len(found) > 1:
                both = " and ".join(repr(self.header[i]) for i in found[:2])
                raise DataError(f"{self.path}: {both} could both be {name!r}, which {whose} takes; rename one")
            if not found or (name not in exact and shared[_normalised(name)] > 1):
                missing.append(name)
                continue
            places.append(found[0])
            if name not in exact:
                renamed.append(f"{self.header[found[0]]!r} as {name!r}")
        if missing:
            self._refuse(wanted, missing, whose)
        notes = [f"{self.path}: read {listed(renamed, 5)}"] if renamed else []
        rest = [self.name(i) for i in range(self.width) if i not in places and self.header[i] not in also]
        if rest:
            notes.append(f"{self.path}: columns that {whose} does not take are left out: {listed(rest, 5)}")
        return Match(places, notes)

    def _refuse(self, wanted: Sequence[str], missing: Sequence[str], whose: str) -> NoReturn:
        assert self.header is not None
        sides = f"{whose} takes: {listed(wanted)}; the file has: {listed(self.header)}"
        if len(missing) == len(wanted):
            counts = f"{self.width} column{'s' * (self.width != 1)}, {whose} takes {len(wanted)}"
            raise DataError(f"{self.path} has {counts}, and no name agrees; {sides}")
        raise DataError(f"{self.path} has no column {listed([repr(name) for name in missing], 5)}; {sides}")

    def rows(self, used: Collection[int] | None = None) -> Iterator[tuple[int, list[str]]]:
        """Line number and stripped cells of each row; blank lines and trailing empty rows are skipped.

        Args:
            used: Indices of the columns whose cells are looked at; the others may hold anything. None: all.

        Raises:
            DataError: Rows differ in length, a quotation mark is not closed, or the text cannot be decoded.
        """
        rows = _csv_rows(self.path, self.separator, self.encoding, self.skip)
        if self.header is not None:
            next(row for _, row in rows if row)
        empty: list[tuple[int, list[str]]] = []
        for line, row in rows:
            if not any(row):  # kept only if a row with content follows
                if len(row) > 1 or self.width == 1:
                    empty.append((line, row or [""]))
                continue
            for waiting in (*empty, (line, row)):
                yield self._checked_row(*waiting)
            empty.clear()

    def _checked_row(self, line: int, row: list[str]) -> tuple[int, list[str]]:
        if len(row) == self.width:
            return line, row
        there = "the header has" if self.header is not None else "the first line has"
        counts = f"{len(row)} cells where {there} {self.width}"
        missing = f"{self.name(len(row))} is missing, " if len(row) < self.width else ""
        raise DataError(f"{self.where(line)}: {missing}{counts}")

    def cells(self, columns: Sequence[int]) -> tuple[list[int], list[list[str]]]:
        """Line number of each row, and the cells of some columns, one list per column."""
        lines, found = [], [[] for _ in columns]  # type: ignore[var-annotated]
        for line, row in self.rows(columns):
            lines.append(line)
            for cells, i in zip(found, columns, strict=True):
                cells.append(row[i])
        return lines, found

    def numbers(self, columns: Sequence[int], missing: bool = False, limit: float = math.inf) -> np.ndarray:
        """Values of some columns, (rows, columns) float64.

        Args:
            columns: Indices of the columns.
            missing: Whether a cell may be missing (empty, NA, NaN, null); it becomes NaN.
            limit: Largest magnitude allowed.

        Raises:
            DataError: A cell is not a finite number; the message names line, column and content.
        """
        reader = NumberReader(self, missing, limit)
        values = array("d")
        for line, row in self.rows(columns):
            values.extend([reader.value(row[i], line, i) for i in columns])
        reader.finish()
        return np.frombuffer(values, np.float64).reshape(-1, len(columns)).copy()


@dataclass
class NumberReader:
    """Parser of a file's numeric cells, which must all use the same decimal mark."""

    table: TableFile
    missing: bool = False
    limit: float = math.inf
    point: str = field(default="", init=False)  # first cell with a decimal point
    comma: str = field(default="", init=False)  # first cell with a decimal comma
    doubtful: str = field(default="", init=False)  # first cell whose comma may separate thousands
    commas: dict[int, str] = field(default_factory=dict, init=False)  # by column: its first doubtful comma
    decimal: set[int] = field(default_factory=set, init=False)  # columns with a certain decimal comma
    long: dict[int, str] = field(default_factory=dict, init=False)  # by column: its first four digits without a comma

    def value(self, cell: str, line: int, column: int, missing: bool = False) -> float:
        """Parse a cell; NaN if it is missing and may be, in this column or in all.

        Raises:
            DataError: The cell is not a finite number.
        """
        if _NUMBER.fullmatch(cell):
            if not self.point and "." in cell:
                self.point = self._place(line, column, cell)
            if len(cell) > 3 and column not in self.long and _LONG.fullmatch(cell):
                self.long[column] = self._place(line, column, cell)
            return self._bounded(float(cell), cell, line, column)
        if _COMMA.fullmatch(cell):
            if _THOUSANDS.fullmatch(cell):
                if column not in self.commas:
                    self.commas[column] = self._place(line, column, cell)
                    self.doubtful = self.doubtful or self.commas[column]
            else:
                self.decimal.add(column)
                self.comma = self.comma or self._place(line, column, cell)
            return self._bounded(float(cell.replace(",", ".")), cell, line, column)
        if cell.lower() in _MISSING and (missing or self.missing or cell == ""):
            if missing or self.missing:
                return math.nan
            raise DataError(f"{self.table.where(line)}: {self.table.name(column)} is empty, not a number")
        self._refuse(cell, line, column, "not a number")

    def _bounded(self, value: float, cell: str, line: int, column: int) -> float:
        if not abs(value) <= self.limit or math.isinf(value):
            self._refuse(cell, line, column, "too large for a number of the model")
        return value

    def _refuse(self, cell: str, line: int, column: int, why: str) -> NoReturn:
        if re.fullmatch(r"[+-]?inf(inity)?", cell, re.IGNORECASE):
            why = "not a number that is finite"
        raise DataError(f"{self.table.where(line)}: {self.table.name(column)} is {cell[:40]!r}, {why}")

    def _place(self, line: int, column: int, cell: str) -> str:
        return f"{cell[:40]!r} ({self.table.unit} {line}, {self.table.name(column)})"

    def finish(self) -> None:
        """Check that all cells use the same decimal mark.

        Raises:
            DataError: Points and commas are mixed; or commas may separate thousands: every comma of a column has three
                digits after it, and the column also has numbers of four digits without a comma.
        """
        comma = self.comma or self.doubtful
        if self.point and comma:
            raise DataError(f"{self.table.path} has numbers with a point, {self.point}, and with a comma, {comma}")
        if self.doubtful and not self.comma and self.table.separator != ";":  # semicolons go with decimal commas
            raise DataError(
                f"{self.table.path}: {self.doubtful} may be a decimal comma or thousands; write numbers with a point, "
                "or separate the cells by semicolons"
            )
        for column in self.commas.keys() & self.long.keys() - self.decimal:
            raise DataError(
                f"{self.table.path}: {self.commas[column]} may be a decimal comma or thousands, beside "
                f"{self.long[column]}; write numbers with a point, or thousands without a mark"
            )


# ---- detecting the layout ----------------------------------------------------------------------------------


def read_table(
    path: str | Path,
    *,
    header: bool | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    what: str = "table",
) -> TableFile:
    """Detect the layout of a delimited text file.

    Args:
        path: The file, at most 200 MB.
        header: Whether the first line is a header; None: it is unless it holds only numbers and times.
        separator: One of :data:`SEPARATORS`; None: the one that gives all lines the same number of cells.
        encoding: Encoding of the text; None: UTF-8, or UTF-16 or UTF-32 if the file has their byte order mark.
        what: What the file is called in messages.

    Raises:
        DataError: The file is missing, empty, too large, not text or of unknown layout, or two columns share a name.
    """
    path = Path(path)
    encoding = _encoding(path, encoding, what)
    skip, declared = _declared_separator(path, encoding)
    if separator is not None and separator not in SEPARATORS:
        raise DataError(f"separator {separator!r} is not one of {' '.join(map(repr, SEPARATORS))}")
    separator = separator or declared or _detected_separator(path, encoding)
    first = next((row for _, row in _csv_rows(path, separator, encoding, skip) if row), None)
    if first is None:
        raise DataError(f"{path} is empty: it has 0 columns")
    if header is None:
        header = not _is_data(first)
    if header:
        first = [name if is_printable(name) or "\0" in name else " ".join(name.split()) for name in first]
        check_names(path, first)
    return TableFile(path, separator, encoding, first if header else None, len(first), skip)


def listed(names: Sequence[str], shown: int = 20, width: int = 60) -> str:
    """The first `shown` names, each cut to `width` characters, for a message."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name[:width] or "(no name)" for name in names[:shown]) + more


def _normalised(name: str) -> str:
    """Normalise a name: case, blanks, underscores, hyphens."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return re.sub(r"[\s_-]+", "_", folded).strip("_")


def is_number(cell: str) -> bool:
    """Whether a cell is a finite number, with a decimal point or comma."""
    return bool(_NUMBER.fullmatch(cell) or _COMMA.fullmatch(cell))


def is_missing(cell: str) -> bool:
    """Whether a cell of a column of numbers holds none: it is empty, NA, NaN, null ..."""
    return cell.lower() in _MISSING


def is_time(cell: str) -> bool:
    """Whether a cell is an ISO 8601 date or time, for example 2016-07-01 00:00:00."""
    try:
        datetime.fromisoformat(cell)
    except ValueError:
        return False
    return not _NUMBER.fullmatch(cell)


def _is_data(row: Sequence[str]) -> bool:
    """Whether a first line holds values: only numbers, times and missing cells."""
    values = [cell for cell in row if cell.lower() not in _MISSING]
    return bool(values) and all(is_number(v) or is_time(v) for v in values)


def check_names(path: Path, names: Sequence[str]) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1 and name), None)
    if twice is not None:
        first, second = [i + 1 for i, name in enumerate(names) if name == twice][:2]
        raise DataError(f"{path}: columns {first} and {second} are both named {twice[:60]!r}; rename one")
    if any("\0" in name for name in names):
        raise DataError(f"{path} is not text: its first line has zero bytes")
    if odd := next((name for name in names if not is_printable(name)), None):
        raise DataError(f"{path}: the column {odd[:60]!r} has characters in its name that cannot be printed; rename it")


def _encoding(path: Path, asked: str | None, what: str) -> str:
    try:
        if not path.is_file():
            raise DataError(f"cannot read the {what} {path}: it is {'a folder' if path.is_dir() else 'no file'}")
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES // 10**6} MB: split it first")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"cannot read the {what} {path}: {error.strerror or error}") from None
    if kind := next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), None):
        raise DataError(f"{path} is {kind}, not text: save it as CSV first")
    marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    if marked is None and b"\0" in start and asked is None:
        raise DataError(f"{path} is not text: it has zero bytes")
    try:
        known = codecs.lookup(asked or "utf-8").name
    except (LookupError, ValueError):
        raise DataError(f"encoding {asked!r} is not one that Python knows, such as utf-8 or cp1252") from None
    return marked if marked and known.startswith("utf") else known


def _declared_separator(path: Path, encoding: str) -> tuple[int, str | None]:
    """Lines to skip and the separator, from a first line such as `sep=;` that spreadsheets write."""
    line = next(iter(_lines(path, encoding)), "").rstrip("\r\n")
    if line.lower().startswith("sep=") and line[4:] in SEPARATORS:
        return 1, line[4:]
    return 0, None


def _detected_separator(path: Path, encoding: str) -> str:
    """The separator that splits most of the first lines into the same number of cells, more than one."""
    best, best_score = ",", (0.0, 0.0)
    for separator in SEPARATORS:
        try:
            rows = [row for _, row in itertools.islice(_csv_rows(path, separator, encoding), _SAMPLE) if any(row)]
        except DataError as error:
            if not isinstance(error.__cause__, csv.Error):
                raise
            continue
        widths = Counter(map(len, rows))
        width, alike = widths.most_common(1)[0] if widths else (0, 0)
        if width < 2:
            continue
        # where comma and semicolon both give even rows, parsable cells tell decimal commas from separators
        cells = [cell for row in rows[1:] or rows for cell in row]
        sense = sum(map(_is_parsable, cells)) / max(1, len(cells))
        score = (alike / len(rows), round(sense, 3))
        if score > best_score:
            best, best_score = separator, score
    return best


def _is_parsable(cell: str) -> bool:
    return is_number(cell) or is_time(cell) or is_missing(cell)


# ---- reading -----------------------------------------------------------------------------------------------


def _lines(path: Path, encoding: str) -> Iterator[str]:
    """Lines of a text file with their line ends; an error names the line that cannot be decoded."""
    try:
        with path.open(encoding=encoding, newline="") as file:
            yield from file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeError:
        raise DataError(
            f"{path}, {_undecodable(path, encoding)} is not {encoding.removesuffix('-sig').upper()}: save the file "
            "as UTF-8"
        ) from None
    except LookupError:  # a codec that does not produce text, such as base64
        raise DataError(f"encoding {encoding!r} is not one of text, such as utf-8 or cp1252") from None


def _undecodable(path: Path, encoding: str) -> str:
    """Line and value of the first byte that cannot be decoded."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    decoder.decode(line)
                except UnicodeDecodeError as error:
                    return f"line {number}: byte 0x{error.object[error.start]:02x}"
            decoder.decode(b"", final=True)
    except (OSError, UnicodeError):
        pass
    return "its end"


def _csv_rows(path: Path, separator: str, encoding: str, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped cells of every row, blank lines included."""
    lines = itertools.islice(_lines(path, encoding), skip, None)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        line = reader.line_num + skip + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {line}: {_csv_problem(str(error))}") from error
        cells = [cell.strip() for cell in row]
        yield line, [] if cells == [""] else cells


def _csv_problem(text: str) -> str:
    if "unexpected end" in text:
        return "a quotation mark opens here and is never closed"
    if "expected after" in text:
        return "a quotation mark closes inside a cell"
    if "field limit" in text:
        return "a cell has more than 131,072 characters"
    return text[:100]
