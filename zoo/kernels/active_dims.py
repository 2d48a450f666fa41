"""A kernel on a subset of the columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.kernels.kernel import Kernel

__all__ = ["ActiveDims"]


class ActiveDims(Kernel):
    """k(x, z) = k_1(x[dims], z[dims]): a kernel applied to some columns of the points.

    >>> ActiveDims(Periodic(), [0]) * ActiveDims(Gaussian([1.0, 2.0]), [1, 2])

    Args:
        kernel: The kernel k_1.
        dims: Its columns, distinct integers of at least 0.

    Raises:
        ValueError: `dims` is empty or invalid.
    """

    dims: Tensor
    kernel: Kernel

    def __init__(self, kernel: Kernel, dims: Sequence[int]) -> None:
        super().__init__()
        columns = list(dims)
        if not columns or any(int(d) != d or d < 0 for d in columns) or len(set(columns)) < len(columns):
            raise ValueError(f"dims={columns} must be one or more different whole numbers of at least 0")
        self.kernel, self.columns = kernel, tuple(map(int, columns))
        self.register_buffer("dims", torch.tensor(self.columns), persistent=False)

    @property
    def has_features(self) -> bool:  # type: ignore[override]
        """Whether k_1 has features."""
        return self.kernel.has_features

    def _of(self, X: Tensor) -> Tensor:
        if max(self.columns) >= X.shape[-1]:
            raise ValueError(f"the points have {X.shape[-1]} dimensions; there is no column {max(self.columns)}")
        return X.index_select(-1, self.dims)

    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.kernel(self._of(X), None if Z is None else self._of(Z))

    def _diag(self, X: Tensor) -> Tensor:
        return self.kernel.diag(self._of(X))

    def _features(self, X: Tensor) -> Tensor:
        return self.kernel.features(self._of(X))

    def extra_repr(self) -> str:
        """The columns."""
        return f"dims={list(self.columns)}"
