"""Tables of one's own: what the columns are, how rows are split, what is refused, and that prediction does the same."""

from __future__ import annotations

import datetime
import json
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.data.checks import DataError
from zoo.data.prepare import prepare
from zoo.data.sampling import SampleKey
from zoo.data.tabular import Tabular, read_rows
from zoo.support import inputs
from zoo.tools.prediction import write_table
from zoo.tools.validation import ValidationError, validate

HEADER = "id,age,income,region,member,stays"


def rows(count: int = 60, seed: int = 0) -> list[list[str]]:
    """Customers: a name, an age (some missing), an income, a region (some missing), a truth value, and the class."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        age, income = int(draw.integers(18, 80)), float(draw.normal(40, 10))
        region = ["north", "south", "east"][i % 3] if i % 7 else ""
        stays = "yes" if age + income + draw.normal(0, 5) > 90 else "no"
        found.append([f"c{i}", "" if i % 11 == 5 else str(age), f"{income:.3f}", region, str(i % 2 == 0), stays])
    return found


def write(path: Path, table: list[list[str]], header: str = HEADER, separator: str = ",") -> Path:
    lines = [header.replace(",", separator), *(separator.join(row) for row in table)]
    path.write_text("\n".join(lines) + "\n")
    return path


def ready(path: Path, **options: Any) -> Tabular:
    data = Tabular(path=path, **{"target": "stays", "drop": ["id"], **options})
    data.prepare_data()
    data.setup()
    return data


def part(data: Tabular, name: str) -> torch.Tensor:
    found = data.datasets[name]  # type: ignore[index]
    return found.images([SampleKey(i) for i in range(len(found))])


@pytest.fixture(scope="module")
def customers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tables") / "customers.csv", rows())


# ---- what is read ------------------------------------------------------------------------------------------


def test_columns_are_what_they_hold(customers: Path) -> None:
    data = ready(customers)
    assert data.own is not None
    train = data.own.parts["train"]
    table = rows()
    ages = np.array([float(row[1] or "nan") for row in table])
    form = data.own.form
    assert form.columns == [
        "age",
        "age=(missing)",
        "income",
        "region=east",
        "region=north",
        "region=south",
        "region=(missing)",
        "member",
    ]
    median = np.nanmedian(ages[train])
    assert form.variables[0].fill == median, "of the training rows alone"
    np.testing.assert_array_equal(data.table.X[:, 0], np.where(np.isnan(ages), median, ages))
    np.testing.assert_array_equal(data.table.X[:, 1], np.isnan(ages))
    np.testing.assert_array_equal(data.table.X[:, 2], [float(row[2]) for row in table])
    np.testing.assert_array_equal(data.table.X[:, 6], [row[3] == "" for row in table])
    np.testing.assert_array_equal(data.table.X[:, 3:7].sum(1), 1)
    np.testing.assert_array_equal(data.table.X[:, 7], [row[4] == "True" for row in table])
    assert data.class_names == ["no", "yes"]
    assert [data.class_names[i] for i in data.table.y] == [row[5] for row in table]
    assert data.groups == ["age", "age", "income", *["region"] * 4, "member"]
    assert data.table.name == "customers.csv"
    told = "\n".join(data.describe())
    assert "60 rows, 4 columns (3 of numbers, 1 of categories) make 8 inputs" in told
    assert "classification, as its values are words" in told
    assert "missing: age 5 (median" in told
    assert "region 9 (a category of its own)" in told
    assert "left out: id (data.drop)" in told
    assert "train: 43 rows: no" in told


def test_training_and_prediction_prepare_alike(customers: Path, tmp_path: Path) -> None:
    """The same file with its columns in another order and layout gives the same tensors, to the bit."""
    data = ready(customers)
    record = json.loads(json.dumps(inputs.check(data.input_record())))
    (found,) = prepare(customers, record)
    assert torch.equal(found, torch.from_numpy(data.table.X).float())
    for name in ("train", "val", "test"):
        assert torch.equal(found[data.own.parts[name]], part(data, name))  # type: ignore[union-attr]
    turned = [[row[5], row[3], row[4].lower(), row[2].replace(".", ","), row[1], "x"] for row in rows()]
    other = write(tmp_path / "turned.csv", turned, "stays,region,Member,income,AGE,more", ";")
    assert torch.equal(prepare(other, record)[0], found)
    hand = [["1", "0", "2.5", "0", "1", "0", "0", "1"]]
    assert prepare(write(tmp_path / "hand.csv", hand, ",".join(record["columns"])), record)[0].tolist() == [
        [1, 0, 2.5, 0, 1, 0, 0, 1]
    ]


def test_what_prediction_has_not_seen_is_told_once(
    customers: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = inputs.read(inputs.check(ready(customers).input_record()))
    table = [["west", "", "30", "true"], ["west", "40", "", "1"], ["north", "40", "20", ""]]
    read = read_rows(write(tmp_path / "new.csv", table, "region,age,income,member"), form)
    age, income = form.variables[0].fill, form.variables[1].fill
    assert read.values[0].tolist() == pytest.approx([age, 1, 30, 0, 0, 0, 0, 1])
    assert read.values[1].tolist() == pytest.approx([40, 0, income, 0, 0, 0, 0, 1])
    assert read.values[2].tolist()[3:7] == [0, 1, 0, 0]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert "region is 'west', which no training row has, in 2 rows (the first is line 2)" in caplog.text
    assert "age is missing in line 2: taken as" in caplog.text
    with pytest.raises(DataError, match=r"has no column 'income'; the model takes: age, income, region, member"):
        read_rows(write(tmp_path / "few.csv", table, "region,age,x,member"), form)


def test_the_task_is_decided_by_the_target_or_given(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    base = [[f"{x:.3f}", str(i % 3), str(i), f"{2 * x:.2f}"] for i, x in enumerate(draw.normal(size=40))]
    path = write(tmp_path / "t.csv", base, "x,three,many,value")
    few = ready(path, target="three", drop=[])
    assert few.class_names == ["0", "1", "2"]
    assert "classification, as its 3 different values are whole numbers (data.task=regression" in few.describe()[1]
    for target in ("many", "value"):
        data = ready(path, target=target, drop=[])
        assert data.num_classes == 1
        assert "regression, as its values are numbers" in data.describe()[1]
    data = ready(path, target="three", drop=[], task="regression")
    assert not data.class_names
    assert data.table.y.dtype == np.float64
    assert data.input_record()["target"] == "three"
    with pytest.raises(DataError, match="many has 40 different values in 40 rows, too many to be classes"):
        ready(path, target="many", drop=[], task="classification")


def test_numbers_can_be_categories_and_words_can_mean_missing(tmp_path: Path) -> None:
    table = [[["10", "9", "9.0", "?"][i % 4], str(i), "ab"[i % 2]] for i in range(40)]
    path = write(tmp_path / "t.csv", table, "zone,x,y")
    data = ready(path, target="y", drop=[], categorical=["zone"], missing_words=["?"])
    assert data.own is not None
    assert data.own.form.variables[0].values == ["9", "10", "(missing)"], "by value; 9.0 is 9"
    data = ready(path, target="y", drop=[], missing_words=["?"])
    assert data.own is not None
    assert data.own.form.variables[0].fill == 9
    with pytest.raises(
        DataError, match=r"t.csv, line 5: zone is '\?', not a number as most of its cells: .*missing_words"
    ):
        ready(path, target="y", drop=[])


def test_parquet_is_read_as_its_cells_are(customers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for pyarrow, which is optional."""
    path = tmp_path / "customers.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(DataError, match=r"needs pyarrow: pip install 'kernel-zoo\[parquet\]', or save it as CSV"):
            ready(path)
    kinds: list[Any] = [
        str,
        lambda cell: int(cell) if cell else None,
        float,
        lambda cell: cell or None,
        "True".__eq__,
        str,
    ]
    columns = [[kind(row[i]) for row in rows()] for i, kind in enumerate(kinds)]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake_parquet(HEADER.split(","), columns))
    data, text = ready(path), ready(customers)
    np.testing.assert_array_equal(data.table.X, text.table.X)
    assert data.input_record() == text.input_record()
    odd = [Decimal("1.50"), float("nan"), datetime.datetime(2020, 1, 2), datetime.date(2020, 1, 2), b"x"]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake_parquet(["x"], [odd]))
    from zoo.data.parquet import read_parquet

    cells = read_parquet(path).rows()
    assert [next(cells)[1] for _ in range(4)] == [["1.50"], [""], ["2020-01-02 00:00:00"], ["2020-01-02"]]
    with pytest.raises(DataError, match=r"customers.parquet, row 5: x holds a bytes"):
        next(cells)
    nested = [*columns, [{"any": [1]}] * len(columns[0])]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", fake_parquet([*HEADER.split(","), "more"], nested))
    np.testing.assert_array_equal(ready(path, drop=["id", "more"]).table.X, ready(customers, drop=["id"]).table.X)
    found = read_rows(path, inputs.read(data.input_record()))
    assert len(found.values) == len(columns[0])
    with pytest.raises(DataError, match=r"customers.parquet, row 1: more holds a dict, not a number or a text"):
        ready(path, drop=["id"])


