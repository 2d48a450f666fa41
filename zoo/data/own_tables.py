"""A user's table for training: which columns are what, the target, the parts, and what is told about them.

>>> own = read_own_table(Options(path="customers.csv", target="stays"))
>>> own.table.X.shape, own.parts["train"], own.form.variables
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from zoo.data import sources
from zoo.data.checks import DataError
from zoo.data.columns import (
    FLOAT32,
    Column,
    Survey,
    check_words,
    encode,
    fitted,
    read_columns,
    survey,
    word_order,
)
from zoo.data.delimited import NumberReader, TableFile, is_missing, is_number, listed, read_table
from zoo.data.parquet import read_parquet
from zoo.data.sampling import stratified_split
from zoo.support import inputs
from zoo.support.cells import unpadded
from zoo.support.inputs import MISSING, Variable
from zoo.support.quoting import is_printable
from zoo.support.scaling import standardisation
from zoo.support.suggest import suggestion

__all__ = ["SUFFIXES", "Options", "OwnTable", "open_table", "read_own_table", "read_targets"]

SUFFIXES = (".csv", ".tsv", ".parquet")
_FEW = 10  # different whole numbers that are classes unless the task is given
_MAX_NAMES = 250_000  # letters of the names of all inputs, which the model's record holds
_INDEX = "__index_level_"  # the name that pandas gives a row's number in Parquet files

Task = Literal["classification", "regression"]
Parts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Options:
    """How a table is read and split; see :class:`zoo.data.tabular.Tabular`, whose arguments these are."""

    path: str | Path
    target: str | None = None
    test_path: str | Path | None = None
    task: Task | None = None
    drop: Sequence[str] = ()
    categorical: Sequence[str] = ()
    missing: Literal["fill", "refuse"] = "fill"
    missing_words: Sequence[str] = ()
    max_categories: int = 100
    group: str | None = None
    time: str | None = None
    time_format: str | None = None
    separator: str | None = None
    encoding: str | None = None
    test_fraction: float = 0.2
    val_fraction: float = 0.1


@dataclass
class OwnTable:
    """A user's table, ready for training.

    Attributes:
        X: Inputs (n, D), float64; the rows of a separate test file come last.
        y: Classes (n,) int64, or values (n,) float64, standardised by the training rows.
        parts: Indices of the rows of `train`, `val` and `test`; empty parts are left out.
        form: The input record.
        class_names: Names of the classes; empty for a regression.
        lines: What it holds, a line each.
        notes: How it is split, what is missing, left out or was not seen in training, a line each.
    """

    X: np.ndarray
    y: np.ndarray
    parts: Parts
    form: inputs.Table
    class_names: list[str]
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def open_table(
    path: str | Path, separator: str | None = None, encoding: str | None = None, header: bool | None = None
) -> TableFile:
    """Open a text or Parquet table, by its suffix; see `read_table` and `read_parquet`."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".parquet":
        return read_parquet(path)
    return read_table(path, header=header, separator=separator, encoding=encoding)


def read_own_table(options: Options) -> OwnTable:
    """Read, split and encode a table. Medians and categories are those of the training rows.

    Raises:
        DataError: The table, a column or a cell does not suit; the message names file, line and column.
    """
    table = _opened(options.path, options)
    names, left_out = _features(table, options)
    assert options.target is not None
    places = [table.column(name) for name in names]
    surveys = survey(table, [*places, table.column(options.target)], options.missing_words, options.max_categories)
    about = surveys.pop()
    variables = [_variable(one, table, options) for one in surveys]
    columns, lines = read_columns(table, variables, places, options.missing_words)
    target = _Target.of(table, about, options)
    y, names_of_classes = target.values, target.classes
    parts = _parts(table, lines, y, bool(names_of_classes), options)
    variables, columns, constant = _fitted(variables, columns, parts["train"], lines)
    left_out |= dict.fromkeys(constant, "the same in all training rows")
    form = _form(variables, options, table)
    X, notes = encode(columns, variables, lines)
    if options.test_path is not None:
        tests, more, told = _test_rows(form, names_of_classes, options)
        parts["test"] = np.arange(len(X), len(X) + len(tests))
        X, y, notes = np.concatenate([X, tests]), np.concatenate([y, more]), [*notes, *told]
        _check_groups_apart(table, options)
    _check_parts(y, parts, names_of_classes, table, lines, target, options)
    if not names_of_classes:
        mean, scale = (float(one[0]) for one in standardisation(y[parts["train"], None]))
        form, y = form.model_copy(update={"target_mean": mean, "target_scale": scale}), (y - mean) / scale
    own = OwnTable(X, y, parts, form, names_of_classes)
    own.lines = _description(own, table, options, target.reason)
    own.notes = _remarks(own, options, left_out, surveys, notes)
    return own


