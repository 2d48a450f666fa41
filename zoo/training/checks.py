"""Checks before the first training step, and the validation of the last one.

`check_config` checks the configuration before anything is built, `together` combinations of its values, and `Start`
what only the loaded data can tell. `is_lightnings` recognises errors of Lightning about configuration values.
"""

from __future__ import annotations

import inspect
import math
import traceback
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
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
from zoo.registry.factory import create_model
from zoo.support.signatures import ConfigError, check_call, check_section, flatten
from zoo.support.suggest import suggestion
from zoo.tasks import Task, create_optimizer, create_scheduler, schedule_problems
from zoo.training.summary import tell, tell_data

# Lightning's callbacks that are refused, and what to use instead
REFUSED: dict[type, str] = {
    StochasticWeightAveraging: "would replace the schedule, and averages after the last validation: use callbacks=ema, "
    "or lightning.pytorch.callbacks.WeightAveraging, which validates its equal-weight average",
    LearningRateFinder: "trains trial steps of its own: set optimizer.lr, or sweep over it with -m",
    BatchSizeFinder: "trains trial steps of its own: set data.batch_size",
    ModelPruning: "puts masked tensors in the place of parameters while they train: prune the finished model",
}


def is_lightnings(error: BaseException) -> bool:
    """Whether Lightning raised the error, directly or through torch: it is about the configuration, not our code."""
    frames = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = next((room for room in reversed(frames) if room not in ("torch", "torchmetrics", "contextlib")), "")
    return inner in ("lightning", "lightning_fabric", "lightning_utilities")


def is_ours(error: BaseException) -> bool:
    """Whether the zoo's own code raised the error, so that its message is meant for users."""
    frames = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1:] == ["zoo"]