def fake_parquet(names: list[str], columns: list[list[Any]]) -> Any:
    """What is used of `pyarrow.parquet`, on columns in memory."""

    class ParquetFile:
        def __init__(self, path: Path, page_checksum_verification: bool) -> None:
            self.schema_arrow = SimpleNamespace(names=names)
            self.metadata = SimpleNamespace(num_rows=len(columns[0]))

        def iter_batches(self, batch_size: int) -> Any:
            yield SimpleNamespace(columns=[SimpleNamespace(to_pylist=lambda c=column: c) for column in columns])

    return SimpleNamespace(ParquetFile=ParquetFile)


# ---- how rows are split ------------------------------------------------------------------------------------


def test_parts_are_stratified_and_the_same_for_every_seed(customers: Path) -> None:
    first, second = ready(customers, seed=0), ready(customers, seed=1)
    assert first.own is not None
    assert second.own is not None
    sizes = {name: len(found) for name, found in first.own.parts.items()}
    assert sum(sizes.values()) == 60
    assert all(np.array_equal(first.own.parts[name], second.own.parts[name]) for name in sizes)
    none = ready(customers, test_fraction=0.0, val_fraction=0.0)
    assert list(none.datasets) == ["train"]


def test_rows_of_a_group_stay_together(tmp_path: Path) -> None:
    table = [[f"p{i // 5}", str(i), "ab"[i % 2]] for i in range(50)]
    path = write(tmp_path / "t.csv", table, "patient,x,y")
    data = ready(path, target="y", drop=[], group="patient")
    assert data.own is not None
    groups = {name: {table[i][0] for i in found} for name, found in data.own.parts.items()}
    assert len(groups["train"] | groups["val"] | groups["test"]) == sum(map(len, groups.values())) == 10
    assert len(groups["test"]) == 2
    assert data.feature_names == ["x"]
    assert "patient is never in two parts" in "\n".join(data.describe())
    more = write(tmp_path / "more.csv", [["p3", "1", "a"]], "patient,x,y")
    with pytest.raises(DataError, match=r"more.csv: rows of patient 'p3' are in .*t.csv too"):
        ready(path, target="y", drop=[], group="patient", test_path=more)


