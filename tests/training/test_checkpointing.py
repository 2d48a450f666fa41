"""The state that counts: the best by the monitored metric, and among equals the better trained one."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from zoo.training.checkpointing import BestCheckpoint


class Scripted(L.LightningModule):
    """Counts its epochs in a weight and logs metrics that a script gives."""

    def __init__(self, script: dict[str, list[float]]) -> None:
        super().__init__()
        self.script, self.epochs = script, nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.epochs * 0

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log_dict({name: torch.tensor(values[self.current_epoch]) for name, values in self.script.items()})

    def on_train_epoch_end(self) -> None:
        self.epochs.data += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder: Path, epochs: int, mode: str) -> L.Trainer:
    best = BestCheckpoint(folder, "val/metric", mode=mode)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[best], **quiet)


def kept_epoch(folder: Path) -> int:
    (file,) = folder.glob("*.ckpt")
    assert file.name == "best.ckpt"
    return int(torch.load(file, weights_only=True)["epoch"])


@pytest.mark.parametrize(
    ("mode", "metric", "loss", "expected"),
    [
        ("max", [0.5, 0.9, 0.9, 0.9, 0.8], [0.9, 0.5, 0.3, 0.4, 0.1], 2),  # of three equals the smallest loss
        ("max", [0.9, 0.9, 0.9, 0.7], [0.2, 0.2, 0.2, 0.2], 2),  # equal in everything: the latest
        ("max", [0.9, 0.8, 0.95, 0.9], [0.1, 0.1, 0.9, 0.1], 2),  # a loss never outweighs the metric
        ("min", [0.5, 0.3, 0.3, 0.4], [0.1, 0.9, 0.8, 0.0], 2),
        ("max", [0.5, 0.9, 0.9, 0.2], None, 2),  # no loss is logged: the later one
        ("max", [math.nan, 0.3, math.inf, 0.2], [0.9, 0.8, 0.7, 0.6], 1),  # only what is finite
        ("max", [0.3, 0.9, 0.2], [0.5, math.nan, 0.6], 0),  # nor with a loss that is not
        ("min", [-math.inf, 0.3, 0.2], [0.5, 0.4, math.inf], 1),
    ],
)
def test_among_equals_the_smaller_loss_and_then_the_later(
    mode: str, metric: list[float], loss: list[float] | None, expected: int, tmp_path: Path
) -> None:
    script = {"val/metric": metric} | ({"val/loss": loss} if loss else {})
    loaders = [DataLoader(torch.zeros(1, 1)), DataLoader(torch.zeros(1, 1))]
    trainer(tmp_path, len(metric), mode).fit(Scripted(script), *loaders)
    assert kept_epoch(tmp_path) == expected


def test_a_resumed_training_remembers_the_loss_of_the_kept_state(tmp_path: Path) -> None:
    loss = [0.3, 0.9, 0.5, 0.4]
    loaders = [DataLoader(torch.zeros(1, 1)), DataLoader(torch.zeros(1, 1))]
    script = {"val/metric": [0.9] * 4, "val/loss": loss}
    first = trainer(tmp_path / "best", 2, "max")
    first.fit(Scripted(script), *loaders)
    first.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path / "best", 4, "max").fit(Scripted(script), *loaders, ckpt_path=tmp_path / "last.ckpt")
    assert kept_epoch(tmp_path / "best") == 0


def test_a_state_with_weights_that_are_not_finite_is_never_the_best(tmp_path: Path) -> None:
    class Spoiled(Scripted):
        def on_train_epoch_end(self) -> None:
            self.epochs.data += 1 if self.current_epoch < 1 else math.nan

    loaders = [DataLoader(torch.zeros(1, 1)), DataLoader(torch.zeros(1, 1))]
    trainer(tmp_path, 4, "max").fit(Spoiled({"val/metric": [0.1, 0.2, 0.8, 0.9]}), *loaders)
    assert kept_epoch(tmp_path) == 0
