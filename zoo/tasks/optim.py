"""Optimizers and schedules by name, from timm's factories, with parameter groups that know the zoo's models."""

from __future__ import annotations

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

from zoo.suggest import suggestion
from zoo.tasks.kar import ChainedCosine

UnitInterval = Annotated[float, Gt(0), Le(1)]


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
    sched: Literal["cosine", "constant", "step", "multistep", "poly", "tanh", "wsd", "chained"] = "cosine",
    warmup_epochs: NonNegativeFloat = 0.0,
    warmup_lr: NonNegativeFloat = 0.0,
    min_lr: NonNegativeFloat = 1e-6,
    decay_epochs: PositiveFloat = 30.0,
    decay_milestones: list[PositiveInt] | None = None,
    decay_rate: UnitInterval = 0.1,
) -> Scheduler:
    """A schedule of timm's, stepped once per optimizer step, after a linear warm-up.

    Args:
        optimizer: Its groups' `lr` is the peak; a group's `lr_scale` multiplies whatever the schedule says.
        total_steps: Optimizer steps of the whole training, warm-up included.
        steps_per_epoch: Optimizer steps in an epoch.
        sched: Form of the decay after the warm-up; `chained` is Terminator's, see `zoo.tasks.kar.chained_factor`.
        warmup_epochs: Length of the warm-up in epochs; fractions are fine.
        warmup_lr: Rate at step 0.
        min_lr: Rate at the last step (`cosine`, `tanh`, `poly`, `wsd`).
        decay_epochs: Interval of `step`.
        decay_milestones: Epochs of `multistep`.
        decay_rate: Factor of `step` and `multistep`.

    Raises:
        ValueError: If the warm-up is longer than the training.
    """
    epochs = total_steps / steps_per_epoch
    if warmup_epochs > epochs:
        raise ValueError(f"warmup_epochs = {warmup_epochs:g} is longer than the whole training of {epochs:g} epochs")
    if sched == "chained":
        return ChainedCosine(optimizer, total_steps, round(warmup_epochs * steps_per_epoch))
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=sched,
        num_epochs=max(epochs - warmup_epochs, 1 / steps_per_epoch),  # type: ignore[arg-type]
        warmup_epochs=warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        decay_epochs=decay_epochs,
        decay_milestones=decay_milestones or [],
        decay_rate=decay_rate,
        warmup_prefix=True,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,  # type: ignore[arg-type]
    )
    return scheduler