@pytest.mark.parametrize("form", [None, "%d.%m.%Y"])
def test_the_last_rows_are_tested(tmp_path: Path, form: str | None) -> None:
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=i // 2) for i in range(40)]
    order = np.random.default_rng(0).permutation(40)
    table = [[days[i].strftime(form or "%Y-%m-%d"), str(i), "ab"[i % 2]] for i in order]
    data = ready(write(tmp_path / "t.csv", table, "day,x,y"), target="y", drop=[], time="day", time_format=form)
    assert data.own is not None
    x = {name: sorted(order[found]) for name, found in data.own.parts.items()}
    assert x["test"] == list(range(32, 40))
    assert max(x["train"]) < min(x["val"]) <= max(x["val"]) < 32
    assert min(x["val"]) % 2 == 0, "rows of one day stay together"


def test_a_test_file_of_its_own(customers: Path, tmp_path: Path) -> None:
    table = [["r", row[0], row[5], *row[1:5]] for row in rows(12, seed=1)]
    table[3][5] = "west"
    test = write(tmp_path / "test.csv", table, "note,id,stays,age,income,region,member")
    data = ready(customers, test_path=test)
    assert data.own is not None
    assert len(data.own.parts["test"]) == 12
    assert len(data.own.parts["train"]) + len(data.own.parts["val"]) == 60
    assert torch.equal(part(data, "test"), prepare(test, inputs.check(data.input_record()))[0])
    assert "region is 'west', which no training row has, in line 5" in "\n".join(data.describe())
    table[0][2] = "perhaps"
    write(test, table, "note,id,stays,age,income,region,member")
    with pytest.raises(DataError, match=r"test.csv, line 2: stays is 'perhaps', not one of no, yes"):
        ready(customers, test_path=test)


