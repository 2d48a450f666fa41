"""Who is watching a computation: shortcuts are taken only where nobody would notice but by the clock."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["is_exported", "is_ordinary", "is_recorded", "is_transformed"]


def is_recorded(x: Tensor) -> bool:
    """Whether the library's operators are wanted, one by one.

    A compiler, exporter or tracer is watching (later calls may have other sizes), or a mode that counts, or the
    computation is transformed (`torch.func`, forward-mode derivatives), for which shortcuts have no rules.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy):
        return True
    return is_in_torch_dispatch_mode() or is_transformed()


def is_transformed() -> bool:
    """Whether tensors may stand for many (`vmap`), or carry tangents or gradients of an outer function."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_exported(x: Tensor) -> bool:
    """Whether an exporter or tracer is watching, who wants the library's operators."""
    return is_recorded(x) and (torch.compiler.is_exporting() or not torch.compiler.is_compiling())


def is_ordinary(*tensors: Tensor) -> bool:
    """Whether these are tensors with memory of their own, no subclasses, and nobody is recording or transforming."""
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and not is_in_torch_dispatch_mode()
        and not is_transformed()
    )
