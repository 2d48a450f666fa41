"""Measurements as rows of CSV files, and generated sections of Markdown documents."""

from __future__ import annotations

import csv
import datetime
import html
import os
import platform
import re
import stat
import statistics
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from zoo.support.environment import chip, commit, wait_policy
from zoo.support.environment import git as _git
from zoo.support.files import write_atomic, writer_of
from zoo.support.quoting import shown

__all__ = ["STAMP", "Provenance", "Records", "RowsError", "code", "has_section", "mean_sd", "put_section", "stamp"]

#: Columns of every row that describe its measurement.
STAMP = ("date", "commit", "threads", "wait_policy", "load", "machine")
#: Prefix of a date or commit that is an upper bound: measured then or earlier.
BY = "by "


def stamp() -> dict[str, str]:
    """Date, commit and machine of a measurement: the columns :data:`STAMP`.

    The commit has the suffix `+` if the source tree has changes, and is empty outside a clone.
    """
    import timm
    import torch

    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    machine = (
        f"{chip()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores; torch {torch.__version__}, "
        f"timm {timm.__version__}, Python {platform.python_version()}"
    )
    found = (
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S"),
        commit(),
        str(torch.get_num_threads()),
        wait_policy(),
        load,
        machine,
    )
    return dict(zip(STAMP, found, strict=True))


class RowsError(ValueError):
    """A table needs rows that were not measured, or a document has no clear place for it."""