# ---- columns -----------------------------------------------------------------------------------------------


def _opened(path: str | Path, options: Options) -> TableFile:
    path = Path(path).expanduser()
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: {path.suffix or 'no suffix'} is none of {' '.join(SUFFIXES)}")
    table = open_table(path, options.separator, options.encoding)
    if table.header is None:
        raise DataError(f"{path} has no header line: write the names of its columns into the first line")
    return table


def _features(table: TableFile, options: Options) -> tuple[list[str], dict[str, str]]:
    """Names of the columns that are read, and why others are not."""
    assert table.header is not None
    known = [name for name in table.header if name]
    if options.target is None:
        raise DataError(f"data.target names the column to predict; {table.path} has {listed(known)}")
    single = {"target": options.target, "group": options.group, "time": options.time}
    roles = {**{role: [name] for role, name in single.items() if name}, "drop": options.drop}
    taken: dict[str, str] = {}
    for role, names in roles.items():
        for name in names:
            if name not in known:
                raise DataError(f"data.{role}: {table.path} has no column {name!r}{suggestion(name, known)}")
            if name in taken and role != "drop":
                raise DataError(f"{name!r} is both data.{taken[name]} and data.{role}")
            taken.setdefault(name, role)
            if role == "drop" and taken[name] == "target":
                raise DataError(f"{name!r} is both data.target and data.drop")
    for name in options.categorical:
        if name not in known:
            raise DataError(f"data.categorical: {table.path} has no column {name!r}{suggestion(name, known)}")
        if name in taken:
            raise DataError(f"{name!r} is both data.{taken[name]} and data.categorical")
    if options.group and options.time:
        raise DataError("data.group and data.time both say how the rows are split: give one of them")
    if options.time_format and not options.time:
        raise DataError("data.time_format is for the column that data.time names")
    left_out = {name: f"data.{role}" for name, role in taken.items() if role != "target"}
    left_out |= {table.name(i): "no name" for i, name in enumerate(table.header) if not name}
    left_out |= {name: "the number of the row" for name in known if name.startswith(_INDEX)}
    names = [name for name in known if name not in taken and name not in left_out]
    if not names:
        raise DataError(f"{table.path} has no column beside {listed(list(taken))}: nothing to predict from")
    return names, left_out


def _variable(about: Survey, table: TableFile, options: Options) -> Variable:
    """What a column is, before its fill value or its categories are known.

    Raises:
        DataError: It is not clear, or it has too many categories; the message says what to do.
    """
    name, gaps = about.name, about.missing
    leave_out = f"leave it out with data.drop=[{name}]"
    as_category = f"data.categorical=[{name}] takes it as categories"
    if name in options.categorical or about.kind == "words":
        many = len(about.words)
        if many > options.max_categories:
            raise DataError(
                f"{table.path}: {name} has more than {options.max_categories} categories, such as "
                f"{listed(list(map(repr, about.words)), 3)}: {leave_out}, or set data.max_categories"
            )
        if many == about.rows - about.gaps > 20:
            raise DataError(
                f"{table.path}: {name} is another word in each of its rows, so it tells nothing: {leave_out}"
            )
        if about.gaps and options.missing == "refuse":
            _refuse_missing(table, name, options)
        required = options.missing == "refuse"
        return Variable.model_construct(name=name, values=[], unseen="zeros", required=required)
    if about.kind == "times":
        assert about.odd is not None
        split = "" if options.time else f", split by it with data.time={name}"
        raise DataError(
            f"{table.path}: {name} holds dates or times, such as {about.odd[1][:40]!r}: {leave_out}{split}, or write "
            "what matters of it as numbers"
        )
    if about.kind == "mixed":
        assert about.odd is not None
        line, cell = about.odd
        why = "not a number as most of its cells"
        word = f", or data.missing_words=[{cell[:40]!r}] if it means a missing value" if is_printable(cell) else ""
        raise DataError(f"{table.where(line)}: {name} is {cell[:40]!r}, {why}: correct it{word}; {as_category}")
    if gaps and options.missing == "refuse":
        _refuse_missing(table, name, options)
    return Variable(name=name, truth=about.kind == "truths", fill=0.0 if options.missing == "fill" else None)


def _refuse_missing(table: TableFile, name: str, options: Options) -> None:
    place = table.column(name)
    line = next(line for line, row in table.rows([place]) if _is_gap(row[place], name, options))
    raise DataError(f"{table.where(line)}: {name} is missing, and data.missing=refuse; data.missing=fill fills it")


