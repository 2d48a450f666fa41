"""A stranger's table from the first command of the page to the last, on a folder that is made here."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import zoo
from tests.conftest import ROOT, train_here
from zoo.cli import main
from zoo.data.prepare import prepare

SECTION = re.search(r"^## Tables\n(.*?)^## ", (ROOT / "docs" / "own-data.md").read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    assert SECTION is not None
    return [shlex.split(line) for line in re.findall(r"^\$ (.*)$", SECTION[1], re.MULTILINE)]


def write(path: Path, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    lines = ["id,age,income,region,stays"]
    for i in range(count):
        age, income = int(draw.integers(18, 80)), float(draw.normal(40, 10))
        stays = "yes" if age + income > 90 else "no"
        region = ["north", "south", ""][i % 3]
        lines.append(f"{i // 2},{'' if i % 9 == 4 else age},{income:.2f},{region},{stays}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tables, in which every command of the page was run."""
    folder = tmp_path_factory.mktemp("own")
    write(folder / "customers.csv", 150, 0)
    write(folder / "more.csv", 30, 1)
    lines = (folder / "more.csv").read_text().splitlines()[:4]
    (folder / "new.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for program, *words in commands():
            assert program == "python"
            if words[0] == "train.py":
                train_here(folder, *words[1:], "trainer.max_epochs=20")
            else:
                assert words[:2] == ["-m", "zoo"]
                assert main(words[2:]) == 0, words
    return folder


def test_the_commands_leave_what_they_say(folder: Path) -> None:
    run = folder / "outputs" / "grbf-tabular" / "latest"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metrics"]["test/acc"] > 0.8, "the majority is less than .6"
    with (folder / "answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [row["row"] for row in answers] == ["1", "2", "3"]
    assert {row["class"] for row in answers} <= {"yes", "no"}
    page = (folder / "report.html").read_text()
    assert "customers.csv" in page
    told = json.loads((folder / "exported" / "deployment.json").read_text())
    assert told["class_names"] == ["no", "yes"]
    assert told["input_record"]["target"] == "stays"
    assert "prepared numbers" in told["prepared"]
    value = json.loads((folder / "outputs" / "income" / "latest" / "summary.json").read_text())
    assert 5 < value["metrics"]["test/rmse"] < 20, "in the units of the column, whose standard deviation is 10"


def test_the_exported_network_takes_what_the_record_prepares(folder: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    told = json.loads((folder / "exported" / "deployment.json").read_text())
    (rows,) = prepare(folder / "new.csv", told["input_record"])
    session = runtime.InferenceSession(str(folder / "exported" / "model.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: rows.numpy()})
    found = zoo.predict(str(folder / "published"), folder / "new.csv")
    names = [told["class_names"][i] for i in logits.argmax(1)]
    assert [entry["predictions"][0]["class"] for entry in found] == names


def test_the_card_is_of_this_model_and_names_no_folder_of_the_machine(folder: Path) -> None:
    card = (folder / "published" / "README.md").read_text()
    assert "customers.csv" in card
    assert "ImageNet" not in card
    assert str(folder) not in card
    for path in (folder / "published").iterdir():
        assert str(folder).encode() not in path.read_bytes()


def test_a_table_that_has_changed_is_not_measured_as_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    path = folder / "customers.csv"
    before = path.read_text()
    runs = sorted(run for run in Path("outputs/grbf-tabular").iterdir() if not run.is_symlink())
    try:
        path.write_text(before.replace("north", "west"))
        assert main(["validate", str(runs[0])]) == 1  # `latest` may be one that could not start
        assert "customers.csv is no longer the one of the training" in capsys.readouterr().err
    finally:
        path.write_text(before)


def test_a_training_that_cannot_start_says_so_in_one_sentence(folder: Path) -> None:
    for words, told in (
        (["data.path=customers.csv"], "data.target names the column to predict; customers.csv has id, age, income"),
        (["data.path=customer.csv", "data.target=stays"], "cannot read the table customer.csv: it is no file"),
        (["data.path=customers.csv", "data.target=stay"], "has no column 'stay'; did you mean stays"),
        (["data.path=customers.csv", "data.target=stays", "data.missing=refuse"], "line 6: age is missing"),
        (["data.path=customers.csv", "data.target=stays", "data.missing=drop"], "data.missing"),
    ):
        done = train_here(folder, "model=grbf", "data=tabular", *words, check=False)
        assert done.returncode == 1
        assert told in done.stderr
        assert done.stderr.count("error:") == 1
