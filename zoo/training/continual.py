"""Pictures of a continual learner: the accuracy matrix, and generated images of the tasks seen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from pydantic import PositiveInt

from zoo.analysis.plots import plot_accuracy_matrix, plot_image_grid
from zoo.support.files import write_atomic, writer_of

__all__ = ["ContinualPictures"]


class ContinualPictures(Callback):
    """Saves `accuracy_matrix.png`, `accuracy_matrix.csv` and `samples.png` after each task; logs the pictures to W&B.

    Args:
        folder: Folder of the files.
        tasks_shown: Number of tasks with generated images, evenly spaced over those seen; one row each.
    """

    def __init__(self, folder: str | Path, tasks_shown: PositiveInt = 4) -> None:
        self.folder, self.tasks_shown = Path(folder), tasks_shown

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or not hasattr(pl_module, "matrix"):
            return
        pictures = self.pictures(pl_module, trainer.current_epoch + 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, ax in pictures.items():
            write_atomic(self.folder / f"{name}.png", partial(ax.figure.savefig, format="png", dpi=120))
        rows = pl_module.matrix.tolist()  # type: ignore[operator]
        text = "\n".join(",".join("" if v != v else f"{v:.6g}" for v in row) for row in rows)
        write_atomic(self.folder / "accuracy_matrix.csv", writer_of(f"{text}\n".encode()))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, ax in pictures.items():
                    logger.log_image(f"continual/{name}", [ax.figure])

    def pictures(self, task: Any, seen: int) -> dict[str, Any]:
        """Matplotlib axes of the pictures, by name."""
        learner = task.learner
        found = {"accuracy_matrix": plot_accuracy_matrix(task.matrix[:seen, :seen].cpu(), title=type(learner).__name__)}
        if hasattr(learner, "generate"):
            shown = torch.linspace(0, seen - 1, min(self.tasks_shown, seen)).round().int().tolist()
            generator = torch.Generator(task.device).manual_seed(0)
            rows = []
            for t in shown:
                classes = learner.active[t].nonzero().squeeze(-1)
                ten = classes[torch.arange(10, device=classes.device) % len(classes)]
                rows.append(learner.generate(t, ten, generator))
            title = "generated, tasks " + ", ".join(str(t + 1) for t in shown)
            found["samples"] = plot_image_grid(torch.cat(rows).float().cpu(), title=title)
        return found