def is_told(error: BaseException) -> bool:
    """Whether an error was raised on purpose by the zoo, torch or Lightning, so that its message says something."""
    frames = [str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = list(traceback.extract_tb(error.__traceback__))[-1:]
    raised = bool(last) and (last[0].line or "").startswith("raise")
    return raised and frames[-1] in ("zoo", "torch", "lightning", "lightning_fabric")


def sentence(error: BaseException) -> str:
    """First line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    where = f" in {frames[-1].f_globals.get('__name__')}" if frames else ""
    return " ".join(lines[0].split()) if lines else f"{type(error).__name__}{where}"


# ---- combinations of values ----------------------------------------------------------------------------------


def together(config: Mapping[str, Any]) -> list[str]:
    """Problems with combinations of values that are valid one by one; one sentence each."""
    trainer, scheduler = config.get("trainer"), config.get("scheduler")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    problems = list(_lengths(trainer))
    if isinstance(scheduler, Mapping):
        optimizer = config.get("optimizer")
        lr = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
        try:
            found = schedule_problems(lr if _number(lr) else None, _epochs(trainer), **scheduler)
        except TypeError:  # a value of the wrong type, which its own check reports
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
    """Epochs of the whole training, if the configuration determines them."""
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
    """Whether a schedule changes the learning rate."""
    constant = isinstance(scheduler, Mapping) and scheduler.get("sched") == "constant"
    return bool(scheduler) and not (constant and not scheduler.get("warmup_epochs"))


def _target(section: Any) -> type | None:
    """The class of a section's `_target_`; None if there is none."""
    from hydra.utils import get_object

    try:
        found = get_object(section["_target_"]) if isinstance(section, Mapping) and "_target_" in section else None
    except (ImportError, ValueError, AttributeError, TypeError):  # reported by the check of the section
        return None
    return found if isinstance(found, type) else None


# ---- checks of the loaded data -------------------------------------------------------------------------------


class Start(Callback):
    """Checks before the first step that the data fits the task, and reports if it has no test or validation part.

    Attributes:
        untested: Reason why the run will not be tested; None if it will be.

    Args:
        test: Whether the configuration asks for a test.
    """

    def __init__(self, test: bool = True) -> None:
        self.untested = None if test else "test = false"
        self._told = not test
        self._reported = self._warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the data module, which Lightning has just set up."""
        if stage != "fit":
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self._reported:
            self._report(data)
            self._reported = True
        if not self._told:
            left_out = "trainer.limit_test_batches = 0" if trainer.limit_test_batches == 0 else None
            self.untested = self.untested or left_out or no_test(data, pl_module)
            self._told = True
            if self.untested:
                tell(f"there will be no test, {self.untested}; val/ figures chose the weights")
        if (missing := no_validation(trainer, data)) and any(map(watches, trainer.callbacks)) and not self._warned:  # type: ignore[attr-defined]
            tell(f"there is no validation, {missing}: the last state counts, and no callback acts on a val/ figure")
            self._warned = True
        if isinstance(pl_module, Task):
            self._check_inputs(data, pl_module)
            encoded = hasattr(pl_module.model, "load_encoder") and hasattr(data, "encoder")
            if pl_module.hparams.get("freeze") and pl_module.starts_fresh and not encoded:
                tell(
                    "task.freeze keeps random weights, as no others are given: those of model.pretrained=true, or of a "
                    "file or run as model.checkpoint_path, would be others"
                )

    @staticmethod
    def _report(data: Any) -> None:
        """Print what a data module says about itself, after a look at its files."""
        if callable(check := getattr(data, "check_files", None)):
            check()
        if callable(describe := getattr(data, "describe", None)):
            tell_data(describe())

    @staticmethod
    def _check_inputs(data: Any, task: Task) -> None:
        dataset: Any = (getattr(data, "datasets", None) or {}).get("train")
        if task.wants_inputs and hasattr(dataset, "images") and len(dataset):
            task.check_inputs(dataset.images([SampleKey(0)]))


def watches(callback: Callback) -> bool:
    """Whether a callback monitors a validation metric."""
    return str(getattr(callback, "monitor", None)).startswith("val/")


def no_validation(trainer: L.Trainer, data: Any) -> str | None:
    """Reason why a run has no validation; None if it has one."""
    if trainer.limit_val_batches == 0:
        return "trainer.limit_val_batches = 0"
    parts = getattr(data, "datasets", None)
    lacks = isinstance(parts, Mapping) and parts and "val" not in parts
    return f"{type(data).__name__} has no validation part" if lacks or not trainer.enable_validation else None


def no_test(data: Any, task: L.LightningModule) -> str | None:
    """Reason why a run on this data has no test result; None if it has one."""
    name = type(data).__name__
    if not is_overridden("test_dataloader", data, L.LightningDataModule):
        return f"{name} has no test part"
    if not is_overridden("test_step", task, L.LightningModule):
        return f"{type(task).__name__} measures by itself while it trains"
    parts = getattr(data, "datasets", None)
    own = getattr(data, "path", None)
    ways = [f"a folder {own}/test would be one"] if isinstance(own, Path) and own.is_dir() else []
    if share := getattr(data, "test_fraction", None):
        ways.append(f"data.test_fraction={share:g} could keep no sample or no whole group of the training part")
    elif share is not None:
        ways.append("data.test_fraction=0.2 would keep a fifth for it")
    remedy = f" ({'; '.join(ways)})" if ways else ""
    if isinstance(parts, Mapping) and parts:
        if "test" not in parts:
            return f"{name} has no test part, only {' and '.join(parts)}{remedy}"
        if parts["test"] is parts.get("val"):
            return f"{name} has no test part of its own, only the validation part{remedy}"
    return None


# ---- the last state ------------------------------------------------------------------------------------------


class LastValidation(Callback):
    """Validates after the last training step, wherever the training ends."""

    def __init__(self) -> None:
        self._usual: tuple[Any, Any] | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Request a validation, which Lightning decides on right after this."""
        if trainer.enable_validation and ends_here(trainer):
            self._usual = trainer.val_check_batch, trainer.check_val_every_n_epoch
            trainer.val_check_batch, trainer.check_val_every_n_epoch = 1, 1
            trainer.should_stop = True  # so that Timer callbacks do not change the end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._usual is not None:
            trainer.val_check_batch, trainer.check_val_every_n_epoch = self._usual
            self._usual = None


def ends_here(trainer: L.Trainer) -> bool:
    """Whether the training ends with the step just taken; call it in `on_train_batch_end`."""
    loop = trainer.fit_loop
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    if trainer.should_stop and loop._can_stop_early:
        return True
    last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


# ---- the whole configuration ---------------------------------------------------------------------------------


def check_config(config: Mapping[str, Any], *, multirun: bool = False) -> None:
    """Check every value of a configuration against the signature it will be passed to.

    Raises:
        ConfigError: With one line for each problem.
    """
    from zoo.training.run import run  # its signature is the schema

    problems = check_call(run, config)
    for key in ("model", "data", "task", "trainer"):
        chosen, wanted = config.get(key), "model_name" if key == "model" else "_target_"
        if isinstance(chosen, Mapping) and not chosen.get(wanted):
            raise ConfigError(f"{key} has no {wanted}: choose one with {key}=...; `--help` lists them")
    missing = [key for key, value in flatten(config) if value == "???"]
    problems += [f"{key} has no value; give it as {key}=..." for key in missing]
    section: Any = config.get("model")
    if isinstance(section, Mapping):
        problems += check_call(create_model, section, "model")
        problems += _check_constructor(section)
    data = config.get("data")
    if isinstance(data, Mapping):
        problems += check_section(data, "data", given={"seed"})
    if isinstance(config.get("task"), Mapping):
        problems += check_section(config["task"], "task", given={"model"})
    if isinstance(config.get("optimizer"), Mapping):
        problems += check_call(create_optimizer, config["optimizer"], "optimizer", given={"model"})
    if isinstance(config.get("scheduler"), Mapping):
        given = {"optimizer", "total_steps", "steps_per_epoch"}
        problems += check_call(create_scheduler, config["scheduler"], "scheduler", given=given)
    if isinstance(config.get("trainer"), Mapping):
        problems += check_section(config["trainer"], "trainer")
        if multirun and _starts_processes(config["trainer"]) and not SLURMEnvironment.detect():
            problems.append(
                "trainer.strategy: a multirun cannot start processes of its own, each of them would repeat the whole "
                "sweep; use trainer.strategy=auto with trainer.devices=1, or start single runs with torchrun"
            )
    for group in ("callbacks", "logger"):
        for key, entry in (config.get(group) or {}).items():
            if entry:
                problems += check_section(entry, f"{group}.{key}")
    problems = problems or together(config)  # needs values of the right types
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _check_constructor(section: Mapping[str, Any]) -> list[str]:
    """Problems with the model's arguments, by the return annotation of its entry point."""
    from timm.models import is_model, model_entrypoint

    name = section.get("model_name")
    if not isinstance(name, str) or not is_model(name.split(".")[0]):
        return []
    try:
        returned = typing.get_type_hints(model_entrypoint(name.split(".")[0])).get("return")
    except NameError:
        return []
    if not inspect.isclass(returned) or returned is torch.nn.Module:
        return []
    own = inspect.signature(create_model).parameters
    values = {k: v for k, v in section.items() if k not in own and v is not None}
    return check_call(returned, values, "model", given=inspect.signature(returned).parameters)


def _starts_processes(trainer: Mapping[str, Any]) -> bool:
    devices = trainer.get("devices", 1)
    several = trainer.get("num_nodes", 1) > 1 or (devices not in (1, "1", "auto", [0]))
    return several or (isinstance(trainer.get("strategy"), str) and "ddp" in trainer["strategy"])
