"""Results as rows of CSV files, and as tables of RESULTS.md that are written by a command and never by hand."""

from __future__ import annotations

import csv
import html
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Records", "mean_sd", "put_section", "surroundings"]


class Records:
    """Rows of a CSV file that a command appends to; what is there already is not measured again.

    Args:
        path: The file; created with its folder.
        keys: Columns that identify a row.
        values: Columns that were measured.
    """

    def __init__(self, path: Path, keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys, self.columns = path, list(keys), [*keys, *values]
        self.rows: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))
            if self.rows and list(self.rows[0]) != self.columns:
                raise ValueError(f"{path} has other columns than {', '.join(self.columns)}: move it away")

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return any(all(row[k] == str(key[k]) for k in self.keys) for row in self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and have it on disk before going on."""
        new = not self.path.is_file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows.append({c: _written(row[c]) for c in self.columns})
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(self.rows[-1])
            file.flush()
            os.fsync(file.fileno())

    def select(self, **key: Any) -> list[dict[str, str]]:
        """Rows with these values."""
        return [row for row in self.rows if all(row[k] == str(v) for k, v in key.items())]

    def numbers(self, column: str, **key: Any) -> list[float]:
        """A column of the rows with these values."""
        return [float(row[column]) for row in self.select(**key)]


def _written(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """`mean (standard deviation)` of a sample; of a single number itself alone."""
    spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def plain(value: Any) -> Any:
    """Values for Markdown, at any depth: a text out of a file is one line that holds no markup of HTML and ends no code."""
    if isinstance(value, str):
        return html.escape(" ".join(value.split("\n")).replace("\r", " ").replace("`", "'"), quote=False)
    if isinstance(value, Mapping):
        return {plain(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def put_section(path: Path, name: str, text: str) -> None:
    """Write a section between its marks in a Markdown file, replacing an earlier one."""
    before = path.read_text() if path.is_file() else "# Results\n\nEvery table is written by the command above it.\n"
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    found = re.search(re.escape(begin) + ".*?" + re.escape(end), before, re.DOTALL)
    after = before[: found.start()] + block + before[found.end() :] if found else f"{before.rstrip()}\n\n{block}\n"
    path.write_text(after)


def surroundings() -> str:
    """What a measurement depends on, in one line."""
    import sklearn
    import torch

    return (
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