def _is_gap(cell: str, name: str, options: Options) -> bool:
    return not cell or cell in options.missing_words or (name not in options.categorical and is_missing(cell))


def _fitted(
    variables: Sequence[Variable], columns: Sequence[Column], rows: np.ndarray, lines: Sequence[int]
) -> tuple[list[Variable], list[Column], list[str]]:
    """Variables with their fill values and categories, and their columns, without those that are constant."""
    check_words(columns, lines)
    kept, theirs, constant = [], [], []
    for variable, column in zip(variables, columns, strict=True):
        values = column.numbers[rows] if variable.values is None else column.codes[rows]
        present = values[~np.isnan(values)] if variable.values is None else values
        varies = len(present) and (present != present[0]).any()
        if not varies and (variable.values is not None or len(present) in (0, len(values))):
            constant.append(variable.name)
            continue
        kept.append(fitted(column, variable, rows))
        theirs.append(column)
    if not kept:
        raise DataError(
            f"{columns[0].table.path}: every column is the same in all training rows: nothing to learn from"
        )
    return kept, theirs, constant


def _form(variables: list[Variable], options: Options, table: TableFile) -> inputs.Table:
    names = [name for variable in variables for name in variable.inputs()]
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise DataError(f"{table.path}: two inputs would be named {twice[:60]!r}; rename a column")
    if sum(map(len, names)) > _MAX_NAMES:
        raise DataError(f"{table.path} makes {len(names):,} inputs with long names; leave out columns with data.drop")
    try:
        record = {"kind": "table", "columns": names, "count": len(names), "target": options.target}
        record |= {"variables": [variable.model_dump() for variable in variables]}
        record |= {"missing_words": list(options.missing_words)}
        record |= {"separator": options.separator, "encoding": options.encoding}
        return inputs.read(inputs.check(record))
    except inputs.InputError as error:
        raise DataError(f"{table.path}: {error}; leave out columns with data.drop") from None


# ---- target ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """Targets of all rows, names of the classes, and how the task was decided."""

    values: np.ndarray
    classes: list[str]
    reason: str

    @classmethod
    def of(cls, table: TableFile, about: Survey, options: Options) -> _Target:
        task, reason = _decided(table, about, options)
        place = table.column(about.name)
        if task == "regression":
            return cls(_numbers(table, place), [], reason)
        lines, (cells,) = table.cells([place])
        words = [_class(table, place, line, cell) for line, cell in zip(lines, cells, strict=True)]
        names = sorted(set(words), key=word_order)
        if len(names) < 2:
            raise DataError(f"{table.path}: {about.name} is {names[0][:40]!r} in all rows: there is one class only")
        if 2 * len(names) > max(len(words), 4):
            raise DataError(
                f"{table.path}: {about.name} has {len(names):,} different values in {len(words):,} rows, too many to "
                "be classes"
            )
        index = {name: i for i, name in enumerate(names)}
        return cls(np.array([index[word] for word in words], np.int64), names, reason)


