"""Continual learning: one task for any learner of `zoo.models.continual`, in which a Lightning epoch is a task.

After each task the learner is evaluated on the tasks seen so far, with the task id and, in the end or always, without.
Everything measured is in buffers, so a run that is resumed between tasks ends with the same matrix as an unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from zoo.models.continual import ContinualLearner, TaskError
from zoo.tasks.base import NonFiniteLossError, OptionError, Task

__all__ = ["ContinualTask", "Recipe", "continual_metrics", "forward_transfer", "per_sample_mean"]

Forgetting = Literal["max_including_last", "max_before_last"]


# ---- metrics -----------------------------------------------------------------------------------------------


def continual_metrics(matrix: Tensor, forgetting: Forgetting = "max_including_last") -> dict[str, float]:
    """Summary of an accuracy matrix.

    Args:
        matrix: (T, T), entry [i, j] the accuracy on task j after learning task i; entries above the diagonal are not
            read.
        forgetting: `max_including_last`, mean over j < T of max_i a[i, j] - a[T, j], which is not negative (KCL's
            convention), or `max_before_last`, where the maximum is over j <= i < T.

    Returns:
        `average_accuracy`, `forgetting`, `backward_transfer`, `learning_accuracy`, `average_incremental_accuracy`.

    Raises:
        ValueError: The matrix is not square, or the convention is unknown.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"an accuracy matrix is (T, T), got {tuple(matrix.shape)}")
    if forgetting not in ("max_including_last", "max_before_last"):
        raise ValueError(f"forgetting={forgetting!r} is not one of 'max_including_last', 'max_before_last'")
    a, T = matrix.double(), len(matrix)
    learnt = torch.ones(T, T, dtype=torch.bool, device=a.device).tril()
    last, diagonal = a[-1], a.diagonal()
    lost = moved = torch.zeros((), dtype=torch.float64)
    if T > 1:
        before = a.masked_fill(~learnt, -torch.inf)
        best = (before if forgetting == "max_including_last" else before[:-1]).amax(0)
        lost, moved = (best - last)[:-1].mean(), (last - diagonal)[:-1].mean()
    rows = a.masked_fill(~learnt, 0).sum(1) / torch.arange(1, T + 1, device=a.device)
    return {
        "average_accuracy": float(last.mean()),
        "forgetting": float(lost),
        "backward_transfer": float(moved),
        "learning_accuracy": float(diagonal.mean()),
        "average_incremental_accuracy": float(rows.mean()),
    }


def forward_transfer(matrix: Tensor, untrained: Tensor) -> float:
    """Mean over j > 0 of a[j - 1, j] - b[j]: what the tasks before give to a task that was not learnt yet.

    Args:
        matrix: (T, T), with the entries just above the diagonal.
        untrained: Accuracy b (T,) of the learner before the first task.
    """
    if len(matrix) < 2:
        return 0.0
    return float((matrix.diagonal(1) - untrained[1:]).double().mean())


def per_sample_mean(values: Tensor, sizes: Tensor) -> float:
    """Mean over samples of batch means: a batch counts by its size, whatever the last one is."""
    return float((values.double() * sizes).sum() / sizes.sum())


def batches_of(order: Tensor, size: int, smallest: int = 1) -> list[Tensor]:
    """Parts (size,) of an order (N,); a last one below `smallest` joins the one before."""
    parts = list(order.split(max(size, smallest)))
    if len(parts) > 1 and len(parts[-1]) < smallest:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


