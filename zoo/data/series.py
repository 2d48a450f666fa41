"""Forecasting data: windows of multivariate time series, from a published wheel or a CSV file.

Every batch is `((windows, marks), targets)`: float32 (B, L, D) and (B, L, F), and float32 (B, H, D), standardised by
the training part's mean and standard deviation. Targets of padding rows are NaN.
"""

from __future__ import annotations

import calendar
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from zoo.data.checks import DataError, extends
from zoo.data.delimited import TableFile, listed, read_table
from zoo.data.frames import read_rdataset
from zoo.data.image import ImageDataModule, Part
from zoo.data.lists import read_list
from zoo.data.sampling import KeyedDataset, SampleKey
from zoo.data.sources import cache_folder
from zoo.data.walk import Files, below
from zoo.support import inputs
from zoo.support.scaling import standardisation
from zoo.support.suggest import suggestion

__all__ = ["SERIES", "Forecast", "Series", "Step", "Window", "last_window", "read_csv", "regular_step"]

_log = logging.getLogger(__name__)

Share = Annotated[float, Field(gt=0, lt=1)]
Fill = Literal["forward"]


@dataclass(frozen=True)
class Series:
    """A multivariate time series.

    Attributes:
        values: (steps, D) float64; missing values are forward-filled.
        times: Time of each step.
        names: Name of each variable.
        time_name: Name of the file's time column; None if the series is not from a file.
    """

    values: np.ndarray
    times: list[datetime]
    names: list[str]
    time_name: str | None = None

    @property
    def step(self) -> Step | None:
        """The step between times; None if it is irregular."""
        step = regular_step(self.times)
        kept = step and all(step.after(a) == b for a, b in itertools.pairwise(self.times))
        return step if kept else None

    def marks(self) -> np.ndarray:
        """Hour, day of week, day of month and day of year of every step, each in [-0.5, 0.5], (steps, 4)."""
        rows = [
            (
                (t.hour + t.minute / 60) / 24 - 0.5,
                t.weekday() / 6 - 0.5,
                (t.day - 1) / 30 - 0.5,
                (t.timetuple().tm_yday - 1) / 365 - 0.5,
            )
            for t in self.times
        ]
        return np.array(rows)


def _forward_filled(values: np.ndarray) -> np.ndarray:
    """Forward-fill missing values; leading ones are filled with the first value."""
    values = values.astype(np.float64)
    for column in values.T:
        present = np.flatnonzero(~np.isnan(column))
        if not len(present):
            raise DataError("a variable has no value at all")
        last = np.maximum.accumulate(np.where(np.isnan(column), 0, np.arange(len(column))))
        column[:] = column[np.where(np.isnan(column[last]), present[0], last)]
    return values


# ---- bundled series ----------------------------------------------------------------------------------------


def _chicago(root: Path, download: bool) -> Series:
    """Riders at 20 stations and the weather, daily, 2001 to 2016: the 39 columns with more than ten values."""
    table = read_rdataset("modeldata", "Chicago", root, download)
    times = [datetime.fromisoformat(day) for day in table.pop("date")]
    del table["rownames"]
    names = [name for name, column in table.items() if len(np.unique(column)) > 10]
    return Series(np.stack([table[name] for name in names], 1).astype(np.float64), times, names)


def _jfk_weather(root: Path, download: bool) -> Series:
    """Hourly weather at JFK airport, 2013, without wind direction (circular) and gusts (mostly missing)."""
    table = read_rdataset("nycflights13", "weather", root, download)
    here = table["origin"] == "JFK"
    names = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
    clock = zip(*(table[part][here].tolist() for part in ("year", "month", "day", "hour")), strict=True)
    return Series(
        _forward_filled(np.stack([table[name][here] for name in names], 1)), [datetime(*t) for t in clock], names
    )


def _victoria_electricity(root: Path, download: bool) -> Series:
    """Half-hourly electricity demand of Victoria, Australia, and the temperature in Melbourne, 2014."""
    table = read_rdataset("fpp2", "elecdemand", root, download)
    names = ["Demand", "Temperature"]
    times = [datetime(2014, 1, 1) + timedelta(minutes=30 * i) for i in range(len(table["Demand"]))]
    return Series(np.stack([table[name] for name in names], 1), times, names)


