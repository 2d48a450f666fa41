"""The end of a run: best weights, saved model, summary, and the commands to continue."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from zoo.registry.checkpoints import read_checkpoint, save_pretrained
from zoo.support.environment import commit, hardware, versions
from zoo.support.files import write_atomic, writer_of
from zoo.support.quoting import command as shell_line
from zoo.tasks import Task
from zoo.training.checkpointing import FOLDER, step_files
from zoo.training.folder import write_texts
from zoo.training.loggers import WandbRun
from zoo.training.result import RunResult
from zoo.training.summary import print_summary, tell


def load_best(engine: L.Trainer, task: Task, metrics: dict[str, float]) -> Path | None:
    """Load the best weights by the monitored metric, and store its best value in `metrics`.

    Returns:
        The checkpoint of the weights; if nothing was monitored, the task keeps the last ones.
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
    """The best checkpoint, in the callback's own folder: a restored path is wrong if the run was moved."""
    if not callback.best_model_path or callback.dirpath is None:
        return None
    path = Path(callback.dirpath) / Path(callback.best_model_path).name
    return path if path.is_file() else None


@rank_zero_only
def finish(
    engine: L.Trainer, task: Task, result: RunResult, notes: dict[str, Any], command: str, untested: str | None = None
) -> None:
    """Save the model with its data's files, write the summary, and log the best checkpoint to W&B."""
    result.model_dir = result.output_dir / "model"
    save_pretrained(
        task.model,
        result.model_dir,
        class_names=task.hparams.get("class_names"),
        preprocessing=task.hparams.get("preprocessing"),
        input_record=getattr(task.model, "input_record", None),
    )
    for name, path in getattr(getattr(engine, "datamodule", None), "model_files", {}).items():
        write_atomic(result.model_dir / name, writer_of(path.read_bytes()))
    summary = {"metrics": result.metrics, "seconds": round(result.seconds, 1), "seed": notes["seed"]}
    summary |= {"data": _data_facts(engine), "versions": versions(), "hardware": hardware()}
    summary |= {"finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), "commit": commit()}
    wandb_dirs = []
    for entry in engine.loggers:
        if isinstance(entry, WandbRun):
            if result.checkpoint is not None:
                entry.log_best(result.checkpoint, summary)
            if entry.folder is not None:
                wandb_dirs.append(str(shown_path(entry.folder)))
    told = print_summary(
        metrics=result.metrics,
        seconds=result.seconds,
        parameters=sum(p.numel() for p in task.model.parameters()),
        checkpoint=shown_path(result.checkpoint) if result.checkpoint else None,
        model_dir=shown_path(result.model_dir),
        tracked=wandb_dirs,
        resume=_train_on(engine, task, result.output_dir, command),
        untested=untested,
    )
    texts = {"summary.json": json.dumps(summary, indent=2) + "\n", "summary.txt": told}
    write_texts(result.output_dir, texts)


def _train_on(engine: L.Trainer, task: Task, folder: Path, command: str) -> str | None:
    """The command that trains twice as long; None if the data determines the number of epochs."""
    if not task.trains_on:
        return None
    longer = {}
    if 0 < engine.max_steps <= engine.global_step:
        longer["trainer.max_steps"] = 2 * engine.max_steps
    if not longer or ((engine.max_epochs or -1) > 0 and 2 * engine.current_epoch > (engine.max_epochs or 0)):
        longer["trainer.max_epochs"] = 2 * max(engine.current_epoch, 1)
    return shell_line(command, resume=shown_path(folder), **longer)


def _data_facts(engine: L.Trainer) -> dict[str, Any]:
    """Sizes of the parts and names of the columns, for the metadata of shipped weights."""
    data: Any = getattr(engine, "datamodule", None)
    facts: dict[str, Any] = {part: len(rows) for part, rows in (getattr(data, "datasets", None) or {}).items()}
    if names := getattr(data, "feature_names", None):
        facts["feature_names"] = list(names)
    return facts


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
