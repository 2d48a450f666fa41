"""Kar2 and Kar3, the sign optimizers that Terminator was trained with, and their schedule; registered in timm.

>>> create_optimizer(model, opt="kar3", lr=0.001215, betas=(0.5, 0.95))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from timm.optim import OptimInfo
from timm.optim._optim_factory import default_registry
from timm.scheduler.scheduler import Scheduler
from torch import Tensor

__all__ = ["ChainedCosine", "Kar2", "Kar3", "chained_factor"]


class Kar(torch.optim.Optimizer):
    """Sign steps along the gradient g and along moving averages m of earlier gradients.

        p -= lr sign(g);   p -= lr sign(m_i) for every i;   then m_i = beta_i m_i + (1 - beta_i) g

    A step changes an entry by at most (1 + number of averages) * lr. There is no bias correction and no epsilon, so
    parameters without effect, whose gradient is rounding noise, move at full speed too.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of each moving average, in [0, 1).
        weight_decay: Decoupled weight decay (ours; the authors use none).

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1.215e-3, betas: Sequence[float] = (), weight_decay: float = 0.0
    ) -> None:
        if not lr > 0 or not weight_decay >= 0:
            raise ValueError(f"lr must be positive and weight_decay not negative, got {lr} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {tuple(betas)}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a step; `closure`, if given, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(f"{type(self).__name__} takes dense gradients only")
            grads: list[Tensor] = [p.grad for p in params]
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, torch._foreach_sign(grads), alpha=-group["lr"])
            for i, beta in enumerate(group["betas"], start=1):
                averages = [self._average(p, i) for p in params]
                torch._foreach_add_(params, torch._foreach_sign(averages), alpha=-group["lr"])
                torch._foreach_lerp_(averages, grads, 1 - beta)
        return loss

    def _average(self, p: Tensor, i: int) -> Tensor:
        state = self.state[p]
        if f"m{i}" not in state:
            state[f"m{i}"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state[f"m{i}"]


class Kar3(Kar):
    """:class:`Kar` with two averages; (0.5, 0.95) for CIFAR-10 and (0.75, 0.99) for CIFAR-100."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.215e-3,
        betas: Sequence[float] = (0.5, 0.95),
        weight_decay: float = 0.0,
    ) -> None:
        if len(betas) != 2:
            raise ValueError(f"Kar3 has two averages, got betas={tuple(betas)}")
        super().__init__(params, lr, betas, weight_decay)


class Kar2(Kar):
    """:class:`Kar` with one average, given as `betas=(0.95,)`."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1.215e-3, betas: Sequence[float] = (0.95,), weight_decay: float = 0.0
    ) -> None:
        if len(betas) != 1:
            raise ValueError(f"Kar2 has one average, got betas={tuple(betas)}; write betas: [0.95]")
        super().__init__(params, lr, betas, weight_decay)


for _kind, _what in ((Kar2, "one average"), (Kar3, "two averages")):
    default_registry.register(
        OptimInfo(
            name=_kind.__name__.lower(),
            opt_class=_kind,
            description=f"sign steps along the gradient and {_what} of it (Terminator)",
            has_eps=False,
            has_betas=True,
            num_betas=1 if _kind is Kar2 else 2,
        )
    )


def chained_factor(step: int, total: int, warmup: int) -> float:
    """Learning rate factor of the authors' chained linear warm-up and cosine at step `step`.

    Both act from the first step on, so the largest factor, at the end of the warm-up, is slightly above one.

    Args:
        step: Optimizer step t, from 0.
        total: Total number of steps.
        warmup: Number of warm-up steps W among them.
    """
    length, place = max(total - warmup, 1), step - warmup + 1
    if place > length:  # past the end, where the authors' chain ignores the warm-up
        return (1 + math.cos(math.pi * place / length)) / 2
    rise = 1e-8 + (1 - 1e-8) * min(step, warmup) / warmup if warmup else 1.0
    fall = 1 + math.cos(math.pi * place / length)
    return rise * fall / (1 + math.cos(math.pi * (warmup - 1) / length))


class ChainedCosine(Scheduler):
    """The authors' schedule as a timm scheduler: the base rate times :func:`chained_factor`."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int, warmup: int) -> None:
        super().__init__(optimizer, param_group_field="lr")
        self.total, self.warmup, self.t_in_epochs = total, warmup, False
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        return [value * chained_factor(t, self.total, self.warmup) for value in self.base_values]
