"""Optimizers by name, from timm's registry, with the zoo's parameter groups."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from pydantic import NonNegativeFloat, PositiveFloat
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from zoo.optim.groups import param_groups
from zoo.optim.muonh import by_method
from zoo.support.suggest import suggestion

UnitInterval = Annotated[float, Gt(0), Le(1)]


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
        opt: Name in timm's optimizer registry, for example `adamw`, `sgd`, `lamb`, `muon`, or `kar2`, `kar3`, `muonh`.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices and filters; vectors and biases are never decayed.
        layer_decay: Factor per depth, see `param_groups`.
        betas: Decays of both moments, for optimizers that have them.
        eps: Epsilon in the denominator, for optimizers that have one.
        momentum: For optimizers that have one.
        kwargs: Further arguments of the optimizer's own constructor.

    Raises:
        ValueError: The optimizer is unknown, or the model has nothing that it can train.
    """
    known = [str(name) for name in list_optimizers()]
    if opt not in known:
        raise ValueError(f"opt = {opt!r} is not an optimizer{suggestion(opt, known)}")
    extra: dict[str, Any] = {k: v for k, v in {"betas": betas and tuple(betas), "eps": eps}.items() if v is not None}
    groups = param_groups(model, weight_decay, layer_decay)
    if opt == "muonh":
        groups = by_method(groups, model)
    return create_optimizer_v2(
        groups, opt=opt, lr=lr, weight_decay=weight_decay, momentum=momentum, **extra, **(kwargs or {})
    )
