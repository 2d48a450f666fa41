"""Pictures of what a GRBF network has learned, sent to W&B while it trains."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from pydantic import PositiveInt

from zoo.figures import plot_importances, plot_loadings, plot_spectrum


class Explanations(Callback):
    """Sends feature importances, spectrum and loadings of the precision matrix to W&B.

    Nothing happens for models without a precision matrix, or without a W&B logger.

    Args:
        every_n_epochs: Validations between two sets of pictures; the last one always sends.
        top: Bars of each picture.
    """

    def __init__(self, every_n_epochs: PositiveInt = 20, top: PositiveInt = 15) -> None:
        self.every_n_epochs, self.top = every_n_epochs, top

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
        if trainer.sanity_checking or not (last or trainer.current_epoch % self.every_n_epochs == 0):
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        if not loggers or not trainer.is_global_zero or not hasattr(pl_module.model, "spectrum"):
            return
        pictures = self.pictures(pl_module.model, getattr(trainer, "datamodule", None))
        for logger in loggers:
            for name, axes in pictures.items():
                logger.log_image(f"explanations/{name}", [axes.figure])

    def pictures(self, model: Any, data: Any = None) -> dict[str, Any]:
        """The pictures of a network as matplotlib axes, by name; `data` gives the names of the features."""
        names = getattr(data, "feature_names", None)
        names = names if names is not None and len(names) == model.dim else None
        values, components = (t.double().cpu() for t in model.spectrum())
        importance = model.feature_importance().double().cpu()
        return {
            "importances": plot_importances(importance, names, top=self.top),
            "spectrum": plot_spectrum(values, top=self.top),
            "loadings": plot_loadings(components, names),
        }
