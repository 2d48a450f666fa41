"""Callbacks: progress bar, throughput, early stopping, sample pictures and pictures of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from pydantic import NonNegativeFloat, PositiveInt
from rich.console import Console
from torch import Tensor, nn

from zoo.analysis.plots import as_array, plot_hyper_kernels, plot_kernels, plot_receptive_field
from zoo.analysis.probes.hyper_kernels import context_kernels, hyper_kernels
from zoo.analysis.probes.kernels import merged_kernels
from zoo.analysis.probes.receptive_field import receptive_field
from zoo.tasks import OptionError


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers, cleared when a phase ends."""

    def __init__(self, refresh_rate: PositiveInt = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self._shows = not Console().is_jupyter or find_spec("ipywidgets") is not None

    @property
    def is_enabled(self) -> bool:
        """Not in a notebook without ipywidgets, where rich shows a warning instead of a bar."""
        return super().is_enabled and self._shows

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Throughput(Callback):
    """Logs `train/samples_per_second`, over all processes and averaged between two log steps."""

    def __init__(self) -> None:
        self._samples, self._since = 0, 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._samples, self._since = 0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += batch_size(batch) * trainer.world_size
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and trainer.global_step % interval == 0:
            now = time.perf_counter()
            pl_module.log("train/samples_per_second", self._samples / (now - self._since), prog_bar=True)
            self._samples, self._since = 0, now


def batch_size(batch: Any) -> int:
    """Length of the first tensor in nested lists, tuples and dictionaries; 0 if there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return next((size for value in values if (size := batch_size(value))), 0)


class StopEarly(EarlyStopping):
    """Ends a training whose validation metric no longer improves.

    A resumed run goes on counting, and one that had stopped stays so unless `patience` is larger.

    Args:
        patience: Validations without improvement after which the training ends; None never ends it.
        monitor: Name of the metric; None for that of the best checkpoint.
        mode: Whether `max` or `min` is better; None for that of the best checkpoint, or by the name of the metric.
        min_delta: Smallest change that is an improvement.
    """

    def __init__(
        self,
        patience: PositiveInt | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] | None = None,
        min_delta: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(monitor or "", patience=patience or 1, check_on_train_epoch_end=False, check_finite=False)
        self.active, self._asked_mode, self._asked_delta = patience is not None, mode, min_delta

    @property
    def state_key(self) -> str:
        return type(self).__name__

    @property
    def reason(self) -> str | None:
        """Why the training has ended early; None if it has not."""
        if not self.active or self.wait_count < self.patience:
            return None
        best = float(self.best_score)
        return f"{self.monitor} has not been better than {best:.4g} for {self.wait_count} validations"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the metric.

        Raises:
            OptionError: There is none to choose.
        """
        if not self.active or stage != "fit":
            return
        kept = next((c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
        followed = kept is not None and self.monitor in ("", kept.monitor)
        if not self.monitor and kept is None:
            raise OptionError(
                "callbacks.stop: there is no best checkpoint whose metric it could watch: set its monitor"
            )
        self.monitor = self.monitor or str(kept and kept.monitor)
        smaller = self.monitor.endswith(("loss", "mse", "mae", "rmse"))
        self.mode = self._asked_mode or (kept.mode if followed and kept else "min" if smaller else "max")
        self.min_delta = self._asked_delta if self.mode == "max" else -self._asked_delta
        self.best_score = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let a run that had stopped and is resumed as it was stay so."""
        if self.reason:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.active and not self.reason:
            super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        if not self.active:
            return {}
        return {"monitor": self.monitor, "wait_count": self.wait_count, "best_score": float(self.best_score)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.active and state_dict.get("monitor") == self.monitor:  # of another metric nothing is known
            self.wait_count = int(state_dict["wait_count"])
            self.best_score = torch.tensor(float(state_dict["best_score"]))


class SamplePictures(Callback):
    """Logs the first validation images with predicted and true class to W&B.

    Args:
        count: Number of images.
    """

    def __init__(self, count: PositiveInt = 16) -> None:
        self.count = count

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if batch_idx > 0 or trainer.sanity_checking or not loggers or not trainer.is_global_zero:
            return
        if not isinstance(outputs, dict) or "logits" not in outputs or batch[0].ndim != 4:
            return
        names = getattr(pl_module, "class_names", None) or [str(i) for i in range(outputs["logits"].shape[-1])]
        predicted = outputs["logits"][: self.count].argmax(-1).tolist()
        captions = [
            f"{names[p]} (true: {names[t]})" for p, t in zip(predicted, batch[1][: self.count].tolist(), strict=True)
        ]
        images = [_picture(image, getattr(pl_module, "preprocessing", None)) for image in batch[0][: self.count]]
        for logger in loggers:
            logger.log_image("val/samples", images, step=None, caption=captions)


def _picture(image: Tensor, preprocessing: dict[str, Any] | None) -> Any:
    """Convert a normalised (C, H, W) tensor to a uint8 array (H, W, C) or (H, W)."""
    image = image.detach().float().cpu()
    if preprocessing:
        mean, std = (torch.tensor(preprocessing[key]).view(-1, 1, 1) for key in ("mean", "std"))
        image = image * std + mean
    array = (image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()  # (C, H, W) -> (H, W, C)
    return array[..., 0] if array.shape[-1] not in (3, 4) else array


class ModelPictures(Callback):
    """Logs the effective receptive field, merged kernels and hyper-kernels of the model to W&B during training.

    The receptive field is averaged over the first validation images. Pictures that a model cannot have are left out.

    Args:
        every_n_epochs: Interval in epochs, from the first epoch on.
        count: Number of images.
        layer: Layer of the merged kernels, see `zoo.analysis.probes.kernels`; None for the first of the largest size.
    """

    def __init__(self, every_n_epochs: PositiveInt = 10, count: PositiveInt = 16, layer: str | None = None) -> None:
        self.every_n_epochs, self.count, self.layer = every_n_epochs, count, layer

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if batch_idx > 0 or trainer.sanity_checking or not loggers or not trainer.is_global_zero:
            return
        if trainer.current_epoch % self.every_n_epochs or not isinstance(batch[0], Tensor) or batch[0].ndim != 4:
            return
        model = getattr(pl_module, "model", pl_module)
        for name, picture in self._pictures(model, batch[0][: self.count]):
            for logger in loggers:
                logger.log_image(f"model/{name}", [picture], step=None)

    def _pictures(self, model: nn.Module, images: Tensor) -> Iterator[tuple[str, np.ndarray]]:
        with suppress(ValueError):  # no feature maps
            yield "receptive_field", as_array(plot_receptive_field(receptive_field(model, images)))
        with suppress(ValueError):  # no depthwise layer
            name, kernels = merged_kernels(model, self.layer)
            yield "kernels", as_array(plot_kernels(kernels, title=name))
        with suppress(ValueError):  # no Terminator
            yield "hyper_kernels", as_array(plot_hyper_kernels(hyper_kernels(model)))
            yield "context_kernels", as_array(plot_hyper_kernels(context_kernels(model, images[0])))
