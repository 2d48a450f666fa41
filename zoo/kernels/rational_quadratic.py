"""The rational quadratic kernel, a mixture of Gaussian kernels over lengthscales."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.kernel import register_kernel
from zoo.kernels.positive import PositiveParameter, ScalarOrTensor
from zoo.kernels.radial import Radial

__all__ = ["RationalQuadratic"]


@register_kernel("rational_quadratic")
class RationalQuadratic(Radial):
    """k(x, z) = (1 + |(x - z) / lengthscale|^2 / (2 alpha))^-alpha; the Gaussian kernel as alpha goes to infinity.

    Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, equation 4.19.

    Args:
        lengthscale: One positive number, one per dimension (D,), or (..., D) or (..., 1) for a batch.
        alpha: Positive; one number, or (...) for a batch.
        learnable: Train both.
        device: Device of the parameters.
        dtype: Their dtype; torch's default if None.
    """

    alpha = PositiveParameter()

    def __init__(
        self,
        lengthscale: ScalarOrTensor = 1.0,
        alpha: ScalarOrTensor = 1.0,
        *,
        learnable: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(lengthscale, learnable=learnable, device=device, dtype=dtype)
        PositiveParameter.register(self, "alpha", alpha, learnable=learnable, device=device, dtype=dtype)

    def _of(self, q: Tensor) -> Tensor:
        alpha = type(self).alpha.of(self, q.dtype)[..., None, None]
        return torch.exp(-alpha * torch.log1p(q / (2 * alpha)))
