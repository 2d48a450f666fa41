"""Cache for tensors that depend on parameters only, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ops.dispatch import is_plain_eager

__all__ = ["KernelCache"]


class KernelCache:
    """Caches a tensor computed from a module's parameters and buffers; recomputed when one of them changes.

    With gradients or under a transform it is recomputed each time and not cached; a compiler sees the cached value as a
    constant. Copies and pickles of a module start with an empty cache.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._state: list[tuple[int, int, int]] = []

    def __call__(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or its cached result.

        Args:
            module: owner of everything that the result depends on.
            compute: computes the tensor.
        """
        if torch.compiler.is_compiling():
            return compute() if self.value is None else self.value
        owned = [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        if not is_plain_eager(owned) or (torch.is_grad_enabled() and any(t.requires_grad for t in owned)):
            return compute()
        state = [(id(t), 0 if t.is_inference() else t._version, t.data_ptr()) for t in owned]
        if self.value is None or self._state != state:
            with torch.inference_mode(False), torch.no_grad():
                self.value = compute()
            self._state = state
        return self.value

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelCache:
        return KernelCache()

    def __reduce__(self) -> tuple[type[KernelCache], tuple[()]]:
        return KernelCache, ()
