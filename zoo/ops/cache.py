"""What parameters alone decide, kept for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.ops.dispatch import is_plain_eager

__all__ = ["KernelCache"]


class KernelCache:
    """A tensor that a module makes of its parameters and buffers alone, computed again only when one of them changed.

    Where gradients are wanted or the computation is transformed, it is computed anew and not kept; a compiler finds
    the kept one, as a constant. Copies and files of a module do not take it along.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._state: list[tuple[int, int, int]] = []

    def __call__(self, module: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), or what it answered before.

        Args:
            module: owner of all that the result depends on.
            compute: makes it.
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
