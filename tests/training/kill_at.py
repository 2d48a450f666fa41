"""A callback that ends its own process, as a power cut would, at a chosen moment of a chosen step."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch.callbacks import Callback

MOMENTS = ("on_before_optimizer_step", "on_train_batch_end", "on_save_checkpoint", "on_validation_start")


class SpoilAt(Callback):
    """Has the loss, or a weight, be not a number, or the weights explode, when optimizer step `step` has been taken."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and self.what == "loss":
            batch[0].fill_(float("nan"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step and self.what != "loss":
            for weight in pl_module.parameters():
                weight.data *= 1e22 if self.what == "weights" else float("nan")


class KillAt(Callback):
    """Sends this process `signum` the first time that `moment` comes at or after optimizer step `step`."""

    def __init__(self, step: int, moment: str = "on_train_batch_end", signum: int = signal.SIGKILL) -> None:
        self.step, self.signum = step, signum
        setattr(self, moment, self._kill)

    def _kill(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            self.step = 10**9
            os.kill(os.getpid(), self.signum)
