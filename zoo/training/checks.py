"""What is asked before a run takes its first step, and that its last step is measured.

Values are checked together before anything is built (`together`); what only the data can say when it is there
(`Start`). An error that Lightning raises about them is told as a sentence (`is_lightnings`).
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import is_overridden

from zoo.data.sampling import SampleKey
from zoo.support.suggest import suggestion
from zoo.tasks import Task, schedule_problems
from zoo.training.summary import tell

# what Lightning exports and a run here cannot have, and what there is instead
REFUSED: dict[type, str] = {
    StochasticWeightAveraging: "would replace the schedule, and averages after the last validation: use callbacks=ema, "
    "or lightning.pytorch.callbacks.WeightAveraging, which validates its equal-weight average",
    LearningRateFinder: "trains trial steps of its own: set optimizer.lr, or sweep over it with -m",
    BatchSizeFinder: "trains trial steps of its own: set data.batch_size",
    ModelPruning: "puts masked tensors in the place of parameters while they train: prune the finished model",
}


def is_lightnings(error: BaseException) -> bool:
    """Whether Lightning raised it, itself or through torch: about a value of the configuration, not about our code."""
    frames = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((room for room in reversed(frames) if room not in ("torch", "torchmetrics", "contextlib")), "")
    return inner in ("lightning", "lightning_fabric", "lightning_utilities")


def is_ours(error: BaseException) -> bool:
    """Whether a line of the zoo raised it, which then is written for people."""
    frames = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1:] == ["zoo"]


def sentence(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = f" in {frames[-1].f_globals.get('__name__')}" if frames else ""
    return " ".join(lines[0].split()) if lines else f"{type(error).__name__}{where}"


# ---- values together, before anything is built ---------------------------------------------------------------


def together(config: Mapping[str, Any]) -> list[str]:
    """What each value allows, and all of them together do not; one sentence each."""
    trainer, scheduler = config.get("trainer"), config.get("scheduler")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    problems = list(_lengths(trainer))
    if isinstance(scheduler, Mapping):
        optimizer = config.get("optimizer")
        lr = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
        try:
            found = schedule_problems(lr if _number(lr) else None, _epochs(trainer), **scheduler)
        except TypeError:  # a value of the wrong type, which its own check tells
            found = []
        problems += [f"scheduler.{problem}" for problem in found]
    callbacks = config.get("callbacks")
    if isinstance(callbacks, Mapping):
        problems += _callbacks(callbacks, config)
    return problems


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _lengths(trainer: Mapping[str, Any]) -> Iterator[str]:
    for key in ("check_val_every_n_epoch", "accumulate_grad_batches"):
        if isinstance(trainer.get(key), int) and trainer[key] < 1:
            yield f"trainer.{key} = {trainer[key]} must be 1 at least"
    for key in ("val_check_interval", "limit_train_batches"):
        if _number(trainer.get(key)) and trainer[key] <= 0:
            yield f"trainer.{key} = {trainer[key]} must be above 0"
    for key in ("gradient_clip_val", "log_every_n_steps"):
        if _number(trainer.get(key)) and trainer[key] < 0:
            yield f"trainer.{key} = {trainer[key]} must not be negative"
    for unit in ("epochs", "steps"):
        least, most = trainer.get(f"min_{unit}"), trainer.get(f"max_{unit}")
        if isinstance(least, int) and isinstance(most, int) and 0 <= most < least:
            yield f"trainer.min_{unit} = {least} is above trainer.max_{unit} = {most}"
    interval, batches = trainer.get("val_check_interval"), trainer.get("limit_train_batches")
    by_epoch = trainer.get("check_val_every_n_epoch", 1) is not None
    if isinstance(interval, int) and isinstance(batches, int) and by_epoch and interval > batches > 0:
        yield f"trainer.val_check_interval = {interval} is above trainer.limit_train_batches = {batches}, an epoch"


def _epochs(trainer: Mapping[str, Any]) -> float | None:
    """Epochs of the whole training, as far as the configuration alone tells them."""
    epochs, steps, batches = (trainer.get(key) for key in ("max_epochs", "max_steps", "limit_train_batches"))
    accumulated = trainer.get("accumulate_grad_batches") or 1
    known = [float(epochs)] if isinstance(epochs, int) and epochs > 0 else []
    if isinstance(steps, int) and steps > 0 and isinstance(batches, int) and batches > 0 and _number(accumulated):
        known.append(steps / math.ceil(batches / max(accumulated, 1)))
    return min(known, default=None)


def _callbacks(callbacks: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    averaging = []
    monitors = getattr(_target(config.get("task")), "monitors", ())
    for key, section in callbacks.items():
        kind = _target(section)
        if kind is None:
            continue
        for refused, why in REFUSED.items():
            if issubclass(kind, refused):
                yield f"callbacks.{key}: {kind.__name__} {why}"
        if issubclass(kind, WeightAveraging):
            averaging.append(f"callbacks.{key}")
        if issubclass(kind, GradientAccumulationScheduler) and _has_course(config.get("scheduler")):
            yield (
                f"callbacks.{key}: with {kind.__name__} epochs differ in steps, which a schedule does not follow: use "
                "trainer.accumulate_grad_batches, or scheduler=none"
            )
        if isinstance(section.get("patience"), int) and section["patience"] < 0:
            yield f"callbacks.{key}.patience = {section['patience']} must not be negative"
        watched = section.get("monitor") if issubclass(kind, (ModelCheckpoint, EarlyStopping)) else None
        if monitors and isinstance(watched, str) and watched.startswith(("val/", "test/")) and watched not in monitors:
            yield f"callbacks.{key}.monitor = {watched!r} is never measured{suggestion(watched, monitors)}"
    if len(averaging) > 1:
        yield f"{' and '.join(averaging)} both average the weights: choose one"


def _has_course(scheduler: Any) -> bool:
    """Whether a schedule ever changes the rate."""
    constant = isinstance(scheduler, Mapping) and scheduler.get("sched") == "constant"
    return bool(scheduler) and not (constant and not scheduler.get("warmup_epochs"))


def _target(section: Any) -> type | None:
    """The class that a section names, where it names one."""
    from hydra.utils import get_object

    try:
        found = get_object(section["_target_"]) if isinstance(section, Mapping) and "_target_" in section else None
    except (ImportError, ValueError, AttributeError, TypeError):  # told by the check of the section
        return None
    return found if isinstance(found, type) else None


# ---- with the data at hand, before the first step ------------------------------------------------------------


class Start(Callback):
    """Asks the data, before the first step, whether the task can take it and what will be measured.

    Attributes:
        untested: Why the run will not be tested, in words; None where it will.

    Args:
        test: Whether the configuration wants a test.
    """

    def __init__(self, test: bool = True) -> None:
        self.untested = None if test else "test = false"
        self._told = not test

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lightning has just set up the data module."""
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self._told:
            self.untested = self.untested or no_test(data, pl_module)
            self._told = True
            if self.untested:
                tell(f"there will be no test, {self.untested}; val/ figures chose the weights")
            if not trainer.enable_validation and any(watches(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
                tell("there is no validation part: the last state counts, and no callback acts on a val/ figure")
        if isinstance(pl_module, Task):
            self._check_inputs(data, pl_module)

    @staticmethod
    def _check_inputs(data: Any, task: Task) -> None:
        dataset: Any = (getattr(data, "datasets", None) or {}).get("train")
        if task.wants_inputs and hasattr(dataset, "images") and len(dataset):
            task.check_inputs(dataset.images([SampleKey(0)]))


def watches(callback: Callback) -> bool:
    """Whether a callback decides by a figure of the validation part."""
    return str(getattr(callback, "monitor", None)).startswith("val/")


def no_test(data: Any, task: L.LightningModule) -> str | None:
    """Why a run on this data has no test figure, in words; None where it has one."""
    name = type(data).__name__
    if not is_overridden("test_dataloader", data, L.LightningDataModule):
        return f"{name} has no test part"
    if not is_overridden("test_step", task, L.LightningModule):
        return f"{type(task).__name__} measures by itself while it trains"
    parts = getattr(data, "datasets", None)
    remedy = f" (a folder {data.root}/test would be one)" if hasattr(data, "root") else ""
    if isinstance(parts, Mapping) and parts:
        if "test" not in parts:
            return f"{name} has no test part, only {' and '.join(parts)}{remedy}"
        if parts["test"] is parts.get("val"):
            return f"{name} has no test part of its own, only the validation part{remedy}"
    return None


# ---- the last state ------------------------------------------------------------------------------------------


class LastValidation(Callback):
    """Validates the last state of a training, wherever its end falls, so that no step is taken that nobody measures."""

    def __init__(self) -> None:
        self._usual: tuple[Any, Any] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Lightning decides about a validation right after this."""
        if trainer.enable_validation and ends_here(trainer):
            self._usual = trainer.val_check_batch, trainer.check_val_every_n_epoch
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, 1
            trainer.should_stop = True  # a clock, if there is one, is not asked then

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._usual is not None:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = self._usual
            self._usual = None


def ends_here(trainer: L.Trainer) -> bool:
    """Whether the training ends with the step just taken; asked in `on_train_batch_end`."""
    loop = trainer.fit_loop
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    if trainer.should_stop and loop._can_stop_early:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()
