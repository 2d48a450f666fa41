"""Mean and standard deviation of columns, with what is constant up to rounding recognised as constant.

>>> mean, scale = standardisation(rows)      # rows (n, D) -> (D,), (D,)
>>> rows = (rows - mean) / scale

A column of 0.1 has, by rounding alone, a computed deviation of 1e-17; divided by it, the first other value becomes
1e16. Its scale is 1 here, and so is that of every column whose variance is within the error of its computation.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

__all__ = ["constant", "standardisation", "standardised"]

_EPS = torch.finfo(torch.float64).eps


def constant(variance: Tensor, mean: Tensor, count: Tensor | int) -> Tensor:
    """Whether a variance is no more than the rounding errors of its computation, as scikit-learn bounds them.

    The bound is n eps var + (n mean eps)^2, for two passes in float64 over n values (Chan, Golub and LeVeque, 1983).

    Args:
        variance: Variances, float64.
        mean: Means, float64, of the same shape.
        count: Number n of values behind each; broadcast.

    Returns:
        True where the values cannot be told from equal ones, of the shape of `variance`.
    """
    return variance <= count * _EPS * variance + (count * mean * _EPS).square()


@overload
def standardisation(rows: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def standardisation(
    rows: np.ndarray[Any, Any], weight: np.ndarray[Any, Any] | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]: ...
def standardisation(rows: Any, weight: Any = None) -> Any:
    """Mean and standard deviation of each column; a column that is constant up to rounding gets 1.

    Two passes in float64, whatever the type of the rows, on columns scaled by a power of two: small differences on a
    large level (1e9 +- 500), small numbers (589e-9 +- 1e-13) and extreme ones (1e-200, 1e200) all come out right. The
    mean of equal values is that value, to the bit.

    Args:
        rows: Values (n, D) or (..., n, D), a tensor or an array of any real type.
        weight: Weights of the rows (..., n), not negative; they need not add up to 1. None weighs all rows alike. With
            a leading dimension B and rows (n, D) there are B means of D columns.

    Returns:
        Mean and scale, (..., D), float64, of the kind (tensor, array) and on the device of `rows`; NaN where a column
        has a NaN or an infinity.

    Raises:
        ValueError: There are no rows.
    """
    if isinstance(rows, np.ndarray):
        given = None if weight is None else torch.from_numpy(np.array(weight, np.float64))
        mean, scale = standardisation(torch.from_numpy(np.array(rows, np.float64)), given)
        return mean.numpy(), scale.numpy()
    rows = rows.detach().double()
    if rows.shape[-2] == 0:
        raise ValueError("mean and deviation need at least one row")
    weight = rows.new_ones(rows.shape[-2]) if weight is None else weight.detach().to(rows)
    count = (weight > 0).sum(-1, keepdim=True)
    weight = (weight / weight.sum(-1, keepdim=True)).unsqueeze(-2)  # (..., 1, n)
    unit = _unit(rows)
    rows = rows / unit
    mean = weight @ rows
    rows = rows - mean
    correction = weight @ rows  # what rounding left in the mean
    variance = (weight @ rows.square() - correction.square()).clamp_min(0).squeeze(-2)
    mean, unit = (mean + correction).squeeze(-2), unit.squeeze(-2)
    scale = torch.where(constant(variance, mean, count), 1.0 / unit, variance.sqrt())
    return mean * unit, scale * unit


def standardised(rows: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Raw rows in units of their columns, in `dtype`.

    They are rounded to it last: float32 cannot hold a small difference on a large level, nor a time in milliseconds.

    Args:
        rows: Values (..., D) of any real type.
        mean: What is subtracted (D), or any shape that broadcasts.
        scale: What the difference is divided by, likewise.
        dtype: Type of the answer.
    """
    if rows.dtype == torch.int64 or rows.dtype == torch.int32:
        rows = rows.double()
    exact = torch.promote_types(torch.promote_types(rows.dtype, mean.dtype), torch.float32)
    return ((rows.to(exact) - mean.to(exact)) / scale.to(exact)).to(dtype)


def _unit(rows: Tensor) -> Tensor:
    """A power of two as large as the largest magnitude of each column (..., 1, D), 1 for a column of zeros."""
    largest = rows.abs().amax(-2, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    return torch.where(largest.isfinite() & (largest > 0), torch.ldexp(torch.ones_like(largest), exponent), 1.0)