# ---- CSV files ---------------------------------------------------------------------------------------------


def read_csv(
    path: str | Path,
    *,
    time_column: str | None = None,
    columns: Sequence[str] | None = None,
    time_format: str | None = None,
    fill: Fill | None = None,
    regular: bool = True,
    separator: str | None = None,
    encoding: str | None = None,
    whose: str | None = None,
) -> Series:
    """Read a series from a text file: a header, then rows of a time and numbers, as in the ETT and weather benchmarks.

    Times must increase by a constant step, a duration or whole months. Separators and decimal commas are detected, see
    `zoo.data.delimited.read_table`.

    Args:
        path: The file.
        time_column: Name of the time column; None means the first one.
        columns: Names of the variables to read, in this order; None means all but the times.
        time_format: Format of the times for `strptime`, for example `%d.%m.%Y %H:%M`; None means ISO 8601.
        fill: `forward` fills missing times and empty cells with the last values (leading ones with the first); None
            refuses them.
        regular: Whether the step must be constant; False accepts irregular times such as trading days.
        separator: Character between cells; None detects it.
        encoding: Encoding of the text; None means UTF-8, or UTF-16 with a byte order mark.
        whose: Who takes the columns, for messages, for example the model; None means the caller.

    Raises:
        DataError: The file is not such a table; the message names line and column.
    """
    table = read_table(path, separator=separator, encoding=encoding, what="series")
    layout = "a header and rows: a time such as 2016-07-01 00:00:00, then numbers"
    if table.header is None:
        raise DataError(f"{path} needs {layout}; its first line holds no names")
    if table.width < 2:
        raise DataError(f"{path} needs {layout}; it has 1 column, {listed(table.header)}")
    asked = [] if time_column is None else [time_column]
    # unused columns are reported only for a model that knows its variables
    also = table.header if whose is None or columns is None else table.header[: not asked]
    found = table.match([*asked, *(columns or ())], whose or "the configuration", also)
    for note in found.notes:
        _log.warning("%s", note)
    clock, places = found.places[0] if asked else 0, found.places[len(asked) :]
    names = list(columns or ())
    if columns is None:
        places = [i for i in range(table.width) if i != clock]
        names = [table.name(i) for i in places]
    if not places or clock in places:
        raise DataError(
            f"{path}: {table.name(clock)} holds the times and is no variable, so there is nothing to forecast"
        )
    lines, times = _times(table, clock, time_format, options=whose is None)
    if not times:
        raise DataError(f"{path} needs {layout}; it has no rows")
    values = table.numbers(places, missing=True)
    _check_cells(table, places, values, lines, fill, options=whose is None)
    step = regular_step(times)
    if regular:
        values, times = _reindexed(table, values, times, lines, step, fill, options=whose is None)
    return Series(_forward_filled(values), times, names, table.name(clock))


def _times(table: TableFile, clock: int, time_format: str | None, options: bool) -> tuple[list[int], list[datetime]]:
    """Line numbers and increasing times; `options`: whether messages may suggest arguments of `read_csv`."""
    lines, (cells,) = table.cells([clock])
    times: list[datetime] = []
    for line, cell in zip(lines, cells, strict=True):
        try:
            time = datetime.strptime(cell, time_format) if time_format else datetime.fromisoformat(cell)
        except ValueError:
            form = f"as {time_format!r} says" if time_format else "such as 2016-07-01 00:00:00"
            if options and not time_format:
                form += "; time_format='%d.%m.%Y %H:%M' reads 01.07.2016 00:00"
            raise DataError(
                f"{table.path}, line {line}: {table.name(clock)} is {cell[:40]!r}, not a time {form}"
            ) from None
        if times:
            _check_order(table, times, time, line)
        times.append(time)
    return lines, times


