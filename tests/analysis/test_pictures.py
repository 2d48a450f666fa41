"""Receptive fields and merged kernels: numbers first, then the PNG and what W&B is sent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor, nn

from zoo.analysis.plots import as_array, plot_kernels, plot_receptive_field, square_of_share
from zoo.analysis.probes.kernels import merged_kernels
from zoo.analysis.probes.receptive_field import receptive_field
from zoo.cli import main
from zoo.registry.factory import create_model
from zoo.training.callbacks import ModelPictures


class Blur(nn.Module):
    """A 5 x 5 box, twice: a field of 9 x 9 with triangular sides."""

    def forward_features(self, x: Tensor) -> Tensor:
        box = torch.ones(1, 1, 5, 5)
        for _ in range(2):
            x = nn.functional.conv2d(x, box, padding=2)
        return x


def test_receptive_field_of_a_known_filter() -> None:
    field = receptive_field(Blur(), torch.randn(3, 1, 21, 21))
    side = np.array([0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0])
    expected = np.outer(side, side) / 625
    np.testing.assert_allclose(field[5:16, 5:16], expected, atol=1e-6)
    assert field.sum() == pytest.approx(1)
    assert square_of_share(field, 1.0) == (10, 10, 9)
    assert square_of_share(field, 25 / 625) == (10, 10, 1)


@pytest.mark.parametrize("name", ["test_unireplknet", "test_convnext", "test_resnet", "test_vit"])
def test_receptive_field_of_any_spatial_model(name: str) -> None:
    model = timm.create_model(name).train()
    size = model.pretrained_cfg["input_size"][-1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():  # as in a validation
        field = receptive_field(model, torch.randn(2, 3, size, size))
    assert field.shape == (size, size)
    assert field.sum() == pytest.approx(1)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_models_without_maps_are_told() -> None:
    with pytest.raises(ValueError, match="no map to look at"):
        receptive_field(nn.Linear(2, 2), torch.randn(1, 1, 4, 4))
    with pytest.raises(ValueError, match="has no feature map 9"):
        receptive_field(timm.create_model("test_convnext"), torch.randn(1, 3, 64, 64), stage=9)
    with pytest.raises(ValueError, match="has no depthwise convolution"):
        merged_kernels(nn.Conv2d(3, 3, 3))


def test_merged_kernels_are_those_of_the_deploy_form() -> None:
    model = create_model("test_unireplknet").eval()
    name, kernels = merged_kernels(model, "stages.1.0")
    assert name == "stages.1.0.dwconv.lk_origin"
    assert kernels.shape == (16, 13, 13)
    weight, _ = model.stages[1][0].dwconv.merged()
    norm = model.stages[1][0].norm
    expected = weight[:, 0] * (norm.weight / (norm.running_var + norm.eps).sqrt()).double()[:, None, None]
    np.testing.assert_allclose(kernels, expected.detach().numpy(), atol=1e-6)
    assert merged_kernels(model)[0] == name  # the largest
    with pytest.raises(ValueError, match="did you mean"):
        merged_kernels(model, "stages.1.0.dwconv.lk_orgin")


def test_figures_draw_and_become_arrays() -> None:
    ax = plot_receptive_field(np.eye(8) + 0.01, title="t")
    assert ax.get_title() == "t"
    assert as_array(ax).ndim == 3
    ax = plot_kernels(np.random.default_rng(0).normal(size=(5, 3, 3)), count=3)
    assert as_array(ax).dtype == np.uint8


def test_command_writes_pngs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (70, 70, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    common = ["--model", "test_unireplknet", "--count", "2"]
    for kind, extra in (("receptive-field", []), ("receptive-field", ["--data", str(tmp_path)]), ("kernels", [])):
        out = tmp_path / "out" / f"{kind}{len(extra)}.png"
        assert main(["figure", kind, *common, *extra, "--out", str(out)]) == 0
        assert "untrained" in capsys.readouterr().out
        with Image.open(out) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture))) > 20


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["kernels", "--model", "unireplknet_aa"], "did you mean unireplknet_a"),
        (["kernels", "--model", "test_unireplknet", "--layer", "stage.1"], "no depthwise layer 'stage.1'"),
        (["receptive-field", "--model", "test_unireplknet", "--data", "nowhere"], "cannot read the folder nowhere"),
        (["kernels", "--model", "test_unireplknet", "--out", "/dev/null/x.png"], "cannot write"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["figure", *arguments]) == 1
    assert told in capsys.readouterr().err


class FakeWandb(WandbLogger):
    def __init__(self) -> None:
        self.sent: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.sent[key] = images[0]


@pytest.mark.parametrize(("epoch", "batch", "sent"), [(0, 0, True), (10, 0, True), (3, 0, False), (0, 1, False)])
def test_wandb_gets_the_pictures(epoch: int, batch: int, sent: bool) -> None:
    logger = FakeWandb()
    trainer: Any = SimpleNamespace(loggers=[logger], sanity_checking=False, is_global_zero=True, current_epoch=epoch)
    module: Any = SimpleNamespace(model=create_model("test_unireplknet"))
    with torch.inference_mode():
        images = torch.randn(4, 3, 64, 64), torch.zeros(4)
        ModelPictures(every_n_epochs=10, count=2).on_validation_batch_end(trainer, module, None, images, batch)
    assert set(logger.sent) == ({"model/receptive_field", "model/kernels"} if sent else set())
    assert all(picture.ndim == 3 for picture in logger.sent.values())
