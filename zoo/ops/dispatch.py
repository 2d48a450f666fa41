"""Dispatch guards: when is it safe to bypass torch's dispatcher?

Not while tracing, or with tensor subclasses, `torch.func` transforms, dual numbers or dispatch modes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_plain_eager", "is_tracing", "is_transformed", "known_value", "shared_value", "values_known"]


def is_plain_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether these are ordinary tensors with storage, outside of any transform, dual level or dispatch mode."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_in_torch_dispatch_mode():
        return False
    for t in tensors:
        if not (type(t) is Tensor or type(t) is nn.Parameter) or not torch._C._has_storage(t):
            return False  # batched gradients have no storage
    return True


def is_tracing(x: Tensor) -> bool:
    """Whether torch's operators must be called one by one.

    True for compilers, exporters and tracers (later calls may have other sizes), dispatch modes, and transforms
    (`torch.func`, forward-mode derivatives), which have no rules for shortcuts.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return True
    return is_in_torch_dispatch_mode() or is_transformed(x)


def is_transformed(*tensors: Tensor) -> bool:
    """Whether tensors are batched (`vmap`) or carry tangents or gradients of an outer function."""
    if torch.compiler.is_compiling() or any(isinstance(t, torch.fx.Proxy) for t in tensors):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    return not all(torch._C._has_storage(t) for t in tensors)


def shared_value(t: Tensor) -> Tensor:
    """Value of a tensor that is equal for all members of a `vmap`.

    Raises:
        ValueError: It differs.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        inner = functorch.get_unwrapped(t)
        if functorch.is_batchedtensor(t):
            many = inner.movedim(functorch.maybe_get_bdim(t), 0)
            if not bool((many == many[:1]).all()):
                raise ValueError("networks that have seen different classes cannot be mapped over together")
            inner = many[0]
        t = inner
    return t


def values_known(*tensors: Tensor) -> bool:
    """Whether Python control flow may depend on the values: they exist, are not batched, and nothing is traced."""
    return not any(t.is_meta or is_tracing(t) for t in tensors)


def known_value(t: Tensor) -> Tensor | None:
    """Concrete value of a tensor, the same for all members of a `vmap`; None if it is not available (meta, compiler).

    Raises:
        ValueError: The members of a `vmap` differ.
    """
    return None if t.is_meta or torch.compiler.is_compiling() else shared_value(t)