# ---- what is refused ---------------------------------------------------------------------------------------

BASE = [[str(i), f"{i / 7:.2f}", "abc"[i % 3], "yn"[i % 2]] for i in range(30)]


def changed(column: int, *cells: str, first: int = 3) -> list[list[str]]:
    """The rows with other cells in a column, from row `first` on."""
    table = [list(row) for row in BASE]
    for i, cell in enumerate(cells):
        table[first + i][column] = cell
    return table


REFUSED: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no target", BASE, {"target": None}, "data.target names the column to predict; .* has n, x, word, y"),
    ("unknown target", BASE, {"target": "yy"}, "data.target: .* has no column 'yy'; did you mean y"),
    ("unknown drop", BASE, {"drop": ["wort"]}, "data.drop: .* has no column 'wort'; did you mean word"),
    ("unknown category", BASE, {"categorical": ["z"]}, "data.categorical: .* has no column 'z'"),
    ("target twice", BASE, {"group": "y"}, "'y' is both data.target and data.group"),
    ("target dropped", BASE, {"drop": ["y"]}, "'y' is both data.target and data.drop"),
    ("two splits", BASE, {"group": "n", "time": "x"}, "data.group and data.time"),
    ("a format without times", BASE, {"time_format": "%Y"}, "data.time_format is for"),
    ("nothing left", BASE, {"drop": ["n", "x", "word"]}, "no column beside y, n, x, word: nothing to predict from"),
    ("target missing", changed(3, ""), {}, "t.csv, line 5: y, the target, is empty"),
    ("value missing", changed(1, "NA"), {"target": "x"}, "t.csv, line 5: x, the target, is empty"),
    ("value a word", changed(1, "much"), {"target": "x"}, "line 5: x is 'much', not a number as most of its cells"),
    ("one class", changed(3, *["y"] * 30, first=0), {}, "y is 'y' in all rows: there is one class only"),
    ("one value", changed(1, *["2.5"] * 30, first=0), {"target": "x"}, "x is 2.5 in all training rows"),
    ("infinite", changed(1, "inf"), {}, "t.csv, line 5: x is 'inf', not a number as most of its cells"),
    ("a formula", changed(1, "=A1+1"), {}, "t.csv, line 5: x is '=A1\\+1', not a number as most of its cells"),
    ("huge", changed(1, "1e300"), {}, "line 5: x is '1e300', too large"),
    ("missing", changed(1, ""), {"missing": "refuse"}, "t.csv, line 5: x is missing, and data.missing=refuse"),
    ("no category", changed(2, ""), {"missing": "refuse"}, "t.csv, line 5: word is missing, and data.missing=refuse"),
    ("too short", [*BASE[:4], ["1", "2"], *BASE], {}, "line 6: word is missing, 2 cells where the header has 4"),
    ("too long", [*BASE[:4], list("12abc"), *BASE], {}, "line 6: 5 cells where the header has 4"),
    ("dates", changed(2, *["2020-01-01"] * 30, first=0), {}, "word holds dates or times, .*data.time=word"),
    (
        "many",
        [[str(i), "1", f"w{i}", "yn"[i % 2]] for i in range(300)],
        {},
        "word has more than 100 categories, such as",
    ),
    (
        "all different",
        changed(2, *(f"w{i}" for i in range(30)), first=0),
        {},
        "word is another word in each of its rows",
    ),
    ("unprintable", changed(2, "a\x1b[2J"), {}, "line 5: word is 'a\\\\x1b.*cannot be printed"),
    ("unprintable class", changed(3, "a\x1b[2J"), {}, "line 5: y, the target, is 'a\\\\x1b.*cannot be printed"),
    (
        "constant",
        [["1", "2", "a", "yn"[i % 2]] for i in range(30)],
        {},
        "every column is the same in all training rows",
    ),
    ("few rows", BASE[:3], {}, "t.csv has 3 rows, too few: 0.2 of 3 .*data.test_fraction=0 does without"),
    ("no rows", [], {}, "t.csv has no rows below its header"),
    ("one group", changed(2, *["a"] * 30, first=0), {"group": "word"}, "too few groups in word"),
    ("no group", changed(2, ""), {"group": "word"}, "line 5: word, the group, is empty"),
    ("no time", BASE, {"time": "word"}, "line 2: word is 'a', not a time such as 2016-07-01; data.time_format"),
    ("one time", changed(1, *["1"] * 30, first=0), {"time": "x"}, "too few: 0.2 of 30 leave no test or no training"),
    ("late class", changed(3, *["z"] * 3, first=27), {"time": "n"}, "line 29: y is 'z', which no training row is"),
    ("wrong separator", BASE, {"separator": "x"}, "separator 'x' is not one of"),
]


