"""Attention that supports the transforms of `torch.func`."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.ops.dispatch import is_transformed

__all__ = ["transformable_attention"]


def transformable_attention(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Context in which torch's attention supports every `torch.func` derivative; the fused form has no forward mode."""
    return sdpa_kernel(SDPBackend.MATH) if is_transformed(*tensors) else nullcontext()
