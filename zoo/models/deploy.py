"""One call from training form to deploy form, for every family."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

__all__ = ["to_deploy"]

Model = TypeVar("Model", bound=nn.Module)


def to_deploy(model: Model, inplace: bool = False) -> Model:
    """Bring a model to its cheaper, equal form for inference.

    Every module of the tree that has a `reparameterize()` method merges itself (UniRepLKNet blocks fold their
    branches and normalisations); models without any are returned as they are. The result gives the same
    outputs in eval mode. A second call changes nothing.

    Args:
        model: any module.
        inplace: convert `model` itself; by default a deep copy is converted and `model` stays trainable as it
            was.

    Returns:
        The converted model: same device, dtype, training flags and `requires_grad` flags.
    """
    if not inplace:
        model = copy.deepcopy(model)
    for module in list(model.modules()):  # a list, because merging removes modules
        reparameterize = getattr(module, "reparameterize", None)
        if callable(reparameterize):
            reparameterize()
    return model