@pytest.mark.parametrize(
    ("table", "options", "told"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_does_not_suit_is_one_sentence(
    tmp_path: Path, table: list[list[str]], options: dict[str, Any], told: str
) -> None:
    path = write(tmp_path / "t.csv", table, "n,x,word,y")
    with pytest.raises(DataError, match=told) as refused:
        ready(path, **{"target": "y", "drop": [], **options})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a,a,y\n1,2,n\n", "columns 1 and 2 are both named 'a'; rename one"),
        (b"1,2,3\n4,5,6\n", "has no header line"),
        (b"", "is empty"),
        ("a,y\nM\xfcller,1\n".encode("cp1252"), "line 2: byte 0xfc is not UTF-8"),
        (b'a,y\n"1,2\n3,4\n', "line 2: a quotation mark opens here and is never closed"),
        (b"a;y\n1.5;1\n2,5;0\n", "has numbers with a point, .* and with a comma"),
    ],
)
def test_files_that_cannot_be_read_are_one_sentence(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=told):
        ready(path, target="y", drop=[])
    for odd in (tmp_path / "none.csv", tmp_path, tmp_path / "t.xlsx"):
        with pytest.raises(DataError):
            ready(odd, target="y", drop=[])


def test_odd_layouts_are_read(tmp_path: Path) -> None:
    """A byte order mark, semicolons and decimal commas, quoted line ends, another encoding, an index without a name."""
    lines = [f'{i};"{i},5";"a{i % 3}";{"jn"[i % 2]};"two\nlines {i}"' for i in range(30)]
    path = tmp_path / "t.csv"
    path.write_text("\n".join([";größe;art;y;notiz", *lines]), encoding="utf-8-sig")
    data = ready(path, target="y", drop=["notiz"])
    assert data.feature_names == ["größe", "art=a0", "art=a1", "art=a2"]
    assert data.table.X[3, 0] == 3.5
    assert "left out: notiz (data.drop), column 1 (no name)" in "\n".join(data.describe())
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("cp1252"))
    assert ready(path, target="y", drop=["notiz"], encoding="cp1252").feature_names[0] == "größe"
    path.write_text("ms,y\n" + "\n".join(f"{1_700_000_000_000 + i},{'ab'[i % 2]}" for i in range(40)))
    assert "ms: different numbers become the same as float32" in "\n".join(ready(path, target="y", drop=[]).describe())


