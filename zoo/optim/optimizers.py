"""Optimizers and schedules by name, from timm's factories, with parameter groups that know the zoo's models."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Le
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from timm.optim import create_optimizer_v2, list_optimizers
from timm.optim._param_groups import param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from zoo.optim.kar import ChainedCosine
from zoo.support.suggest import suggestion

UnitInterval = Annotated[float, Gt(0), Le(1)]
Sched = Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "chained"]


class ScheduleError(ValueError):
    """A schedule that does not fit the training; the message names the value and what it allows."""


def param_groups(model: nn.Module, weight_decay: float = 0.0, layer_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay and, where asked for, one learning rate scale per depth.

    Vectors (norm weights, layer scale), biases and whatever `model.no_weight_decay()` names are not decayed. With
    `layer_decay` a parameter of depth id `i` gets `lr_scale = layer_decay ** (max_id - i)`; ids come from
    `model.layer_ids()` where the model has them (UniRepLKNet's twelve groups), else from timm's `group_matcher`.

    Args:
        model: Any module; parameters that do not require a gradient are left out.
        weight_decay: Decay of the decayed groups.
        layer_decay: Factor per depth id in (0, 1]; None for one rate everywhere.

    Returns:
        Groups for a `torch.optim.Optimizer`, in a fixed order. `lr_scale` is applied by the schedule.
    """
    patterns = set(getattr(model, "no_weight_decay", set)())
    if layer_decay is not None and not hasattr(model, "layer_ids"):
        return param_groups_layer_decay(
            model, weight_decay, no_weight_decay_list=sorted(patterns), layer_decay=layer_decay
        )

    ids, max_id = getattr(model, "layer_ids")() if layer_decay is not None else ({}, 0)  # noqa: B009 (not a tensor)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        fixed = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, p) for p in patterns)
        depth = ids.get(name, max_id)
        if (depth, fixed) not in groups:
            groups[depth, fixed] = {"params": [], "weight_decay": 0.0 if fixed else weight_decay}
            if layer_decay is not None:
                groups[depth, fixed]["lr_scale"] = layer_decay ** (max_id - depth)
        groups[depth, fixed]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def create_optimizer(
    model: nn.Module,
    opt: str = "adamw",
    lr: PositiveFloat = 1e-3,
    weight_decay: NonNegativeFloat = 0.0,
    layer_decay: UnitInterval | None = None,
    betas: tuple[float, float] | None = None,
    eps: PositiveFloat | None = None,
    momentum: NonNegativeFloat = 0.9,
    kwargs: dict[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer of timm's registry over `param_groups(model, weight_decay, layer_decay)`.

    Args:
        model: The module whose parameters are optimised.
        opt: Name in timm's optimizer registry, for example `adamw`, `sgd`, `lamb`, `muon`, or `kar2`, `kar3`.
        lr: Peak learning rate.
        weight_decay: Decay of matrices and filters; vectors and biases are never decayed.
        layer_decay: Factor per depth, see `param_groups`.
        betas: Two moment decays, for optimizers that have them.
        eps: Denominator offset, for optimizers that have one.
        momentum: For optimizers that have one.
        kwargs: Further arguments of the optimizer's own constructor.

    Raises:
        ValueError: If no optimizer is called `opt`.
    """
    known = [str(name) for name in list_optimizers()]
    if opt not in known:
        raise ValueError(f"opt = {opt!r} is not an optimizer{suggestion(opt, known)}")
    extra: dict[str, Any] = {k: v for k, v in {"betas": betas and tuple(betas), "eps": eps}.items() if v is not None}
    groups = param_groups(model, weight_decay, layer_decay)
    return create_optimizer_v2(
        groups, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **extra, **(kwargs or {})
    )


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
    """A schedule of timm's, stepped once per optimizer step, after a linear warm-up.

    The rate is a function of the step and of these arguments alone, so a training that is resumed with other values
    follows those from there on.

    Args:
        optimizer: Its groups' `lr` is the peak; a group's `lr_scale` multiplies whatever the schedule says.
        total_steps: Optimizer steps of the whole training, warm-up included.
        steps_per_epoch: Optimizer steps in an epoch.
        sched: Form of the decay after the warm-up; `chained` is Terminator's, see `zoo.optim.kar.chained_factor`.
        warmup_epochs: Length of the warm-up in epochs; fractions are fine.
        warmup_lr: Rate at step 0.
        min_lr: Rate at the end (`cosine`, `tanh`, `poly`, `wsd`).
        decay_epochs: Interval of `step`, counted from the end of the warm-up, 30 where it is None. For `wsd` the length
            of the decay, or below 1 its share of what follows the warm-up, a fifth where it is None.
        decay_milestones: Epochs of `multistep`, counted from the end of the warm-up, in rising order.
        decay_rate: Factor of `step` and `multistep`; the power of `poly`.

    Raises:
        ScheduleError: If the warm-up is longer than the training, or a value does not fit the schedule's form.
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
            # timm compares with the next step: half a step more, and the rate falls after a whole epoch, as in `step`
            decay_milestones=[epoch + 0.5 / steps_per_epoch for epoch in decay_milestones or []],  # type: ignore[misc]
            decay_rate=decay_rate,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,  # type: ignore[arg-type]
        )
    except ValueError as error:  # a phase that is shorter than a step
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
    """What does not fit together in the arguments of `create_scheduler`, one sentence each.

    Args:
        lr: The peak rate; None where it is not known yet.
        epochs: Length of the training in epochs; None where it is not known yet.
        sched: Form of the schedule; this and what follows as in `create_scheduler`.
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
