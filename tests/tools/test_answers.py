"""Answers as a table: one line for an input, or for a step of a forecast."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.tools.prediction import write_table


def test_answers_as_a_table(tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    best = [{"class": "a, b", "probability": 0.75}, {"class": "c", "probability": 0.25}]
    write_table(path, [{"file": "x.png", "predictions": best}, {"file": "y.png", "predictions": best[:1], "note": "?"}])
    assert path.read_text() == (
        'file,class,probability,class_2,probability_2\nx.png,"a, b",0.75,c,0.25\ny.png,"a, b",0.75,,\n'
    )
    write_table(path, [{"file": "t.csv", "row": 1, "value": 0.5}, {"file": "t.csv", "row": 2, "value": -1.0}])
    assert path.read_text() == "file,row,value\nt.csv,1,0.5\nt.csv,2,-1.0\n"
    forecast = {"file": "s.csv", "forecast": [[1.0, 2.0], [3.0, 4.0]], "columns": ["bread", "milk"]}
    write_table(path, [forecast | {"times": ["2024-01-01", "2024-01-02"]}])
    assert path.read_text() == "file,step,time,bread,milk\ns.csv,1,2024-01-01,1.0,2.0\ns.csv,2,2024-01-02,3.0,4.0\n"
    write_table(path, [forecast | {"times": []}])
    assert path.read_text().splitlines()[0] == "file,step,bread,milk"


def test_names_of_files_that_are_no_text_are_written(tmp_path: Path) -> None:
    path, best = tmp_path / "answers.csv", [{"class": "c", "probability": 0.5}]
    write_table(path, [{"file": os.fsdecode(b"\xff\xfe.png"), "predictions": best}])
    assert path.read_text() == "file,class,probability\n\\udcff\\udcfe.png,c,0.5\n"


def test_an_answer_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {"file": "a\nb\t\udcff.png", "predictions": [{"class": "c", "probability": 0.5}], "note": "a\nb is blank"}
    monkeypatch.setattr("zoo.tools.prediction.predict", lambda *_, **__: [odd])
    assert main(["predict", "some", "a.png"]) == 0
    found = capsys.readouterr()
    assert found.out == "a\\u000ab\\u0009\\udcff.png: c 50.0%\n"
    assert found.err == "note: a\\u000ab is blank\n"
