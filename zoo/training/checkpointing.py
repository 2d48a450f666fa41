"""Checkpoints that survive: written atomically, at any step, on a signal, with every random state in them."""

from __future__ import annotations

import math
import random
import re
import shlex
import signal
from pathlib import Path
from typing import Any, BinaryIO, Literal

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from pydantic import PositiveInt
from torch import Tensor
from torch import distributed as dist

from zoo.checkpoints import CheckpointError, read_checkpoint, write_atomic
from zoo.quoting import override
from zoo.training.checks import ends_here

FOLDER = "checkpoints"
_STEP_FILE = re.compile(r"step=(\d+)\.ckpt")


class StopRequested(Exception):
    """Training was asked to stop by a signal and has saved its state."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to disk and renames it; reads it without running any code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: _serialise(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)


def _serialise(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(checkpoint, file)
    except (
        RuntimeError
    ) as error:  # torch's writer hides the reason, a full disk for example, behind an error of its own
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best state by a validation metric; among equals the one of smaller loss, and then the later one.

    A small validation part gives the same accuracy to many states, of which the first is still far from trained.

    Args:
        folder: Where `best.ckpt` goes.
        monitor: The logged metric.
        mode: `max` or `min`, what is better.
        tie_breaker: The metric that decides among equals, smaller is better; where it is not logged the later one wins.
    """

    def __init__(
        self, folder: str | Path, monitor: str, mode: Literal["max", "min"] = "max", tie_breaker: str = "val/loss"
    ) -> None:
        super().__init__(dirpath=folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False)
        self.tie_breaker = tie_breaker
        self._kept_loss = math.inf

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        loss = float(trainer.callback_metrics.get(self.tie_breaker, math.inf))
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
        super().load_state_dict(state_dict)
        self._kept_loss = state_dict["kept_loss"]


class ResumeCheckpoint(Checkpoint):
    """Keeps the newest states of a training, so that it can be continued exactly.

    A state holds weights, optimizer, schedule, averages, loop position and the random states of every process. It is
    written every `every_n_steps` optimizer steps, before the last step of an epoch, after its validation, and on SIGINT
    or SIGTERM, after which training stops with `StopRequested`. A second signal stops at once. No state lies between an
    epoch's last step and the end of its validation, so that a resumed run never misses a validation; a run that is
    stopped there repeats one step.

    Args:
        folder: Where `step=<n>.ckpt` files go.
        every_n_steps: Interval in optimizer steps.
        keep: How many states stay; with two, a damaged newest file never costs the run.
    """

    def __init__(self, folder: str | Path, every_n_steps: PositiveInt = 100, keep: PositiveInt = 2) -> None:
        self.folder, self.every_n_steps, self.keep = Path(folder), every_n_steps, keep
        self._signum = 0
        self._saved_step: int | None = None
        self._random_states: list[dict[str, Any]] | None = None
        self._previous_handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[signum] = signal.signal(signum, self._request_stop)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_states is not None:  # last moment before the step: nothing else may draw in between
            set_random_states(self._random_states[trainer.global_rank % len(self._random_states)])
            self._random_states = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return  # accumulated gradients are not part of a state
        stop = self._agreed_signal(trainer)
        due = trainer.global_step % self.every_n_steps == 0 or self._last_step_comes_next(trainer, batch_idx)
        if (stop or due) and not trainer.is_last_batch and not ends_here(trainer):
            self._save(trainer)
        if stop:
            self._stop(trainer, stop)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit" and (stop := self._agreed_signal(trainer)):
            self._stop(trainer, stop)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        if stop := self._agreed_signal(trainer):
            self._stop(trainer, stop)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = [random_states()]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._saved_step = checkpoint["global_step"]
            self._random_states = checkpoint.get("random_states")

    @staticmethod
    def _last_step_comes_next(trainer: L.Trainer, batch_idx: int) -> bool:
        left = trainer.num_training_batches - (batch_idx + 1)
        if trainer.max_steps == trainer.global_step + 1:
            return True
        return 0 < left <= trainer.accumulate_grad_batches

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        if self._saved_step is None:  # nothing of this training is on disk yet
            self._save(trainer)
        raise StopRequested(signum, self._saved_step or 0)

    def _save(self, trainer: L.Trainer) -> None:
        path = self.folder / f"step={trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for _, old in step_files(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def _request_stop(self, signum: int, frame: Any) -> None:
        self._signum = signum
        self._restore_handlers()  # a second signal does what it would have done without us

    def _restore_handlers(self) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers = {}

    def _agreed_signal(self, trainer: L.Trainer) -> int:
        if trainer.world_size == 1:
            return self._signum
        number = torch.tensor(self._signum, device=trainer.strategy.root_device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)


def random_states() -> dict[str, Any]:
    """The global random states of Python, NumPy and torch (every device) as plain containers and tensors."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(words).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned; devices that are absent now are passed over."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def step_files(folder: Path) -> list[tuple[int, Path]]:
    """`(step, path)` of the resumable states in a folder, newest first."""
    found = ((match, path) for path in folder.glob("step=*.ckpt") if (match := _STEP_FILE.fullmatch(path.name)))
    return sorted(((int(match[1]), path) for match, path in found), reverse=True)


def find_resumable(run: Path, checkpoint: Path | None = None) -> Path:
    """The state to continue from, the named one or the newest; read once, so that damage shows now.

    Args:
        run: Folder of the run.
        checkpoint: A particular checkpoint of it.

    Raises:
        CheckpointError: If there is none, or if it is damaged; the message then offers the newest good one.
    """
    candidates = [path for _, path in step_files(run / FOLDER)]
    chosen = checkpoint or next(iter(candidates), None)
    if chosen is None:
        raise CheckpointError(
            f"{run} holds no {FOLDER}/step=*.ckpt to resume from: it stopped before its first one; start it again"
        )
    try:
        read_checkpoint(chosen)
    except CheckpointError as error:
        for path in candidates:
            if path != chosen and _readable(path):
                raise CheckpointError(
                    f"{error}\nthe checkpoint before it is intact, continue with: "
                    f"{shlex.quote(override('resume', path))}"
                ) from None
        raise CheckpointError(f"{error}\nno other checkpoint in {run / FOLDER} can be read") from None
    return chosen


def _readable(path: Path) -> bool:
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True
