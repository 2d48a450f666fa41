"""Learning rate schedules by name, from timm's factory, with clear errors for unsuitable values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from zoo.optim.kar import ChainedCosine
from zoo.optim.optimizers import UnitInterval

Sched = Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "chained"]


class ScheduleError(ValueError):
    """A schedule that does not fit the training; the message names the value and what is allowed."""


def create_scheduler(
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    steps_per_epoch: float,
    sched: Sched = "cosine",
    warmup_epochs: NonNegativeFloat = 0.0,
    warmup_lr: NonNegativeFloat = 0.0,
    min_lr: NonNegativeFloat = 1e-6,
    decay_epochs: PositiveFloat | None = None,
    decay_milestones: list[PositiveInt] | None = None,
    decay_rate: UnitInterval = 0.1,
) -> Scheduler:
    """A timm schedule, stepped once per optimizer step, after a linear warm-up.

    The rate depends only on the step and on these arguments, so a training resumed with other values uses those from
    there on.

    Args:
        optimizer: The `lr` of its groups is the peak; a group's `lr_scale` multiplies the scheduled rate.
        total_steps: Optimizer steps of the whole training, including the warm-up.
        steps_per_epoch: Optimizer steps per epoch.
        sched: Form of the decay after the warm-up; `chained` is Terminator's, see `zoo.optim.kar.chained_factor`.
        warmup_epochs: Length of the warm-up in epochs, not necessarily an integer.
        warmup_lr: Learning rate at step 0.
        min_lr: Final learning rate (`cosine`, `tanh`, `poly`, `wsd`).
        decay_epochs: Interval of `step`, counted from the end of the warm-up, default 30. For `wsd` the length of the
            decay, or if below 1 its fraction of the epochs after the warm-up, default a fifth.
        decay_milestones: Epochs of `multistep`, counted from the end of the warm-up, ascending.
        decay_rate: Factor of `step` and `multistep`; the power of `poly`.

    Raises:
        ScheduleError: The warm-up is longer than the training, or a value does not fit the schedule.
    """
    problems = schedule_problems(
        max((group["lr"] for group in optimizer.param_groups), default=0.0),
        total_steps / steps_per_epoch,
        sched=sched,
        warmup_epochs=warmup_epochs,
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        decay_epochs=decay_epochs,
        decay_milestones=decay_milestones,
    )
    if problems:
        raise ScheduleError("; ".join(problems))
    if sched == "chained":
        return ChainedCosine(optimizer, total_steps, round(warmup_epochs * steps_per_epoch))
    interval = 30.0 if sched == "step" else None
    left = max(total_steps / steps_per_epoch - warmup_epochs, 1 / steps_per_epoch)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=sched,
            num_epochs=left,  # type: ignore[arg-type]
            warmup_epochs=warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=warmup_lr,
            min_lr=min_lr,
            decay_epochs=interval if decay_epochs is None else decay_epochs,
            # half a step more, since timm compares with the next step: decay after a whole epoch, as in `step`
            decay_milestones=[epoch + 0.5 / steps_per_epoch for epoch in decay_milestones or []],  # type: ignore[misc]
            decay_rate=decay_rate,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,  # type: ignore[arg-type]
        )
    except ValueError as error:  # a phase shorter than a step
        raise ScheduleError(f"sched = {sched}: {error}") from None
    return scheduler


def schedule_problems(
    lr: float | None = None,
    epochs: float | None = None,
    *,
    sched: Sched = "cosine",
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 1e-6,
    decay_epochs: float | None = None,
    decay_milestones: Sequence[int] | None = None,
    **_: Any,
) -> list[str]:
    """Inconsistencies in the arguments of `create_scheduler`, one sentence each.

    Args:
        lr: Peak learning rate; None if not known yet.
        epochs: Length of the training in epochs; None if not known yet.
        sched: Form of the schedule; this and the following as in `create_scheduler`.
        warmup_epochs: Length of the warm-up.
        warmup_lr: Rate at step 0.
        min_lr: Rate at the end.
        decay_epochs: Interval, or length of the decay.
        decay_milestones: Epochs of `multistep`.
    """
    problems = []
    if epochs is not None and warmup_epochs > epochs:
        problems.append(f"warmup_epochs = {warmup_epochs:g} is longer than the whole training of {epochs:g} epochs")
    elif sched == "wsd" and decay_epochs is not None and decay_epochs >= 1 and epochs is not None:
        left = epochs - warmup_epochs
        if decay_epochs > left:
            problems.append(f"decay_epochs = {decay_epochs:g} is longer than the {left:g} epochs after the warm-up")
    if lr is not None and warmup_epochs and sched != "chained" and warmup_lr > lr:
        problems.append(f"warmup_lr = {warmup_lr:g} is above the rate {lr:g} that the warm-up leads to")
    if lr is not None and sched in ("cosine", "tanh", "poly", "wsd") and min_lr > lr:
        problems.append(f"min_lr = {min_lr:g} is above the rate {lr:g} that the schedule starts from")
    if sched == "multistep":
        milestones = list(decay_milestones or [])
        if not milestones or milestones != sorted(set(milestones)):
            problems.append(f"decay_milestones = {milestones} must be epochs in rising order, one at least")
    return problems
