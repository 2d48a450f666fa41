"""Conversion of any model from training form to deploy form."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["to_deploy"]

Model = TypeVar("Model", bound=nn.Module)


def to_deploy(model: Model, inplace: bool = False) -> Model:
    """Convert a model to its faster, equivalent form for inference.

    Every submodule with a `reparameterize()` method merges itself, or returns the module that replaces it (UniRepLKNet
    blocks fold their branches and normalisations); models without any are returned unchanged. Outputs in eval mode are
    the same. A second call changes nothing.

    Args:
        model: any module.
        inplace: convert `model` itself, unless it is itself replaced; by default a deep copy is converted and `model`
            remains trainable.

    Returns:
        The converted model: same device, dtype, training flags and `requires_grad` flags.

    Raises:
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_deploy takes a model (torch.nn.Module), not {type(model).__name__}")
    return _merged(model if inplace else copy.deepcopy(model), {})


def _merged(module: Any, done: dict[nn.Module, nn.Module]) -> Any:
    """A module in deploy form; `done` maps modules that were already converted."""
    if module not in done:
        reparameterize = getattr(module, "reparameterize", None)
        replacement = reparameterize() if callable(reparameterize) else None
        done[module] = replacement if isinstance(replacement, nn.Module) else module
        if done[module] is module:
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = _merged(child, done)
    return done[module]
