"""The end of a run: best weights, saved model, summary, and the commands to continue."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from zoo.registry.checkpoints import read_checkpoint, save_pretrained
from zoo.results.runs import MEASURED, of_whole, weights_of
from zoo.support.environment import commit, hardware, versions
from zoo.support.files import write_atomic, writer_of
from zoo.support.quoting import command as shell_line
from zoo.support.values import DamagedFileError, read_json
from zoo.tasks import Task
from zoo.training.callbacks import StopEarly
from zoo.training.checkpointing import FOLDER, step_files
from zoo.training.counts import counts, trained
from zoo.training.folder import write_texts
from zoo.training.loggers import WandbRun
from zoo.training.result import RunResult
from zoo.training.summary import print_summary, tell


def load_best(engine: L.Trainer, task: Task, result: RunResult) -> None:
    """Load the best weights by the monitored metric, and store their checkpoint, epoch and `val/` metrics in `result`.

    If nothing was monitored, the task keeps the last weights. Without a training step there is no epoch.
    """
    last = max(engine.current_epoch - 1, 0)
    result.epochs = dict.fromkeys(("train", "val", "test"), last) if trained(engine) else {}
    watched = [callback for callback in engine.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    best = next((callback for callback in watched if Path(callback.best_model_path).is_file()), None)
    counts = f"best by {best.monitor}" if best and best.monitor else "last state"
    for callback in watched[: watched.index(best) if best else None]:
        if callback.monitor in result.metrics:
            tell(f"no state with a finite {callback.monitor} is kept: the {counts} counts")
    if best is None:
        result.checkpoint = next((path for _, path in step_files(Path(engine.default_root_dir) / FOLDER)), None)
        return
    result.checkpoint = path = Path(best.best_model_path)
    kept = read_checkpoint(path)
    task.load_state_dict(kept["state_dict"])
    result.epochs |= {"val": kept["epoch"], "test": kept["epoch"]}
    if kept["global_step"] != engine.global_step:  # the metrics are those of the last state
        then = (kept.get("so_far") or {}).get("metrics") or {}
        if best.monitor and best.best_model_score is not None:
            then = {best.monitor: float(best.best_model_score)} | then
        metrics = {name: value for name, value in result.metrics.items() if not name.startswith("val/")}
        result.metrics = metrics | {name: value for name, value in then.items() if name.startswith("val/")}


@rank_zero_only
def finish(
    engine: L.Trainer,
    task: Task,
    result: RunResult,
    notes: dict[str, Any],
    command: str,
    untested: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> None:
    """Save the model with its data's files, write the summary, and log the best checkpoint to W&B.

    Args:
        engine: The trainer.
        task: The task, with the best weights.
        result: Metrics, epochs and time; receives the folder of the model.
        notes: Of `run.json`.
        command: Command that starts the program, for printed commands.
        untested: Reason why there is no test result, if one was expected.
        before: The summary of a run whose training was over, which stays as it is but for new figures.
    """
    result.model_dir = result.output_dir / "model"
    former = weights_of(result.output_dir)
    _mark(result.output_dir, former)
    save_pretrained(
        task.model,
        result.model_dir,
        class_names=task.hparams.get("class_names"),
        preprocessing=task.hparams.get("preprocessing"),
        input_record=getattr(task.model, "input_record", None),
        overwrite=True,
    )
    for name, path in getattr(getattr(engine, "datamodule", None), "model_files", {}).items():
        write_atomic(result.model_dir / name, writer_of(path.read_bytes()))
    measured = {name.partition("/")[0] for name in result.metrics}
    figures = {"metrics": result.metrics}
    figures["epochs"] = {part: epoch for part, epoch in result.epochs.items() if part in measured}
    saved = weights_of(result.output_dir)
    if before:
        summary = {MEASURED: former or saved, **before, **figures}
    else:
        summary = {**_summary(engine, result, notes, figures), MEASURED: saved}
    rows, whole = summary.get("data") or {}, summary.get("whole") or {}
    wandb_dirs = []
    for entry in engine.loggers:
        if isinstance(entry, WandbRun):
            if result.checkpoint is not None:
                entry.log_best(result.checkpoint, summary)
            if entry.folder is not None:
                wandb_dirs.append(str(shown_path(entry.folder)))
    told = print_summary(
        metrics=result.metrics,
        epochs=result.epochs,
        shares={part: of_whole(part, rows, whole) for part in whole if part in rows},
        seconds=result.seconds,
        parameters=sum(p.numel() for p in task.model.parameters()),
        checkpoint=shown_path(result.checkpoint) if result.checkpoint else None,
        model_dir=shown_path(result.model_dir),
        tracked=wandb_dirs,
        resume=_train_on(engine, task, result.output_dir, command),
        untested=untested,
        stopped=result.stopped,
    )
    texts = {"summary.json": json.dumps(summary, indent=2) + "\n", "summary.txt": told}
    write_texts(result.output_dir, texts)


def _mark(folder: Path, weights: str | None) -> None:
    """Let a summary of an earlier release say which weights it is of, before others take their place."""
    with suppress(DamagedFileError, OSError):
        found = read_json(folder / "summary.json")
        if weights and isinstance(found, dict) and MEASURED not in found:
            write_texts(folder, {"summary.json": json.dumps({**found, MEASURED: weights}, indent=2) + "\n"})


def _summary(
    engine: L.Trainer, result: RunResult, notes: Mapping[str, Any], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `summary.json`."""
    used = counts(engine)
    summary = {"metrics": figures["metrics"], "seconds": round(result.seconds, 1), "seed": notes["seed"]}
    summary |= {"epochs": figures["epochs"]}
    summary |= {} if trained(engine) else {"untrained": True}
    summary |= {"stages": notes["stages"]} if notes.get("stages") else {}
    summary |= {"stopped_early": result.stopped} if result.stopped else {}
    summary |= {"data": used.used | _names(engine)} | ({"whole": used.whole} if used.whole else {})
    summary |= {"versions": versions(), "hardware": hardware()}
    return summary | {"finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "commit": commit()}


def _train_on(engine: L.Trainer, task: Task, folder: Path, command: str) -> str | None:
    """The command that trains twice as long; None if the data determines the number of epochs, or no state is kept."""
    if not task.trains_on or not step_files(folder / FOLDER):
        return None
    longer = {}
    if 0 < engine.max_steps <= engine.global_step:
        longer["trainer.max_steps"] = 2 * engine.max_steps
    if not longer or ((engine.max_epochs or -1) > 0 and 2 * engine.current_epoch > (engine.max_epochs or 0)):
        longer["trainer.max_epochs"] = 2 * max(engine.current_epoch, 1)
    stop = next((c for c in engine.callbacks if isinstance(c, StopEarly) and c.reason), None)  # type: ignore[attr-defined]
    if stop is not None:
        longer["callbacks.stop.patience"] = 2 * stop.patience
    return shell_line(command, resume=shown_path(folder), **longer)


def _names(engine: L.Trainer) -> dict[str, Any]:
    """Names of the columns, for the metadata of shipped weights."""
    names = getattr(getattr(engine, "datamodule", None), "feature_names", None)
    return {"feature_names": list(names)} if names else {}


def last_good(folder: Path, command: str, **changes: Any) -> str:
    """Message with the command that continues from the last checkpoint, with changed configuration values."""
    states = step_files(folder / FOLDER)
    if not states:
        again = "".join(f" with {key}={value}" for key, value in changes.items())
        return f"no good checkpoint had been written yet: start the run again{again}"
    resume = shell_line(command, resume=shown_path(folder), **changes)
    return f"the last good checkpoint is step {states[0][0]}; continue from it with: {resume}"


def shown_path(path: Path) -> Path:
    """A path for messages: relative if it is below the working directory."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path
