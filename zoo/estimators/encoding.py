"""Columns of a table as inputs of an estimator: numbers whose gaps are filled, and categories, one input each.

>>> columns = read_columns(X, categorical_mask(X, "from_dtype"))
>>> encoding = fit_encoding(columns, weight)                   # of the rows of positive weight
>>> encoding.inputs(columns)                                   # (n, inputs), float64

A gap gets the median of the training rows; if they have gaps in that column, a further input says where. A category is
compared as the text that a file would have for it, so 3, 3.0 and "3" are one; missing is a category of its own. What is
none of a column's categories (not seen in training, or too rare, see :data:`MOST_LEVELS`) is 0 in each of its inputs.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.utils.validation import check_array

from zoo.support.cells import cell_text, known_category, unpadded
from zoo.support.inputs import MISSING, Variable
from zoo.support.scaling import OWN, UNSCALED

__all__ = ["Columns", "Encoding", "categorical_mask", "check_encoding", "fit_encoding", "read_columns"]

_TIMES = ("date", "time", "period", "duration")  # how the types of pandas and polars begin
_TIME_TYPES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)

#: Categories of a column that get an input, the most frequent ones; as many as networks take (`data.max_categories`).
MOST_LEVELS = 100


class Columns(NamedTuple):
    """The columns of a table.

    Attributes:
        numbers: (n, D) float64, NaN where missing and in categories.
        words: The categories (n,) of each column that has some, by its index.
    """

    numbers: np.ndarray
    words: dict[int, np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """What the columns of a table become.

    Attributes:
        fill: What a gap in a column of numbers becomes (D,); 0 for categories.
        indicator: Whether a further input says where the gaps are (D,).
        levels: The categories of a column in the order of its inputs, by its index.
    """

    fill: np.ndarray
    indicator: np.ndarray
    levels: dict[int, list[str]]

    @property
    def owners(self) -> np.ndarray:
        """Index of the column that each input comes from (inputs,)."""
        widths = 1 + self.indicator.astype(int)
        for column, levels in self.levels.items():
            widths[column] = len(levels)
        return np.repeat(np.arange(len(widths)), widths)

    @classmethod
    def of_numbers(cls, count: int) -> Encoding:
        """That of columns of numbers without gaps."""
        return cls(np.zeros(count), np.zeros(count, dtype=bool), {})

    @property
    def categorical(self) -> np.ndarray:
        """Which columns hold categories (D,)."""
        return np.isin(np.arange(len(self.fill)), list(self.levels))

    def names(self, columns: Sequence[str]) -> list[str]:
        """Names of the inputs, from those of the columns (D,)."""
        found = []
        for i, name in enumerate(columns):
            found += [f"{name}={level}" for level in self.levels[i]] if i in self.levels else [name]
            found += [f"{name}={MISSING}"] if self.indicator[i] else []
        return found

    @property
    def is_plain(self) -> bool:
        """Whether the inputs are the columns."""
        return not self.levels and not self.indicator.any()

    @property
    def blocks(self) -> np.ndarray | None:
        """How inputs share scales, for :func:`zoo.support.scaling.block_scale` (inputs,); None if each has its own.

        Those of a category share one; where a gap is, is not scaled: it is one standard deviation away from the median.
        """
        if self.is_plain:
            return None
        owners = self.owners
        found = np.where(self.categorical[owners], owners, OWN)
        found[1:][(owners[1:] == owners[:-1]) & (found[1:] == OWN)] = UNSCALED
        return found

    def variables(self, names: Sequence[str]) -> list[Variable]:
        """The columns as an input record has them, so that files are encoded in the same way."""
        return [
            Variable(name=name, values=self.levels[i], unseen="zeros")
            if i in self.levels
            else Variable(name=name, fill=float(self.fill[i]), indicator=bool(self.indicator[i]))
            for i, name in enumerate(names)
        ]

    def inputs(self, columns: Columns) -> np.ndarray:
        """The inputs (n, inputs) of some rows."""
        numbers = columns.numbers
        gaps = np.isnan(numbers)
        if gaps.any():
            numbers = np.where(gaps, self.fill, numbers)
        if self.is_plain:
            return numbers
        found = []
        for i in range(len(self.fill)):
            if i in self.levels:
                place = {level: k for k, level in enumerate(self.levels[i])}
                codes = np.array([place.get(known_category(word, place), -1) for word in columns.words[i]])
                found.append(codes[:, None] == np.arange(len(place)))
            else:
                found.append(numbers[:, [i]])
                found += [gaps[:, [i]]] if self.indicator[i] else []
        return np.hstack(found, dtype=np.float64, casting="unsafe")

    def by_column(self, shares: np.ndarray) -> np.ndarray:
        """Shares of the inputs, summed over those of each column (D,)."""
        return np.bincount(self.owners, shares, len(self.fill))


def fit_encoding(columns: Columns, weight: np.ndarray) -> Encoding:
    """The encoding of the rows of positive weight; a weight of 2 is two rows, in medians and in what is frequent.

    Args:
        columns: Of n rows.
        weight: (n,), non-negative.
    """
    present = weight > 0
    numbers, weight = columns.numbers[present], weight[present] / weight.max()
    gaps = np.isnan(numbers)
    for column in columns.words:
        gaps[:, column] = False
    filled = np.where(np.isnan(numbers), np.inf, numbers)  # gaps are last, and weigh nothing
    order = filled.argsort(0, kind="stable")
    mass = np.take_along_axis(weight[:, None] * np.isfinite(filled), order, 0).cumsum(0)
    middle = (mass < mass[-1] / 2).sum(0)  # of the lower median
    fill = np.take_along_axis(filled, np.take_along_axis(order, middle[None], 0), 0)[0]
    levels = {column: _frequent(words[present], weight) for column, words in columns.words.items()}
    return Encoding(np.where(np.isfinite(fill), fill, 0.0), gaps.any(0), levels)


def _frequent(words: np.ndarray, weight: np.ndarray) -> list[str]:
    different, place = np.unique(words, return_inverse=True)
    mass, found = np.bincount(place, weight), different.tolist()
    kept = sorted(range(len(found)), key=lambda i: (-mass[i], _order(found[i])))[:MOST_LEVELS]
    return sorted((found[i] for i in kept), key=_order)


def _order(word: str) -> tuple[bool, bool, float, str]:
    """Key of the order of categories: numbers by value, then words; the missing category last."""
    try:
        number = float(word)
    except ValueError:
        number = np.nan
    return word == MISSING, bool(np.isnan(number)), 0.0 if np.isnan(number) else number, word


def check_encoding(encoding: Any, count: int) -> None:
    """Refuse an encoding from a file that no fit gives.

    Raises:
        ValueError: It is none, or not one of `count` columns.
    """
    if not isinstance(encoding, Encoding):
        raise ValueError(f"encoding_ is a {type(encoding).__name__}, not an encoding of columns")
    for name, kind in (("fill", "f"), ("indicator", "b")):
        value = getattr(encoding, name)
        if not isinstance(value, np.ndarray) or value.dtype.kind != kind or value.shape != (count,):
            raise ValueError(f"{name} of encoding_ does not hold one value for each column")
    if not np.isfinite(encoding.fill).all():
        raise ValueError("encoding_ fills gaps with NaN or infinity")
    if not isinstance(encoding.levels, dict):
        raise ValueError("levels of encoding_ is no mapping")
    for column, levels in encoding.levels.items():
        if type(column) is not int or not 0 <= column < count or encoding.indicator[column]:
            raise ValueError(f"encoding_ has categories of the column {column!r:.60}, which has none")
        fine = isinstance(levels, list) and 0 < len(levels) <= MOST_LEVELS
        if not fine or not all(isinstance(level, str) for level in levels) or len(set(levels)) < len(levels):
            raise ValueError(f"encoding_ has no list of different categories of the column {column}")


# ---- tables ------------------------------------------------------------------------------------------------


def _is_frame(X: Any) -> bool:
    """Whether a table has columns of different types, as those of pandas and polars."""
    return hasattr(X, "columns") and hasattr(X, "dtypes")


def _column(X: Any, place: int) -> list[Any]:
    return (X.iloc[:, place] if hasattr(X, "iloc") else X.to_series(place)).to_list()


def categorical_mask(X: Any, given: Any) -> np.ndarray | None:
    """Which columns hold categories (D,); None if none do.

    Args:
        X: A data frame, or whatever scikit-learn takes as rows.
        given: `"from_dtype"`, None, or a mask, indices or names, as in scikit-learn's `HistGradientBoostingClassifier`.

    Raises:
        ValueError: `given` does not fit the columns.
    """
    frame = _is_frame(X)
    if given is None or (isinstance(given, str) and given == "from_dtype"):
        if given is None or not frame:
            return None
        kinds = [str(kind) for kind in X.dtypes]
        mask = np.array([_is_categorical(kind, X, i) for i, kind in enumerate(kinds)], dtype=bool)
        return mask if mask.any() else None
    chosen = np.asarray(given)
    if chosen.size == 0:
        return None
    cells = given if isinstance(given, list | tuple) else chosen.tolist()  # an array makes texts of 1 beside "a"
    kinds = sorted({type(one).__name__ for one in cells}) if chosen.ndim == 1 else [f"{chosen.ndim} axes"]
    if kinds not in (["bool"], ["int"], ["str"]):
        raise ValueError(f"categorical_features must be an array-like of bool, int or str, got: {', '.join(kinds)}.")
    count = X.shape[1] if hasattr(X, "shape") else np.shape(X)[1]
    mask = np.zeros(count, dtype=bool)
    if kinds == ["bool"]:
        if len(chosen) != count:
            raise ValueError(
                f"categorical_features set as a boolean mask must have shape (n_features,), got: {chosen.shape}"
            )
        mask[:] = chosen
    elif kinds == ["int"]:
        if chosen.min() < 0 or chosen.max() >= count:
            raise ValueError("categorical_features set as integer indices must be in [0, n_features - 1]")
        mask[chosen] = True
    else:
        if not hasattr(X, "columns"):
            raise ValueError(
                "categorical_features should be passed as an array of integers or as a boolean mask when the model is "
                "fitted on data without feature names."
            )
        names = list(X.columns)
        for name in chosen.tolist():
            if name not in names:
                raise ValueError(
                    f"categorical_features has an item value '{name}' which is not a valid feature name of the "
                    f"training data. Observed feature names: {names}"
                )
            mask[names.index(name)] = True
    return mask if mask.any() else None


def _is_categorical(kind: str, X: Any, place: int) -> bool:
    """Whether a column of a frame holds categories by its type; of objects, if one is a text."""
    if kind == "object":
        return any(isinstance(value, str) for value in _column(X, place))
    return kind == "str" or kind.lower().startswith(("categor", "enum", "string", "utf8"))


def without_times(X: Any, mask: np.ndarray | None = None) -> Any:
    """The table itself.

    Args:
        X: A data frame, or whatever scikit-learn takes as rows.
        mask: Which columns hold categories (D,), of which a time may be one; None if none do.

    Raises:
        ValueError: A column of numbers holds dates, times or spans of time.
    """
    if not _is_frame(X):
        if getattr(getattr(X, "dtype", None), "kind", "") in ("m", "M"):
            raise ValueError(f"X holds dates or times ({X.dtype}): write what matters of them as numbers")
        return X
    for i, (name, dtype) in enumerate(zip(X.columns, X.dtypes, strict=True)):
        if mask is not None and i < len(mask) and mask[i]:
            continue
        kind = str(dtype).lower()
        cells = _column(X, i) if kind == "object" or kind.startswith(_TIMES) else []
        first = next((cell for cell in cells if isinstance(cell, _TIME_TYPES) and cell_text(cell)), None)
        if kind.startswith(_TIMES) or first is not None:
            such = "" if first is None else f", such as {cell_text(first)[:40]!r}"
            raise ValueError(f"{name} holds dates or times{such}: leave it out, or write what matters of it as numbers")
    return X


def read_columns(X: Any, mask: np.ndarray, **checks: Any) -> Columns:
    """The columns of a table with categories.

    Args:
        X: A data frame, or rows (n, D) of numbers and texts.
        mask: Which columns hold categories (D,).
        **checks: Of scikit-learn's `check_array`, for the numbers.

    Raises:
        ValueError: A number is infinite, or no number.
    """
    if not _is_frame(X):
        X = check_array(X, dtype=object, ensure_all_finite=False, **checks)
    places = np.flatnonzero(~mask).tolist()
    numbers = np.full((len(X), len(mask)), np.nan)
    if places:
        some = X.iloc[:, places] if hasattr(X, "iloc") else X[:, places]
        numbers[:, places] = check_array(some, dtype=np.float64, ensure_all_finite="allow-nan", **checks)
    words = {}
    for place in np.flatnonzero(mask).tolist():
        cells = _column(X, place) if _is_frame(X) else X[:, place].tolist()
        words[place] = np.array([unpadded(cell_text(cell)) or MISSING for cell in cells], dtype=object)
    return Columns(numbers, words)