def _decided(table: TableFile, about: Survey, options: Options) -> tuple[Task, str]:
    """The task, and why."""
    if not about.rows:
        raise DataError(f"{table.path} has no rows below its header")
    if options.task is not None:
        return options.task, f"{options.task}, as data.task says"
    if about.kind == "mixed":
        assert about.odd is not None
        line, cell = about.odd
        raise DataError(
            f"{table.where(line)}: {about.name} is {cell[:40]!r}, not a number as most of its cells: correct it, or "
            "data.task=classification takes all of them as classes"
        )
    if about.kind != "numbers":
        return "classification", "classification, as its values are words"
    whole = all(word.lstrip("+-").isdigit() for word in about.words)
    if whole and len(about.words) <= min(_FEW, about.rows // 2):
        few = f"its {len(about.words)} different values are whole numbers"
        return "classification", f"classification, as {few} (data.task=regression predicts the number)"
    return "regression", "regression, as its values are numbers"


def _class(table: TableFile, place: int, line: int, cell: str) -> str:
    if not cell:
        raise DataError(f"{table.where(line)}: {table.name(place)}, the target, is empty: remove such rows")
    if not is_printable(cell):
        odd = f"{cell[:40]!r}, with characters that cannot be printed"
        raise DataError(f"{table.where(line)}: {table.name(place)}, the target, is {odd}")
    return unpadded(cell)


def _numbers(table: TableFile, place: int) -> np.ndarray:
    reader, values = NumberReader(table, limit=FLOAT32), []
    for line, row in table.rows([place]):
        value = reader.value(row[place], line, place, missing=True)
        if np.isnan(value):
            raise DataError(f"{table.where(line)}: {table.name(place)}, the target, is empty: remove such rows")
        values.append(value)
    reader.finish()
    return np.array(values, np.float64)


def read_targets(table: TableFile, target: str, classes: Sequence[str]) -> np.ndarray:
    """Classes (n,) int64 of a file's rows, or values (n,) float64 if there are no classes.

    Raises:
        DataError: There is no such column, or a cell is empty, not a number or not one of the classes.
    """
    place = table.column(target)
    if not classes:
        return _numbers(table, place)
    index, values = {name: i for i, name in enumerate(classes)}, []
    for line, row in table.rows([place]):
        word = _class(table, place, line, row[place])
        if word not in index:
            raise DataError(f"{table.where(line)}: {target} is {word[:40]!r}, not one of {listed(list(classes))}")
        values.append(index[word])
    return np.array(values, np.int64)


# ---- parts -------------------------------------------------------------------------------------------------


def _parts(table: TableFile, lines: Sequence[int], y: np.ndarray, classes: bool, options: Options) -> Parts:
    """Indices of the training, validation and test rows of the file."""
    split: Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]
    if options.group is not None:
        groups = _groups(table, options.group)
        split = lambda rows, share: _by_group(groups[rows], share, table, options)  # noqa: E731
    elif options.time is not None:
        times = _times(table, options.time, options.time_format)
        split = lambda rows, share: _by_time(times[rows], share, table, options)  # noqa: E731
    else:
        strata = y if classes else np.zeros(len(y), np.int64)
        split = lambda rows, share: stratified_split(strata[rows], share, sources.SPLIT_SEED)  # noqa: E731
    rest = np.arange(len(y))
    found: Parts = {}
    for part, share in (("test", 0.0 if options.test_path else options.test_fraction), ("val", options.val_fraction)):
        if not share:
            continue
        first, second = split(rest, share)
        if not len(second) or not len(first):
            raise DataError(
                f"{table.path} has {len(y):,} rows, too few: {share:g} of {len(rest):,} leave no {part} or no training "
                f"part; data.{part}_fraction=0 does without"
            )
        rest, found[part] = rest[first], rest[second]
    return {"train": rest} | {part: found[part] for part in ("val", "test") if part in found}


def _groups(table: TableFile, name: str) -> np.ndarray:
    """The group of each row, numbered in the order of their names."""
    lines, (cells,) = table.cells([table.column(name)])
    if "" in cells:
        raise DataError(f"{table.where(lines[cells.index('')])}: {name}, the group, is empty")
    return np.unique(np.array(cells, dtype=object).astype(str), return_inverse=True)[1]