# ---- the task ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a learner is trained on one task. Its own `training_defaults` replace these values.

    The rate of task t, counted from 0, is max(lr * decay^(t + offset), floor).

    Attributes:
        optimizer: `sgd`, or `adam`.
        lr: First rate.
        decay: Factor from task to task.
        offset: 1 where the first task already gets a decayed rate, as in KCL.
        floor: Smallest rate.
        momentum: Of SGD.
        keep_state: Carry momentum or moments over task borders.
        batch_size: Samples of a step.
        epochs: Passes through a task.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    decay: float = 0.8
    offset: int = 1
    floor: float = 5e-5
    momentum: float = 0.8
    keep_state: bool = False
    batch_size: int = 10
    epochs: int = 1

    def rate(self, task: int) -> float:
        """The learning rate of a task."""
        return max(self.lr * self.decay ** (task + self.offset), self.floor)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over these parameters, at the rate of the first task."""
        trained = [p for p in parameters if p.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(trained, lr=self.rate(0), fused=True)
        return torch.optim.SGD(trained, lr=self.rate(0), momentum=self.momentum, fused=True)


class ContinualTask(Task):
    """Trains a :class:`zoo.models.continual.ContinualLearner` on a loader's stream of tasks, one task an epoch.

    The batch of an epoch is a task, with its `number` and `train` (images and classes); the loader's dataset is the
    stream, which also has the test images of every task. `zoo.data.ContinualData` has such a loader.

    Logs, with the prefix of the part evaluated on (`test/` or `val/`): `acc` (average accuracy of the tasks so far),
    `forgetting`, `backward_transfer`, `forward_transfer`, `learning_accuracy`, `acc_agnostic` (the task id unknown),
    `seconds` of the last task, and `kept_samples` and `kept_bytes` of the learner.

    Args:
        model, optimizer, scheduler, channels_last, compile: See `Task`. A recipe says how the learner is
            trained; `optimizer` and `scheduler` must be None.
        lr, lr_decay, batch_size, epochs: Values that replace those of the recipe; None keeps them.
        agnostic: Evaluate without the task id after every task (`every`), after the last one (`last`), or `never`.
        eval_batch_size: Images of one evaluation step.
        class_names: Kept in the checkpoint.
        preprocessing: Kept in the checkpoint.

    Raises:
        ValueError: The model is no continual learner, or an optimizer is given.
    """

    monitors = tuple(
        f"{part}/{name}"
        for part in ("val", "test")
        for name in (
            *("acc", "forgetting", "backward_transfer", "forward_transfer", "learning_accuracy", "acc_agnostic"),
            *("average_incremental_accuracy", "seconds", "kept_samples", "kept_bytes"),
        )
    )
    trains_on = False
    matrix: Tensor
    matrix_agnostic: Tensor
    untrained: Tensor
    seconds: Tensor
    kept_bytes: Tensor
    kept_samples: Tensor

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        lr: PositiveFloat | None = None,
        lr_decay: NonNegativeFloat | None = None,
        batch_size: PositiveInt | None = None,
        epochs: PositiveInt | None = None,
        agnostic: Literal["every", "last", "never"] = "last",
        eval_batch_size: PositiveInt = 256,
        class_names: list[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if optimizer is not None or scheduler is not None:
            raise ValueError("a continual learner has a recipe of its own: set optimizer and scheduler to none")
        super().__init__(
            model,
            channels_last=channels_last,
            compile=compile,
            lr=lr,
            lr_decay=lr_decay,
            batch_size=batch_size,
            epochs=epochs,
            agnostic=agnostic,
            eval_batch_size=eval_batch_size,
            class_names=class_names,
            preprocessing=preprocessing,
        )
        if not isinstance(self.model, ContinualLearner):
            raise ValueError(f"{type(self.model).__name__} is no continual learner: it has no begin_task and end_task")
        self.learner: ContinualLearner = self.model
        given: dict[str, Any] = {"lr": lr, "decay": lr_decay, "batch_size": batch_size, "epochs": epochs}
        given = {**self.learner.training_defaults, **{k: v for k, v in given.items() if v is not None}}
        self.recipe = replace(Recipe(), **given)
        self.agnostic, self.eval_batch_size, self.class_names = agnostic, eval_batch_size, class_names
        self.automatic_optimization = False
        T = self.learner.tasks
        for name, shape in (("matrix", (T, T)), ("matrix_agnostic", (T, T)), ("untrained", (T,)), ("seconds", (T,))):
            self.register_buffer(name, torch.full(shape, torch.nan, dtype=torch.float64))
        for name in ("kept_bytes", "kept_samples"):
            self.register_buffer(name, torch.zeros(T, dtype=torch.long))

    @property
    def stream(self) -> Any:
        """The tasks that the training loader reads from."""
        stream = getattr(self.trainer.train_dataloader, "dataset", None)
        if not hasattr(stream, "test_part"):
            raise OptionError("a continual learner needs a loader of a stream of tasks: use zoo.data.ContinualData")
        return stream

    @property
    def part(self) -> str:
        """Prefix of the metrics: what is evaluated on."""
        return getattr(getattr(self.trainer, "datamodule", None), "evaluate_on", "test")

    def configure_optimizers(self) -> Any:
        trained = any(p.requires_grad for p in self.learner.parameters())
        return self.recipe.build(self.learner.parameters()) if trained else None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Skip the base class's logging of rates and gradient norms: a run has thousands of short schedules."""

    def on_train_start(self) -> None:
        """Tell the learner how many tasks will come, and tell what cannot be learnt before anything is.

        Raises:
            TaskError: The stream does not fit the learner; the message says what and why.
            OptionError: There are more epochs than tasks.
        """
        length, epochs = len(self.stream), self.trainer.max_epochs
        self.learner.begin_stream(length)
        if epochs is None or not 0 <= epochs <= length:
            raise OptionError(
                f"the stream has {length} tasks, and an epoch learns one: trainer.max_epochs = {epochs} is not between "
                f"0 and {length}"
            )
        if epochs > 0:
            self.learner.begin_stream(epochs)  # the run ends before the stream does
        if hasattr(self.stream, "labels"):
            for part in ("train", "test"):
                self.learner.check_images(self.pixels(getattr(self.stream, part)[0][:1]), f"the {part} part")
            for t in range(length):
                self.learner.check_labels(t, self.stream.labels(t))
        if bool(self.untrained.isnan().all()):
            for t in range(len(self.stream)):
                self.untrained[t] = self.accuracy(t, None)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Learn the task that the loader gives, and evaluate.

        Raises:
            OptionError: It gives something else, or the task of another epoch.
        """
        t = getattr(batch, "number", None)
        if t != self.current_epoch:
            given = f"a {type(batch).__name__}" if t is None else f"task {t}"
            raise OptionError(
                f"the loader of a continual learner gives one task an epoch; epoch {self.current_epoch} got {given}: "
                "use zoo.data.ContinualData"
            )
        x, y = batch.train
        began = time.perf_counter()
        self.learn(t, self.pixels(x), y.to(self.device))
        self.seconds[t] = time.perf_counter() - began
        kept = self.learner.memory_footprint()
        self.kept_bytes[t], self.kept_samples[t] = kept["bytes"], kept["samples"]
        self.evaluate(t)
        for name, value in self.summary(t).items():
            self.log(f"{self.part}/{name}", value, prog_bar=name == "acc")

    def pixels(self, images: Tensor) -> Tensor:
        """Bytes, or numbers, as inputs in [0, 1] on this device."""
        images = images.to(self.device)
        dtype = next((t.dtype for t in self.learner.parameters()), self.dtype)
        return self.ordered(images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype))

    def learn(self, t: int, x: Tensor, y: Tensor) -> None:
        """Take the learner through one task by the recipe.

        Raises:
            TaskError: The task cannot be learnt.
            NonFiniteLossError: A loss became NaN or infinite.
        """
        learner, recipe = self.learner, self.recipe
        images, labels = learner.begin_task(t, x, y)
        if 0 < len(labels) < learner.smallest_batch:
            raise TaskError(
                f"task {t} has {len(labels)} images to train on; {learner.smallest_batch} at least are needed"
            )
        optimizer: Any = self.optimizers()
        if not recipe.keep_state:
            optimizer.optimizer.state.clear()
        for group in optimizer.optimizer.param_groups:
            group["lr"] = recipe.rate(t)
        learner.train()
        optimizer.zero_grad()
        for _ in range(recipe.epochs if len(labels) else 0):
            order = torch.randperm(len(labels)).to(labels.device)
            for chosen in batches_of(order, recipe.batch_size, learner.smallest_batch):
                losses = learner.losses(images[chosen], labels[chosen], t)
                total = torch.stack([loss.float() for loss in losses.values()]).sum()
                if not torch.isfinite(total):
                    values = ", ".join(f"{name} = {float(value):g}" for name, value in losses.items())
                    raise NonFiniteLossError(f"the loss is not finite in task {t}: {values}")
                self.manual_backward(total)
                optimizer.step()
                optimizer.zero_grad()
        if not len(labels):
            optimizer.step()  # nothing moves; Lightning counts tasks by steps
        learner.end_task(t, x, y)

    # ---- evaluation ---------------------------------------------------------------------------------------

    def accuracy(self, j: int, task: int | None) -> float:
        """Accuracy on the test images of task j, told the task id `task`."""
        return self._accuracies(j, lambda x: (self.learner(x, task),))[0]

    def accuracies(self, j: int) -> list[float]:
        """Accuracy on the test images of task j, told the task and not."""
        return self._accuracies(j, lambda x: self.learner.predict_aware_and_agnostic(x, j))

    @torch.no_grad()
    def _accuracies(self, j: int, answers: Callable[[Tensor], tuple[Tensor, ...]]) -> list[float]:
        images, labels = self.stream.test_part(j)
        training, learner = self.learner.training, self.learner.eval()
        right: list[list[int]] = []
        for x, y in zip(images.split(self.eval_batch_size), labels.split(self.eval_batch_size), strict=True):
            y = y.to(self.device)
            right.append([int((logits.argmax(-1) == y).sum()) for logits in answers(self.pixels(x))])
        learner.train(training)
        return [sum(counts) / len(labels) for counts in zip(*right, strict=True)]

    def evaluate(self, t: int) -> None:
        """Fill row t of both matrices."""
        last = t + 1 == len(self.stream)
        for j in range(t + 1):
            if self.agnostic == "every" or (self.agnostic == "last" and last):
                self.matrix[t, j], self.matrix_agnostic[t, j] = self.accuracies(j)
            else:
                self.matrix[t, j] = self.accuracy(j, j)
        if not last:
            self.matrix_agnostic[t, t + 1] = self.accuracy(t + 1, None)

    def summary(self, t: int) -> dict[str, float]:
        """Every figure after task t."""
        metrics = continual_metrics(self.matrix[: t + 1, : t + 1])
        found = {"acc": metrics.pop("average_accuracy"), **metrics}
        found["forward_transfer"] = forward_transfer(self.matrix_agnostic[: t + 1, : t + 1], self.untrained[: t + 1])
        agnostic = self.matrix_agnostic[t, : t + 1]
        if not bool(agnostic.isnan().any()):
            found["acc_agnostic"] = float(agnostic.mean())
        found |= {"seconds": float(self.seconds[t]), "kept_samples": float(self.kept_samples[t])}
        return found | {"kept_bytes": float(self.kept_bytes[t])}

    def predict_step(self, batch: Any, batch_idx: int, task: int | None = None) -> Tensor:
        """Class probabilities (B, num_classes) of images, or of `(images, targets)`."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return self.learner(self.pixels(x), task).float().softmax(-1)
