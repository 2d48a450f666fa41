"""Hyper-parameters of a kernel, or of a learner with a kernel, as values instead of raw parameters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.positive import PositiveParameter, as_numbers

__all__ = ["Hyperparameter", "hyperparameters"]


class Hyperparameter(NamedTuple):
    """A hyper-parameter of a module.

    Attributes:
        module: Its owner.
        name: Attribute name in the owner.
        raw: The raw tensor; the value itself if it is unconstrained.
    """

    module: nn.Module
    name: str
    raw: Tensor

    def positive(self) -> PositiveParameter | None:
        """Its positivity constraint, or None."""
        found = getattr(type(self.module), self.name, None)
        return found if isinstance(found, PositiveParameter) else None

    @property
    def value(self) -> Tensor:
        """The value; differentiable."""
        return getattr(self.module, self.name)

    @torch.no_grad()
    def set(self, value: Tensor | float) -> None:
        """Assign a new value.

        Raises:
            ValueError: The value is out of range or of the wrong shape.
        """
        if self.positive() is not None:
            setattr(self.module, self.name, value)
            return
        new = as_numbers(self.name, value)
        if not bool(new.isfinite().all()):
            raise ValueError(f"{self.name} must be finite")
        self.raw.copy_(new.expand(self.raw.shape))


def hyperparameters(module: nn.Module) -> dict[str, Hyperparameter]:
    """Trainable hyper-parameters by path, such as `kernels.0.lengthscale`, in the order of `parameters()`."""
    found = {}
    for path, raw in module.named_parameters():
        owner, _, leaf = path.rpartition(".")
        parent = module.get_submodule(owner)
        name = leaf.removeprefix("raw_")
        if not isinstance(getattr(type(parent), name, None), PositiveParameter):
            name = leaf
        found[f"{owner}.{name}" if owner else name] = Hyperparameter(parent, name, raw)
    return found
