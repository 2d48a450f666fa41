"""One training run: build, fit, test, save and summarise."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import lightning as L
from annotated_types import Ge, Lt
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar

from zoo.registry.checkpoints import CheckpointError
from zoo.registry.closed import closed
from zoo.support.files import offline
from zoo.support.quoting import command as shell_line
from zoo.support.signatures import ConfigError
from zoo.support.values import first_line
from zoo.tasks import NonFiniteLossError, ScheduleError, Task
from zoo.training.build import build, build_task, instantiate
from zoo.training.callbacks import StopEarly
from zoo.training.checkpointing import (
    FOLDER,
    AtomicCheckpointIO,
    EndRequested,
    EndWatch,
    Home,
    ResumeCheckpoint,
    StopRequested,
    UnsoundStateError,
    check_weights,
    find_resumable,
    scalars,
    set_aside,
)
from zoo.training.checks import LastValidation, Start, check_config, is_lightnings, is_ours, is_told, sentence
from zoo.training.finish import finish, last_good, load_best, shown_path
from zoo.training.folder import check_new, is_first_process, link_latest, writing_in
from zoo.training.loggers import WandbRun, titles
from zoo.training.notes import note_seconds, run_notes
from zoo.training.result import RunResult
from zoo.training.resuming import Changes, Resumed, resumed, stages

_log = logging.getLogger(__name__)


class RunStopped(Exception):
    """A run that was stopped by a signal and can be resumed; `exit_code` is the process's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _StepCounter(L.Callback):
    """Counts batches and measures the time of the training; from the first batch on, the checkpoint was restored.

    Args:
        begins: Called when the training starts, which it does not if it was over.
    """

    def __init__(self, begins: Callable[[], None]) -> None:
        self.steps, self._begins, self._spent = 0, begins, 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Of training, with its validations."""
        return self._spent + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def on_train_start(self, *_: Any) -> None:
        self._begins()
        self._since = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1

    def on_train_end(self, *_: Any) -> None:
        self._spent, self._since = self.seconds, None


class RunFailed(RuntimeError):
    """A run that could not continue; the message names the last good checkpoint."""


def _started_from(folder: Path, value: Any) -> Any:
    """A value whose places in the run folder start from it, so that a moved run logs the same."""
    if isinstance(value, dict):
        return {key: _started_from(folder, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_started_from(folder, entry) for entry in value]
    inside = isinstance(value, str) and value.startswith(str(folder))
    return f".{value.removeprefix(str(folder))}" if inside else value


def run_config(
    config: dict[str, Any],
    *,
    multirun: bool = False,
    command: str = "python train.py",
    origin: dict[str, Any] | None = None,
    changes: Changes | None = None,
) -> RunResult:
    """Check a composed configuration, then run it.

    Args:
        config: All arguments of `run` but the last three.
        multirun: Whether it is one of several runs of a command.
        command: See `run`.
        origin: See `run`.
        changes: See `run`.

    Raises:
        ConfigError: Before anything is built, with all problems found.
    """
    check_config(config, multirun=multirun)
    return run(**config, command=command, origin=origin, changes=changes)


# Callbacks that a switch of the trainer turns off; Lightning refuses the one with the other
_SWITCHES: dict[str, type[L.Callback]] = {
    "enable_progress_bar": ProgressBar,
    "enable_model_summary": ModelSummary,
    "enable_checkpointing": Checkpoint,
}

_RESUMED = "a resumed run fetches nothing: start the same experiment once without resume=..."


def _one_writer(run: Callable[..., RunResult]) -> Callable[..., RunResult]:
    @wraps(run)
    def locked(*, output_dir: str, **options: Any) -> RunResult:
        folder = Path(output_dir).absolute()
        # a run folder is untrusted: its configuration must not open an address
        fetching = offline(_RESUMED) if options.get("resume") else nullcontext()
        with writing_in(folder, resumed=bool(options.get("resume"))), fetching:
            if not options.get("resume"):
                check_new(folder, options.get("command", "python train.py"))
            return run(output_dir=output_dir, **options)

    return locked


@_one_writer
def run(
    *,
    output_dir: str,
    name: str,
    model: dict[str, Any],
    data: dict[str, Any],
    task: dict[str, Any],
    trainer: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    callbacks: dict[str, Any] | None = None,
    logger: dict[str, Any] | None = None,
    seed: Annotated[int, Ge(0), Lt(2**32)] | None = 0,
    test: bool = True,
    resume: str | None = None,
    optimized_metric: str | None = None,
    command: str = "python train.py",
    origin: dict[str, Any] | None = None,
    changes: Changes | None = None,
) -> RunResult:
    """Train, test and save one model. Every argument is a section or a value of `configs/train.yaml`.

    Args:
        output_dir: The run folder, for checkpoints, logs, the trained model and the summary.
        name: Display name of the run.
        model: Arguments of `zoo.create_model`; null ones that the data knows (`num_classes`, `in_chans`, `seq_len`,
            ...) are taken from the data.
        data: `_target_` and arguments of a LightningDataModule.
        task: `_target_` and arguments of a `zoo.tasks.Task`.
        trainer: `_target_` and arguments of `lightning.Trainer`.
        optimizer: Arguments of `zoo.tasks.create_optimizer`; None for a task without gradient steps.
        scheduler: Arguments of `zoo.tasks.create_scheduler`; None for a constant learning rate.
        callbacks: Named sections with `_target_`.
        logger: Named sections with `_target_`.
        seed: Seed of all randomness, below 2^32; None chooses one at random and stores it.
        test: Evaluate the best checkpoint on the test part at the end.
        resume: Run folder or checkpoint to resume exactly.
        optimized_metric: Metric that a sweep optimises, for example `val/acc`.
        command: Command that starts the program, for printed commands.
        origin: Where the configuration comes from, logged with it: `experiment`, `choices` and `overrides`; in a
            multirun also `label`, what sets this run apart, and `group`, the name of them all.
        changes: What the command line changes in a run that it resumes.

    Returns:
        Metrics, time and paths.

    Raises:
        ConfigError: If a section cannot be built.
        RunFolderInUse: If another run writes to the folder.
        RunStopped: After SIGINT, SIGTERM or SIGHUP, with the state saved.
        RunFailed: If the loss is not finite or the disk is full; the last good checkpoint is kept.
        CheckpointError: If `resume` names a damaged checkpoint.
    """
    _quiet()
    folder = Path(output_dir).absolute()
    accumulated = trainer.get("accumulate_grad_batches") or 1
    found = find_resumable(folder, _named_checkpoint(resume), accumulated) if resume else None
    state = found.path if found else None
    notes = run_notes(folder, seed, found.content if found else None, origin)
    L.seed_everything(notes["seed"], workers=False, verbose=False)

    datamodule = build("data", lambda: instantiate(data, seed=notes["seed"]))
    with closed(str(folder)) if state else nullcontext():  # all weights are in the checkpoint
        task_module = build("model", lambda: build_task(model, task, datamodule, optimizer, scheduler))
    if not isinstance(task_module, Task):
        raise ConfigError(f"task._target_ = {task['_target_']} is not a zoo.tasks.Task")
    if found is not None:
        check_weights(found, folder, task_module)
    task_module.run_notes = {"seed": notes["seed"], "wandb_id": notes["wandb_id"]}
    build("optimizer", task_module.build_optimizer)
    offered: dict[str, Any] = {"run_id": notes["wandb_id"], "resumed": state is not None}
    offered |= titles(name, notes.get("label", ""), notes.get("group", ""))
    loggers = [
        build(f"logger.{key}", partial(instantiate, section, **offered))
        for key, section in (logger or {}).items()
        if section
    ]
    hooks = [
        build(f"callbacks.{key}", partial(instantiate, section))
        for key, section in (callbacks or {}).items()
        if section
    ]
    hooks.sort(key=lambda hook: isinstance(hook, ResumeCheckpoint))  # the last: it saves the others' states
    going_on: Resumed | None = None

    def has_started() -> None:
        if state is None and is_first_process():
            link_latest(folder, name)  # not before: nobody goes on with a run that could not start

    def begins() -> None:
        """Note a stage with other values where it begins, so that even a killed run has it on record."""
        has_started()
        if going_on is not None:
            trained = stages(notes, going_on, changes.words if changes else ())
            if trained != (notes.get("stages") or []):
                notes["stages"] = trained
                if is_first_process():
                    note_seconds(folder, notes, 0.0)

    counter, watch = _StepCounter(begins), EndWatch()
    for key, kind in _SWITCHES.items():
        if trainer.get(key) is False:
            hooks = [hook for hook in hooks if not isinstance(hook, kind)]
    start = Start(test)
    engine: L.Trainer = build(
        "trainer",
        lambda: instantiate(
            trainer,
            max_epochs=getattr(datamodule, "tasks", None),  # of a stream, an epoch is a task
            callbacks=[*hooks, start, counter, LastValidation(), watch, Home()],
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(folder),
        ),
    )
    if found is not None:
        going_on = resumed(engine, found.content, changes, (notes["seed"], seed))
        found = None  # as large as the training
    known = going_on.summary if going_on else None  # of a training that is over
    config: dict[str, Any] = {
        "model": dict(task_module.hparams["model"] or {}),
        "data": data,
        "task": task,
        "trainer": trainer,
    }
    config |= {"optimizer": optimizer, "scheduler": scheduler, "seed": notes["seed"], "name": name}
    config |= {"callbacks": callbacks, "logger": logger, "test": test, "optimized_metric": optimized_metric}
    for entry in engine.loggers:
        entry.log_hyperparams(_started_from(folder, {**(origin or {}), **config}))

    result = RunResult(folder)
    exit_code = 1
    try:
        with watch:
            engine.fit(task_module, datamodule=datamodule, ckpt_path=str(state) if state else None)
            watch.over = True
            has_started()  # also where there is no epoch to train
            before = next((hook.metrics for hook in hooks if isinstance(hook, ResumeCheckpoint)), {})
            result.metrics = before | scalars(engine.callback_metrics)
            result.stopped = next((hook.reason for hook in hooks if isinstance(hook, StopEarly)), None)
            load_best(engine, task_module, result)
            result.seconds = notes["seconds_before"] + counter.seconds
            if start.untested is None:
                engine.test(task_module, datamodule=datamodule, verbose=False)
                result.metrics |= scalars(engine.callback_metrics)
            if known is not None:  # measured again for the tables of the loggers; what is on record stays
                tested = {name: value for name, value in result.metrics.items() if name.startswith("test/")}
                result.metrics, result.seconds = known["metrics"] | tested | known["metrics"], known["seconds"]
                result.epochs |= known.get("epochs") or {}
            finish(engine, task_module, result, notes, command, start.untested if test else None, known)
        exit_code = 0
    except StopRequested as stop:
        exit_code = 128 + stop.signum
        message = f"stopped by {signal.Signals(stop.signum).name}; the state after step {stop.step} is saved"
        line = shell_line(command, resume=shown_path(folder))
        raise RunStopped(f"{message}\ncontinue with: {line}", exit_code) from None
    except EndRequested as stop:
        exit_code = 128 + stop.signum
        message = f"stopped by {signal.Signals(stop.signum).name} after the last step, before the results were written"
        raise RunStopped(f"{message}\n{last_good(folder, command)}", exit_code) from None
    except NonFiniteLossError as error:
        if is_first_process() and not isinstance(error, UnsoundStateError):
            set_aside(folder / FOLDER, engine.global_step)
        rate = (optimizer or {}).get("lr")
        lower = {"optimizer.lr": float(f"{rate / 10:.2g}")} if rate else {}
        raise RunFailed(f"{error}\n{last_good(folder, command, **lower)}") from None
    except CheckpointError as error:
        raise RunFailed(f"{error}\n{last_good(folder, command)}") from None
    except ScheduleError as error:
        raise ConfigError(f"scheduler: {error}") from None
    except Exception as error:
        damaged = isinstance(error, KeyError | TypeError | AttributeError | IndexError | RuntimeError | ValueError)
        if damaged and state is not None and not counter.steps and not type(error).__module__.startswith("zoo."):
            raise RunFailed(f"{state} is not a state that this run can continue from{_reason(error)}") from error
        ours = type(error) is ValueError and is_ours(error)  # the zoo's own types are raised as they are
        if not (ours or is_lightnings(error)):
            raise
        _log.info("the training stopped", exc_info=True)  # traceback for the run's log file
        if ours:
            raise RunFailed(f"training stopped: {sentence(error)}") from None
        if engine.global_step:
            raise RunFailed(f"training stopped: {sentence(error)}\n{last_good(folder, command)}") from None
        raise ConfigError(f"trainer or callbacks: {sentence(error)}") from None
    finally:
        if is_first_process():
            note_seconds(folder, notes, counter.seconds)
        for entry in engine.loggers:
            if isinstance(entry, WandbRun):
                entry.close(exit_code)
    return result


def _reason(error: Exception) -> str:
    """What torch or Lightning says of a state; words of Python say nothing to a user, and are in the log."""
    _log.info("the state was not restored", exc_info=True)
    told = isinstance(error, RuntimeError | ValueError) and is_told(error)
    return f": {first_line(error)}" if told else ": a part of it is damaged or of another run"


def _named_checkpoint(resume: str) -> Path | None:
    path = Path(resume).expanduser()
    return path.absolute() if path.is_file() else None


def _quiet() -> None:
    """Silence the libraries' log messages and known warnings."""
    for noisy in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger(noisy).propagate = False
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Trying to infer the `batch_size`.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation, which is told in our own words
        r".*ModelCheckpoint\(monitor='val/[^']*'\)` could not find the monitored key.*",
    ):
        warnings.filterwarnings("ignore", message=message)
