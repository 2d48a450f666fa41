"""One call from training form to deploy form, for every family."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

__all__ = ["to_deploy"]

Model = TypeVar("Model", bound=nn.Module)


def to_deploy(model: Model, inplace: bool = False) -> Model:
    """Bring a model to its cheaper, equal form for inference.

    Every module of the tree that has a `reparameterize()` method merges itself, or answers the module that takes its
    place (UniRepLKNet blocks fold their branches and normalisations); models without any are returned as they are.
    The result gives the same outputs in eval mode. A second call changes nothing.

    Args:
        model: any module.
        inplace: convert `model` itself, if it is not a module that is replaced; by default a deep copy is converted
            and `model` stays trainable as it was.

    Returns:
        The converted model: same device, dtype, training flags and `requires_grad` flags.
    """
    return _merged(model if inplace else copy.deepcopy(model), {})


def _merged(module: Any, done: dict[nn.Module, nn.Module]) -> Any:
    """A module in deploy form; `done` holds those that were met before."""
    if module not in done:
        reparameterize = getattr(module, "reparameterize", None)
        replacement = reparameterize() if callable(reparameterize) else None
        done[module] = replacement if isinstance(replacement, nn.Module) else module
        if done[module] is module:
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = _merged(child, done)
    return done[module]
