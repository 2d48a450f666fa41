"""Rows of a table as a model takes them, from a file or a data frame, by its input record.

>>> read_rows("wines.csv", form).values                    # (n, D)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.data.checks import DataError
from zoo.data.columns import encode as encode_columns
from zoo.data.columns import read_columns
from zoo.data.delimited import TableFile, listed
from zoo.data.own_tables import open_table
from zoo.support import inputs
from zoo.support.cells import cell_text

__all__ = ["FrameTable", "TableRows", "prepare_table", "read_rows"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableRows:
    """Rows of a file, as a model takes them.

    Attributes:
        values: (n, D).
        lines: Line number of each row in the file.
        notes: Warnings given: names spelled differently, columns not used.
    """

    values: Tensor
    lines: list[int]
    notes: list[str]


@dataclass(frozen=True)
class FrameTable(TableFile):
    """A data frame in memory, whose cells are read as those of a file.

    Attributes:
        frame: Of pandas or polars.
    """

    frame: Any = None
    unit: ClassVar[str] = "row"

    @classmethod
    def of(cls, frame: Any) -> FrameTable:
        """The table of a frame; DataError if two of its columns share a name."""
        names = [str(name).strip() for name in frame.columns]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"the data frame has the column {twice!r:.60} twice")
        unnamed = names == list(map(str, range(len(names))))
        return cls(Path("the data frame"), ",", "utf-8", None if unnamed else names, len(names), frame=frame)

    def rows(self, used: Collection[int] | None = None) -> Iterator[tuple[int, list[str]]]:
        """Number of each row, from 1, and its cells; a missing value is an empty cell, as are all not used.

        Args:
            used: Indices of the columns whose cells are looked at; the others may hold anything. None: all.

        Raises:
            DataError: A cell holds several values.
        """
        pandas = hasattr(self.frame, "itertuples")
        rows = self.frame.itertuples(index=False, name=None) if pandas else self.frame.iter_rows()
        wanted = frozenset(range(self.width) if used is None else used)
        for row, values in enumerate(rows, 1):
            yield row, [self._cell(value, row, i) if i in wanted else "" for i, value in enumerate(values)]

    def _cell(self, value: Any, row: int, column: int) -> str:
        if isinstance(value, Mapping | list | tuple | set | np.ndarray):
            told = f"{self.name(column)} holds a {type(value).__name__}, not a number or a text"
            raise DataError(f"{self.where(row)}: {told}")
        return cell_text(value)


def read_rows(
    path: str | Path | TableFile, form: inputs.Table, dtype: torch.dtype = torch.float32, truth: bool = False
) -> TableRows:
    """Read the rows of a text file, encoded as in training.

    Columns are matched by name, in any order; unused ones are reported. Categorical columns are one-hot encoded. A file
    without a header is refused unless the record says that files have none. If the model knows no column names, columns
    are taken in order.

    Args:
        path: A table, see `zoo.data.delimited.read_table`, or one that is already open.
        form: The model's input record.
        dtype: Type of the values.
        truth: Whether any column of numbers may hold true and false, as 1 and 0; those of a data frame always may.

    Raises:
        DataError: A column is missing, the file has no header, or a cell is not a number; the message names line and
            column.
    """
    names = [variable.name for variable in form.variables] or form.columns
    table = path if isinstance(path, TableFile) else _opened(path, form, header=None if form.header else False)
    if table.header is None and names and form.header:
        first = next((row for _, row in table.rows()), [])
        if not set(names) <= set(first):
            _refuse_headless(table, names)
        table = _opened(table.path, form, header=True)  # the names are numbers
    notes: list[str] = []
    if table.header is None or not names:
        variables = _in_order(table, form)
        if form.header and not names:
            notes.append(f"{table.path}: the model knows no names of columns, so they are taken in order")
        places = list(range(len(variables)))
    else:
        variables, places, notes = _matched(table, form)
    columns, lines = read_columns(
        table, variables, places, form.missing_words, truth=truth or isinstance(table, FrameTable)
    )
    values, told = encode_columns(columns, variables, lines)
    for note in [*notes, *told]:
        _log.warning("%s", note)
    return TableRows(torch.from_numpy(values).to(dtype), lines, [*notes, *told])


def _opened(path: str | Path, form: inputs.Table, header: bool | None) -> TableFile:
    return open_table(path, form.separator, form.encoding, header=header)


def prepare_table(path: Path, form: inputs.Table) -> tuple[Tensor]:
    """Read all rows of a file, (n, D)."""
    return (read_rows(path, form).values,)


def _number(name: str) -> inputs.Variable:
    return inputs.Variable(name=name)


def _refuse_headless(table: TableFile, names: Sequence[str]) -> None:
    counts = f"its {table.width} columns cannot be matched by name with the {len(names)} of the model ({listed(names)})"
    if table.width != len(names):
        raise DataError(f"{table.path} has no header line, and {counts}")
    raise DataError(
        f"{table.path} has no header line, so {counts}; write the names into the first line, or say that the columns "
        "stand in this order with --no-header"
    )


def _in_order(table: TableFile, form: inputs.Table) -> list[inputs.Variable]:
    """The variables of a file whose columns are taken in order: the model's, or its inputs as numbers."""
    if table.width == len(form.variables):
        return form.variables
    encoded = table.width == form.count or not form.variables
    names = form.columns if encoded else [variable.name for variable in form.variables]
    _check_order(table, len(names) or form.count, names)
    return [_number(table.name(i)) for i in range(form.count)]


def _check_order(table: TableFile, count: int, names: Sequence[str]) -> None:
    """Check a file whose columns are taken in order: their number, and that the header is not a row."""
    if table.width != count:
        named = f" ({listed(names)})" if names else ""
        columns = f"{table.width} column{'s' * (table.width != 1)}"
        raise DataError(f"{table.path} has {columns}, the model takes {count}{named}")
    for i, cell in enumerate(table.header or ()):
        try:
            float(cell)
        except ValueError:
            continue
        raise DataError(
            f"{table.path}, line 1: column {i + 1} is {cell[:40]!r} beside words, so the line is neither names nor a "
            "row; the model knows no names and takes its columns in order"
        )


def _matched(table: TableFile, form: inputs.Table) -> tuple[list[inputs.Variable], list[int], list[str]]:
    """Variables to read, their columns in the file, and warnings; categories may also be encoded in the file."""
    assert table.header is not None
    variables = form.variables or [_number(name) for name in form.columns]
    if not {variable.name for variable in variables} <= set(table.header) and set(form.columns) <= set(table.header):
        variables = [_number(name) for name in form.columns]
    found = table.match([variable.name for variable in variables], also=[form.target] if form.target else [])
    return variables, found.places, found.notes