def test_names_that_would_clash_are_refused(tmp_path: Path) -> None:
    table = [["ab"[i % 2], str(i), "yn"[i // 2 % 2]] for i in range(40)]
    with pytest.raises(DataError, match="two inputs would be named 'c=a'; rename a column"):
        ready(write(tmp_path / "t.csv", table, "c,c=a,y"), target="y", drop=[])


def test_words_of_a_file_are_for_files(customers: Path) -> None:
    with pytest.raises(DataError, match=r"name='iris', path=.*: give one of them"):
        Tabular(name="iris", path=customers)
    with pytest.raises(DataError, match="target is for a file of your own, which path names"):
        Tabular(target="stays")
    assert Tabular().table_name == "wine"


# ---- what a model remembers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("snnk_mlp", {}), ("dkm_mlp", {"likelihood": "gaussian"})])
def test_values_of_any_size_are_learned(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Prices around 200,000, by models whose outputs start near zero; the figures are in units."""
    import lightning

    from zoo.tasks import TabularTask

    x = np.random.default_rng(0).normal(size=(150, 2))
    table = [[f"{a:.4f}", f"{b:.4f}", f"{200_000 + 9_000 * (a - b):.1f}"] for a, b in x]
    data = ready(write(tmp_path / "t.csv", table, "a,b,price"), target="price", drop=[])
    model: Any = zoo.create_model(name, in_chans=2, num_classes=1, **options)
    model.input_record = inputs.check(data.input_record())
    task = TabularTask(model, {"opt": "adamw", "lr": 0.01})
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=10, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(task, datamodule=data)
    (found,) = trainer.test(task, datamodule=data, verbose=False)
    assert found["test/r2"] > 0.5
    spread = np.std([float(row[2]) for row in table])
    assert found["test/rmse"] == pytest.approx(np.sqrt(1 - found["test/r2"]) * spread, rel=0.3)
    answers: Any = trainer.predict(task, datamodule=data)
    assert float(answers[0].mean()) == pytest.approx(200_000, rel=0.05)


def saved(data: Tabular, folder: Path) -> str:
    model: Any = zoo.create_model("test_grbf", in_chans=data.in_chans, num_classes=data.num_classes)
    model.initialize(*data.training_table(), generator=torch.Generator().manual_seed(0))
    record = {"preprocessing": data.preprocessing, "input_record": data.input_record()}
    zoo.save_pretrained(model, folder, class_names=data.class_names or None, **record)
    return f"local-dir:{folder}"


def test_a_model_is_measured_on_another_table(customers: Path, tmp_path: Path) -> None:
    data = ready(customers)
    name = saved(data, tmp_path / "model")
    found = validate(name, customers)
    model = zoo.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        answers = model(torch.from_numpy(data.table.X).float()).argmax(1).numpy()
    assert found.metrics["accuracy"] == pytest.approx((answers == data.table.y).mean())  # type: ignore[union-attr]
    assert "on 60 rows of" in str(found)
    assert "column stays: accuracy" in str(found)
    value = ready(customers, target="income")
    assert value.own is not None
    train = value.table.y[value.own.parts["train"]]
    assert (train.mean(), train.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1)), "standardised"
    answers = [entry["value"] for entry in zoo.predict(saved(value, tmp_path / "value"), customers)]
    right = np.array([float(row[2]) for row in rows()])
    assert abs(np.mean(answers) - right.mean()) < 5, "in the units of the file"
    found = validate(f"local-dir:{tmp_path / 'value'}", customers)
    assert found.metrics == {  # type: ignore[union-attr]
        "r2": pytest.approx(1 - np.square(answers - right).sum() / np.square(right - right.mean()).sum(), abs=1e-6),
        "rmse": pytest.approx(np.sqrt(np.square(answers - right).mean()), rel=1e-5),
    }
    for text, told in (
        ("age,income,region,member\n1,2,north,True\n", "has no column 'stays'"),
        ("age,income,region,member,stays\n1,2,north,True,maybe\n", "line 2: stays is 'maybe', not one of no, yes"),
        ("age,income,region,member,stays\n1,2,north,True,\n", "line 2: stays, the target, is empty"),
    ):
        (tmp_path / "new.csv").write_text(text)
        with pytest.raises(DataError, match=told):
            validate(name, tmp_path / "new.csv")
    (tmp_path / "wine.csv").write_text("a\n1\n")
    with pytest.raises(ValidationError, match="does not name the column that it predicts"):
        validate("grbf.wine", tmp_path / "wine.csv")


def test_rare_categories_are_not_far_out(tmp_path: Path) -> None:
    """One row of 4,000: 63 standard deviations, and yet a category that was trained on."""
    table = [["b" if i == 7 else "a", f"{i % 97}", "yn"[i % 2]] for i in range(4000)]
    path = write(tmp_path / "t.csv", table, "c,x,y")
    name = saved(ready(path, target="y", drop=[], test_fraction=0.0, val_fraction=0.0), tmp_path / "model")
    write(path, table[7:9], "c,x,y")
    assert all("note" not in entry for entry in zoo.predict(name, path))
    write(path, [["a", "1e6", "y"]], "c,x,y")
    assert "x (row 1: 1e+06" in zoo.predict(name, path)[0]["note"]


def test_answers_in_a_spreadsheet_are_no_formulas(tmp_path: Path) -> None:
    classes = [{"class": "=1+1", "probability": 0.9}, {"class": "-1", "probability": 0.1}]
    write_table(tmp_path / "answers.csv", [{"file": "a.csv", "row": 1, "predictions": classes}])
    told = (tmp_path / "answers.csv").read_text().splitlines()
    assert told == ["file,row,class,probability,class_2,probability_2", "a.csv,1,'=1+1,0.9,-1,0.1"]
