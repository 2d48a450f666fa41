"""Image classification: cross-entropy on hard or mixed labels."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from pydantic import NonNegativeFloat
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from zoo.support.padding import IGNORE_INDEX
from zoo.tasks.base import OptionError, Task
from zoo.tasks.weights import ClassWeights, balanced_weights, given_weights, training_classes


class ClassificationTask(Task):
    """Cross-entropy classification of `(inputs, targets)` batches.

    Targets are class indices (B,); rows with the target -100 are padding and ignored. Logs `train/loss`, `val/loss`,
    `val/acc` and the same for `test`, with more than ten classes also `acc5`; metrics are exact over all processes.

    A model with a method `load_encoder(path)` is initialised with the pretrained encoder of the data module
    (`encoder`), unless the run is resumed or loads weights.

    Args:
        model, optimizer, scheduler, channels_last, compile, freeze: See `Task`.
        class_weights: Weight of each class in the training loss: a list in the order of the classes, or by name, 1 for
            the others; `balanced` gives all classes the same total. Validation and test count every sample once.
        label_smoothing: Probability mass spread over all classes, in [0, 1).
        mixup_alpha: Beta parameter of mixup, for images, clips and waveforms; 0 for none.
        cutmix_alpha: Beta parameter of CutMix, for images and clips; 0 for none. With both, each batch uses one of
            them at random.
        class_names: Names in the order of the outputs, stored in the checkpoint.
        preprocessing: The evaluation transform (`input_size`, `mean`, `std`, ...), stored in the checkpoint.
    """

    monitors = ("val/loss", "val/acc", "val/acc5", "test/loss", "test/acc", "test/acc5")

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0,
        mixup_alpha: NonNegativeFloat = 0.0,
        cutmix_alpha: NonNegativeFloat = 0.0,
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
            label_smoothing=label_smoothing,
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            class_names=class_names,
            preprocessing=preprocessing,
        )
        self.label_smoothing = label_smoothing
        self.class_names = class_names
        self.preprocessing = preprocessing
        num_classes: int = self.model.num_classes  # type: ignore[assignment]
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"the model has {num_classes} classes and the data has {len(class_names)}: "
                "leave model.num_classes at null to take it from the data"
            )
        self.balanced = class_weights == "balanced"
        # no buffer, as it may come after an average of the weights and buffers was made; None: all the same
        self.class_weights = given_weights(class_weights, class_names, num_classes)
        self.mix = self._mixes(num_classes, mixup_alpha, cutmix_alpha)
        self.mixed = {"mixup_alpha": mixup_alpha > 0, "cutmix_alpha": cutmix_alpha > 0}
        self.wants_inputs = self.mix is not None
        accuracy = {"acc": MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE_INDEX)}
        if num_classes > 10:
            accuracy["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", ignore_index=IGNORE_INDEX)
        self.val_metrics = MetricCollection(dict(accuracy), prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    @staticmethod
    def _mixes(num_classes: int, mixup_alpha: float, cutmix_alpha: float) -> v2.Transform | None:
        mixes: list[v2.Transform] = []
        if mixup_alpha > 0:
            mixes.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha > 0:
            mixes.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        return v2.RandomChoice(mixes) if mixes else None

    def setup(self, stage: str) -> None:
        """Load the data module's pretrained encoder; a resumed run restores its own weights afterwards.

        Raises:
            WeightsError: The classes are to be balanced, and the data does not tell them.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.balanced:
            count: Any = self.model.num_classes
            self.class_weights = balanced_weights(training_classes(data), count)
        load = getattr(self.model, "load_encoder", None)
        if stage == "fit" and callable(load) and hasattr(data, "encoder") and self.starts_fresh:
            load(data.encoder)

    def check_inputs(self, inputs: Any) -> None:
        """Check that the inputs can be mixed: mixup needs a fixed grid, CutMix two spatial dimensions.

        Raises:
            OptionError: The inputs cannot be mixed, for example points, tokens or several tensors.
        """
        numbers = isinstance(inputs, Tensor) and inputs.is_floating_point()
        allowed = {"mixup_alpha": (2, 4, 5), "cutmix_alpha": (4, 5)}
        takes = {"mixup_alpha": "pictures, clips and waveforms", "cutmix_alpha": "pictures and clips"}
        for option, used in self.mixed.items():
            if used and not (numbers and inputs.ndim in allowed[option]):
                shape = f"of shape {tuple(inputs.shape[1:])}" if isinstance(inputs, Tensor) else "of several parts"
                raise OptionError(f"task.{option} mixes {takes[option]}; these inputs are {shape}: set it to 0")

    def _mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed inputs and label distributions (B, K); torchvision's transforms take (B, C, H, W)."""
        assert self.mix is not None
        self.check_inputs(inputs)
        if inputs.ndim == 2:  # (B, N) waveforms
            mixed, targets = self.mix(inputs[:, None, None], targets)
        else:  # clips (B, C, T, H, W): the same rectangle in all frames
            mixed, targets = self.mix(inputs.flatten(1, -3), targets)
        return mixed.reshape(inputs.shape), targets

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, targets = batch
        if self.mix is not None:
            kept = targets != IGNORE_INDEX
            inputs, targets = self._mix(inputs[kept], targets[kept])
        logits = self(inputs)
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing}
        if self.class_weights is not None:
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            options["weight"] = self.class_weights.to(logits)
        return {"cross_entropy": F.cross_entropy(logits, targets, **options)}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection, mean: MeanMetric) -> Tensor:
        inputs, targets = batch
        logits = self(inputs).float()
        count = (targets != IGNORE_INDEX).sum()
        mean.update(F.cross_entropy(logits, targets, reduction="sum") / count.clamp(min=1), count)
        metrics.update(logits, targets)
        return logits

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self._evaluate(batch, self.val_metrics, self.val_loss)
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_metrics, prog_bar=True)
        return {"logits": logits}

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics, self.test_loss)
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_metrics)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities (B, num_classes) of a batch of inputs, or of `(inputs, targets)`."""
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        return torch.softmax(self(inputs).float(), dim=-1)
