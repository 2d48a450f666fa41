"""Forecasting data: windows over real multivariate series out of a published wheel, or over a CSV file of one's own.

Every batch is `((windows, marks), targets)`: float32 (B, L, D) and (B, L, F), and float32 (B, H, D), standardised by
the mean and deviation of the training part. A padded row's target is NaN.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from zoo.data.checks import DataError, checked
from zoo.data.frames import read_rdataset
from zoo.data.image import ImageDataModule
from zoo.data.sampling import KeyedDataset, SampleKey
from zoo.data.sources import cache_folder
from zoo.suggest import suggestion

__all__ = ["SERIES", "Forecast", "Series", "read_csv"]

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Series:
    """A multivariate series.

    Attributes:
        values: (steps, D) float64, without gaps: a missing value is the last one seen.
        times: Time of each step.
        names: Name of each variable.
    """

    values: np.ndarray
    times: list[datetime]
    names: list[str]

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


def _filled(values: np.ndarray) -> np.ndarray:
    """Missing values replaced by the last one seen, or at the beginning by the first one."""
    values = values.astype(np.float64)
    for column in values.T:
        present = np.flatnonzero(~np.isnan(column))
        if not len(present):
            raise DataError("a variable has no value at all")
        last = np.maximum.accumulate(np.where(np.isnan(column), 0, np.arange(len(column))))
        column[:] = column[np.where(np.isnan(column[last]), present[0], last)]
    return values


# ---- where they come from ----------------------------------------------------------------------------------


def _chicago(root: Path, download: bool) -> Series:
    """Riders at 20 stations and the weather, daily, 2001 to 2016: the 39 columns with more than ten values."""
    table = read_rdataset("modeldata", "Chicago", root, download)
    times = [datetime.fromisoformat(day) for day in table.pop("date")]
    del table["rownames"]
    names = [name for name, column in table.items() if len(np.unique(column)) > 10]
    return Series(np.stack([table[name] for name in names], 1).astype(np.float64), times, names)


def _jfk_weather(root: Path, download: bool) -> Series:
    """Hourly weather at JFK airport, 2013; wind direction and gusts, mostly missing or circular, are left out."""
    table = read_rdataset("nycflights13", "weather", root, download)
    here = table["origin"] == "JFK"
    names = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
    clock = zip(*(table[part][here].tolist() for part in ("year", "month", "day", "hour")), strict=True)
    return Series(_filled(np.stack([table[name][here] for name in names], 1)), [datetime(*t) for t in clock], names)


def _victoria_electricity(root: Path, download: bool) -> Series:
    """Half-hourly electricity demand of Victoria, Australia, and the temperature in Melbourne, 2014."""
    table = read_rdataset("fpp2", "elecdemand", root, download)
    names = ["Demand", "Temperature"]
    times = [datetime(2014, 1, 1) + timedelta(minutes=30 * i) for i in range(len(table["Demand"]))]
    return Series(np.stack([table[name] for name in names], 1), times, names)


def read_csv(path: Path) -> Series:
    """A CSV file in the layout of the ETT and weather benchmarks: a header, the time first, then numbers.

    Raises:
        DataError: If the file is missing or a cell cannot be read; the message has the line.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the series {path}: {error}") from error
    if len(rows) < 2 or len(rows[0]) < 2:
        raise DataError(f"{path} needs a header and rows: a time such as 2016-07-01 00:00:00, then numbers")
    times, values = [], []
    for line, row in enumerate(rows[1:], 2):
        try:
            times.append(datetime.fromisoformat(row[0]))
            values.append([float(cell) if cell.strip() else np.nan for cell in row[1:]])
        except (ValueError, IndexError) as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        if len(row) != len(rows[0]):
            raise DataError(f"{path}, line {line}: {len(row)} cells where the header has {len(rows[0])}")
    return Series(_filled(np.array(values)), times, rows[0][1:])


SERIES = {"chicago": _chicago, "jfk_weather": _jfk_weather, "victoria_electricity": _victoria_electricity}


# ---- windows -----------------------------------------------------------------------------------------------


