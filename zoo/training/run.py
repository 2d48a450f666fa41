"""One configuration from data to checkpoint: build, fit, test, save, and say where everything is."""

from __future__ import annotations

import inspect
import json
import logging
import secrets
import signal
import time
import typing
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import hydra
import lightning as L
import torch
from annotated_types import Ge, Lt
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zoo import inputs
from zoo.checkpoints import CheckpointError, read_checkpoint, save_pretrained
from zoo.config import ConfigError, check_call, check_section, flatten
from zoo.facts import commit, hardware, versions
from zoo.files import offline
from zoo.models.closed import closed
from zoo.models.registry import create_model
from zoo.quoting import command as shell_line
from zoo.tasks import NonFiniteLossError, ScheduleError, Task, create_optimizer, create_scheduler
from zoo.training.callbacks import ProgressBar
from zoo.training.checkpointing import (
    FOLDER,
    AtomicCheckpointIO,
    EndRequested,
    EndWatch,
    ResumeCheckpoint,
    StopRequested,
    UnsoundStateError,
    find_resumable,
    scalars,
    set_aside,
    step_files,
)
from zoo.training.checks import LastValidation, Start, is_lightnings, is_ours, sentence, together
from zoo.training.folder import check_new, is_first_process, link_latest, record, writing_in
from zoo.training.loggers import WandbRun
from zoo.training.notes import NAME, read_notes
from zoo.training.summary import print_summary, tell
from zoo.values import first_line

_log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a run reached and where it lies."""

    output_dir: Path
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    checkpoint: Path | None = None
    model_dir: Path | None = None


class RunStopped(Exception):
    """A run that was stopped and can be resumed; `exit_code` is what the process should end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Begun(L.Callback):
    """Notes that the first step was reached, and with it that a state was restored."""

    steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


class RunFailed(RuntimeError):
    """A run that could not go on; the message says where it stands."""


def run_config(config: dict[str, Any], *, multirun: bool = False, command: str = "python train.py") -> float | None:
    """Check a composed configuration whole, then run it; returns `optimized_metric` for a sweeper.

    Raises:
        ConfigError: Before anything is built, with every problem found.
    """
    check_config(config, multirun=multirun)
    result = run(**config, command=command)
    return result.metrics.get(config.get("optimized_metric") or "")


_RESUMED = "a resumed run fetches nothing: start the same experiment once without resume=..."


