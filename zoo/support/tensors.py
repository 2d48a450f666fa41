"""Tensors that come from elsewhere: whether they are plain numbers, and whether others can hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["all_finite", "not_held", "not_plain", "unusual", "without_grad"]

#: Types of numbers that every operation of loading knows.
_NUMBERS: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool)
_NUMBERS += (torch.complex64, torch.complex128)
_NUMBERS += (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
_NUMBERS += (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def unusual(tensor: Tensor) -> str:
    """What distinguishes a tensor from plain, dense numbers in memory; empty for a plain one."""
    if tensor.is_meta:
        return "on the meta device, without values"
    if is_lazy(tensor):
        return "not initialised, without values"
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"of the layout {str(tensor.layout).removeprefix('torch.').strip('_')}"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}"
    return "" if tensor.dtype in _NUMBERS else f"of the type {tensor.dtype}"


def not_plain(content: Any) -> str:
    """Name of the first tensor at any depth that is not plain, and what it is; empty if all are.

    Args:
        content: Content of a file, or a state dict: mappings and lists.
    """
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if odd := unusual(value):
                return f"{name or 'its tensor'} is {odd}"
        elif id(value) not in seen:  # a file can nest a list in itself
            seen.add(id(value))
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            inner = [(key, part) for key, part in parts if isinstance(part, Tensor | Mapping | list | tuple)]
            waiting += [(f"{name}.{key}"[:200] if name else f"{key}"[:200], part) for key, part in reversed(inner)]
    return ""


def not_held(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Name of the first given tensor whose numbers another type does not hold, and why; empty if all are held.

    Whole numbers are not taken for real ones (quantised files need their scales), and no number may become infinite.

    Args:
        own: Tensors by name, to which the given ones are to be copied.
        given: Plain tensors; other names, and values of other kinds, are ignored.
    """
    for name, tensor in given.items():
        if name not in own or not isinstance(tensor, Tensor) or own[name].dtype == tensor.dtype:
            continue
        dtype = own[name].dtype
        if _kind(own[name]) != _kind(tensor):
            return f"{name} is {tensor.dtype}, the model's {dtype}; convert the file first"
        converted = tensor.to(dtype)
        if _kind(tensor) == "whole":
            lost = converted.long() != tensor.long()
        else:
            lost = _finite(tensor) & ~_finite(converted)
        if bool(lost.any()):
            worst = tensor[lost][0].item()
            return f"{name} holds {worst:.4g}, which the model's {dtype} cannot hold: build the model with a wider type"
    return ""


def without_grad(values: Any) -> Any:
    """A tensor that takes part in a gradient as one that does not, which NumPy reads; anything else as it is."""
    return values.detach() if isinstance(values, Tensor) else values


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    return bool(_finite(tensor).all())


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "whole"


def _finite(tensor: Tensor) -> Tensor:
    small = tensor.is_floating_point() and tensor.dtype.itemsize < 2  # torch has no isfinite for them
    return (tensor.float() if small else tensor).isfinite()
