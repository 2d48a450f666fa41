"""Base of all tasks: a model, its named losses, its optimizer, and self-contained checkpoints.

Optional methods of a model:

- `aux_losses() -> dict[str, Tensor]`: weighted auxiliary losses of the last forward pass;
- `no_weight_decay() -> set[str]` and `layer_ids() -> (dict[str, int], int)`: see `zoo.optim.param_groups`.

A subclass may return several losses from `losses` (they are summed, and logged by name), set `optimizer=None` and fit
in closed form after the last batch, use manual optimisation (`automatic_optimization = False`), or train with L-BFGS,
whose closure Lightning provides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
import torch
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

import zoo
from zoo.optim import ScheduleError, create_optimizer, create_scheduler
from zoo.support import inputs
from zoo.support.values import first_line
from zoo.tasks.freezing import freeze as freeze_parts

_TASKS: dict[str, type[Task]] = {}


class NonFiniteLossError(ArithmeticError):
    """A loss is NaN or infinite; the optimizer step was not taken."""


class OptionError(ValueError):
    """An option of a task that does not fit the data; the message says what it requires."""


class Task(L.LightningModule):
    """A model with losses and optimisation; subclasses define `losses` and their metrics.

    All arguments are stored in the checkpoint as plain values, so `load_task(path)` or
    `SomeTask.load_from_checkpoint(path)` rebuilds model and task from the file alone.

    Args:
        model: Keyword arguments of `zoo.create_model` (with `model_name`), or a module. A module that
            `zoo.create_model` built is stored by its name and arguments; any other must be passed again on loading.
        optimizer: Keyword arguments of `create_optimizer`; None for a task without gradient steps.
        scheduler: Keyword arguments of `create_scheduler`; None for a constant learning rate.
        channels_last: Keep the model and 4-D inputs in channels-last memory format (faster depthwise convolutions).
        compile: Compile the model in place; parameter names do not change.
        freeze: Patterns of parameters that are not trained, such as `backbone` or `stages.[01]`, see
            `zoo.tasks.freezing.freeze`; a module that is frozen whole stays in evaluation mode.
        **hparams: Further plain values of the subclass to store in the checkpoint.

    Attributes:
        monitors: Names of the validation and test metrics; empty if unknown.
        wants_inputs: Whether `check_inputs` must be called.
        trains_on: Whether training can be continued for more epochs.
    """

    #: Seed and id of the run, stored in every checkpoint.
    run_notes: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)
    monitors: ClassVar[tuple[str, ...]] = ()
    wants_inputs: bool = False
    trains_on: ClassVar[bool] = True

    def __init__(
        self,
        model: dict[str, Any] | nn.Module,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        *,
        channels_last: bool = False,
        compile: bool = False,
        freeze: str | list[str] | None = None,
        **hparams: Any,
    ) -> None:
        super().__init__()
        from zoo.registry.factory import create_model

        self.model = model if isinstance(model, nn.Module) else create_model(**model)
        self.optimizer, self.scheduler, self.channels_last = optimizer, scheduler, channels_last
        self._chosen: list[dict[str, Any]] = []  # configured options of each parameter group
        self._schedule: dict[str, Any] = {}
        self._built: torch.optim.Optimizer | None = None
        spec = getattr(self.model, "zoo_config", None)
        if not isinstance(model, nn.Module):
            folder = ":" in str(model.get("model_name"))  # a folder or hub name, which the checkpoint must not need
            spec = {**model, **(spec or {})} if folder else dict(model)
        self.save_hyperparameters(
            {"model": spec, "optimizer": optimizer, "scheduler": scheduler, "channels_last": channels_last}
            | {"compile": compile}
            | ({"freeze": freeze} if freeze else {})
            | hparams,
            logger=False,
        )
        patterns = [freeze] if isinstance(freeze, str) else freeze
        self._frozen = freeze_parts(self.model, patterns) if patterns else []
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _TASKS[cls.__name__] = cls

    def train(self, mode: bool = True) -> Self:
        """Change between training and evaluation mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen if mode else ():
            module.eval()
        return self

    @property
    def starts_fresh(self) -> bool:
        """Whether the model was built without pretrained weights."""
        spec = self.hparams.get("model") or {}
        return not (spec.get("pretrained") or spec.get("checkpoint_path"))

    def check_inputs(self, inputs: Any) -> None:
        """Check a batch of inputs before training.

        Raises:
            OptionError: The task's options do not fit the inputs.
        """

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Training losses of a batch by name; their sum is minimised."""
        raise NotImplementedError(f"{type(self).__name__} must define losses(batch)")

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.ordered(x))

    def ordered(self, x: Tensor) -> Tensor:
        """Inputs in the memory order of the weights."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        losses = self.losses(batch)
        if hasattr(self.model, "aux_losses"):
            losses = losses | self.model.aux_losses()  # type: ignore[operator]
        total = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(total):
            values = ", ".join(f"{name} = {value.item():g}" for name, value in losses.items())
            raise NonFiniteLossError(
                f"the loss is not finite at step {self.global_step}, epoch {self.current_epoch}: {values}"
            )
        self.log("train/loss", total.detach(), prog_bar=True)
        if len(losses) > 1:
            self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()})
        return total

    def build_optimizer(self) -> None:
        """Build the optimizer of the next training now, so that what is wrong with its options is told before."""
        if self.optimizer is not None:
            self._built = create_optimizer(self.model, **self.optimizer)

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            return None
        optimizer, self._built = self._built, None
        trained = {p for p in self.model.parameters() if p.requires_grad}
        if optimizer is None or trained != {p for group in optimizer.param_groups for p in group["params"]}:
            optimizer = create_optimizer(self.model, **self.optimizer)  # a callback froze, or a strategy wrapped, some
        chosen = {"lr", *self.optimizer, *(self.optimizer.get("kwargs") or {})}
        self._chosen = [{k: v for k, v in group.items() if k in chosen} for group in optimizer.param_groups]
        if self.scheduler is None:
            return optimizer
        total, per_epoch = self._length()
        scheduler = create_scheduler(optimizer, total, per_epoch, **self.scheduler)
        self._schedule = scheduler.state_dict()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Apply the current configuration to a resumed training, whose checkpoint restored the old learning rates."""
        if self.trainer.ckpt_path is None:
            return
        for optimizer, chosen in zip(self.trainer.optimizers, [self._chosen], strict=False):
            for group, values in zip(optimizer.param_groups, chosen, strict=False):
                group.update(values)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, Scheduler):
                config.scheduler.load_state_dict(self._schedule)
                config.scheduler.step_update(self.global_step)

    def _length(self) -> tuple[int, int]:
        """Optimizer steps of the whole training and of one epoch, as Lightning counts them.

        The last step of an epoch may accumulate fewer batches than `accumulate_grad_batches`.
        """
        trainer = self.trainer
        trainer.fit_loop.setup_data()  # Lightning itself does this only if max_epochs limits the training
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        if math.isinf(total) and (self.scheduler or {}).get("sched") == "constant":
            total = 2**53  # any end after the warm-up
        if math.isinf(total) or total < 0:
            raise ScheduleError(
                "a schedule needs an end: set trainer.max_epochs or trainer.max_steps, or scheduler=none"
            )
        if math.isinf(batches):
            raise ScheduleError(
                "a schedule counts epochs, and this data does not say how long one is: set "
                "trainer.limit_train_batches to a number of batches, or scheduler=none"
            )
        return int(total), max(1, math.ceil(batches / trainer.accumulate_grad_batches))

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Scheduler):
            scheduler.step_update(self.global_step)
        else:  # a torch scheduler set by a callback
            super().lr_scheduler_step(scheduler, metric)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval and (self.global_step + 1) % interval == 0:
            self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["zoo"] = {"task": type(self).__name__, "version": zoo.__version__, "run": self.run_notes}
        if record := getattr(self.model, "input_record", None):
            checkpoint["zoo"]["input"] = record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the model's input record; in a run, that of its data takes precedence.

        Raises:
            OptionError: The state is of another task; or the data has other classes, columns or tokens than it had.
        """
        note = checkpoint.get("zoo")
        kind = note.get("task") if isinstance(note, dict) else None
        if self._trainer is not None and kind not in (None, type(self).__name__):
            raise OptionError(f"the state is of the task {kind!r:.60}, and this run's is {type(self).__name__}")
        if self._trainer is not None and self.trainer.world_size == 1:  # others may hold a part of the weights each
            self._check_sizes(checkpoint.get("state_dict"))
        if self._trainer is not None:
            self._check_classes(checkpoint.get("hyper_parameters"))
        own: Any = getattr(self.model, "input_record", None)
        record = note.get("input") if isinstance(note, dict) else None
        if record and (self._trainer is None or own is None):
            self.model.input_record = inputs.check(record)  # type: ignore[assignment]
        elif record:
            wanted = inputs.check(record).get("tokenizer_sha256")
            if wanted not in (None, own.get("tokenizer_sha256")):
                raise OptionError(f"the data has another tokenizer than the checkpoint (sha256 {wanted[:12]}...)")
            if own.get("kind") == "table" and own != inputs.check(record):
                raise OptionError(
                    "the table is not the one that the run had: its columns or training rows make other inputs "
                    f"({_first_difference(inputs.check(record), own)}); start a new run"
                )

    def _check_classes(self, given: Any) -> None:
        """Refuse data whose classes are not those of the state, by their order or names."""
        before = given.get("class_names") if isinstance(given, Mapping) else None
        now = self.hparams.get("class_names")
        if before and now and list(before) != list(now):
            i = next((i for i, pair in enumerate(zip(before, now, strict=False)) if len(set(pair)) == 2), len(before))
            names = [f"{part[i]!r:.60}" if i < len(part) else "none" for part in (list(before), list(now))]
            raise OptionError(
                f"the data has other classes than the run had: output {i} was {names[0]}, and is {names[1]} now; give "
                "the run its own data again, or start a new one"
            )

    def _check_sizes(self, state: Any) -> None:
        """Refuse the state of another model, before torch does in words of its own."""
        own = self.state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            return  # damaged, which is told where it is loaded
        sizes = {k: (tuple(state[k].shape), tuple(own[k].shape)) for k in own if k in state}
        other = [f"{k} is {_size(a)} in the state and {_size(b)} in this run" for k, (a, b) in sizes.items() if a != b]
        missing, added = [k for k in own if k not in state], [k for k in state if k not in own]
        other += [f"the state has no {missing[0]}"] if missing else []
        other += [f"this run has no {added[0]}"] if added else []
        if other:
            raise OptionError(
                f"the state is of another model than this run's ({other[0]}): resume without changes of the model or "
                "its classes, or start a new run from its weights with model.checkpoint_path=..."
            )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def load_task(path: str | Path) -> Task:
    """Rebuild model and task from a training checkpoint, in eval mode, with its (averaged) weights.

    Args:
        path: A checkpoint written by a training run.

    Raises:
        zoo.CheckpointError: If the file is damaged, contains code, or was not written by a task of the zoo.
    """
    from zoo.registry.checkpoints import CheckpointError, read_checkpoint
    from zoo.registry.closed import closed, sized
    from zoo.registry.loading import check_types, warn_not_finite

    checkpoint = read_checkpoint(path)
    about, hparams, state = (checkpoint.get(key) for key in ("zoo", "hyper_parameters", "state_dict"))
    name = about.get("task") if isinstance(about, Mapping) else None
    if name not in list(_TASKS) or not isinstance(hparams, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(
            f"{path} is not a training checkpoint of the zoo; load plain weights with zoo.load_checkpoint"
        )
    model = hparams.get("model")
    if model is None:
        raise CheckpointError(
            f"{path} was trained with a model that zoo.create_model did not build; pass it yourself: "
            f"{name}.load_from_checkpoint(path, model=...)"
        )
    try:
        with closed(str(path), opened=True), sized(str(path), Path(path).stat().st_size):
            task = _TASKS[name](**{**hparams, "model": {**model, "pretrained": False, "checkpoint_path": None}})
        task.load_state_dict(state)
        task.on_load_checkpoint(checkpoint)
    except CheckpointError:
        raise
    except inputs.InputError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # untrusted values can make a constructor raise anything
        raise CheckpointError(f"{path} holds no {name} that can be built again: {first_line(error)}") from error
    own = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    check_types(task.model, own, str(path))
    warn_not_finite(task.model, own, str(path))  # only the model: metrics of the task may be NaN
    return task.eval()


def _first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Where two input records first differ, for a message."""
    key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
    old, new = before.get(key), now.get(key)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
    return f"{key} was {old!r:.80}, and is {new!r:.80}"
