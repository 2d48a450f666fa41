"""Callbacks for monitoring: progress bar, throughput, sample pictures and pictures of the model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from pydantic import PositiveInt
from torch import Tensor, nn

from zoo.analysis.plots import as_array, plot_hyper_kernels, plot_kernels, plot_receptive_field
from zoo.analysis.probes.hyper_kernels import context_kernels, hyper_kernels
from zoo.analysis.probes.kernels import merged_kernels
from zoo.analysis.probes.receptive_field import receptive_field


class ProgressBar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers, cleared when a phase ends."""

    def __init__(self, refresh_rate: PositiveInt = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

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
