"""The numbers that a kernel, or a learner around it, is tuned by: as they are read, not as they are stored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.positive import PositiveParameter

__all__ = ["Hyperparameter", "hyperparameters"]


class Hyperparameter(NamedTuple):
    """One of a module's hyper-parameters.

    Attributes:
        module: Its owner.
        name: Its name there.
        raw: The tensor behind it; itself where it may be any number.
    """

    module: nn.Module
    name: str
    raw: Tensor

    def positive(self) -> PositiveParameter | None:
        """How it is stored, where it must be positive."""
        found = getattr(type(self.module), self.name, None)
        return found if isinstance(found, PositiveParameter) else None

    @property
    def value(self) -> Tensor:
        """As it is read; differentiable."""
        return getattr(self.module, self.name)

    @torch.no_grad()
    def set(self, value: Tensor | float) -> None:
        """Give it another value.

        Raises:
            ValueError: The value is out of range, or of a shape that does not fit.
        """
        if self.positive() is not None:
            setattr(self.module, self.name, value)
            return
        new = torch.as_tensor(value, dtype=torch.float64, device="cpu")
        if not bool(new.isfinite().all()):
            raise ValueError(f"{self.name} must be finite")
        self.raw.copy_(new.expand(self.raw.shape))


def hyperparameters(module: nn.Module) -> dict[str, Hyperparameter]:
    """Hyper-parameters that can be learned, by path: `kernels.0.lengthscale`, in the order of `parameters()`."""
    found = {}
    for path, raw in module.named_parameters():
        owner, _, leaf = path.rpartition(".")
        parent = module.get_submodule(owner)
        name = leaf.removeprefix("raw_")
        if not isinstance(getattr(type(parent), name, None), PositiveParameter):
            name = leaf
        found[f"{owner}.{name}" if owner else name] = Hyperparameter(parent, name, raw)
    return found