def _by_group(groups: np.ndarray, share: float, table: TableFile, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Whole groups in random order up to about the share, one group at least, and never all."""
    names, counts = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise DataError(f"{table.path} has too few groups in {options.group} to split its rows by them")
    chosen: list[int] = []
    for i in np.random.RandomState(sources.SPLIT_SEED).permutation(len(names)):
        if counts[chosen].sum() + counts[i] / 2 <= share * len(groups) and len(chosen) < len(names) - 1:
            chosen.append(i)
    inside = np.isin(groups, names[chosen or [int(counts.argmin())]])
    return np.flatnonzero(~inside), np.flatnonzero(inside)


def _times(table: TableFile, name: str, form: str | None) -> np.ndarray:
    """The time of each row: numbers, or seconds."""
    place = table.column(name)
    lines, (cells,) = table.cells([place])
    if form is None and all(map(is_number, cells)):
        return table.numbers([place])[:, 0]
    times = []
    for line, cell in zip(lines, cells, strict=True):
        try:
            times.append(datetime.strptime(cell, form) if form else datetime.fromisoformat(cell))
        except ValueError:
            right = f"as {form!r} says" if form else "such as 2016-07-01; data.time_format='%d.%m.%Y' reads 01.07.2016"
            raise DataError(f"{table.where(line)}: {name} is {cell[:40]!r}, not a time {right}") from None
        if (times[-1].tzinfo is None) != (times[0].tzinfo is None):
            raise DataError(f"{table.where(line)}: some times have a time zone and some have none")
    start = times[0]
    return np.array([(time - start).total_seconds() for time in times])


def _by_time(times: np.ndarray, share: float, table: TableFile, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The last rows; rows of the same time stay together."""
    begin = np.sort(times)[min(len(times) - round(share * len(times)), len(times) - 1)]
    return np.flatnonzero(times < begin), np.flatnonzero(times >= begin)


def _check_groups_apart(table: TableFile, options: Options) -> None:
    """Refuse a test file with groups of the training file."""
    if options.group is None:
        return
    assert options.test_path is not None
    other = _opened(options.test_path, options)
    sides = [set(one.cells([one.column(options.group)])[1][0]) for one in (table, other)]
    if both := sorted(sides[0] & sides[1]):
        raise DataError(f"{other.path}: rows of {options.group} {both[0][:40]!r} are in {table.path} too")


def _test_rows(
    form: inputs.Table, classes: Sequence[str], options: Options
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Inputs and targets of the test file, and notes."""
    assert options.test_path is not None
    assert options.target is not None
    table = _opened(options.test_path, options)
    wanted = [variable.name for variable in form.variables]
    found = table.match([*wanted, options.target], "the training table", also=[*(table.header or ())])
    columns, lines = read_columns(table, form.variables, found.places[:-1], form.missing_words)
    X, notes = encode(columns, form.variables, lines)
    return X, read_targets(table, (table.header or [])[found.places[-1]], classes), [*found.notes, *notes]


def _check_parts(
    y: np.ndarray,
    parts: Parts,
    classes: Sequence[str],
    table: TableFile,
    lines: Sequence[int],
    target: _Target,
    options: Options,
) -> None:
    """Refuse classes without a training row, and a constant target."""
    values = y[parts["train"]]
    if not classes:
        if (values == values[0]).all():
            raise DataError(f"{table.path}: {options.target} is {values[0]:g} in all training rows")
        return
    if absent := sorted(set(range(len(classes))) - set(values.tolist())):
        row = int(np.argmax(y == absent[0]))
        raise DataError(
            f"{table.where(lines[row])}: {options.target} is {classes[absent[0]][:40]!r}, which no training row is "
            "once the rows are split"
        )


# ---- description -------------------------------------------------------------------------------------------


def _description(own: OwnTable, table: TableFile, options: Options, reason: str) -> list[str]:
    variables = own.form.variables
    many = sum(variable.values is not None for variable in variables)
    kinds = f"{len(variables)} columns ({len(variables) - many} of numbers, {many} of categories)"
    lines = [f"{table.path}: {len(own.y):,} rows, {kinds} make {own.form.count} inputs"]
    values = ""
    if not own.class_names:
        y = own.y * own.form.target_scale + own.form.target_mean
        values = f"; {y.min():.6g} to {y.max():.6g}, mean {y.mean():.6g}"
    return [*lines, f"target {options.target}: {reason}{values}"]


def _remarks(
    own: OwnTable, options: Options, left_out: Mapping[str, str], surveys: Sequence[Survey], notes: Sequence[str]
) -> list[str]:
    variables = own.form.variables
    lines = [f"split: {_how(options)}"]
    gaps = {one.name: one.gaps if v.values is not None else one.missing for one, v in _pairs(surveys, variables)}
    if told := [_gap(v, gaps[v.name]) for v in variables if gaps[v.name]]:
        lines += [f"missing: {listed(told, 20, 100)}"]
    if left_out:
        lines += [f"left out: {listed([f'{name} ({why})' for name, why in left_out.items()], 20, 100)}"]
    rounded = [v.name for v, column in zip(variables, _numbers_of(own), strict=True) if _is_rounded(column)]
    if rounded:
        lines += [f"{listed(rounded)}: different numbers become the same as float32; subtract an offset from them"]
    return [*lines, *(note for note in notes if "which no training row has" in note)]


def _how(options: Options) -> str:
    if options.group:
        return f"{options.group} is never in two parts"
    if options.time:
        return f"by {options.time}, the last ones for testing"
    return f"tests from {Path(options.test_path).name}" if options.test_path else "drawn at random"


def _pairs(surveys: Sequence[Survey], variables: Sequence[Variable]) -> list[tuple[Survey, Variable]]:
    named = {one.name: one for one in surveys}
    return [(named[variable.name], variable) for variable in variables]


def _gap(variable: Variable, count: int) -> str:
    if variable.values is None:
        return f"{variable.name} {count:,} (median {variable.fill:.6g})"
    known = MISSING in variable.values
    return f"{variable.name} {count:,} ({'a category of its own' if known else 'no category'})"


def _numbers_of(own: OwnTable) -> list[np.ndarray]:
    """The first input of each variable."""
    ends = np.cumsum([variable.width() for variable in own.form.variables])
    return [own.X[:, end - v.width()] for end, v in zip(ends, own.form.variables, strict=True)]


def _is_rounded(values: np.ndarray) -> bool:
    as_model = torch.from_numpy(values).float().numpy()
    return 2 * len(np.unique(as_model)) < len(np.unique(values))