def _one_writer(run: Callable[..., RunResult]) -> Callable[..., RunResult]:
    @wraps(run)
    def alone(*, output_dir: str, **options: Any) -> RunResult:
        folder = Path(output_dir).absolute()
        # a run folder may come from anyone, and what it records opens no address
        fetching = offline(_RESUMED) if options.get("resume") else nullcontext()
        with writing_in(folder, resumed=bool(options.get("resume"))), fetching:
            if not options.get("resume"):
                check_new(folder, options.get("command", "python train.py"))
            return run(output_dir=output_dir, **options)

    return alone


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
) -> RunResult:
    """Train, test and save one model. Every argument is a section or a value of `configs/train.yaml`.

    Args:
        output_dir: The run folder; checkpoints, logs, the trained model and the summary go here.
        name: Display name of the run.
        model: Arguments of `zoo.create_model`; what is null and known to the data (`num_classes`,
            `in_chans`, `seq_len`, ...) is taken from there.
        data: `_target_` and arguments of a LightningDataModule.
        task: `_target_` and arguments of a `zoo.tasks.Task`.
        trainer: `_target_` and arguments of `lightning.Trainer`.
        optimizer: Arguments of `zoo.tasks.create_optimizer`; None for a task without gradient steps.
        scheduler: Arguments of `zoo.tasks.create_scheduler`; None for a constant rate.
        callbacks: Named sections with `_target_`.
        logger: Named sections with `_target_`.
        seed: Seed of every random draw, below 2^32; 0 is a seed, None draws one and notes it.
        test: Evaluate the best checkpoint on the test set at the end.
        resume: Run folder or checkpoint to continue from, exactly where it stopped.
        optimized_metric: Metric that a sweep optimises, for example `val/acc`.
        command: How the user starts the program, for the printed commands.

    Returns:
        Metrics, time and paths.

    Raises:
        ConfigError: If a section cannot be built.
        RunFolderInUse: If another run writes into the folder.
        RunStopped: After SIGINT, SIGTERM or SIGHUP, with the state saved, also between the last step and the results.
        RunFailed: If the loss is not finite or the disk is full; the last good checkpoint stays.
        CheckpointError: If `resume` names a damaged checkpoint.
    """
    _quiet()
    folder = Path(output_dir).absolute()
    started = time.perf_counter()
    state = find_resumable(folder, _named_checkpoint(resume)) if resume else None
    notes = _run_notes(folder, seed, name, state)
    L.seed_everything(notes["seed"], workers=False, verbose=False)

    datamodule = _build("data", lambda: _instantiate(data, seed=notes["seed"]))
    with closed(str(folder)) if state else nullcontext():  # all weights come with the state
        task_module = _build("model", lambda: _build_task(model, task, datamodule, optimizer, scheduler))
    if not isinstance(task_module, Task):
        raise ConfigError(f"task._target_ = {task['_target_']} is no zoo.tasks.Task")
    task_module.run_notes = {"seed": notes["seed"], "wandb_id": notes["wandb_id"]}
    if optimizer is not None:
        _build("optimizer", lambda: create_optimizer(task_module.model, **optimizer))
    loggers = [
        _build(
            f"logger.{key}",
            partial(_instantiate, section, run_id=notes["wandb_id"], name=name, resumed=state is not None),
        )
        for key, section in (logger or {}).items()
        if section
    ]
    hooks = [
        _build(f"callbacks.{key}", partial(_instantiate, section))
        for key, section in (callbacks or {}).items()
        if section
    ]
    begun, watch = _Begun(), EndWatch()
    if trainer.get("enable_progress_bar") is False:
        hooks = [hook for hook in hooks if not isinstance(hook, ProgressBar)]
    start = Start(test)
    engine: L.Trainer = _build(
        "trainer",
        lambda: _instantiate(
            trainer,
            callbacks=[*hooks, start, begun, LastValidation(), watch],
            logger=loggers,
            plugins=[AtomicCheckpointIO()],
            default_root_dir=str(folder),
        ),
    )
    config: dict[str, Any] = {
        "model": dict(task_module.hparams["model"] or {}),
        "data": data,
        "task": task,
        "trainer": trainer,
    }
    config |= {"optimizer": optimizer, "scheduler": scheduler, "seed": notes["seed"], "name": name}
    for entry in engine.loggers:
        entry.log_hyperparams(config)

    result = RunResult(folder)
    exit_code = 1
    try:
        with watch:
            engine.fit(task_module, datamodule=datamodule, ckpt_path=str(state) if state else None)
            watch.over = True
            before = next((hook.metrics for hook in hooks if isinstance(hook, ResumeCheckpoint)), {})
            result.metrics = before | scalars(engine.callback_metrics)
            result.checkpoint = _load_best(engine, task_module, result.metrics)
            if start.untested is None:
                engine.test(task_module, datamodule=datamodule, verbose=False)
                result.metrics |= scalars(engine.callback_metrics)
            result.seconds = notes["seconds_before"] + time.perf_counter() - started
            _finish(engine, task_module, result, notes, command, start.untested if test else None)
        exit_code = 0
    except StopRequested as stop:
        exit_code = 128 + stop.signum
        message = f"stopped by {signal.Signals(stop.signum).name}; the state after step {stop.step} is saved"
        line = shell_line(command, resume=_shown(folder))
        raise RunStopped(f"{message}\ncontinue with: {line}", exit_code) from None
    except EndRequested as stop:
        exit_code = 128 + stop.signum
        message = f"stopped by {signal.Signals(stop.signum).name} after the last step, before the results were written"
        raise RunStopped(f"{message}\n{_last_good(folder, command)}", exit_code) from None
    except NonFiniteLossError as error:
        if is_first_process() and not isinstance(error, UnsoundStateError):
            set_aside(folder / FOLDER, engine.global_step)
        rate = (optimizer or {}).get("lr")
        lower = {"optimizer.lr": float(f"{rate / 10:.2g}")} if rate else {}
        raise RunFailed(f"{error}\n{_last_good(folder, command, **lower)}") from None
    except CheckpointError as error:
        raise RunFailed(f"{error}\n{_last_good(folder, command)}") from None
    except ScheduleError as error:
        raise ConfigError(f"scheduler: {error}") from None
    except Exception as error:
        damaged = isinstance(error, KeyError | TypeError | AttributeError | IndexError | RuntimeError | ValueError)
        if damaged and state is not None and not begun.steps and not type(error).__module__.startswith("zoo."):
            raise RunFailed(f"{state} is no state that this run can continue from: {first_line(error)}") from error
        told = type(error) is ValueError and is_ours(error)  # the zoo's own kinds of errors stay as they are
        if not (told or is_lightnings(error)):
            raise
        _log.info("the training stopped", exc_info=True)  # into the run's log file
        if told:
            raise RunFailed(f"training stopped: {sentence(error)}") from None
        if engine.global_step:
            raise RunFailed(f"training stopped: {sentence(error)}\n{_last_good(folder, command)}") from None
        raise ConfigError(f"trainer or callbacks: {sentence(error)}") from None
    finally:
        if is_first_process():
            _note_seconds(folder, notes, time.perf_counter() - started)
        for entry in engine.loggers:
            if isinstance(entry, WandbRun):
                entry.close(exit_code)
    return result


