"""Pictures of a GRBF network's precision matrix, logged to W&B during training."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from pydantic import PositiveInt

from zoo.analysis.plots import (
    plot_importance_image,
    plot_importances,
    plot_loadings,
    plot_output,
    plot_spectrum,
    plot_summary,
)

#: Largest number of training rows plotted as points.
POINTS = 1000


class Fitted:
    """A network with those methods of a fitted estimator that the plots use.

    Args:
        model: The network.
        class_names: Names in the order of its outputs; empty for a regression.
    """

    def __init__(self, model: Any, class_names: list[str]) -> None:
        self.model = model
        self.components_, self.centers_ = _array(model.spectrum().components), _array(model.centers)
        self.mean, self.scale = _array(model.input_mean), _array(model.input_scale)
        if class_names:
            names = np.array(class_names)
            self.classes_ = names if (names[:-1] < names[1:]).all() else np.arange(len(names))

    def transform(self, X: Any) -> np.ndarray:
        """Coordinates (n, D) of rows (n, D) along the eigenvectors."""
        return ((np.asarray(X) - self.mean) / self.scale) @ self.components_.T

    def inverse_transform(self, Z: np.ndarray) -> np.ndarray:
        """Rows (n, D) from coordinates (n, D)."""
        return (Z @ self.components_) * self.scale + self.mean

    @torch.no_grad()
    def predict(self, X: Any) -> np.ndarray:
        """Predictions (n,) of a regression."""
        return _array(self.model(torch.as_tensor(np.asarray(X)).to(self.model.centers)))[:, 0]

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities (n, K)."""
        f = self.model(torch.as_tensor(np.asarray(X)).to(self.model.centers))
        return _array(torch.cat([-f, f], 1).sigmoid() if f.shape[1] == 1 else f.softmax(1))


def _array(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


class Explanations(Callback):
    """Logs pictures of the precision matrix to W&B: feature importances (as an image for square inputs), spectrum,
    loadings; and for a table, the output over the first two latent variables and the target over the first one.

    Does nothing for models without a precision matrix, or without a W&B logger.

    Args:
        every_n_epochs: Interval in epochs; the last epoch is always logged.
        top: Number of bars in each picture.
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
        """Matplotlib axes of the pictures, by name; `data` provides feature names and training rows."""
        names = getattr(data, "feature_names", None)
        names = names if names is not None and len(names) == model.dim else None
        values, components = (t.double().cpu() for t in model.spectrum())
        importance = model.feature_importance().double().cpu()
        found = {
            "importances": plot_importances(importance, names, top=self.top),
            "spectrum": plot_spectrum(values, top=self.top),
            "loadings": plot_loadings(components, names),
        }
        pixels = model.dim // model.in_chans
        side = round(pixels**0.5)
        if side > 1 and side**2 == pixels:
            shares = importance.reshape(-1, pixels).sum(0)
            found["importance_image"] = plot_importance_image(shares, (side, side))
        if names is not None and hasattr(data, "training_table") and model.num_classes:
            rows, targets = (part[:POINTS] for part in data.training_table())
            fitted = Fitted(model, getattr(data, "class_names", None) or [])
            classes = getattr(fitted, "classes_", None)
            y = targets.numpy() if classes is None else classes[targets.numpy()]
            found["summary"] = plot_summary(fitted, rows, y)
            if len(fitted.components_) > 1:
                found["output"] = plot_output(fitted, rows, y)
        return found
