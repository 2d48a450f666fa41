"""The linear kernel around another origin."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.kernel import Kernel
from zoo.kernels.positive import ScalarOrTensor, as_numbers

__all__ = ["OffsetLinear"]


class OffsetLinear(Kernel):
    """k(x, z) = (x + offset) . (z + offset): linear functions that are zero at x = -offset.

    Args:
        offset: Added to every coordinate; one number, or (...) for a batch.
        learnable: Train it.
        device: Device of the parameters.
        dtype: Its dtype; torch's default if None.
    """

    has_features = True
    offset: Tensor

    def __init__(self, offset: ScalarOrTensor = 0.0, *, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        value = as_numbers("offset", offset).detach()
        if not bool(value.isfinite().all()):
            raise ValueError(f"offset={offset} must be finite")
        value = value.to(device=device, dtype=dtype, copy=True)
        if learnable:
            self.offset = torch.nn.Parameter(value)
        else:
            self.register_buffer("offset", value)

    def _features(self, X: Tensor) -> Tensor:
        """The shifted points (..., n, D)."""
        return X + self.offset.to(X.dtype)[..., None, None]
