"""Doors for Python, and saved estimators at the commands: the same answers by every way in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import is_classifier
from sklearn.datasets import load_wine

import zoo
from zoo.cli import main
from zoo.data.checks import DataError
from zoo.estimators import GPClassifier, GPRegressor, GRBFClassifier, GRBFRegressor, KernelStreamClassifier
from zoo.support.files import CheckpointError
from zoo.tools.errors import ToolError
from zoo.tools.estimators import score
from zoo.tools.export import export

NAMES = ["alcohol", "acid", "ash"]


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    """Rows (178, 3) and the names of their classes."""
    X, y = load_wine(return_X_y=True)
    return X[:, :3], np.array(["red", "white", "rosé"])[y]


@pytest.fixture(scope="module")
def estimator(wine: tuple[np.ndarray, np.ndarray]) -> Any:
    fitted = GRBFClassifier(solver="adam", n_centers=5, max_iter=20, random_state=0).fit(*wine)
    fitted.feature_names_in_ = np.array(NAMES, dtype=object)  # as a data frame sets them
    return fitted


@pytest.fixture(scope="module")
def folder(estimator: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo.save_pretrained(estimator, tmp_path_factory.mktemp("doors") / "wine")


class Frame:
    """What is read of a data frame: its columns, and its rows as tuples."""

    def __init__(self, columns: list[Any], rows: Any) -> None:
        self.columns, self.rows = columns, rows

    def itertuples(self, index: bool = True, name: str | None = "") -> Any:
        return iter([tuple(row) for row in self.rows])


def table(path: Path, names: list[str], rows: np.ndarray) -> Path:
    lines = [",".join(names), *(",".join(map(repr, row)) for row in rows.tolist())]
    path.write_text("\n".join(lines) + "\n")
    return path


def best(found: list[dict[str, Any]]) -> list[str]:
    return [entry["predictions"][0]["class"] for entry in found]


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_an_estimator_answers_alike_by_every_way(
    estimator: Any, folder: Path, wine: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    rows = wine[0][:9]
    right = estimator.predict(rows).tolist()
    shares = estimator.predict_proba(rows).max(1)
    turned = table(tmp_path / "rows.csv", ["ash", "alcohol", "acid"], rows[:, [2, 0, 1]])
    frame = Frame(["acid", "more", "alcohol", "ash"], [(r[1], np.ones(2), r[0], r[2]) for r in rows])
    for model in (estimator, folder, str(folder), f"local-dir:{folder}"):
        for given in (rows, torch.from_numpy(rows), rows.tolist(), frame, turned, [str(turned)], tmp_path):
            found = zoo.predict(model, given)
            assert best(found) == right, given
            assert [entry["row"] for entry in found] == list(range(1, 10))
            assert [entry["predictions"][0]["probability"] for entry in found] == [round(s, 6) for s in shares.tolist()]
    assert best(zoo.predict(estimator, rows[0])) == right[:1]
    assert zoo.predict(estimator, rows, top=2)[0]["predictions"][1]["class"] in ("red", "white", "rosé")


def test_what_is_given_is_refused_in_one_sentence(estimator: Any, folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, told in (
        (np.zeros((2, 4)), r"shape \(2, 4\); the model takes \(n, 3\)"),
        (np.full((2, 3), np.nan), "NaN or infinity"),
        (np.zeros((0, 3)), "no rows"),
        ({"a": 1}, "inputs are files, a data frame or numbers"),
        (np.ones((1, 3)) + 1j, "complex numbers"),
        (np.ma.masked_array(np.ones((1, 3)), [[True, False, False]]), "masked values"),
        (np.ones((1, 3)).astype("datetime64[s]"), "inputs are files, a data frame or numbers"),
        (torch.ones(1, 3).to_sparse(), "the array is of the layout sparse_coo"),
        (torch.ones(1, 3, device="meta"), "on the meta device"),
        ([["a", "b", "c"]], "inputs are files, a data frame or numbers"),
        (Frame(NAMES, [(1.0, None, 2.0)]), "the data frame, row 1: acid is empty"),
        (Frame(NAMES, [(1.0, [3.0], 2.0)]), "the data frame, row 1: acid holds a list, not a number or a text"),
        (Frame(["alcohol", "ash"], [(1.0, 2.0)]), "the data frame has no column 'acid'"),
        (Frame(["ash", "ash"], []), "'ash' twice"),
        (Frame(NAMES, []), "the data frame has no rows"),
        (empty, "a folder without a file that the model takes"),
        (tmp_path / "none.csv", "there is no file"),
    ):
        with pytest.raises(ToolError, match=told) as refused:
            zoo.predict(folder, given)
        assert "\n" not in str(refused.value)
    for model, told in ((GRBFClassifier(), "not fitted yet"), ({}, "dict is no model"), (tmp_path, "is a folder, but")):
        with pytest.raises(ToolError, match=told):
            zoo.predict(model, np.zeros((1, 3)))


def test_a_module_answers_arrays_and_is_not_changed() -> None:
    model = zoo.create_model("test_unireplknet", num_classes=2, in_chans=1).train()
    model.stages[0].eval()
    model.input_record = {"kind": "image", "channels": 1, "size": [32, 32]}
    modes = [module.training for module in model.modules()]
    images, threads = torch.randn(3, 1, 32, 32), torch.get_num_threads()
    found = zoo.predict(model, images)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_num_threads() == threads
    with torch.no_grad():
        right = model.eval()(images).softmax(-1).max(-1)
    assert [int(entry["predictions"][0]["class"]) for entry in found] == right.indices.tolist()
    assert [entry["predictions"][0]["probability"] for entry in found] == pytest.approx(right.values.tolist(), abs=1e-5)
    with pytest.raises(ToolError, match="prepared"):
        zoo.predict(model, torch.zeros(3, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ToolError, match=r"takes \(n, 1, 32, 32\)"):
        zoo.predict(model, np.zeros((3, 32, 32, 1)))
    with pytest.raises(ToolError, match="a data frame holds rows of a table"):
        zoo.predict(model, Frame(["a"], [(1.0,)]))
    with pytest.raises(ToolError, match=r"infinite in the model's torch\.float32"):
        zoo.predict(model, np.full((1, 1, 32, 32), 1e300))
    with pytest.raises(ToolError, match="complex numbers"):
        zoo.predict(model, torch.zeros(1, 1, 32, 32, dtype=torch.complex64))


def test_the_commands_take_the_folder_of_an_estimator(
    folder: Path,
    wine: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    file = table(tmp_path / "rows.csv", NAMES, wine[0][:2])
    assert main(["predict", "wine", str(file), "--json", "--out", str(tmp_path / "first.png")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(zoo.predict(folder, file)))
    assert (tmp_path / "first.png").read_bytes().startswith(b"\x89PNG")
    assert main(["info", "wine"]) == 0
    told = capsys.readouterr().out
    assert "wine (GRBFClassifier)" in told
    assert "3 columns: alcohol, acid, ash" in told
    assert "3 classes: red, rosé, white" in told
    assert "n_centers" in told
    config = json.loads((folder / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["predict", str(broken), str(file)]) == 1
    assert "has no model.safetensors" in capsys.readouterr().err


EXPORTED = {
    "grbf": lambda: GRBFClassifier(solver="adam", n_centers=5, max_iter=5, random_state=0),
    "agop": lambda: GRBFClassifier(solver="agop"),
    "values": lambda: GRBFRegressor(solver="adam", n_centers=5, max_iter=5, precision=2, random_state=0),
    "gp": lambda: GPRegressor(max_iter=2, restarts=0, random_state=0),
    "sparse": lambda: GPRegressor(max_iter=2, n_inducing=8, random_state=0),
    "gpc": lambda: GPClassifier(max_iter=1, random_state=0),
    "stream": lambda: KernelStreamClassifier(n_features=8, random_state=0),
    "mean": lambda: KernelStreamClassifier(n_features=8, head="mean", random_state=0),
}


@pytest.mark.parametrize("which", [pytest.param(w, marks=() if w == "grbf" else pytest.mark.slow) for w in EXPORTED])
def test_an_estimator_is_exported_with_its_scaling(
    which: str, wine: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    X, y = wine
    estimator: Any = EXPORTED[which]()
    estimator.fit(X * [1, 100, 1e-3], y if is_classifier(estimator) else X[:, 0] * X[:, 1])
    folder = zoo.save_pretrained(estimator, tmp_path / "saved")
    told = export(str(folder), tmp_path / "out")
    names = ["red", "rosé", "white"] if is_classifier(estimator) else []
    assert told["class_names"] == names
    assert told["output"] == ("probabilities" if names else "values")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (given,) = session.get_inputs()
    rows = (X * [1, 100, 1e-3]).astype(np.float32)
    (found,) = session.run(None, {given.name: rows})
    right = getattr(estimator, "predict_proba", estimator.predict)(rows.astype(np.float64)).reshape(len(X), -1)
    assert np.abs(found - right).max() <= 1e-5 * max(1, np.abs(right).max())


def test_what_has_no_pipeline_is_not_exported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("zoo.estimators.grbf._GRBF.to_pipeline")
    with pytest.raises(ToolError, match=r"GRBFClassifier has no method to_pipeline\(\)"):
        export(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stream_answers_and_tells_rows_far_away(wine: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    stream = KernelStreamClassifier(n_features=8, random_state=0).fit(*wine)
    saved = zoo.save_pretrained(stream, tmp_path / "stream")
    found = zoo.predict(saved, wine[0])
    assert best(found) == stream.predict(wine[0]).tolist()
    assert "note" in zoo.predict(saved, wine[0] * 1e4)[0]


def test_an_estimator_is_measured_on_a_table(
    estimator: Any,
    folder: Path,
    wine: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    X, y = wine
    lines = ["ash,colour,alcohol,acid", *(f"{r[2]},{label},{r[0]},{r[1]}" for r, label in zip(X, y, strict=True))]
    table = tmp_path / "wines.csv"
    table.write_text("\n".join(lines))
    right = float((estimator.predict(X) == y).mean())
    for target in ("colour", None):
        assert score(folder, table, target) == {"name": str(folder), "data": str(table), "rows": 178, "accuracy": right}
    assert main(["validate", str(folder), "--data", str(table)]) == 0
    assert f"accuracy {right:.4f}" in capsys.readouterr().out
    for change, told in (
        (lambda t: t.replace("red", "blue", 1), r"line 2, column colour: 'blue' is no class"),
        (lambda t: t.replace("colour", "color,colour", 1), "line|cells|columns"),
        (lambda t: t.replace("alcohol", "spirit"), "has no column 'alcohol'"),
    ):
        (tmp_path / "bad.csv").write_text(change("\n".join(lines)))
        with pytest.raises((DataError, ToolError), match=told):
            score(folder, tmp_path / "bad.csv", "colour")
    with pytest.raises(DataError, match="no column 'color'"):
        score(folder, table, "color")
    with pytest.raises(DataError, match="is a folder; an estimator takes a table"):
        score(folder, tmp_path)
    values = GRBFRegressor(solver="adam", n_centers=5, max_iter=5, random_state=0).fit(X[:, :2], X[:, 2])
    saved = zoo.save_pretrained(values, tmp_path / "values")  # without names of columns
    (tmp_path / "plain.csv").write_text("\n".join(["x,y,z", *(",".join(map(repr, r)) for r in X.tolist())]))
    found = score(saved, tmp_path / "plain.csv", "z")
    assert found["r2"] == pytest.approx(values.score(X[:, :2], X[:, 2]))
    with pytest.raises(ToolError, match=r"name the column of the right answers with --target.*x, y, z"):
        score(saved, tmp_path / "plain.csv")


def test_an_estimator_is_pushed_with_a_true_card(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["push", str(folder), "local-dir:mirror"]) == 0
    assert capsys.readouterr().out == 'zoo.load_estimator("local-dir:mirror")\n'
    mirror = tmp_path / "mirror"
    assert sorted(path.name for path in mirror.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (mirror / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    card = (mirror / "README.md").read_text()
    assert "alcohol, acid, ash" in card
    assert "red, rosé, white" in card
    assert str(tmp_path) not in card
    assert str(folder) not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    scope: dict[str, Any] = {"rows": [[13.0, 2.0, 2.4]]}
    exec(code, scope)
    table(tmp_path / "rows.csv", [*NAMES], np.array([[13.0, 2.0, 2.4]]))
    (tmp_path / "rows.csv").write_text("alcohol,acid,ash,COLUMN\n13.0,2.0,2.4,red\n")
    for line in card.rpartition("```\n")[0].rpartition("```\n")[2].strip().splitlines():
        assert main(line.split()[3:]) == 0, line
    assert main(["push", "mirror", "local-dir:mirror"]) == 0
    for command in ("report", "validate"):
        assert main([command, "mirror"]) == 1
        assert "is a saved estimator, which has no record of its data" in capsys.readouterr().err


def test_an_estimator_that_fails_is_told(folder: Path) -> None:
    broken = zoo.load_estimator(folder)
    broken.network_ = SimpleNamespace()
    with pytest.raises(ToolError, match="GRBFClassifier gives no answer"):
        zoo.predict(broken, np.zeros((1, 3)))
    with pytest.raises(CheckpointError):
        zoo.save_pretrained(broken, folder)
