"""Precision: what half precision would ruin."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

__all__ = ["at_least_float32", "autocast_disabled"]


def at_least_float32(x: Tensor) -> Tensor:
    """Upcast half precision to float32; leave float64 alone."""
    return x if x.dtype == torch.float64 else x.float()


def autocast_disabled(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which mixed precision is off on a device, for sums that half precision would ruin."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
