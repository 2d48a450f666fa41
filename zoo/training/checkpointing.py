"""Checkpoints for exact resuming: written atomically, at any step and on signals, with all random states."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import shlex
import signal
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from pydantic import PositiveInt
from torch import Tensor, nn
from torch import distributed as dist

from zoo.registry.checkpoints import CheckpointError, read_checkpoint, write_atomic
from zoo.support.quoting import override
from zoo.support.values import DamagedFileError, read_json
from zoo.tasks import NonFiniteLossError
from zoo.training.checks import ends_here
from zoo.training.loggers import CsvRun
from zoo.training.states import generators, inexact, state_problem
from zoo.training.summary import tell

FOLDER = "checkpoints"
_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")

#: Weights have exploded if their norm exceeds this factor times the larger of their initial norm and that of all ones.
EXPLODED = 1e4


class UnsoundStateError(NonFiniteLossError):
    """The weights are not finite or have exploded; the state is not saved."""


class StopRequested(Exception):
    """Training was stopped by a signal, after saving its state."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class EndRequested(BaseException):
    """A signal between the last training step and the results; a `BaseException`, so that no handler swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class EndWatch(Callback):
    """Raises `EndRequested` on SIGINT, SIGTERM or SIGHUP after training; `ResumeCheckpoint` handles them during it."""

    def __init__(self) -> None:
        self.over = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> EndWatch:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signum = getattr(signal, name, None)
            if signum is not None and _may_handle(signum):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.over = True

    def _handle(self, signum: int, frame: Any) -> None:
        if self.over:
            raise EndRequested(signum)
        if callable(before := self._previous[signum]):
            before(signum, frame)
        else:
            signal.signal(signum, before)
            os.kill(os.getpid(), signum)


def _may_handle(signum: int) -> bool:
    """Whether to handle a signal: only in the main thread, and not if it is ignored (as SIGHUP under nohup)."""
    in_main = threading.current_thread() is threading.main_thread()
    return in_main and signal.getsignal(signum) not in (signal.SIG_IGN, None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically (temporary file, flush, rename), and reads them without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: _serialise(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        if ".." not in Path(path).parts:  # a path from a checkpoint must not lead out of the folder
            super().remove_checkpoint(path)


def _serialise(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # torch hides the reason, for example a full disk
            raise error.__context__ from None
        raise


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best state by a validation metric; ties are broken by the smaller loss, then by the later state.

    On a small validation part many states have the same accuracy, and the first is the least trained. States with a
    non-finite metric, loss or weight are never kept.

    Args:
        folder: Folder of `best.ckpt`.
        monitor: Name of the metric.
        mode: Whether `max` or `min` is better.
        tie_breaker: Metric that breaks ties, smaller is better; if it is not logged, the later state wins.
    """

    def __init__(
        self, folder: str | Path, monitor: str, mode: Literal["max", "min"] = "max", tie_breaker: str = "val/loss"
    ) -> None:
        super().__init__(dirpath=folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        self.tie_breaker = tie_breaker
        self._kept_loss = math.inf
        self._exempt: set[str] = set()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._exempt = _not_finite(pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        logged = trainer.callback_metrics.get(self.tie_breaker)
        loss = math.inf if logged is None else float(logged)
        sound = current is None or (math.isfinite(current) and (logged is None or math.isfinite(loss)))
        sound = (
            sound
            and trainer.lightning_module is not None
            and not _unsound(trainer.lightning_module, exempt=self._exempt)
        )
        if not trainer.strategy.reduce_boolean_decision(sound, all=True):
            return False
        better = super().check_monitor_top_k(trainer, current)
        if not better and current is not None:
            equal = bool(current == self.best_k_models[self.kth_best_model_path])
            better = trainer.strategy.reduce_boolean_decision(equal and loss <= self._kept_loss)
        if better:
            self._kept_loss = loss
        return better

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kept_loss": self._kept_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_at_home(self, state_dict))
        self._kept_loss = float(state_dict["kept_loss"])


def _at_home(callback: ModelCheckpoint, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint callback with its paths in the callback's own folder.

    The run may have been moved or copied, for which Lightning drops the best score; and a checkpoint may name any path.
    """
    old, folder = Path(state.get("dirpath") or ""), Path(callback.dirpath or "")

    def here(path: str) -> str:
        inside = Path(path).is_relative_to(old) and ".." not in Path(path).parts
        return str(folder / (Path(path).relative_to(old) if inside else Path(path).name)) if path else ""

    paths = {
        name: here(state.get(name) or "") for name in ("best_model_path", "kth_best_model_path", "last_model_path")
    }
    scores = {here(path): score for path, score in (state.get("best_k_models") or {}).items()}
    return {**state, **paths, "best_k_models": scores, "dirpath": callback.dirpath}


class Home(Callback):
    """Points the states of checkpoint callbacks to this run's folder, and forgets the scores of missing files."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the states before the callbacks load them.

        Raises:
            DamagedFileError: The best state is missing, and going on would replace the model that was made of it.
        """
        states: dict[str, Any] = checkpoint.get("callbacks") or {}
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.state_key not in states:
                continue
            states[callback.state_key] = state = _at_home(callback, states[callback.state_key])
            path, model = state["best_model_path"], Path(trainer.default_root_dir) / "model"
            kept = {path: score for path, score in state["best_k_models"].items() if Path(path).is_file()}
            kept, exists = trainer.strategy.broadcast((kept, model.exists()))  # other nodes may lack the folder
            if path and callback.monitor and path not in kept:
                if exists and isinstance(callback, BestCheckpoint):
                    raise DamagedFileError(
                        f"{path}, the best state by {callback.monitor}, is missing: put it back; or move {model}, "
                        "which holds its weights, elsewhere, and the run goes on without it"
                    )
                tell(f"{path} is missing: of the states from here on, the best by {callback.monitor} counts")
                path = (max if callback.mode == "max" else min)(kept, key=lambda path: float(kept[path]), default="")
                state |= {"best_model_path": path, "best_model_score": kept.get(path)}
            if len(kept) < len(state["best_k_models"]):
                state |= {"best_k_models": kept, "kth_best_model_path": ""}


class ResumeCheckpoint(Checkpoint):
    """Keeps the latest states of a training for exact resuming.

    A state contains weights, optimizer, schedule, weight averages, loop position, random states of all processes,
    metrics and the number of logged rows. It is saved every `every_n_steps` optimizer steps, before a step that is
    followed by a validation, at the end of an epoch, and on SIGINT, SIGTERM or SIGHUP, which then stop the training
    with `StopRequested`. A second SIGINT or SIGTERM stops at once. No state is saved between a step and the end of its
    validation, so a resumed run never misses a validation; stopping there repeats one step.

    If weights are not finite or have exploded (see `EXPLODED`), no state is saved: training stops with
    `UnsoundStateError`, and the earlier states remain.

    Args:
        folder: Folder of the `step=<n>.ckpt` files.
        every_n_steps: Interval in optimizer steps.
        keep: Number of states to keep; with two, a damaged latest file does not lose the run.
    """

    def __init__(self, folder: str | Path, every_n_steps: PositiveInt = 100, keep: PositiveInt = 2) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self._signum = 0
        self._saved_step: int | None = None
        self._random_states: list[dict[str, Any]] | None = None
        self._norm: float | None = None  # initial norm of the weights
        self._exempt: set[str] = set()
        self._previous_handlers: dict[int, Any] = {}
        self.metrics: dict[str, float] = {}  # of the state resumed from

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if stage == "fit" and (hangup := getattr(signal, "SIGHUP", None)) is not None:
            self._handle(hangup)  # before the workers start: they inherit it, and survive a closed terminal

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._norm = self._norm or _norm(pl_module)
        self._exempt = _not_finite(pl_module)
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handle(signum)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore_handlers()
        if self._saved_step is not None and (stop := self._agreed_signal(trainer)):  # arrived after the last epoch
            raise StopRequested(stop, self._saved_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_states is not None:  # as late as possible: nothing else may use the generators before the step
            set_random_states(self._random_states[trainer.global_rank % len(self._random_states)])
            self._random_states = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # accumulated gradients are not part of a state
        stop = self._agreed_signal(trainer)
        if trainer.is_last_batch or _validation_follows(trainer, 0) or ends_here(trainer):
            self._stop_at_the_state_before(stop)
        else:
            self._save_and_stop(trainer, stop)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._stop_at_the_state_before(self._agreed_signal(trainer))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or trainer.is_last_batch or ends_here(trainer):
            return
        if (trainer.fit_loop.epoch_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_and_stop(trainer, self._agreed_signal(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        if stop := self._agreed_signal(trainer):
            raise StopRequested(stop, trainer.global_step)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [random_states()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint["random_states"] = states
        pending = _pending_row(trainer)
        metrics = self.metrics | scalars(trainer.callback_metrics)
        tables = [logger.experiment.rows for logger in trainer.loggers if isinstance(logger, CsvRun)]
        rows = [n if isinstance(n, int) else 0 for n in tables]  # other processes have no table
        checkpoint["so_far"] = {"metrics": metrics, "rows": rows, "pending": pending, "norm": self._norm}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._saved_step = checkpoint["global_step"]
            self._random_states = checkpoint.get("random_states")
            so_far = checkpoint.get("so_far") or {}
            self.metrics, self._norm = dict(so_far.get("metrics") or {}), so_far.get("norm")
            tables = [logger for logger in trainer.loggers if isinstance(logger, CsvRun)]
            for table, rows in zip(tables, so_far.get("rows") or (), strict=False):
                table.rewind(rows, so_far.get("pending"))

    def _stop_at_the_state_before(self, signum: int) -> None:
        """Stop at the last saved state, if any; otherwise the signal waits until a state can be saved."""
        if signum and self._saved_step is not None:
            raise StopRequested(signum, self._saved_step)

    def _save_and_stop(self, trainer: L.Trainer, signum: int) -> None:
        ahead = range(1, trainer.accumulate_grad_batches + 1)
        due = trainer.global_step % self.every_n_steps == 0 or any(_validation_follows(trainer, n) for n in ahead)
        if signum or due or self._ends_soon(trainer):
            self._save(trainer)
        if signum:
            raise StopRequested(signum, trainer.global_step)

    @staticmethod
    def _ends_soon(trainer: L.Trainer) -> bool:
        if trainer.max_steps == trainer.global_step + 1:
            return True
        left = trainer.num_training_batches - (trainer.fit_loop.epoch_loop.batch_idx + 1)
        return 0 < left <= trainer.accumulate_grad_batches

    def _save(self, trainer: L.Trainer) -> None:
        problem = _unsound(trainer.lightning_module, self._norm, self._exempt)
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            where = f"after step {trainer.global_step}, epoch {trainer.current_epoch}"
            raise UnsoundStateError(f"{problem or 'the weights of another process are not finite'} {where}")
        path = self.folder / f"step={trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for _, old in step_files(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def _handle(self, signum: int) -> None:
        if _may_handle(signum):
            self._previous_handlers.setdefault(signum, signal.signal(signum, self._request_stop))

    def _request_stop(self, signum: int, frame: Any) -> None:
        self._signum = self._signum or signum
        # a second SIGINT or SIGTERM has its usual effect; SIGHUP often comes several times
        self._restore_handlers(signal.SIGINT, signal.SIGTERM)

    def _restore_handlers(self, *only: int) -> None:
        for signum in [n for n in self._previous_handlers if n in only or not only]:
            signal.signal(signum, self._previous_handlers.pop(signum))

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        if trainer.world_size == 1:
            return self._signum
        number = torch.tensor(self._signum, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


def _validation_follows(trainer: L.Trainer, ahead: int) -> bool:
    """Whether a validation in this epoch follows the batch `ahead` batches after the current one."""
    loop = trainer.fit_loop.epoch_loop
    every = trainer.val_check_batch
    if every is None or math.isinf(every) or not loop._should_check_val_epoch():
        return False
    if loop.batch_idx + ahead >= trainer.num_training_batches:
        return False
    done = (loop.total_batch_idx if trainer.check_val_every_n_epoch is None else loop.batch_idx) + ahead + 1
    return done % every == 0


def _pending_row(trainer: L.Trainer) -> dict[str, float] | None:
    """The row that is logged right after this state, and that a run resumed from it would not log again."""
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    if trainer.state.fn != "fit" or not trainer.training:
        return None
    ends = connector._first_loop_iter is None
    if not ends and not connector.should_update_logs:
        return None
    row = scalars(connector.metrics["log"])
    if not row:
        return None
    return {"epoch": trainer.current_epoch, **row, "step": loop._batches_that_stepped - ends}


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The scalar metrics."""
    return {name: float(value) for name, value in metrics.items() if torch.as_tensor(value).numel() == 1}


def _trained(module: nn.Module) -> list[Tensor]:
    return [p.detach() for p in module.parameters() if p.requires_grad and p.is_floating_point()]


def _norm(module: nn.Module) -> float:
    """L2 norm of the trained weights."""
    square = 0.0
    for weight in _trained(module):
        precise = None if weight.device.type == "mps" else torch.float64  # MPS has no float64
        square += float(torch.linalg.vector_norm(weight, dtype=precise)) ** 2
    return math.sqrt(square)


def _is_finite(values: Tensor) -> bool:
    return not values.is_floating_point() or bool(torch.isfinite(values.detach()).all())


def _is_sound(values: Tensor) -> bool:
    """Whether a buffer has no NaN and no +inf; -inf is allowed, as the log-prior of an unseen class."""
    return not values.is_floating_point() or bool((values.detach() < torch.inf).all())


def _not_finite(module: nn.Module) -> set[str]:
    """Frozen parameters and buffers that are not finite at the start: placeholders that are filled later."""
    found = {name for name, weight in module.named_parameters() if not weight.requires_grad and not _is_finite(weight)}
    buffers = getattr(module, "model", module).named_buffers()
    return found | {f"buffer {name}" for name, values in buffers if not _is_sound(values)}


def _unsound(module: nn.Module, norm: float | None = None, exempt: Collection[str] = ()) -> str | None:
    """Why a state must not be saved: non-finite values, or weights that exploded from `norm`; None if it is sound."""
    for name, weight in module.named_parameters():
        if name not in exempt and not _is_finite(weight):
            return f"the weights {name} are not finite"
    for name, values in getattr(module, "model", module).named_buffers():
        if f"buffer {name}" not in exempt and not _is_sound(values):
            return f"the values {name} are not finite"
    size = math.sqrt(sum(weight.numel() for weight in _trained(module)))
    if norm is not None and (now := _norm(module)) > EXPLODED * max(norm, size):
        return f"the weights have exploded, their norm was {norm:.3g} at the start and is {now:.3g}"
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename the states from `step` on, whose weights gave a non-finite loss, so that they are not resumed."""
    for number, path in step_files(folder):
        if number >= step:
            path.replace(path.with_name(f"not_finite_after-{path.name}"))


def random_states() -> dict[str, Any]:
    """Global random states of Python, NumPy and torch (all devices) as plain containers and tensors."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the result of `random_states`; GPU states only if the number of GPUs is the same."""
    python, numpy, own = generators(states)
    random.setstate(python.getstate())
    np.random.set_state(numpy.get_state())
    torch.set_rng_state(own.get_state())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of the resumable states in a folder, newest first."""
    found = ((match, path) for path in folder.glob("step=*.ckpt") if (match := _STEP_FILE.fullmatch(path.name)))
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


class State(NamedTuple):
    """A state of a run: its file, and what it contains."""

    path: Path
    content: dict[str, Any]


def find_resumable(run: Path, checkpoint: Path | None = None, accumulated: int = 1) -> State:
    """The state to resume from, read and checked.

    Args:
        run: Folder of the run.
        checkpoint: A checkpoint of the run; None for the newest state.
        accumulated: Batches of a step, `trainer.accumulate_grad_batches`.

    Raises:
        CheckpointError: If there is none, or it is damaged, or the run cannot go on from it exactly; the message then
            names the newest intact one.
    """
    chosen = checkpoint or next((path for _, path in step_files(run / FOLDER)), None)
    if chosen is None:
        raise CheckpointError(
            f"{run} holds no {FOLDER}/step=*.ckpt to resume from: it stopped before its first one, or keeps none; "
            "start it again"
        )
    try:
        content = _read_state(chosen, run)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_instead(chosen, run)}") from None
    if why := inexact(content, accumulated):
        raise CheckpointError(f"{chosen} is no state to go on from exactly, {why}\n{_instead(chosen, run)}")
    return State(chosen, content)


def check_weights(state: State, run: Path, task: nn.Module) -> None:
    """Check that the weights of a state are finite, but for placeholders of a new model, and tell which state it is.

    Raises:
        CheckpointError: They are not; the message names the newest intact state.
    """
    exempt, trained = _not_finite(task), {name for name, _ in task.named_parameters()}
    model = getattr(task, "model", None)  # other buffers are figures of the task: those to come are NaN
    buffers = {f"model.{name}" if model else name for name, _ in (model or task).named_buffers()}
    path, content = state
    for part in ("state_dict", "current_model_state"):
        for name, values in content.get(part, {}).items():
            if name in trained:
                sound = name in exempt or _is_finite(values)
            else:
                known = name in buffers and f"buffer {name.removeprefix('model.')}" not in exempt
                sound = not known or _is_sound(values)
            if not sound:
                raise CheckpointError(f"{path} is damaged: its {part} {name} is not finite\n{_instead(path, run)}")
    done = content["loops"]["fit_loop"]["epoch_progress"]["current"].get("processed", content["epoch"])
    epochs = "1 epoch" if done == 1 else f"{done} epochs"
    tell(f"going on from {path.name}, the state after step {content['global_step']} and {epochs}")


def _read_state(path: Path, run: Path) -> dict[str, Any]:
    seed = None
    with contextlib.suppress(DamagedFileError, OSError):  # told where the notes are read
        notes = read_json(run / "run.json")
        seed = notes.get("seed") if isinstance(notes, dict) else None
    content = read_checkpoint(path)
    if problem := state_problem(content, seed if isinstance(seed, int) else None):
        raise CheckpointError(f"{path} is damaged, or no state of this run: {problem}")
    return content


def _instead(chosen: Path, run: Path) -> str:
    """The line that names the newest other state that is intact."""
    for _, path in step_files(run / FOLDER):
        if path != chosen and _readable(path, run):
            line = shlex.quote(override("resume", path))
            return f"the checkpoint before it is intact, continue with: {line}"
    return f"no other state in {run / FOLDER} can be read"


def _readable(path: Path, run: Path) -> bool:
    try:
        _read_state(path, run)
    except CheckpointError:
        return False
    return True
