"""White noise as a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.kernel import Kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor

__all__ = ["WhiteNoise"]


class WhiteNoise(Kernel):
    """Variance on the diagonal of k(X): independent noise for every row.

    Between two sets of points, k(X, Z), it is 0, even where points coincide: a second measurement at the same point has
    independent noise. So a Gaussian process with this kernel predicts the noise-free function.

    Args:
        variance: Positive; one number, or (...) for a batch.
        learnable: Train it.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    variance = PositiveParameter("exp", floor=0.0)

    def __init__(self, variance: ScalarOrTensor = 1.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        PositiveParameter.register(self, "variance", variance, learnable=learnable, device=device, dtype=dtype)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        variance = self.variance.to(X.dtype)[..., None, None]
        if Z is None:
            return variance * torch.eye(X.shape[-2], dtype=X.dtype, device=X.device).expand(*X.shape[:-1], -1)
        zeros = X.new_zeros(X.shape[:-1]).unsqueeze(-1) * Z.new_zeros(Z.shape[:-1]).unsqueeze(-2)
        return variance * zeros

    def _diag(self, X: Tensor) -> Tensor:
        return self.variance.to(X.dtype)[..., None] * X.new_ones(X.shape[:-1])
