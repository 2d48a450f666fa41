"""Forecasting: squared error of what is known, a linear start, a checkpoint that stands alone."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from zoo.data import Forecast
from zoo.tasks import ForecastingTask, load_task

SPEC = {"model_name": "test_unireplknet_forecast", "in_chans": 2, "linear_skip": True}


class Last(nn.Module):
    """Says that nothing will change."""

    def forward(self, x: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        return x[:, -1:].expand(-1, 6, -1)


@pytest.fixture
def data(tmp_path: Path) -> Forecast:
    """A seasonal series of 300 hours, the second variable lagging behind the first."""
    start = datetime(2016, 7, 1)
    wave = torch.sin(torch.arange(301) * 2 * torch.pi / 24)
    rows = [f"{start + timedelta(hours=i)},{wave[i + 1]:.6f},{wave[i]:.6f}" for i in range(300)]
    path = tmp_path / "series.csv"
    path.write_text("\n".join(["date,a,b", *rows]) + "\n")
    return Forecast(str(path), seq_len=12, pred_len=6, batch_size=32)


def trainer(folder: Path, **arguments: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, **{**quiet, **arguments})  # type: ignore[arg-type]


def test_what_is_not_known_counts_nowhere() -> None:
    task = ForecastingTask(Last())
    inputs = (torch.zeros(2, 12, 1), torch.zeros(2, 12, 4))
    targets = torch.full((2, 6, 1), 2.0)
    targets[1] = torch.nan
    targets[0, 3:] = torch.nan
    assert task.losses((inputs, targets))["squared_error"] == 4.0


def test_errors_are_means_over_everything(data: Forecast, tmp_path: Path) -> None:
    """Batches that the part does not fill are padded; the mean must not notice."""
    engine = trainer(tmp_path)
    (found,) = engine.test(ForecastingTask(Last()), datamodule=data, verbose=False)
    part = data.datasets["test"]
    (windows, _), targets = part.batch(range(len(part)))
    error = windows[:, -1:].double() - targets
    assert found["test/mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert found["test/mae"] == pytest.approx(error.abs().mean().item(), rel=1e-5)


def test_training_starts_from_the_linear_forecast_and_comes_back(data: Forecast, tmp_path: Path) -> None:
    task = ForecastingTask(dict(SPEC), optimizer={"opt": "adamw", "lr": 1e-3}, preprocessing={"mean": [0.0, 0.0]})
    engine = trainer(tmp_path, max_epochs=1)
    engine.fit(task, datamodule=data)
    assert engine.callback_metrics["val/mse"] < 0.05, "a sine is linear in its past"
    engine.save_checkpoint(tmp_path / "task.ckpt")
    again = load_task(tmp_path / "task.ckpt")
    assert isinstance(again, ForecastingTask)
    assert again.preprocessing == {"mean": [0.0, 0.0]}
    batch = next(iter(data.test_dataloader()))
    task.eval()
    with torch.no_grad():
        torch.testing.assert_close(again.predict_step(batch, 0), task.predict_step(batch, 0))
    assert again.predict_step(batch, 0).shape == batch[1].shape