# --- checks before anything is built ---


def check_config(config: Mapping[str, Any], *, multirun: bool = False) -> None:
    """Check every value of a configuration against the signature that it will be passed to.

    Raises:
        ConfigError: With one line for each problem.
    """
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
    problems = problems or together(config)  # which takes values of the right types
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _check_constructor(section: Mapping[str, Any]) -> list[str]:
    """Problems of the model's own arguments, by the class that its entry point says it returns."""
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


# --- building ---


def _build(key: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__ or error
        known = (ValueError, TypeError, OSError, MisconfigurationException, ImportError)
        if not isinstance(cause, known) and not is_lightnings(cause):
            raise cause from None
        raise _located(key, cause) from None
    except (ValueError, TypeError, OSError, MisconfigurationException) as error:
        raise _located(key, error) from None


def _located(key: str, error: BaseException) -> BaseException:
    """Say which section an error is about, unless it is the zoo's own and says so itself."""
    return error if type(error).__module__.startswith("zoo.") else ConfigError(f"{key}: {error}")


def _instantiate(section: Mapping[str, Any], **offered: Any) -> Any:
    """Build a section through its `_target_`; `offered` fills what the target takes and the section leaves open."""
    accepted = inspect.signature(hydra.utils.get_object(section["_target_"])).parameters
    extra = {k: v for k, v in offered.items() if k in accepted and section.get(k) is None}
    return hydra.utils.instantiate({**section}, **extra, _convert_="all")


def _build_task(
    model: dict[str, Any],
    task: dict[str, Any],
    datamodule: L.LightningDataModule,
    optimizer: dict[str, Any] | None,
    scheduler: dict[str, Any] | None,
) -> Task:
    spec = {**model}
    for key in ("num_classes", "in_chans", *(k for k, value in model.items() if value is None)):
        if spec.get(key) is None and getattr(datamodule, key, None) is not None:
            spec[key] = getattr(datamodule, key)
    arguments = {"model": spec, "optimizer": optimizer, "scheduler": scheduler}
    target = hydra.utils.get_object(task["_target_"])
    accepted = inspect.signature(target).parameters
    for key in ("class_names", "preprocessing"):
        if key in accepted and task.get(key) is None and getattr(datamodule, key, None) is not None:
            arguments[key] = getattr(datamodule, key)
    built = target(**arguments, **{k: v for k, v in task.items() if k not in arguments and not k.startswith("_")})
    if callable(record := getattr(datamodule, "input_record", None)):
        built.model.input_record = inputs.check(record())
    return built


def _run_notes(folder: Path, seed: int | None, name: str, state: Path | None) -> dict[str, Any]:
    """Seed, W&B id and seconds so far: drawn once when the run begins, kept when it is resumed."""
    begins = state is None and is_first_process()  # what an earlier, empty attempt left does not count
    kept = None if begins else read_notes(folder, seed, state)
    if kept is not None and state is None and seed is not None:
        kept["seed"] = seed
    if kept is not None and kept["wandb_id"]:
        return kept
    if kept is not None:
        kept["wandb_id"] = secrets.token_hex(4)
        return kept
    drawn = secrets.randbelow(2**31) if seed is None else seed
    notes = {"seed": drawn, "wandb_id": secrets.token_hex(4), "seconds_before": 0.0}
    if is_first_process():
        record(folder, {NAME: json.dumps(notes, indent=2) + "\n"})
        link_latest(folder, name)
    return notes


def _note_seconds(folder: Path, notes: dict[str, Any], seconds: float) -> None:
    notes = {**notes, "seconds_before": notes["seconds_before"] + seconds}
    try:
        record(folder, {NAME: json.dumps(notes, indent=2) + "\n"})
    except CheckpointError as error:  # a full disk has its own message already
        _log.debug("%s not updated: %s", NAME, error)


def _named_checkpoint(resume: str) -> Path | None:
    path = Path(resume).expanduser()
    return path.absolute() if path.is_file() else None


# --- the end of a run ---


def _load_best(engine: L.Trainer, task: Task, metrics: dict[str, float]) -> Path | None:
    """Put the best weights by the monitored metric into the task, and their value of it into the metrics; the last ones
    stay where nothing was monitored.
    """
    best = next((c for c in engine.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and _best_file(c)), None)
    if best is None:
        for callback in engine.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.monitor in metrics:
                tell(f"{callback.monitor} was never finite: the last state counts, not the best one")
        return next((path for _, path in step_files(Path(engine.default_root_dir) / FOLDER)), None)
    path = _best_file(best)
    assert path is not None
    task.load_state_dict(read_checkpoint(path)["state_dict"])
    if best.monitor and best.best_model_score is not None:
        metrics[best.monitor] = float(best.best_model_score)
    return path


def _best_file(callback: ModelCheckpoint) -> Path | None:
    """The best state, in the folder that the callback writes to; a restored one may name another, where the run was
    moved or its state is not its own.
    """
    if not callback.best_model_path or callback.dirpath is None:
        return None
    path = Path(callback.dirpath) / Path(callback.best_model_path).name
    return path if path.is_file() else None


@rank_zero_only
def _finish(
    engine: L.Trainer, task: Task, result: RunResult, notes: dict[str, Any], command: str, untested: str | None = None
) -> None:
    result.model_dir = result.output_dir / "model"
    save_pretrained(
        task.model,
        result.model_dir,
        class_names=task.hparams.get("class_names"),
        preprocessing=task.hparams.get("preprocessing"),
        input_record=getattr(task.model, "input_record", None),
    )
    summary = {"metrics": result.metrics, "seconds": round(result.seconds, 1), "seed": notes["seed"]}
    summary |= {"data": _data_facts(engine), "versions": versions(), "hardware": hardware()}
    summary |= {"finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "commit": commit()}
    wandb_dirs = []
    for entry in engine.loggers:
        if isinstance(entry, WandbRun):
            if result.checkpoint is not None:
                entry.log_best(result.checkpoint, summary)
            if entry.folder is not None:
                wandb_dirs.append(str(_shown(entry.folder)))
    told = print_summary(
        metrics=result.metrics,
        seconds=result.seconds,
        parameters=sum(p.numel() for p in task.model.parameters()),
        checkpoint=_shown(result.checkpoint) if result.checkpoint else None,
        model_dir=_shown(result.model_dir),
        tracked=wandb_dirs,
        resume=_train_on(engine, task, result.output_dir, command),
        untested=untested,
    )
    texts = {"summary.json": json.dumps(summary, indent=2) + "\n", "summary.txt": told}
    record(result.output_dir, texts)


def _train_on(engine: L.Trainer, task: Task, folder: Path, command: str) -> str | None:
    """The command that trains twice as long; None for a task whose epochs are counted by its data."""
    if not task.trains_on:
        return None
    longer = {}
    if 0 < engine.max_steps <= engine.global_step:
        longer["trainer.max_steps"] = 2 * engine.max_steps
    if not longer or ((engine.max_epochs or -1) > 0 and 2 * engine.current_epoch > (engine.max_epochs or 0)):
        longer["trainer.max_epochs"] = 2 * max(engine.current_epoch, 1)
    return shell_line(command, resume=_shown(folder), **longer)


def _data_facts(engine: L.Trainer) -> dict[str, Any]:
    """Sizes of the parts and names of the columns, for the record of weights that may be shipped."""
    data: Any = getattr(engine, "datamodule", None)
    facts: dict[str, Any] = {part: len(rows) for part, rows in (getattr(data, "datasets", None) or {}).items()}
    if names := getattr(data, "feature_names", None):
        facts["feature_names"] = list(names)
    return facts


def _last_good(folder: Path, command: str, **changes: Any) -> str:
    states = step_files(folder / FOLDER)
    if not states:
        again = "".join(f" with {key}={value}" for key, value in changes.items())
        return f"no good checkpoint had been written yet: start the run again{again}"
    resume = shell_line(command, resume=_shown(folder), **changes)
    return f"the last good checkpoint is step {states[0][0]}; continue from it with: {resume}"


def _shown(path: Path) -> Path:
    """A path as the user would type it: relative where it lies below the working folder."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path


def _quiet() -> None:
    """Keep the libraries' chatter off the screen; their warnings about our own choices say nothing new."""
    for noisy in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger(noisy).propagate = False
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*Trying to infer the `batch_size`.*",
    ):
        warnings.filterwarnings("ignore", message=message)
