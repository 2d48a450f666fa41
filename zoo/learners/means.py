r"""Mean functions of Gaussian processes: prior knowledge of the shape of the function.

Their values are parameters, learned together with the kernel's; each may have leading batch dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["BoxMean", "ConstantMean", "LinearMean", "TrapezoidMean", "ZeroMean"]


class ZeroMean(nn.Module):
    """m(x) = 0."""

    def forward(self, X: Tensor) -> Tensor:
        """Points (..., n, D) -> zeros (..., n)."""
        return X.new_zeros(X.shape[:-1])


class ConstantMean(nn.Module):
    """m(x) = constant.

    Args:
        constant: Initial value.
        learnable: Train it.
    """

    constant: Tensor

    def __init__(self, constant: ScalarOrTensor = 0.0, *, learnable: bool = True) -> None:
        super().__init__()
        _register(self, "constant", constant, learnable)

    def forward(self, X: Tensor) -> Tensor:
        """Points (..., n, D) -> the constant (..., n)."""
        return self.constant.to(X.dtype)[..., None] + X.new_zeros(X.shape[:-1])


class LinearMean(nn.Module):
    """m(x) = weight . x + constant.

    Args:
        weight: Initial value (D,).
        constant: Initial value.
        learnable: Train both.
    """

    weight: Tensor
    constant: Tensor

    def __init__(self, weight: ScalarOrTensor, constant: ScalarOrTensor = 0.0, *, learnable: bool = True) -> None:
        super().__init__()
        _register(self, "weight", weight, learnable)
        _register(self, "constant", constant, learnable)
        if self.weight.ndim < 1:
            raise ValueError("weight must be one number per dimension (D,)")

    def forward(self, X: Tensor) -> Tensor:
        """Points (..., n, D) -> (..., n).

        Raises:
            ValueError: D is not the size of the weight.
        """
        if X.shape[-1] != self.weight.shape[-1]:
            raise ValueError(f"the points have {X.shape[-1]} dimensions, the weight {self.weight.shape[-1]}")
        return (X @ self.weight.to(X.dtype).unsqueeze(-1)).squeeze(-1) + self.constant.to(X.dtype)[..., None]


class BoxMean(nn.Module):
    """A transit: m(t) = constant - depth where |t - centre| <= duration / 2, else constant; points (..., n, 1).

    Centre and duration have no gradient and are buffers; use a grid search, or start with :class:`TrapezoidMean`.

    Args:
        constant: Level outside of the transit.
        depth: Depth of the transit.
        centre: Middle of the transit.
        duration: Its length, positive.
        learnable: Train constant and depth.
    """

    constant: Tensor
    depth: Tensor
    centre: Tensor
    duration: Tensor

    def __init__(
        self,
        constant: ScalarOrTensor = 1.0,
        depth: ScalarOrTensor = 0.0,
        centre: ScalarOrTensor = 0.0,
        duration: ScalarOrTensor = 1.0,
        *,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        _register(self, "constant", constant, learnable)
        _register(self, "depth", depth, learnable)
        _register(self, "centre", centre, False)
        _register(self, "duration", duration, False)
        if not bool((self.duration > 0).all()):
            raise ValueError(f"duration={duration} must be positive")

    def forward(self, X: Tensor) -> Tensor:
        """Times (..., n, 1) -> (..., n)."""
        constant, depth, centre, duration = _columns(X, self.constant, self.depth, self.centre, self.duration)
        inside = (_times(X) - centre).abs() <= duration / 2
        return constant - torch.where(inside, depth, 0.0)


class TrapezoidMean(nn.Module):
    """A transit with sloped sides: m(t) = constant - depth clip((duration / 2 - |t - centre|) / ingress, 0, 1).

    Args:
        constant: Level outside of the transit.
        depth: Depth of the transit.
        centre: Middle of the transit.
        duration: From first to last contact, positive.
        ingress: Duration of each slope, positive.
        learnable: Train all of them.
    """

    duration = PositiveParameter()
    ingress = PositiveParameter()
    constant: Tensor
    depth: Tensor
    centre: Tensor

    def __init__(
        self,
        constant: ScalarOrTensor = 1.0,
        depth: ScalarOrTensor = 0.0,
        centre: ScalarOrTensor = 0.0,
        duration: ScalarOrTensor = 1.0,
        ingress: ScalarOrTensor = 0.1,
        *,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        _register(self, "constant", constant, learnable)
        _register(self, "depth", depth, learnable)
        _register(self, "centre", centre, learnable)
        PositiveParameter.register(self, "duration", duration, learnable=learnable, dtype=torch.float64)
        PositiveParameter.register(self, "ingress", ingress, learnable=learnable, dtype=torch.float64)

    def forward(self, X: Tensor) -> Tensor:
        """Times (..., n, 1) -> (..., n)."""
        numbers = self.constant, self.depth, self.centre, self.duration, self.ingress
        constant, depth, centre, duration, ingress = _columns(X, *numbers)
        return constant - depth * ((duration / 2 - (_times(X) - centre).abs()) / ingress).clamp(0, 1)


def _register(module: nn.Module, name: str, value: ScalarOrTensor, learnable: bool) -> None:
    number = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    if not bool(number.isfinite().all()):
        raise ValueError(f"{name}={value} must be finite")
    if learnable:
        setattr(module, name, nn.Parameter(number))
    else:
        module.register_buffer(name, number)


def _columns(X: Tensor, *numbers: Tensor) -> list[Tensor]:
    return [number.to(X.dtype)[..., None] for number in numbers]


def _times(X: Tensor) -> Tensor:
    if X.shape[-1] != 1:
        raise ValueError(f"a transit is a function of time: points are (..., n, 1), not of {X.shape[-1]} dimensions")
    return X[..., 0]
