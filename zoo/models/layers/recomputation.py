"""Activation checkpointing: keep only a module's inputs and recompute the rest in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_contexts", "recompute_in_backward"]


def recompute_in_backward(module: nn.Module, enable: bool = True) -> None:
    """Enable or disable activation checkpointing of a module.

    The second forward pass leaves running statistics alone, so that no batch counts twice.
    """
    module.__dict__.pop("forward", None)
    if enable:
        module.forward = partial(_recomputed, module)


def _recomputed(module: nn.Module, *args: Any) -> Any:
    context = partial(recompute_contexts, module)
    return checkpoint(partial(type(module).forward, module), *args, use_reentrant=False, context_fn=context)


def recompute_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed forward pass and of its recomputation, which must not update running statistics."""
    return nullcontext(), _borrowed_statistics(module)


@contextmanager
def _borrowed_statistics(module: nn.Module) -> Iterator[None]:
    """Let a module update copies of its buffers, and restore the originals afterwards."""
    kept = [(m, name, b) for m in module.modules() for name, b in m.named_buffers(recurse=False)]
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            setattr(owner, name, buffer)
