"""The result of a run, as training returns it and as its folder tells it later.

>>> run = zoo.train("experiment=grbf_wine")
>>> run.metrics["test/acc"], run.load_model()
>>> zoo.load_run(run.output_dir).metrics == run.metrics
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.results.runs import RunsError, read_parts
from zoo.support.files import CheckpointError, as_path

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RunResult", "load_run"]


@dataclass
class RunResult:
    """Metrics, duration and paths of a run.

    Attributes:
        output_dir: The run folder.
        metrics: By name, for example `test/acc`.
        epochs: Of the `train/`, `val/` and `test/` metrics, from 0; empty if nothing was trained.
        seconds: Time of the training, of all its parts if it was resumed.
        checkpoint: Of the best weights; None if none was kept.
        model_dir: Folder of the trained model, which every command and `zoo.predict` take.
        stopped: Why the training ended early; None if it did not.
    """

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: Path | None = None
    model_dir: Path | None = None
    stopped: str | None = None

    def load_model(self) -> nn.Module:
        """The trained model, in eval mode.

        Raises:
            CheckpointError: Its folder is missing or damaged.
        """
        from zoo.registry.factory import create_model

        return create_model(f"local-dir:{self.model_dir}", pretrained=True).eval()


def load_run(folder: str | Path) -> RunResult:
    """The result of a finished run, from its folder; nothing in it is run.

    Args:
        folder: `outputs/<experiment>/<date>`, for example.

    Raises:
        RunsError: It is not the folder of a finished run, or is damaged.
    """
    try:
        folder = as_path(folder).expanduser().absolute()
    except CheckpointError as error:
        raise RunsError(str(error)) from None
    summary, _ = read_parts(folder)
    best, model = folder / "checkpoints" / "best.ckpt", folder / "model"
    return RunResult(
        folder,
        summary["metrics"],
        summary.get("epochs") or {},
        summary["seconds"],
        best if best.is_file() else None,
        model if model.is_dir() else None,
    )