class Records:
    """Rows of a CSV file; existing ones are not measured again.

    Args:
        path: The file; created with its folder.
        keys: Columns that identify a row.
        values: Measured columns; the columns of :data:`STAMP` are added.

    Raises:
        ValueError: The file has other columns.
    """

    #: Treat all rows as measured, so that commands only write their tables.
    frozen: ClassVar[bool] = False

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys = path, list(keys)
        self.columns = list(dict.fromkeys((*keys, *values, *STAMP)))
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
            if self.rows and list(self.rows[0]) != self.columns:
                raise ValueError(f"{path} has other columns than {', '.join(self.columns)}: move it away")

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return self.frozen or any(all(row[k] == str(key[k]) for k in self.keys) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row with its stamp, and write the file."""
        row = {**stamp(), **row}
        self._write([*self.rows, {c: _cell(row[c]) for c in self.columns}])

    def drop(self, **key: Any) -> None:
        """Remove the rows with these values, to measure them again."""
        self._write([row for row in self.rows if row not in self.select(**key)])

    def _write(self, rows: list[dict[str, str]]) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, writer_of(text.getvalue().encode()))
        self.rows = rows

    def select(self, **key: Any) -> list[dict[str, str]]:
        """Rows with these values."""
        return [row for row in self.rows if all(row[k] == str(v) for k, v in key.items())]

    def numbers(self, column: str, **key: Any) -> list[float]:
        """A column of the rows with these values."""
        return [float(row[column]) for row in self.select(**key)]

    def number(self, column: str, **key: Any) -> float:
        """A column of the first row with these values.

        Raises:
            RowsError: There is no such row.
        """
        for row in self.select(**key):
            return float(row[column])
        wanted = ", ".join(f"{name} {value}" for name, value in key.items())
        raise RowsError(f"{self.path} has no row of {wanted}: measure it first, without --table")


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Format a sample as `mean (standard deviation)`, a single number without the latter."""
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plain(value: Any) -> Any:
    """Escape untrusted values for Markdown, recursively: one line, no control characters, no HTML, no backticks."""
    if isinstance(value, str):
        return html.escape(shown(" ".join(value.split("\n")).replace("\r", " ").replace("`", "'"), "\t"), quote=False)
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def code(text: str) -> str:
    """An untrusted text as a Markdown code span in a table, where it stands as it is and can be copied.

    Only what would start a tag or a comment is escaped.
    """
    text = shown(" ".join(text.split("\n")).replace("\r", " "), "\t")
    text = re.sub(r"<(?=[A-Za-z!/?])", "&lt;", text).replace("|", "\\|")
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def put_section(path: Path, name: str, text: str) -> None:
    """Write a section between its markers in a Markdown file, replacing an earlier one.

    A link is followed; the file keeps its mode and its ends of lines.

    Raises:
        RowsError: See :func:`has_section`.
    """
    path = Path(os.path.realpath(path))
    before = _document(path) if path.is_file() else "# Results\n\nEvery table is written by the command above it.\n"
    end = "\r\n" if "\r\n" in before else "\n"
    block = end.join([f"<!-- begin {name} -->", *text.strip().splitlines(), f"<!-- end {name} -->"])
    place = _place(path, before, name)
    after = before[: place[0]] + block + before[place[1] :] if place else f"{before.rstrip()}{end}{end}{block}{end}"
    mode = path.stat().st_mode if path.is_file() else None
    write_atomic(path, writer_of(after.encode()))
    if mode is not None:
        path.chmod(stat.S_IMODE(mode))


def has_section(path: Path, name: str) -> bool:
    """Whether a Markdown file has the markers of a section, each alone in its line.

    Raises:
        RowsError: The markers are not one beginning and one end after it, so what is between them is not known; or the
            file is no text.
    """
    return path.is_file() and _place(path, _document(path), name) is not None


def _document(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except ValueError as error:
        raise RowsError(f"{path} is not a text in UTF-8 and stays as it is") from error


def _place(path: Path, text: str, name: str) -> tuple[int, int] | None:
    """Where a section begins and ends, with its markers; None if it has none."""
    begins, ends = (
        [found.span(1) for found in re.finditer(rf"(?m)^(<!-- {word} {re.escape(name)} -->)[ \t]*\r?$", text)]
        for word in ("begin", "end")
    )
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise RowsError(
            f"{path}: a section is between one line <!-- begin {name} --> and one line <!-- end {name} --> after it; "
            f"there are {len(begins)} and {len(ends)}, so nothing is written"
        )
    return begins[0][0], ends[0][1]


class Provenance:
    """Provenance note of a table, from the stamps of its rows.

    Args:
        rows: All rows of the table.
        measures: Files and folders of the source tree that the rows measure; a row is outdated if they changed later.
    """

    def __init__(self, rows: Sequence[Mapping[str, str]], measures: Sequence[str]) -> None:
        self.rows, self.measures = rows, tuple(measures)
        self.older = [row for row in rows if self._is_outdated(row)]

    def mark(self, rows: Iterable[Mapping[str, str]]) -> str:
        """A dagger for a line with outdated rows, unless all rows are outdated."""
        return " †" if len(self.older) < len(self.rows) and any(self._is_outdated(row) for row in rows) else ""

    def marked(self, lines: Iterable[Sequence[Any]], *columns: str) -> list[list[Any]]:
        """Lines of a table whose first cells are the values of these columns, the last of those cells with its mark."""
        found = []
        for line in lines:
            key = dict(zip(columns, map(str, line), strict=False))
            mark = self.mark(row for row in self.rows if key.items() <= row.items())
            found.append([*line[: len(columns) - 1], f"{line[len(columns) - 1]}{mark}", *line[len(columns) :]])
        return found

    def __str__(self) -> str:
        def span(values: Iterable[str], word: str, missing: str) -> str:
            found = sorted(set(filter(None, values)))
            if not found:
                return missing
            return f"{word} {found[0]}" if len(found) == 1 else f"{word} {found[0]} to {found[-1]}"

        days = [row["date"].removeprefix(BY)[:10] for row in self.rows]
        earlier = any(row["date"].startswith(BY) or not row["date"] for row in self.rows)
        commits = list(dict.fromkeys(row["commit"].removeprefix(BY) for row in self.rows if row["commit"]))
        loads = sorted(float(row["load"]) for row in self.rows if row["load"])
        policies = ", ".join(sorted({row["wait_policy"] for row in self.rows if row["wait_policy"]}))
        parts = [
            span(days, "Measured", "Measured at an unknown date") + (" or earlier" if earlier else ""),
            f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}" if commits else "commit unknown",
            _count(self.rows, "threads", "thread(s)"),
            f"threads wait: {policies}" if policies else "waiting of threads not recorded",
            f"load {_between(loads)}" if loads else "load not recorded",
        ]
        machines = "; ".join(dict.fromkeys(row["machine"] for row in self.rows if row["machine"]))
        return ", ".join(parts) + (f"; {machines}." if machines else ".") + self._outdated_note()

    def _outdated_note(self) -> str:
        if not self.older:
            return ""
        which = "All rows are" if len(self.older) == len(self.rows) else "† has rows"
        return f" {which} of code before the last change of {', '.join(f'`{m}`' for m in self.measures)}."

    def _is_outdated(self, row: Mapping[str, str]) -> bool:
        commit = row["commit"].removeprefix(BY).removesuffix("+")
        return bool(commit) and bool(_git("log", "-1", "--format=%h", f"{commit}..HEAD", "--", *self.measures))


def _between(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _count(rows: Sequence[Mapping[str, str]], column: str, word: str) -> str:
    found = sorted({row[column] for row in rows if row[column]}, key=float)
    return f"{' or '.join(found)} {word}" if found else f"{word} not recorded"