def _check_order(table: TableFile, times: Sequence[datetime], time: datetime, line: int) -> None:
    last = times[-1]
    if (last.tzinfo is None) != (time.tzinfo is None):
        raise DataError(f"{table.path}, line {line}: some times have a time zone and some have none")
    if time > last:
        return
    hint = _of_clocks(last - time + (last - times[-2]), time) if len(times) > 1 else ""
    if time == last:
        raise DataError(f"{table.path}, line {line}: {time} comes twice; keep one row of each time{hint}")
    raise DataError(f"{table.path}, line {line}: time goes back from {last} to {time}; sort the rows by time{hint}")


def _of_clocks(span: timedelta, time: datetime) -> str:
    """What to do where local times are an hour off, as on the day that the clocks change; else empty."""
    if span != timedelta(hours=1) or time.tzinfo is not None:
        return ""
    return "; if the clocks changed there, write times with their offset, such as 2024-03-31T01:00+01:00"


def _check_cells(
    table: TableFile,
    places: Sequence[int],
    values: np.ndarray,
    lines: Sequence[int],
    fill: Fill | None,
    options: bool,
) -> None:
    gaps = np.isnan(values)
    for i, place in enumerate(places):
        if gaps[:, i].all():
            raise DataError(
                f"{table.path}: {table.name(place)} has no value at all{'; leave it out with columns=[...]' * options}"
            )
    if fill is None and gaps.any():
        row, i = np.argwhere(gaps)[0]
        more = f", one of {gaps.sum():,} such cells" if gaps.sum() > 1 else ""
        way_out = "; fill=forward repeats the last value seen" * options
        raise DataError(f"{table.path}, line {lines[row]}: {table.name(places[i])} is empty{more}{way_out}")
    if gaps.any():
        leading = int(np.logical_and.accumulate(gaps, 0).sum())
        early = f"; {leading:,} of them stand before the first value, and take it" if leading else ""
        _log.warning("%s: %d empty cells were filled with the last value seen%s", table.path, gaps.sum(), early)


@dataclass(frozen=True)
class Step:
    """The step between two rows of a series: whole months or a fixed duration.

    Attributes:
        months: Calendar months; 0 for a fixed duration.
        seconds: The fixed duration, seconds.
        month_end: Whether every time is the last day of its month.
    """

    months: int = 0
    seconds: float = 0.0
    month_end: bool = False

    def after(self, time: datetime, steps: int = 1) -> datetime:
        """The time `steps` steps after `time`.

        Raises:
            DataError: The time is beyond Python's calendar.
        """
        try:
            if not self.months:
                return time + timedelta(seconds=self.seconds) * steps
            year, month = divmod(time.year * 12 + time.month - 1 + self.months * steps, 12)
            last = calendar.monthrange(year, month + 1)[1]
            return time.replace(year=year, month=month + 1, day=last if self.month_end else min(time.day, last))
        except (OverflowError, ValueError):
            raise DataError(f"the calendar ends {steps} steps of {self} after {time}") from None

    def __str__(self) -> str:
        if self.months:
            return f"{self.months} month{'s' * (self.months > 1)}"
        return str(timedelta(seconds=self.seconds))


def regular_step(times: Sequence[datetime]) -> Step | None:
    """The most frequent step between increasing times, the shorter one in a tie; None for fewer than two times."""
    if len(times) < 2:
        return None
    if times[-1] - times[0] > timedelta(days=27) and len({t.timetz() for t in times}) == 1:
        ends = all(t.day == calendar.monthrange(t.year, t.month)[1] for t in times)
        if ends or len({t.day for t in times}) == 1:
            months = [t.year * 12 + t.month for t in times]
            return Step(months=_most_frequent([b - a for a, b in itertools.pairwise(months)]), month_end=ends)
    spans = [(b - a).total_seconds() for a, b in itertools.pairwise(times)]
    return Step(seconds=_most_frequent(spans))


def _most_frequent(spans: Sequence[Any]) -> Any:
    counts = Counter(spans)
    most = max(counts.values())
    return min(span for span, count in counts.items() if count == most)