class Windows(KeyedDataset):
    """Pairs of a window and what follows it.

    Args:
        values: Standardised series (steps, D).
        marks: Calendar features (steps, F).
        starts: First step of each window.
        seq_len: Steps L of a window.
        pred_len: Steps H that follow.
    """

    def __init__(self, values: Tensor, marks: Tensor, starts: Sequence[int], seq_len: int, pred_len: int) -> None:
        super().__init__(torch.zeros(len(starts)))
        self.values, self.marks = values, marks
        self.starts, self.seq_len, self.pred_len = torch.as_tensor(starts), seq_len, pred_len

    def batch(self, keys: Sequence[SampleKey | int]) -> Any:
        """Windows (B, L, D) with their marks (B, L, F), and targets (B, H, D), which are NaN for padded keys."""
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
    """Forecasting windows over a series: `seq_len` steps are seen, the `pred_len` after them are to be told.

    The series is split in time: the first 70 % for training, then 10 % for validation and 20 % for testing. Every step
    of the last two is forecast from every possible window, which may begin before the part does. Variables are
    standardised by mean and deviation of the training part.

    Args:
        name: `chicago` (5,698 days, 39 variables), `jfk_weather` (8,706 hours, 7), `victoria_electricity` (17,520 half
            hours, 2), or the path of a CSV file (see `read_csv`).
        root: Folder of the files; `None` means the cache folder, `$XDG_CACHE_HOME/kernel-zoo` or `~/.cache/kernel-zoo`.
        download: Fetch missing files with pip.
        seq_len: Steps L of a window.
        pred_len: Steps H to forecast.
        time_features: How many of the calendar features to use, in the order of `Series.marks`; the last two say
            nothing where the series is no longer than a year.
        train_share: Share of the series for training.
        val_share: Share for validation; the rest is for testing.
        seed: Decides the order of the training windows.
        batch_size: Training windows of one step of one process.
        eval_batch_size: Windows of one evaluation step of one process; `None` means `batch_size`.
        num_workers: Processes that load windows; 0 loads in the training process.
        drop_last: Leave out the last, incomplete training batch.
        pin_memory: Load into page-locked memory; `None` does so where a GPU is present.

    Raises:
        ValueError: If an argument is outside its range.
        DataError: If the series is unknown, too short, missing or damaged.
    """

    num_classes = None  # type: ignore[assignment]
    class_names = None  # type: ignore[assignment]

    @checked
    def __init__(
        self,
        name: str = "chicago",
        root: str | Path | None = None,
        download: bool = True,
        seq_len: PositiveInt = 28,
        pred_len: PositiveInt = 7,
        time_features: Annotated[int, Field(ge=0, le=4)] = 4,
        train_share: Share = 0.7,
        val_share: Share = 0.1,
        seed: NonNegativeInt = 0,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt | None = 256,
        num_workers: NonNegativeInt = 0,
        drop_last: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        super().__init__(seed, batch_size, eval_batch_size, num_workers, drop_last, pin_memory)
        if name not in SERIES and not name.endswith(".csv"):
            raise DataError(
                f"Forecast(name={name!r}): there is no such series{suggestion(name, SERIES)}, or a .csv file"
            )
        if train_share + val_share >= 1:
            raise DataError(f"train_share + val_share = {train_share + val_share:g} leaves nothing to test on")
        self.series_name, self.download = name, download
        self.seq_len, self.pred_len = seq_len, pred_len
        self.time_features, self.train_share, self.val_share = time_features, train_share, val_share
        self.root = cache_folder(root)
        self._series: Series | None = None

    @property
    def series(self) -> Series:
        """The whole series, read once."""
        if self._series is None:
            read = SERIES.get(self.series_name)
            self._series = read(self.root, self.download) if read else read_csv(Path(self.series_name).expanduser())
        return self._series

    @property
    def in_chans(self) -> int:  # type: ignore[override]
        """Number of variables."""
        return len(self.series.names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """A window is an image of one row, with the variables as channels."""
        return self.in_chans, 1, self.seq_len

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean and deviation of the training part, which a window must be standardised by."""
        values = self.series.values[: self._borders()[0]]
        return {
            "input_size": list(self.input_size),
            "mean": values.mean(0).tolist(),
            "std": _deviation(values).tolist(),
        }

    def input_record(self) -> dict[str, Any]:
        """Variables, length of a window, calendar features, and what the variables are standardised by."""
        known = {k: self.preprocessing[k] for k in ("mean", "std")}
        record = {"kind": "series", "columns": list(self.series.names), "count": self.in_chans, "steps": self.seq_len}
        return record | {"time_features": self.time_features, **known}

    def _borders(self) -> tuple[int, int, int]:
        """Ends of the training, validation and test part."""
        steps = len(self.series.values)
        return int(steps * self.train_share), int(steps * (self.train_share + self.val_share)), steps

    def prepare_data(self) -> None:
        """Fetch the series unless the cache has it."""
        _ = self.series

    def setup(self, stage: str | None = None) -> None:
        """Standardise and split, once."""
        if self.datasets:
            return
        training, validation, steps = self._borders()
        whole = self.seq_len + self.pred_len
        if min(training - self.seq_len, validation - training, steps - validation) < self.pred_len:
            windows = f"windows of {self.seq_len} + {self.pred_len}"
            raise DataError(f"{self.series_name} has {steps} steps, too few for {windows} in every part")
        past = self.series.values[:training]
        values = torch.from_numpy((self.series.values - past.mean(0)) / _deviation(past)).float()
        marks = torch.from_numpy(self.series.marks()[:, : self.time_features]).float()
        starts = {
            "train": range(training - whole + 1),
            "val": range(training - self.seq_len, validation - whole + 1),
            "test": range(validation - self.seq_len, steps - whole + 1),
        }
        self.datasets = {
            part: Windows(values, marks, list(first), self.seq_len, self.pred_len)  # type: ignore[misc]
            for part, first in starts.items()
        }

    def training_windows(self) -> tuple[Tensor, Tensor]:
        """All training windows (N, L, D) and their targets (N, H, D), for models that start from the data."""
        part = self._dataset("train")
        (windows, _), targets = part.batch(range(len(part)))
        return windows, targets


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each variable; 1 for one that never changes."""
    deviation = values.std(0)
    return np.where(deviation > 0, deviation, 1.0)
