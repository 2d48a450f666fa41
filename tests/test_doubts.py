"""What looks like an answer and is none is told: even files, names that steer a terminal, NaN."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.cli import main
from zoo.data.checks import DataError
from zoo.data.points import PointMnist
from zoo.data.prepare import prepare, says_nothing
from zoo.data.task_streams import ContinualData
from zoo.optim import create_optimizer
from zoo.registry.factory import answers_imagenet
from zoo.support import inputs
from zoo.support.files import CheckpointError
from zoo.support.quoting import is_printable, shown
from zoo.support.signatures import check_call
from zoo.support.values import DamagedFileError, read_json
from zoo.tasks import ClassificationTask
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import unusable
from zoo.tools.prediction import _facts, predict
from zoo.tools.validation import ValidationError, validate

LOOK = {"kind": "image", "channels": 3, "size": [32, 32]}


def saved(folder: Path, **other: object) -> Path:
    torch.manual_seed(0)
    model = zoo.create_model("test_unireplknet", num_classes=2)
    return zoo.save_pretrained(model, folder, class_names=["cat", "dog"], input_record={**LOOK, **other})


@pytest.fixture(scope="module")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("m") / "model", background=0)


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = zoo.create_model("test_unireplknet", num_classes=2)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.startswith("head"))[:] = torch.nan
    return zoo.save_pretrained(model, tmp_path_factory.mktemp("n") / "model", input_record=LOOK)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return tmp_path / "x.png"


def test_even_pictures_get_a_note(
    sound_model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[8:20, 12:16, 3] = 255  # black on transparent, shown on black
    Image.fromarray(ink).save(tmp_path / "ink.png")
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    Image.new("RGB", (50, 40), (3, 90, 200)).save(tmp_path / "even.png")
    files = [str(tmp_path / name) for name in ("ink.png", "one.png", "even.png")] + [str(picture)]
    assert main(["predict", f"local-dir:{sound_model}", *files, "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [("note" in entry) for entry in found] == [True, True, True, False]
    lines = [line for line in told.err.splitlines() if line.startswith("note: ")]
    assert [line.split(": ")[1] for line in lines] == files[:3]


@pytest.mark.parametrize(
    ("record", "shape"),
    [
        ({"kind": "sound", "rate": 8000, "samples": 64}, (1, 64)),
        ({"kind": "series", "count": 2, "steps": 8}, (1, 8, 2)),
        ({"kind": "points", "points": 5}, (1, 5, 3)),
        ({"kind": "clip", "channels": 1, "size": [4, 4], "frames": 3}, (1, 1, 3, 4, 4)),
        ({"kind": "spectrum", "bands": 3, "patch": 2, "mean": [1.0, 2.0, 3.0]}, (1, 3, 2, 2)),
    ],
)
def test_even_inputs_of_every_kind(record: dict[str, object], shape: tuple[int, ...]) -> None:
    form = inputs.read(record)
    even = torch.full(shape, 0.25)
    if record["kind"] == "spectrum":
        even = even - torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    assert "the prediction says nothing" in (says_nothing(Path("x"), even, form) or "")
    even[(0,) * even.ndim] += 0.01
    assert says_nothing(Path("x"), even, form) is None


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a\x1b[31m", "b"], "cannot be printed"),
        (["a\u202eb", "b"], "cannot be printed"),
        (["a", "a"], "twice"),
        (["a", "b", "c"], "3 names for 2 classes"),
    ],
)
def test_names_of_classes(names: list[str], told: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": names}))
    with pytest.raises(CheckpointError, match=told) as refusal:
        zoo.create_model(f"local-dir:{folder}")
    assert is_printable(str(refusal.value))


def test_a_record_that_was_changed(tmp_path: Path) -> None:
    """Labels may be renamed by hand, but not swapped; how files are prepared stays as saved, unless it is meant."""
    folder, path = saved(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    look = {**config["input"], "channels": 3, "background": 7}
    for change, told in (
        ({"label_names": ["dog", "cat"]}, "label_names, which say what each output means, are not as saved"),
        ({"input": look}, "input, which says how files are prepared, is not as saved"),
        ({"record_sha256": [1]}, "record_sha256 must be an object"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=told):
            zoo.create_model(f"local-dir:{folder}", pretrained=True)
    renamed = config | {"label_names": ["Hund", "Katze"]}
    older = {key: value for key, value in (config | {"input": look}).items() if key != "record_sha256"}
    for fine in (config, renamed, older, older | {"label_names": ["dog", "cat"]}):
        path.write_text(json.dumps(fine))
        zoo.create_model(f"local-dir:{folder}", pretrained=True)


def test_columns_that_contradict_the_variables() -> None:
    variables = [{"name": "age"}, {"name": "sex", "values": ["f", "m"]}, {"name": "size", "fill": 0.0}]
    record = {"kind": "table", "count": 4, "variables": variables, "columns": ["age", "sex=f", "sex=m", "size"]}
    inputs.check(record)
    inputs.check(record | {"columns": ["age", "f", "m", "size"]})
    for swapped in (["size", "sex=f", "sex=m", "age"], ["age", "sex=m", "sex=f", "size"]):
        with pytest.raises(inputs.InputError, match=f"{swapped[0]}|sex=m.* is where the variables have"):
            inputs.check(record | {"columns": swapped})


def test_two_names_of_one_output(tmp_path: Path) -> None:
    folder = zoo.save_pretrained(zoo.create_model("test_unireplknet", num_classes=1), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"label_names": ["no", "yes"]}))
    cfg: Any = zoo.create_model(f"local-dir:{folder}").pretrained_cfg
    assert list(cfg["label_names"]) == ["no", "yes"]


def test_a_thousand_outputs_are_not_imagenet(picture: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network: Any = zoo.create_model("test_unireplknet", num_classes=1000)
    network.pretrained_cfg["tag"] = "in1k"  # of what its own weights were trained from
    folder = zoo.save_pretrained(network, tmp_path / "model", input_record=LOOK)
    (found,) = predict(f"local-dir:{folder}", [picture])
    assert all(entry["class"].isdecimal() for entry in found["predictions"])
    facts = _facts("unireplknet_a.in1k", network)
    assert (facts["classes"][0], len(facts["classes"])) == ("tench, Tinca tinca", 1000)
    for name, known in (
        ("unireplknet_a", True),
        ("resnet50.a1_in1k", True),
        ("hf-hub:timm/resnet50.a1_in1k", True),
        ("hf-hub:someone/resnet50.a1_in1k", False),
        ("unireplknet_s.in22k", False),
        ("resnet50.never", False),
        ("grbf.wine", False),
        (f"local-dir:{folder}", False),
    ):
        assert answers_imagenet(name) == known, name
    (tmp_path / "data" / "n01440764").mkdir(parents=True)
    picture.rename(tmp_path / "data" / "n01440764" / "x.png")
    with pytest.raises(ValidationError, match="is not a label of the model"):
        validate(f"local-dir:{folder}", tmp_path / "data")


@pytest.mark.parametrize("scenario", ["permuted", "rotated", "split"])
def test_tasks_that_change_pictures_get_a_note(
    scenario: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = ContinualData("digits", scenario, tasks=3).input_record()
    folder = zoo.save_pretrained(zoo.create_model("test_kcl"), tmp_path / "model", input_record=record)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    assert main(["predict", f"local-dir:{folder}", *map(str, files)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.startswith("note: each task of training showed the pictures") for line in told] == [True] * (
        scenario != "split"
    )


def test_clouds_in_other_units_get_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    record = {"kind": "points", "points": 40}
    network = zoo.create_model("test_unireplknet_point", num_classes=2)
    known = zoo.save_pretrained(network, tmp_path / "known", input_record=PointMnist().input_record() | record)
    unknown = zoo.save_pretrained(network, tmp_path / "unknown", input_record=record)
    cloud = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
    files = [tmp_path / f"{scale}.npy" for scale in (1, 0.001, 1000)]
    for path in files:
        np.save(path, cloud * float(path.stem))
    assert main(["predict", f"local-dir:{known}", *map(str, files)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in told] == list(map(str, files[1:]))
    assert "its coordinates reach 99" in told[1]
    assert told[1].endswith("those of training 1, and the model takes them as they are: are the units the same?")
    assert main(["predict", f"local-dir:{unknown}", *map(str, files)]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("columns", [["a", "a"], ["a", "b\x9b2J"]])
def test_names_of_columns(columns: list[str]) -> None:
    for record in ({"kind": "table", "count": 2}, {"kind": "series", "count": 2, "steps": 3}):
        with pytest.raises(inputs.InputError, match=r"twice|cannot be printed"):
            inputs.check(record | {"columns": columns})


def test_what_is_printed_steers_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("\x1b]0;x\x07 größe 日本 \u202e\n\x9b") == "\\u001b]0;x\\u0007 größe 日本 \\u202e\n\\u009b"
    assert main(["predict", "grbf.wine", f"{tmp_path}/\x1b[2J.csv"]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_a_key_stands_once(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(DamagedFileError, match="the key 'b' occurs twice"):
        read_json(tmp_path / "x.json")


# ---- answers -----------------------------------------------------------------------------------------------


def test_answers_that_are_no_numbers(
    broken_model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", f"local-dir:{broken_model}", str(picture)]) == 1
    told = capsys.readouterr()
    warned, error = told.err.strip().splitlines()
    assert warned.startswith("warning: ")
    assert "holds NaN" in warned
    assert error.startswith(f"error: {picture}: the model gives NaN")
    assert not told.out
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "b").mkdir()
    for name in "ab":
        (tmp_path / "val" / name / "1.png").write_bytes(picture.read_bytes())
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=r"a/1\.png: the model gives"):
        validate(f"local-dir:{broken_model}", tmp_path)


def test_an_impossible_class_is_an_answer() -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0.0, -inf], [-inf, -inf], [inf, 0.0], [nan, 0.0]])
    assert unusable(rows).tolist() == [False, True, True, True]
    assert unusable(torch.tensor([[1.0], [inf]])).tolist() == [False, True]


def test_a_task_with_weights_that_are_no_numbers_is_told(tmp_path: Path) -> None:
    task = ClassificationTask({"model_name": "test_unireplknet", "num_classes": 2})
    name, weights = next(iter(task.named_parameters()))
    with torch.no_grad():
        weights.flatten()[0] = torch.nan
    state = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(state)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.warns(RuntimeWarning, match=f"{name.removeprefix('model.')} holds NaN"):
        zoo.load_task(tmp_path / "x.ckpt")


# ---- the command's words -----------------------------------------------------------------------------------


def test_what_a_model_may_be(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(picture.parent)
    for arguments in (
        ["predict", folder, str(picture)],
        ["predict", str(picture), "grbf.wine"],
        ["validate", folder, "--data", folder],
        ["validate", "nosuch"],
    ):
        assert main(arguments) == 1
        told = capsys.readouterr().err
        assert "a name with its tag (grbf.wine), local-dir:FOLDER" in told
        assert told.count("\n") == 1
        assert "model_name" not in told


def test_what_is_no_file(sound_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "b.png")
    for name, told in (("a.png", "is a folder"), ("b.png", "is not a regular file"), ("c.png", "there is no file")):
        with pytest.raises(ToolError, match=told):
            predict(f"local-dir:{sound_model}", [tmp_path / name])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "inf"])
def test_numbers_of_a_configuration_are_finite(value: object) -> None:
    check: Callable[..., list[str]] = check_call
    (problem,) = check(create_optimizer, {"lr": value}, "optimizer", given=["model"])
    assert problem.startswith("optimizer.lr = ")
    why = "a valid number" if isinstance(value, str) else "finite"
    assert why in check(create_optimizer, {"betas": [0.9, value]}, "optimizer", given=["model"])[0]
    assert not check(create_optimizer, {"lr": 1e-3, "betas": [0.9, 0.99]}, "optimizer", given=["model"])


def test_texts_without_words(tmp_path: Path) -> None:
    form = inputs.read({"kind": "text", "tokens": 6, "tokenizer": "minilm"})
    unknown, known = torch.tensor([[101, 100, 100, 102, 0, 0]]), torch.tensor([[101, 100, 7592, 102, 0, 0]])
    assert "holds no word that the model knows" in (says_nothing(Path("x"), unknown, form) or "")
    assert says_nothing(Path("x"), known, form) is None
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\t\n")
    with pytest.raises(DataError, match=r"blank\.txt holds no text"):
        prepare(blank, {"kind": "text", "tokens": 6, "tokenizer": "minilm"})