def _reindexed(
    table: TableFile,
    values: np.ndarray,
    times: list[datetime],
    lines: Sequence[int],
    step: Step | None,
    fill: Fill | None,
    options: bool,
) -> tuple[np.ndarray, list[datetime]]:
    """Reindex the rows to a constant step; missing times become NaN rows if `fill` allows them."""
    if step is None:
        return values, times
    anyway = "; regular=false takes the rows as they come" * options
    whole, places = [times[0]], [0]
    for line, time in zip(lines[1:], times[1:], strict=True):
        last, missing = whole[-1], 0
        while (due := step.after(whole[-1])) < time:
            missing += 1
            if fill is None or len(whole) > 10 * len(times):
                break
            whole.append(due)
        if missing and due < time and fill is not None:
            raise DataError(f"{table.path}: times are missing, and filled it would have more than ten times its rows")
        if due > time:
            raise DataError(f"{table.path}, line {line}: {time} is not a whole step of {step} after {last}{anyway}")
        if missing and fill is None:
            raise DataError(
                f"{table.path}, line {line}: times are missing between {last} and {time}, where the step is {step}"
                + f"; fill=forward repeats the last values seen{anyway.replace(';', ',')}" * options
                + _of_clocks(time - due, time)
            )
        places.append(len(whole))
        whole.append(time)
    if len(whole) == len(times):
        return values, times
    filled = np.full((len(whole), values.shape[1]), np.nan)
    filled[places] = values
    _log.warning("%s: %d missing times were filled with the last values seen", table.path, len(whole) - len(times))
    return filled, whole


#: Reading options of the bundled series, which cannot be changed.
_BUNDLED_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("time_column", "columns", "time_format", "fill", "separator", "encoding")),
    "regular": True,
}
SUFFIXES = (".csv", ".tsv", ".txt")
_MAX_VALUE = 1e150  # whose squares, and sums of them, are numbers of float64
_FILES_SHOWN = 5
SERIES = {"chicago": _chicago, "jfk_weather": _jfk_weather, "victoria_electricity": _victoria_electricity}


# ---- model inputs ------------------------------------------------------------------------------------------


def standardised(series: Series, form: inputs.Series) -> tuple[Tensor, Tensor]:
    """Standardised values (steps, D) and calendar features (steps, F) of a series, float32.

    Raises:
        DataError: A standardised value overflows float32.
    """
    with np.errstate(over="ignore"):
        values = torch.from_numpy((series.values - np.array(form.mean)) / np.array(form.std)).float()
    if not values.isfinite().all():
        row, column = (~values.isfinite()).nonzero()[0].tolist()
        where = f"{series.names[column]} at {series.times[row]}"
        raise DataError(f"{where} is {series.values[row, column]:g}, too far from the training part for float32")
    return values, torch.from_numpy(series.marks()[:, : form.time_features]).float()


def in_units(forecast: Tensor, form: inputs.Series) -> np.ndarray:
    """Transform forecasts (..., D) back to the units of the data, float64."""
    return forecast.detach().double().cpu().numpy() * np.array(form.std) + np.array(form.mean)


@dataclass(frozen=True)
class Window:
    """The last window of a series, as a model takes it.

    Attributes:
        values: Standardised (1, L, D).
        marks: Calendar features (1, L, F).
        past: Times of the L steps.
        times: Times of the H steps to forecast; empty if the step is irregular.
        names: Name of each variable.
    """

    values: Tensor
    marks: Tensor
    past: list[datetime]
    times: list[datetime]
    names: list[str]


def last_window(path: str | Path, form: inputs.Series) -> Window:
    """The last window of a file, prepared as in training.

    Args:
        path: A text file, see `read_csv`; its columns are matched with the model's by name.
        form: The model's record.

    Raises:
        DataError: The file cannot be read, is shorter than a window, or has another step than the training series.
    """
    series = read_csv(
        path,
        time_column=form.time_column,
        columns=form.columns or None,
        time_format=form.time_format,
        fill=form.fill,
        regular=form.regular,
        separator=form.separator,
        encoding=form.encoding,
        whose="the model",
    )
    if len(series.names) != form.count:
        raise DataError(
            f"{path} has {len(series.names)} variables ({listed(series.names)}), the model takes {form.count}"
        )
    if not form.columns:
        _log.warning("%s: the model knows no names of variables, so they are taken in order", path)
    if len(series.times) < form.steps:
        raise DataError(f"{path} has {len(series.times)} steps, the model looks at {form.steps}")
    step = series.step
    if step and form.step and str(step) != form.step:
        raise DataError(f"{path} has steps of {step}, the model was trained on steps of {form.step}")
    values, marks = standardised(series, form)
    following = [step.after(series.times[-1], i + 1) for i in range(form.horizon)] if step else []
    past = series.times[-form.steps :]
    return Window(values[None, -form.steps :], marks[None, -form.steps :], past, following, series.names)


