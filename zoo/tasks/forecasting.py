"""Forecasting with the mean squared error."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn
from torchmetrics import MeanMetric

from zoo.tasks.base import Task


class ForecastingTask(Task):
    """Mean squared error of `((windows, marks), targets)` batches: (B, L, D), (B, L, F) and (B, H, D).

    NaN targets (padding or missing values) are ignored. Logs `mse` and `mae` of the validation and test parts over all
    windows, steps and variables, in the units of the batches (the zoo's data is standardised).

    A model with a method `initialize(windows, targets, ridge)` is initialised with the data module's training part
    (`training_windows()`), unless the run is resumed or loads weights.

    Args:
        model, optimizer, scheduler, channels_last, compile, freeze: See `Task`.
        ridge: Ridge penalty of the linear forecast in `initialize`.
        preprocessing: Standardisation of the data (`mean`, `std`, ...), stored in the checkpoint.
    """

    monitors = ("val/mse", "val/mae", "test/mse", "test/mae")

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        ridge: PositiveFloat = 1.0,
        preprocessing: dict[str, Any] | None = None,
        freeze: str | list[str] | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            scheduler,
            channels_last=channels_last,
            compile=compile,
            freeze=freeze,
            ridge=ridge,
            preprocessing=preprocessing,
        )
        self.ridge, self.preprocessing = ridge, preprocessing
        self.errors: Any = nn.ModuleDict(
            {part: nn.ModuleDict({"mse": MeanMetric(), "mae": MeanMetric()}) for part in ("val", "test")}
        )

    def setup(self, stage: str) -> None:
        """Initialise the model's linear forecast; a resumed run restores its own weights afterwards."""
        data: Any = getattr(self.trainer, "datamodule", None)
        initialize = getattr(self.model, "initialize", None)
        if stage == "fit" and callable(initialize) and hasattr(data, "training_windows") and self.starts_fresh:
            initialize(*data.training_windows(), ridge=self.ridge)

    def forward(self, x: Any) -> Tensor:
        """Forecasts (B, H, D) of windows, or of `(windows, marks)`."""
        return self.model(*x) if isinstance(x, (tuple, list)) else self.model(x)

    def losses(self, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        inputs, targets = batch
        known = ~targets.isnan()
        return {"squared_error": F.mse_loss(self(inputs)[known], targets[known])}

    def _evaluate(self, batch: tuple[Any, Tensor], part: str) -> None:
        inputs, targets = batch
        known = ~targets.isnan()
        error = self(inputs).float()[known] - targets[known]
        self.errors[part]["mse"].update(error.square())
        self.errors[part]["mae"].update(error.abs())
        for name, metric in self.errors[part].items():
            self.log(f"{part}/{name}", metric, prog_bar=part == "val")

    def validation_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Forecasts (B, H, D) of `((windows, marks), targets)`."""
        return self(batch[0])
