"""Accuracy of weights on a folder: the record's preprocessing, the right classes, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform

from zoo.cli import main
from zoo.data.checks import DataError
from zoo.registry.checkpoints import CheckpointError, save_pretrained
from zoo.registry.factory import create_model
from zoo.tools import evaluation
from zoo.tools.errors import ToolError
from zoo.tools.validation import ValidationError, _outputs, _preprocessing, validate

WNIDS = ImageNetInfo("imagenet-1k").label_names()


def write_images(folder: Path, names: list[str], each: int = 3) -> None:
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(draw.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("test_unireplknet", num_classes=6, layer_scale_init_value=1.0)
    names = ["cat", "dog", "emu", "fox", "gnu", "hen"]
    return save_pretrained(model, tmp_path_factory.mktemp("m") / "model", class_names=names)


def test_accuracy_is_that_of_the_model(saved: Path, tmp_path: Path) -> None:
    names = ["fox", "cat"]  # some of the model's classes, looked up by name
    write_images(tmp_path / "val", names)
    model = create_model(f"local-dir:{saved}", pretrained=True).eval()
    how = _preprocessing(dict(model.pretrained_cfg))
    transform = create_transform(is_training=False, **how)
    hits = 0
    for name in names:
        for file in (tmp_path / "val" / name).iterdir():
            with torch.no_grad(), Image.open(file) as image:
                hits += int(model(transform(image)[None]).argmax()) == ["cat", "dog", "emu", "fox"].index(name)
    found = validate(f"local-dir:{saved}", tmp_path, batch_size=4)
    assert found.images == 6
    assert found.top1 == pytest.approx(100 * hits / 6)
    assert found.top5 >= found.top1
    assert found.published is None
    assert "no accuracy was published" in str(found)


@pytest.mark.parametrize(
    ("name", "size", "crop", "mode", "published"),
    [
        ("unireplknet_a.in1k", 224, 0.875, "center", 77.03),
        ("unireplknet_s.in22k_ft_in1k_384", 384, 1.0, "squash", 86.44),
    ],
)
def test_the_record_decides(
    name: str, size: int, crop: float, mode: str, published: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "val", WNIDS[:2], each=1)
    real = create_model(name, num_classes=1000, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], kernel_sizes=[[3]] * 4)
    monkeypatch.setattr("zoo.tools.validation.create_model", lambda *args, **kwargs: real)
    found = validate(name, tmp_path)
    assert found.preprocessing["input_size"] == (3, size, size)
    assert (found.preprocessing["crop_pct"], found.preprocessing["crop_mode"]) == (crop, mode)
    assert found.preprocessing["interpolation"] == "bicubic"
    assert found.published == published
    assert f"published {published:.2f} %" in str(found)


def test_refusals(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_images(tmp_path / "val", ["cat", "yak"], each=1)
    with pytest.raises(DataError, match="there is no folder"):
        validate("unireplknet_a.in1k", tmp_path / "nowhere")
    with pytest.raises(ValidationError, match="did you mean unireplknet_a"):
        validate("unireplknet_aa.in1k", tmp_path)
    with pytest.raises(ValidationError, match="2 class folders, the model 6 classes, and 'yak' is not a label"):
        validate(f"local-dir:{saved}", tmp_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        validate("unireplknet_a.in1k", tmp_path, checkpoint=tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"unireplknet_a_in1k_224_acc77.03.pth.*place it at"):
        validate("unireplknet_a.in1k", tmp_path)


def test_five_classes_have_no_top_5(tmp_path: Path) -> None:
    model = save_pretrained(create_model("test_unireplknet", num_classes=5), tmp_path / "model")
    write_images(tmp_path / "val", list("abcde"), each=1)
    found = validate(str(model), tmp_path)
    assert found.top5 is None
    assert "top-5" not in str(found)


def test_other_names_are_no_classes(saved: Path, tmp_path: Path) -> None:
    """As many folders as classes, in an order of their own: no answer is better than a wrong one."""
    write_images(tmp_path / "val", ["Hen", "cat", "dog", "emu", "fox", "gnu"], each=1)
    with pytest.raises(ValidationError, match=r"'Hen' is not a label of the model \(did you mean 'hen'\?\): name the"):
        validate(str(saved), tmp_path)
    (tmp_path / "list.csv").write_text("file,class\n" + "".join(f"val/{n}/0.png,{n * 2}\n" for n in ("cat", "dog")))
    with pytest.raises(ValidationError, match="'catcat' is not a label of the model"):
        validate(str(saved), tmp_path / "list.csv")


def test_a_model_without_labels_says_what_it_takes_for_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = create_model("test_unireplknet", num_classes=11).eval()
    folder = str(save_pretrained(model, tmp_path / "model"))
    write_images(tmp_path / "words", [f"{i}_{'abcdefghijk'[i]}" for i in range(9)] + ["x", "y"], each=1)
    validate(folder, tmp_path / "words")
    assert "no names of its classes: they are taken in order, output 0 0_a, 1 1_b" in caplog.text
    caplog.clear()
    names = [str(i) for i in range(11)]
    assert _outputs(sorted(names), [], 11, tmp_path) == [int(name) for name in sorted(names)]
    assert not caplog.text


def test_the_data_of_a_record_has_the_classes_of_the_model(tmp_path: Path) -> None:
    model = create_model("test_unireplknet", num_classes=2)
    folder = save_pretrained(model, tmp_path, class_names=["cat", "dog"])
    record: dict[str, Any] = {
        "name": "mine",
        "folder": str(folder),
        "class_names": ["cat", "dog"],
        "data": {"own": True},
    }
    renamed = record | {"class_names": ["Katze", "Hund"]}
    for fine in (["cat", "dog"], []):
        evaluation._check_classes(record, SimpleNamespace(class_names=fine, path="there"))
    evaluation._check_classes(renamed, SimpleNamespace(class_names=["cat", "dog"]))
    evaluation._check_classes(record | {"data": {}}, SimpleNamespace(class_names=["0", "1"]))
    for names, told in (
        (["dog", "cat"], "in another order than the classes of its data"),
        (["a", "b"], "there has 2 classes, such as 'a', the model 2, such as 'cat': name the classes by the labels"),
        (["cat", "dog", "emu"], "there has 3 classes, such as 'emu', the model 2"),
        (["cat"], "there has 1 classes, such as 'cat', the model 2"),
    ):
        with pytest.raises(ToolError, match=told):
            evaluation._check_classes(record, SimpleNamespace(class_names=names, path="there"))
    with pytest.raises(ToolError, match="such as 'a', the model 2, such as 'Katze'"):
        evaluation._check_classes(renamed, SimpleNamespace(class_names=["a", "b"]))


def test_only_pictures_and_tables_are_validated_on_files(tmp_path: Path) -> None:
    model = create_model("test_unireplknet_audio", num_classes=2)
    record = {"kind": "sound", "rate": 8000, "samples": 8000}
    folder = save_pretrained(model, tmp_path / "model", class_names=["a", "b"], input_record=record)
    (tmp_path / "sounds" / "a").mkdir(parents=True)
    (tmp_path / "list.csv").write_text("file,class\nx.wav,a\n")
    for data in ("sounds", "list.csv"):
        with pytest.raises(ValidationError, match="takes a recording, no images: without --data its own figure"):
            validate(str(folder), tmp_path / data)


def test_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "val", ["cat"], each=2)
    assert main(["validate", "--model", f"local-dir:{saved}", "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "top-1" in told
    assert "top-5" in told
    assert main(["validate", "--model", f"local-dir:{saved}", "--data", str(tmp_path / "none")]) == 1
    assert "error: there is no folder" in capsys.readouterr().err