def prepare_series(path: Path, form: inputs.Series) -> tuple[Tensor, Tensor]:
    """Read the last window of a file and its marks, (1, L, D) and (1, L, F)."""
    window = last_window(path, form)
    return window.values, window.marks


# ---- windows -----------------------------------------------------------------------------------------------


class Windows(KeyedDataset):
    """Pairs of an input window and the steps after it.

    Args:
        values: Standardised series (steps, D).
        marks: Calendar features (steps, F).
        starts: First step of each window.
        seq_len: Steps L of a window.
        pred_len: Steps H of a target.
    """

    def __init__(self, values: Tensor, marks: Tensor, starts: Sequence[int], seq_len: int, pred_len: int) -> None:
        super().__init__(torch.zeros(len(starts)))
        self.values, self.marks = values, marks
        self.starts, self.seq_len, self.pred_len = torch.as_tensor(starts), seq_len, pred_len

    def batch(self, keys: Sequence[SampleKey | int]) -> Any:
        """Windows (B, L, D) with their marks (B, L, F), and targets (B, H, D), NaN for padding keys."""
        asked = [key if isinstance(key, SampleKey) else SampleKey(int(key)) for key in keys]
        first = self.starts[[key.sample for key in asked]][:, None]
        seen = first + torch.arange(self.seq_len)
        targets = self.values[first + self.seq_len + torch.arange(self.pred_len)]
        targets[torch.tensor([key.padded for key in asked])] = torch.nan
        return (self.values[seen], self.marks[seen]), targets

    def __getitem__(self, key: SampleKey | int) -> Any:
        (window, marks), target = self.batch([key])
        return (window[0], marks[0]), target[0]


