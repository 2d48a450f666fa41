"""Torch's attention where a computation may be transformed."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.ops.dispatch import is_transformed

__all__ = ["transformable_attention"]


def transformable_attention(*tensors: Tensor) -> AbstractContextManager[Any]:
    """Within it, torch's attention has every derivative that `torch.func` takes; its fused form has none forwards."""
    return sdpa_kernel(SDPBackend.MATH) if is_transformed(*tensors) else nullcontext()
