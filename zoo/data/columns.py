"""Columns of a table from cells to the numbers that a model takes, by one code for training, evaluation, prediction.

A column is described by a variable of the input record (`zoo.support.inputs.Variable`): numbers, whose missing cells
get a fill value, or categories, one input each.

>>> found = survey(table, [0, 1])                           # what the cells are
>>> columns, lines = read_columns(table, variables, places)
>>> X, notes = encode(columns, variables, lines)            # (rows, D) float64
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from zoo.data.checks import DataError
from zoo.data.delimited import NumberReader, TableFile, is_missing, is_number, is_time, listed
from zoo.support.cells import TRUTH, known_category, unpadded
from zoo.support.inputs import MISSING, Variable
from zoo.support.quoting import is_printable

__all__ = ["Column", "Survey", "check_words", "encode", "fitted", "read_columns", "survey", "word_order"]

FLOAT32 = float(torch.finfo(torch.float32).max)

# ---- what the cells are ------------------------------------------------------------------------------------


@dataclass
class Survey:
    """Counts of a column's cells.

    Attributes:
        name: Name of the column.
        rows: All cells.
        missing: Cells without a value; of words, only the empty ones are (`gaps`).
        gaps: Empty cells, and the words that mean one.
        numbers: Cells that are finite numbers.
        truths: Cells that are true or false.
        times: Cells that are dates or times.
        odd: Line and content of the first cell that is neither missing nor a number.
        words: The different cells, up to a limit.
    """

    name: str
    rows: int = 0
    missing: int = 0
    gaps: int = 0
    numbers: int = 0
    truths: int = 0
    times: int = 0
    odd: tuple[int, str] | None = None
    words: dict[str, None] = field(default_factory=dict)

    @property
    def present(self) -> int:
        """Cells with a value, if the column holds numbers."""
        return self.rows - self.missing

    def add(self, cell: str, line: int, missing_words: Collection[str], limit: int) -> None:
        """Count a cell; no more than `limit` different ones are kept."""
        self.rows += 1
        gap = not cell or cell in missing_words
        self.gaps += gap
        if gap or is_missing(cell):
            self.missing += 1
        elif is_number(cell):
            self.numbers += 1
        else:
            self.odd = self.odd or (line, cell)
            self.truths += cell.lower() in TRUTH
            self.times += cell[:1].isdigit() and is_time(cell)
        if not gap and len(self.words) <= limit:
            self.words[unpadded(cell)] = None

    @property
    def kind(self) -> str:
        """`empty`, `numbers`, `truths`, `times`, `mixed` (at least half of the cells are numbers) or `words`."""
        if not self.present:
            return "empty"
        for kind in ("numbers", "truths", "times"):
            if getattr(self, kind) == self.present:
                return kind
        return "mixed" if 2 * self.numbers >= self.present else "words"


def survey(
    table: TableFile, places: Sequence[int], missing_words: Collection[str] = (), limit: int = 100
) -> list[Survey]:
    """Count the cells of some columns; `limit` is the number of different cells that are kept."""
    found = [Survey(table.name(place)) for place in places]
    for line, row in table.rows(places):
        for one, place in zip(found, places, strict=True):
            one.add(row[place], line, missing_words, limit)
    return found


# ---- cells as numbers and words ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """The cells of a column.

    Attributes:
        table: The file.
        name: Name of the column.
        numbers: (n,) float64, NaN where missing; empty for categories.
        codes: (n,) int64, places in `words`; empty for numbers.
        words: The different cells; a missing one is :data:`zoo.support.inputs.MISSING`.
    """

    table: TableFile
    name: str
    numbers: np.ndarray
    codes: np.ndarray
    words: list[str]


def read_columns(
    table: TableFile,
    variables: Sequence[Variable],
    places: Sequence[int],
    missing_words: Collection[str] = (),
    truth: bool = False,
) -> tuple[list[Column], list[int]]:
    """The columns of some variables, and the line number of each row.

    Args:
        table: The open file.
        variables: What the columns are.
        places: Index of each variable's column.
        missing_words: Words that mean a missing cell, beside an empty one.
        truth: Whether a column of numbers may hold true and false instead, as 1 and 0, if it holds nothing else.

    Raises:
        DataError: A cell is not a number, or missing where none may be; or there are no rows.
    """
    reader = NumberReader(table, limit=FLOAT32)
    known = [frozenset(variable.values or ()) for variable in variables]
    values: list[Any] = [array("q" if variable.values is not None else "d") for variable in variables]
    words: list[dict[str, int]] = [{} for _ in variables]
    lines = []
    for line, row in table.rows(places):
        lines.append(line)
        for i, (variable, place) in enumerate(zip(variables, places, strict=True)):
            cell = "" if row[place] in missing_words else row[place]
            if variable.values is not None:
                if not cell and variable.required:
                    raise DataError(f"{table.where(line)}: {table.name(place)} is empty")
                if cell not in known[i]:
                    cell = MISSING if not cell and variable.unseen else known_category(cell, known[i])
                values[i].append(words[i].setdefault(cell, len(words[i])))
            elif (variable.truth or truth) and cell.lower() in TRUTH:
                values[i].append(TRUTH[cell.lower()])
                words[i].setdefault(cell, line)
            else:
                values[i].append(reader.value(cell, line, place, missing=variable.fill is not None))
    reader.finish()
    if not lines:
        below = "below its header" if table.header else "at all"
        raise DataError(f"{table.path} has no rows {below}")
    found = []
    for variable, numbers, seen in zip(variables, values, words, strict=True):
        cells = np.array(numbers)
        empty = cells[:0]
        numeric = variable.values is None
        if numeric and seen and not variable.truth and not np.isin(cells[~np.isnan(cells)], (0.0, 1.0)).all():
            word, line = next(iter(seen.items()))
            raise DataError(f"{table.where(line)}: {variable.name} is {word!r} beside numbers, not a number")
        both = (cells, empty, []) if numeric else (empty, cells, list(seen))
        found.append(Column(table, variable.name, *both))
    return found, lines


def fitted(column: Column, variable: Variable, rows: np.ndarray) -> Variable:
    """A variable with its fill value or its categories, from the training rows.

    Args:
        column: The cells.
        variable: What they are: `fill` 0 for numbers that may be missing, `values` empty for categories.
        rows: Indices of the training rows.
    """
    if variable.values is not None:
        words = [column.words[i] for i in np.unique(column.codes[rows])]
        return variable.model_copy(update={"values": sorted(words, key=word_order)})
    if variable.fill is None:
        return variable
    values = column.numbers[rows]
    gaps = np.isnan(values)
    median = float(np.median(values[~gaps])) if not gaps.all() else 0.0
    return variable.model_copy(update={"fill": median, "indicator": bool(gaps.any())})


def word_order(word: str) -> tuple[bool, bool, float, str]:
    """Key of the order of categories: numbers by value, then words; the missing category last."""
    number = is_number(word)
    return word == MISSING, not number, float(word.replace(",", ".")) if number else 0.0, word


def encode(
    columns: Sequence[Column], variables: Sequence[Variable], lines: Sequence[int]
) -> tuple[np.ndarray, list[str]]:
    """Inputs (n, D), float64, and what was done with missing cells and unseen categories, a sentence each.

    Raises:
        DataError: A category is not among those of the variable, which refuses others.
    """
    found, notes = [], []
    for column, variable in zip(columns, variables, strict=True):
        inputs, told = _encode(column, variable, lines)
        found += inputs
        notes += [f"{column.table.path}: {one}" for one in told]
    if (blank := np.logical_and.reduce([_gaps(column) for column in columns])).any():
        where = _rows(blank, lines, columns[0].table.unit)
        empty = f"no column that the model takes has a value in {where}, so an answer there says nothing"
        notes.append(f"{columns[0].table.path}: {empty}")
    return np.stack(found, 1), notes


def _gaps(column: Column) -> np.ndarray:
    """Which cells are missing, (n,)."""
    if len(column.numbers):
        return np.isnan(column.numbers)
    return np.array([word in ("", MISSING) for word in column.words], bool)[column.codes]


def _encode(column: Column, variable: Variable, lines: Sequence[int]) -> tuple[list[np.ndarray], list[str]]:
    where = column.table.unit
    if variable.values is None:
        gaps = np.isnan(column.numbers)
        if not gaps.any():
            return [column.numbers, *([gaps.astype(np.float64)] if variable.indicator else [])], []
        told = f"{column.name} is missing in {_rows(gaps, lines, where)}: taken as {variable.fill:.6g}, the median"
        filled = np.where(gaps, variable.fill or 0.0, column.numbers)
        return [filled, *([gaps.astype(np.float64)] if variable.indicator else [])], [f"{told} of the training rows"]
    place = {word: i for i, word in enumerate(variable.values)}
    positions = np.array([place.get(word, -1) for word in column.words], np.int64)[column.codes]
    notes = []
    if (unseen := positions < 0).any():
        row = int(np.argmax(unseen))
        if variable.unseen is None:
            word, allowed = column.words[column.codes[row]], listed(variable.values)
            raise DataError(f"{column.table.where(lines[row])}: {column.name} is {word[:40]!r}, not one of {allowed}")
        odd = [repr(word[:40]) for word in column.words if word not in place]
        many = f"{listed(odd, 3)}, which no training row has"
        notes = [f"{column.name} is {many}, in {_rows(unseen, lines, where)}: taken as none of its categories"]
    return list((positions[:, None] == np.arange(len(place))).T.astype(np.float64)), notes


def _rows(chosen: np.ndarray, lines: Sequence[int], unit: str) -> str:
    first, count = lines[int(np.argmax(chosen))], int(chosen.sum())
    return f"{count:,} rows (the first is {unit} {first})" if count > 1 else f"{unit} {first}"


def check_words(columns: Sequence[Column], lines: Sequence[int]) -> None:
    """Refuse categories that cannot be printed; the message names the first row."""
    for column in columns:
        for code, word in enumerate(column.words):
            if not is_printable(word):
                line = lines[int(np.argmax(column.codes == code))]
                raise DataError(
                    f"{column.table.where(line)}: {column.name} is {word[:40]!r}, with characters that cannot be "
                    "printed"
                )
