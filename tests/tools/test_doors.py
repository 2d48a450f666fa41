"""Doors for Python, and saved estimators at the commands: the same answers by every way in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine

import zoo
from zoo.cli import main
from zoo.estimators import GRBFClassifier, KernelStreamClassifier
from zoo.support.files import CheckpointError
from zoo.tools.errors import ToolError
from zoo.tools.export import export

NAMES = ["alcohol", "acid", "ash"]


@pytest.fixture(scope="module")
def wine() -> tuple[np.ndarray, np.ndarray]:
    """Rows (178, 3) and the names of their classes."""
    X, y = load_wine(return_X_y=True)
    return X[:, :3], np.array(["red", "white", "rosé"])[y]


@pytest.fixture(scope="module")
def estimator(wine: tuple[np.ndarray, np.ndarray]) -> Any:
    fitted = GRBFClassifier(n_centers=5, max_iter=20, random_state=0).fit(*wine)
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
    frame = Frame(["acid", "more", "alcohol", "ash"], [(r[1], "x", r[0], r[2]) for r in rows])
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
        ([["a", "b", "c"]], "inputs are files, a data frame or numbers"),
        (Frame(NAMES, [(1.0, None, 2.0)]), "the data frame, line 1: acid is empty"),
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


def test_grbf_is_exported_with_its_scaling(
    estimator: Any, folder: Path, wine: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    told = export(str(folder), tmp_path / "out", formats=("onnx",))
    assert told["class_names"] == ["red", "rosé", "white"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    (given,) = session.get_inputs()
    rows = wine[0].astype(np.float64 if "double" in given.type else np.float32)
    (found,) = session.run(None, {given.name: rows})
    right = estimator.decision_function(wine[0])
    assert np.abs(found - right).max() < 1e-4 * np.abs(right).max()


def test_what_has_no_module_is_not_exported(wine: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    stream = KernelStreamClassifier(n_features=8, random_state=0).fit(*wine)
    saved = zoo.save_pretrained(stream, tmp_path / "stream")
    with pytest.raises(ToolError, match="KernelStreamClassifier has no torch module"):
        export(str(saved), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = zoo.predict(saved, wine[0])
    assert best(found) == stream.predict(wine[0]).tolist()
    assert "note" in zoo.predict(saved, wine[0] * 1e4)[0]


def test_an_estimator_that_fails_is_told(folder: Path) -> None:
    broken = zoo.load_estimator(folder)
    broken.network_ = SimpleNamespace()
    with pytest.raises(ToolError, match="GRBFClassifier gives no answer"):
        zoo.predict(broken, np.zeros((1, 3)))
    with pytest.raises(CheckpointError):
        zoo.save_pretrained(broken, folder)