class Forecast(ImageDataModule):
    """Windows of a series: `seq_len` input steps and the `pred_len` steps after them to forecast.

    The series is split in time: by default 70 % for training, then 10 % for validation and 20 % for testing. Input
    windows of the validation and test parts may begin before the part. Variables are standardised by the training
    part's mean and standard deviation. Of several files, each is split in time by itself, and no window crosses from
    one into another; they need the same variables and the same step.

    Args:
        name: `chicago` (5,698 days, 39 variables), `jfk_weather` (8,706 hours, 7), `victoria_electricity` (17,520 half
            hours, 2), or a CSV file; not used with `path`.
        cache: Folder of what is fetched; `None` means `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        seq_len: Steps L of an input window.
        pred_len: Steps H to forecast.
        time_features: Number of calendar features, in the order of `Series.marks`; the last two are useless for a
            series of at most a year.
        time_column, columns, time_format, fill, regular, separator, encoding: How a file is read, see `read_csv`.
        train_share: Share of the series for training.
        val_share: Share for validation; the rest is for testing.
        path: A file of one's own (see `read_csv`), a folder of such files, or with `file_column` a list of them.
        file_column: Of a list: column of the names of the files.
        folder: Of a list: where relative names start, and out of which none may lead; None: the list's own.
        **loader: Seed and loaders, see :class:`zoo.data.ImageDataModule`.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the series is unknown, too short, missing or damaged.
    """

    num_classes = None  # type: ignore[assignment]
    class_names = None  # type: ignore[assignment]

    @extends(ImageDataModule, without=("balanced",), eval_batch_size=256)
    def __init__(
        self,
        name: str | None = "chicago",
        cache: str | Path | None = None,
        download: bool = True,
        seq_len: PositiveInt = 28,
        pred_len: PositiveInt = 7,
        time_features: Annotated[int, Field(ge=0, le=4)] = 4,
        time_column: str | None = None,
        columns: list[str] | None = None,
        time_format: str | None = None,
        fill: Fill | None = None,
        regular: bool = True,
        separator: str | None = None,
        encoding: str | None = None,
        train_share: Share = 0.7,
        val_share: Share = 0.1,
        path: str | Path | None = None,
        file_column: str | None = None,
        folder: str | Path | None = None,
        **loader: Any,
    ) -> None:
        super().__init__(**loader)
        self.path = None if path is None else Path(path).expanduser()  # type: ignore[assignment]
        self.folder = None if folder is None else Path(folder).expanduser()
        self.file_column = file_column
        name = name if path is None else str(self.path)
        if name is None:
            raise DataError(f"Forecast: there is no series: give path, or as name one of {', '.join(SERIES)}")
        if path is None and name not in SERIES and not name.lower().endswith(SUFFIXES):
            raise DataError(
                f"Forecast(name={name!r}): there is no such series{suggestion(name, SERIES)}, or a "
                f"{', '.join(SUFFIXES)} file"
            )
        if train_share + val_share >= 1:
            raise DataError(f"train_share + val_share = {train_share + val_share:g} leaves nothing to test on")
        self.series_name, self.download = name, download
        self.seq_len, self.pred_len = seq_len, pred_len
        self.time_features, self.train_share, self.val_share = time_features, train_share, val_share
        self.reading: dict[str, Any] = {
            "time_column": time_column,
            "columns": columns,
            "time_format": time_format,
            "fill": fill,
            "regular": regular,
            "separator": separator,
            "encoding": encoding,
        }
        if path is None and name in SERIES and self.reading != _BUNDLED_OPTIONS:
            given = next(key for key, value in self.reading.items() if value != _BUNDLED_OPTIONS[key])
            raise DataError(f"Forecast(name={name!r}): {given} is for files; {name} is read as it is")
        self.cache = cache_folder(cache)

    @property
    def series(self) -> Series:
        """The series, or the first one of several."""
        return self.all_series[0]

    @functools.cached_property
    def all_series(self) -> list[Series]:
        """The series of all files, read once.

        Raises:
            DataError: A file cannot be read, or its variables or its step are not those of the first one.
        """
        if self.path is None and self.series_name in SERIES:
            return [SERIES[self.series_name](self.cache, self.download)]
        paths = self.paths
        found = [read_csv(paths[0], **self.reading)]
        first = found[0]
        for path in paths[1:]:
            series = read_csv(path, **self.reading)
            if sorted(series.names) != sorted(first.names):
                raise DataError(
                    f"{path} has the variables {listed(series.names)}, and {paths[0]} has {listed(first.names)}: all "
                    "files need the same ones"
                )
            if series.names != first.names:  # in another order
                series = read_csv(path, **self.reading | {"columns": first.names})
            if series.step != first.step:
                steps = [str(s.step) if s.step else "of different lengths" for s in (series, first)]
                raise DataError(f"the steps of {path} are {steps[0]}, those of {paths[0]} {steps[1]}")
            found.append(series)
        return found

    @functools.cached_property
    def paths(self) -> list[Path]:
        """The files, sorted, or in the order of the list."""
        path = self.path or Path(self.series_name).expanduser()
        if self.file_column is not None:
            kind = Files("series", "series", SUFFIXES)
            return [Path(file) for file in read_list(path, kind, {"file": self.file_column}, self.folder).files]
        if not path.is_dir():
            return [path]
        found = below(path, Files("series", "series", SUFFIXES))
        if not found:
            raise DataError(f"{path} holds no series ({' '.join(SUFFIXES)})")
        return list(map(Path, found))

    @property
    def in_chans(self) -> int:  # type: ignore[override]
        """Number of variables."""
        return len(self.series.names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(D, 1, L): the variables are channels."""
        return self.in_chans, 1, self.seq_len

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Input size, and mean and standard deviation of the training part."""
        return {"input_size": list(self.input_size), "mean": self._form.mean, "std": self._form.std}

    @functools.cached_property
    def _form(self) -> inputs.Series:
        series = self.series
        past = np.concatenate([one.values[: self._borders(one)[0]] for one in self.all_series])
        if not len(past):
            raise DataError(f"{self.series_name} has {len(series.values)} steps, too few to train on")
        if (large := np.abs(past).max(0)).max() > _MAX_VALUE:
            name, most = series.names[int(large.argmax())], large.max()
            raise DataError(f"{name} of {self.series_name} holds {most:g}, whose square is no number: in another unit?")
        mean, scale = standardisation(past)
        same = [name for name, one, raw in zip(series.names, scale == 1, past.std(0), strict=True) if one and raw < 0.5]
        if same:
            _log.warning(
                "%s: %s never changes in the training part and is only centred", self.series_name, listed(same)
            )
        reading = {**self.reading, "columns": series.names, "time_column": series.time_name}
        return inputs.Series(
            kind="series",
            count=len(series.names),
            steps=self.seq_len,
            horizon=self.pred_len,
            time_features=self.time_features,
            mean=mean.tolist(),
            std=scale.tolist(),
            step=str(series.step) if series.step else None,
            **reading,
        )

    def input_record(self) -> dict[str, Any]:
        """Names and scales of the variables, window lengths, calendar features, and how a file is read."""
        return self._form.model_dump()

    def _borders(self, series: Series) -> tuple[int, int, int]:
        """Ends of the training, validation and test parts of a series."""
        steps = len(series.values)
        return int(steps * self.train_share), int(steps * (self.train_share + self.val_share)), steps

    def prepare_data(self) -> None:
        """Fetch the series unless it is cached."""
        _ = self.series

    def setup(self, stage: str | None = None) -> None:
        """Standardise and split, once."""
        if self.datasets:
            return
        starts: dict[Part, list[int]] = {"train": [], "val": [], "test": []}
        values, marks, offset = [], [], 0
        for i, series in enumerate(self.all_series):
            for part, first in self._windows(series, i).items():
                starts[part] += [offset + start for start in first]
            rows = standardised(series, self._form)
            values.append(rows[0])
            marks.append(rows[1])
            offset += len(rows[0])
        whole = torch.cat(values), torch.cat(marks)
        self.datasets = {part: Windows(*whole, first, self.seq_len, self.pred_len) for part, first in starts.items()}

    def _windows(self, series: Series, i: int) -> dict[Part, range]:
        """First steps of the windows of each part of the i-th series."""
        training, validation, steps = self._borders(series)
        whole = self.seq_len + self.pred_len
        if min(training - self.seq_len, validation - training, steps - validation) < self.pred_len:
            name = self.paths[i] if len(self.all_series) > 1 else self.series_name
            windows = f"windows of {self.seq_len} + {self.pred_len}"
            raise DataError(f"{name} has {steps} steps, too few for {windows} in every part")
        return {
            "train": range(training - whole + 1),
            "val": range(training - self.seq_len, validation - whole + 1),
            "test": range(validation - self.seq_len, steps - whole + 1),
        }

    def describe(self) -> list[str]:
        """A short report of the series: files, span, variables, windows of each part."""
        series, lines = self.all_series, []
        for i, one in enumerate(series[:_FILES_SHOWN]):
            name = self.paths[i] if len(series) > 1 else self.series_name
            step = f"every {str(one.step).removesuffix(', 0:00:00')}" if one.step else "at irregular times"
            lines.append(f"{name}: {len(one.times):,} steps {step}, from {one.times[0]} to {one.times[-1]}")
        if len(series) > _FILES_SHOWN:
            lines.append(f"... {len(series)} files, {sum(len(one.times) for one in series):,} steps")
        lines.append(f"{len(self.series.names)} variables: {listed(self.series.names, 8)}")
        sizes = ", ".join(f"{part} {len(rows):,}" for part, rows in self.datasets.items())
        lines.append(f"windows of {self.seq_len} + {self.pred_len} steps: {sizes}")
        each = " of each file" if len(series) > 1 else ""
        rest = 1 - self.train_share - self.val_share
        shares = f"the first {self.train_share:.0%}{each}, the next {self.val_share:.0%}, the last {rest:.0%}"
        return [*lines, f"train, val, test: {shares}"]

    def training_windows(self) -> tuple[Tensor, Tensor]:
        """All training windows (N, L, D) and targets (N, H, D), for models initialised from the data."""
        part = self._dataset("train")
        (windows, _), targets = part.batch(range(len(part)))
        return windows, targets
