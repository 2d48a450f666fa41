"""Tabular classification and regression, chosen by the type of the targets."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, R2Score
from torchmetrics.classification import MulticlassAccuracy

from zoo.support.inputs import in_units, unit_of
from zoo.support.padding import IGNORE_INDEX
from zoo.support.scaling import standardisation
from zoo.tasks.base import OptionError, Task
from zoo.tasks.weights import ClassWeights, balanced_weights, given_weights, training_classes


class TabularTask(Task):
    """Cross-entropy for class indices, squared error for real targets, on batches of `(rows, targets)`.

    Rows are (B, D). Targets are int64 classes (B,), -100 for padding, or float values (B,), NaN for padding. A model
    with one output gives the logit of the second of two classes. The squared error is divided by the variance of the
    training targets, which makes penalties comparable between tables. Logs `loss`, `score` (accuracy or R²) and `acc`,
    or `r2` and `rmse`, of the validation and test parts, exact over all processes.

    A model with a method `initialize(X, y, ...)` is initialised with the data module's training part
    (`training_table()`), unless the run is resumed or loads weights.

    Args:
        model, optimizer, scheduler, channels_last, compile, freeze: See `Task`.
        class_weights: As in `ClassificationTask`; not for a regression.
        centers: Passed to `initialize`: `kmeans` or `random`.
        init: Passed to `initialize`: `median`, `scale`, `official`, or a width.
        class_names: Names in the order of the outputs, stored in the checkpoint; empty for a regression.
        preprocessing: Stored in the checkpoint.
    """

    monitors = tuple(f"{part}/{name}" for part in ("val", "test") for name in ("loss", "score", "acc", "r2", "rmse"))
    unit: Tensor

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        centers: Literal["kmeans", "random"] = "kmeans",
        init: Literal["median", "scale", "official"] | PositiveFloat = "median",
        class_weights: ClassWeights | None = None,
        freeze: str | list[str] | None = None,
        class_names: list[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
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
            class_weights=class_weights,
            centers=centers,
            init=init,
            class_names=class_names or None,
            preprocessing=preprocessing,
        )
        self.centers, self.init = centers, init
        self.class_names, self.preprocessing = class_names or None, preprocessing
        self.outputs = int(self.model.num_classes)  # type: ignore[arg-type]
        if self.class_names and self.outputs not in (len(self.class_names), 1):
            raise ValueError(
                f"the model has {self.outputs} outputs and the data {len(self.class_names)} classes: leave "
                "model.num_classes at null to take it from the data"
            )
        regression = self.outputs == 1 and not self.class_names
        if regression and class_weights is not None:
            raise OptionError("task.class_weights: a regression has no classes")
        self.classes = len(self.class_names or ()) or self.outputs
        self.balanced = class_weights == "balanced"
        self.class_weights = given_weights(class_weights, self.class_names, self.classes)  # None: all the same
        self.register_buffer("unit", torch.ones(()))  # standard deviation of the training targets
        metrics = {part: self._metrics(regression) for part in ("val", "test")}
        self.metrics: Any = nn.ModuleDict({part: nn.ModuleDict(found) for part, found in metrics.items()})
        self.mean: Any = nn.ModuleDict({part: MeanMetric() for part in metrics})

    def _metrics(self, regression: bool) -> dict[str, Metric]:
        if regression:
            return {"r2": R2Score(), "rmse": MeanSquaredError(squared=False)}
        return {"acc": MulticlassAccuracy(max(self.outputs, 2), average="micro")}

    def setup(self, stage: str) -> None:
        """Initialise the model from the training part; a resumed run restores its own weights afterwards.

        Losses of values are in units of the training targets, also where a finished model is measured.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "training_table"):
            return
        X, y = data.training_table()
        if y.is_floating_point():
            self.unit.copy_(standardisation(y.unsqueeze(1))[1].squeeze())
        if stage != "fit":
            return
        if self.balanced:
            self.class_weights = balanced_weights(training_classes(data), self.classes)
        initialize = getattr(self.model, "initialize", None)
        if callable(initialize) and self.starts_fresh:
            options: dict[str, Any] = {"centers": self.centers, "init": self.init}
            initialize(X, y, **options, generator=torch.Generator().manual_seed(torch.initial_seed() % 2**63))

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row, (B,)."""
        if targets.is_floating_point():
            return ((outputs.squeeze(-1) - targets) / self.unit).square()
        if self.outputs == 1:
            return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), targets.to(outputs), reduction="none")
        return F.cross_entropy(outputs, targets, reduction="none")

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        rows, targets = batch
        kept = _present(targets)
        name = "squared_error" if targets.is_floating_point() else "cross_entropy"
        losses = self._loss(self(rows[kept]), targets[kept])
        if self.class_weights is None or targets.is_floating_point():
            return {name: losses.mean()}
        weights = self.class_weights.to(losses)[targets[kept]]
        return {name: (losses * weights).sum() / weights.sum()}

    def _evaluate(self, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
        rows, targets = batch
        kept = _present(targets)
        outputs = self(rows).float()
        self.mean[part].update(self._loss(outputs[kept], targets[kept]))
        decided = self._decide(outputs[kept], targets)
        scale, _ = unit_of(getattr(self.model, "input_record", None))
        for name, metric in self.metrics[part].items():
            unit = scale if name == "rmse" else 1
            metric.update(decided * unit, targets[kept] * unit)
            self.log(f"{part}/{name}", metric, prog_bar=part == "val")
        score = self.metrics[part]["acc" if "acc" in self.metrics[part] else "r2"]
        self.log(f"{part}/score", score)
        self.log(f"{part}/loss", self.mean[part])
        return outputs

    def _decide(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return outputs.squeeze(-1)
        return (outputs.squeeze(-1) > 0).long() if self.outputs == 1 else outputs.argmax(-1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, K), or values (B,), of a batch of rows or of `(rows, targets)`."""
        outputs = self(batch[0] if isinstance(batch, (tuple, list)) else batch).float()
        if self.class_names is None:
            return in_units(getattr(self.model, "input_record", None), outputs.squeeze(-1))
        if self.outputs == 1:
            return torch.cat([-outputs, outputs], -1).sigmoid()
        return outputs.softmax(-1)


def _present(targets: Tensor) -> Tensor:
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE_INDEX
