"""Shared numerics: sums that would overflow in half precision, and higher derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.ops.dispatch import values_known

__all__ = ["at_least_float32", "autocast_disabled", "differentiable_grad", "without_padding"]


def at_least_float32(x: Tensor) -> Tensor:
    """Upcast half precision to float32 (squares and sums overflow in half); other dtypes are unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def without_padding(tokens: Tensor) -> Tensor:
    """Tokens (B, L) without trailing columns that are padding (0) in every row; unchanged while tracing."""
    return tokens[:, : int((tokens != 0).sum(1).max())] if values_known(tokens) and len(tokens) else tokens


def autocast_disabled(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context that disables autocast on a device, for sums that would overflow in half precision."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def differentiable_grad(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of function(*inputs) that are differentiable again and work under `vmap`.

    Args:
        function: Composed of differentiable operators.
        inputs: Its arguments; a tensor may occur twice.
        wanted: Whether each input's gradient is needed.
        grad: Gradient of the result.
    """
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in inputs]  # distinct tensors, even if one is given twice
        y = function(*own)
    chosen = [t for t, wants in zip(own, wanted, strict=True) if wants and t is not None]
    found = iter(torch.autograd.grad(y, chosen, grad, create_graph=True))
    return tuple(next(found) if wants else None for wants in wanted)
