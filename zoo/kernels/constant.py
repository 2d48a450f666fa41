"""The constant kernel."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.kernel import Kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["Constant"]


class Constant(Kernel):
    """k(x, z) = variance: the covariance of a random constant function.

    Args:
        variance: Positive; one number, or (...) for a batch.
        learnable: Train it.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    variance = PositiveParameter("exp", floor=0.0)
    has_features = True

    def __init__(self, variance: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        PositiveParameter.register(self, "variance", variance, learnable=learnable, device=device, dtype=dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        Y = X if Z is None else Z
        ones = X.new_ones(X.shape[:-1]).unsqueeze(-1) * Y.new_ones(Y.shape[:-1]).unsqueeze(-2)
        return self.variance.to(X.dtype)[..., None, None] * ones

    def _diag(self, X: Tensor) -> Tensor:
        return self.variance.to(X.dtype)[..., None] * X.new_ones(X.shape[:-1])

    def _features(self, X: Tensor) -> Tensor:
        """One column, the standard deviation."""
        return (self.variance.to(X.dtype).sqrt()[..., None] * X.new_ones(X.shape[:-1])).unsqueeze(-1)
