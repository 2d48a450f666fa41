"""Tables and series as people have them, from the file to the answer: no column is guessed, no row vanishes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_wine

import zoo
from zoo.cli import main
from zoo.data import Forecast
from zoo.data.prepare import prepare
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import batches
from zoo.tools.export import export

WINE = "grbf.wine"
CHOSEN = [0, 70, 150]


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main(["predict", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["predict", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def wine_file(
    folder: Path, names: list[str] | None = None, order: list[int] | range = range(13), separator: str = ","
) -> Path:
    """Three rows of wine as a file of its own; `names` None leaves the header out."""
    wine, path = load_wine(), folder / f"wine{len(list(folder.iterdir()))}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        if names is not None:
            writer.writerow([names[i] for i in order])
        writer.writerows([[row[i] for i in order] for row in wine.data[CHOSEN]])
    return path


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Probability of the class of each row."""
    rows = torch.tensor(load_wine().data[CHOSEN]).float()
    return zoo.create_model(WINE, pretrained=True).eval()(rows).softmax(-1).max(-1).values.tolist()


def test_rows_of_any_order_and_spelling(
    tmp_path: Path, expected: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Reversed columns named in capitals; further columns; semicolons: the same answers."""
    names = list(load_wine().feature_names)
    shouted = [name.upper().replace("_", " ") for name in names]
    for path, told in (
        (wine_file(tmp_path, names, range(12, -1, -1)), ""),
        (wine_file(tmp_path, shouted, range(12, -1, -1)), "read 'ALCOHOL' as 'alcohol'"),
        (wine_file(tmp_path, names, separator=";"), ""),
    ):
        caplog.clear()
        found = answers(capsys, WINE, str(path))
        assert [row["row"] for row in found] == [1, 2, 3]
        assert [row["predictions"][0]["probability"] for row in found] == pytest.approx(expected, abs=1e-5)
        assert told in caplog.text
    twice = wine_file(tmp_path, names, [*range(13), 5])
    assert "columns 6 and 14 are both named 'total_phenols'" in refusal(capsys, WINE, str(twice))


def test_further_columns_are_left_out_and_told(
    tmp_path: Path, expected: list[float], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = wine_file(tmp_path, list(load_wine().feature_names))
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(["id,target," + lines[0], *(f"{i}a,class_{i}," + line for i, line in enumerate(lines[1:]))])
    )
    found = answers(capsys, WINE, str(path))
    assert [row["predictions"][0]["probability"] for row in found] == pytest.approx(expected, abs=1e-5)
    assert "columns that the model does not take are left out: id, target" in caplog.text


def test_a_table_without_header(tmp_path: Path, expected: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Three rows in, three answers out, once it is said that the columns stand in order."""
    path = wine_file(tmp_path)
    told = refusal(capsys, WINE, str(path))
    assert "has no header line, so its 13 columns cannot be matched by name with the 13 of the model (alcohol" in told
    assert "--no-header" in told
    found = answers(capsys, WINE, str(path), "--no-header")
    assert [row["predictions"][0]["probability"] for row in found] == pytest.approx(expected, abs=1e-5)
    path.write_text("1,2\n3,4\n")
    assert "has no header line, and its 2 columns cannot be matched" in refusal(capsys, WINE, str(path))
    assert "has 2 columns, the model takes 13" in refusal(capsys, WINE, str(path), "--no-header")
    path = wine_file(tmp_path, list(load_wine().feature_names))
    assert "line 1: column 1 is 'alcohol', not a number" in refusal(capsys, WINE, str(path), "--no-header")


def test_names_that_do_not_match_are_shown_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = wine_file(tmp_path, [f"V{i}" for i in range(13)])
    told = refusal(capsys, WINE, str(path))
    assert "13 columns, the model takes 13, and no name agrees" in told
    assert "the model takes: alcohol, malic_acid" in told
    assert "the file has: V0, V1" in told
    names = list(load_wine().feature_names)
    path = wine_file(tmp_path, [*names[:12], "price"])
    assert "no column 'proline'" in refusal(capsys, WINE, str(path))


def test_a_model_that_knows_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """In order, said so; a line that is neither names nor numbers is no header."""
    torch.manual_seed(0)
    model = zoo.create_model("test_grbf", in_chans=3, num_classes=2).eval()
    zoo.save_pretrained(model, tmp_path / "model")
    name, path = f"local-dir:{tmp_path / 'model'}", tmp_path / "rows.csv"
    found = []
    for text in ("a,b,c\n1,2,3\n4,5,6\n", "1,2,3\n4,5,6\n"):
        path.write_text(text)
        found.append([row["predictions"] for row in answers(capsys, name, str(path))])
        assert "the model knows no names of columns, so they are taken in order" in caplog.text
        caplog.clear()
    assert found[0] == found[1]
    assert len(found[0]) == 2
    path.write_text("class_1,2,3\n4,5,6\n")
    assert "line 1: column 2 is '2' beside words" in refusal(capsys, name, str(path))


# ---- series ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Forecast, Path]:
    """A series of 120 hours, its data module, and a saved model for it."""
    folder = tmp_path_factory.mktemp("series")
    start, draw = datetime(2020, 1, 1), np.random.default_rng(0)
    rows = [
        f"{start + timedelta(hours=i)},{a:.4f},{b:.1f}"
        for i, (a, b) in enumerate(draw.normal([1, 1e6], [0.1, 1e5], (120, 2)))
    ]
    path = folder / "series.csv"
    path.write_text("\n".join(["date,a,b", *rows]) + "\n")
    data = Forecast(str(path), seq_len=12, pred_len=6)
    data.prepare_data()
    data.setup()
    torch.manual_seed(0)
    model = zoo.create_model("test_unireplknet_forecast", in_chans=2, pred_len=6).eval()
    zoo.save_pretrained(model, folder / "model", preprocessing=data.preprocessing, input_record=data.input_record())
    return path, data, folder / "model"


def test_a_forecast_is_the_one_of_evaluation_in_the_units_of_the_file(
    forecaster: tuple[Path, Forecast, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data, folder = forecaster
    part = data.datasets["test"]
    (windows, marks), _ = part.batch([len(part) - 1])
    with torch.no_grad():
        out = zoo.create_model(f"local-dir:{folder}", pretrained=True).eval()(windows, marks)[0]
    past = data.series.values[: int(120 * 0.7)]
    expected = out.numpy() * past.std(0) + past.mean(0)
    cut, picture = tmp_path / "cut.csv", tmp_path / "answer.png"
    lines = path.read_text().splitlines()[: 1 + 120 - 6]
    cells = [line.split(",") for line in lines]
    cut.write_text("\n".join(";".join([b, "0", date, a]).replace(".", ",") for date, a, b in cells[1:]))
    assert "needs a header" in refusal(capsys, f"local-dir:{folder}", str(cut))
    cut.write_text("B;note;Date;A\n" + cut.read_text())
    (found,) = answers(capsys, f"local-dir:{folder}", str(cut), "--out", str(picture))
    np.testing.assert_allclose(found["forecast"], expected, rtol=1e-4)
    assert found["columns"] == ["a", "b"]
    assert found["times"][0] == str(datetime(2020, 1, 1) + timedelta(hours=114))
    assert len(found["times"]) == len(found["forecast"]) == 6
    assert Image.open(picture).size[0] > 500
    capsys.readouterr()
    assert main(["predict", f"local-dir:{folder}", str(cut)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{cut}: a, b"
    assert told[1] == f"2020-01-05 18:00:00: {expected[0, 0]:.6g}, {expected[0, 1]:.6g}"


def test_series_that_cannot_be_forecast(
    forecaster: tuple[Path, Forecast, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _, folder = forecaster
    name, other = f"local-dir:{folder}", tmp_path / "other.csv"
    lines = path.read_text().splitlines()
    for rows, told in (
        (lines[:5], "has 4 steps, the model looks at 12"),
        (["date,a,c", *lines[1:]], "no column 'b'; the model takes: date, a, b; the file has: date, a, c"),
        ([*lines[:20], lines[19], *lines[20:]], "line 21: 2020-01-01 18:00:00 comes twice"),
        ([*lines[:20], *lines[22:]], "line 21: times are missing between"),
        ([*lines[:20], lines[20].rsplit(",", 1)[0] + ",inf"], "line 21: b is 'inf', not a number that is finite"),
    ):
        other.write_text("\n".join(rows))
        assert told in refusal(capsys, name, str(other))
    assert "only tables can be without a header line" in refusal(capsys, name, str(path), "--no-header")


def test_a_series_in_other_units_gets_a_note(forecaster: tuple[Path, Forecast, Path], tmp_path: Path) -> None:
    path, _, folder = forecaster
    cells = [line.split(",") for line in path.read_text().splitlines()]

    def note(b: Callable[[int, str], Any]) -> str | None:
        other = tmp_path / "other.csv"
        lines = [f"{date},{a},{b(i, last) if i else last}" for i, (date, a, last) in enumerate(cells)]
        other.write_text("\n".join(lines))
        (found,) = zoo.predict(folder, other)
        return found.get("note")

    assert note(lambda _, cell: cell) is None
    told = note(lambda _, cell: float(cell) / 1000) or ""
    assert "most values are unlike those of training, are the units the same? b (median " in told
    assert told.count("training had") == 1
    assert "a (" not in told
    assert "are the units the same? b (" in (note(lambda _, cell: float(cell) * 1000) or "")
    told = note(lambda i, cell: 1e9 if i == 115 else cell) or ""
    assert "far outside of the training steps, so answers there are guesses: b (2020-01-05 18:00:00: 1e+09; " in told
    assert note(lambda i, cell: 1e9 if i == 90 else cell) is None, "before the window"


def test_forecasts_are_not_compared_as_classes(forecaster: tuple[Path, Forecast, Path]) -> None:
    with pytest.raises(ToolError, match="Forecast has windows and times"):
        next(batches(forecaster[1]))


def test_an_exported_forecast_uses_the_calendar(forecaster: tuple[Path, Forecast, Path], tmp_path: Path) -> None:
    """Given what a file is prepared to, the exported program answers as the model; at other times, otherwise."""
    path, data, folder = forecaster
    told = export(f"local-dir:{folder}", tmp_path, formats=("program",))
    assert told["input"] == ["batch", 12, 2]
    assert told["marks"] == ["batch", 12, 4]
    assert told["input_record"] == data.input_record()
    windows, marks = prepare(path, told["input_record"])
    program = torch.export.load(tmp_path / "model.pt2").module()
    model = zoo.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(program(windows, marks), model(windows, marks), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(program(windows, marks * 0), model(windows, marks), atol=1e-5)
