"""Mean and standard deviation of columns; columns that are constant up to rounding are treated as constant.

>>> mean, scale = standardisation(rows)      # rows (n, D) -> (D,), (D,)
>>> rows = (rows - mean) / scale

A column of 0.1 has a computed deviation of 1e-17 by rounding alone; dividing by it would turn the first other value
into 1e16. Its scale is 1 here, as for every column whose variance is within rounding error.
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

__all__ = ["OWN", "UNSCALED", "block_scale", "constant", "power_of_two", "standardisation", "standardised"]

_EPS = torch.finfo(torch.float64).eps


def constant(variance: Tensor, mean: Tensor, count: Tensor | int) -> Tensor:
    """Whether a variance is no larger than its rounding error, with the bound of scikit-learn.

    The bound is n eps var + (n mean eps)^2, for two passes in float64 over n values (Chan, Golub and LeVeque, 1983).

    Args:
        variance: Variances, float64.
        mean: Means, float64, of the same shape.
        count: Number n of values behind each variance; broadcasts.

    Returns:
        True where the values are indistinguishable from equal ones, with the shape of `variance`.
    """
    return variance <= count * _EPS * variance + (count * mean * _EPS).square()


@overload
def standardisation(rows: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
@overload
def standardisation(
    rows: np.ndarray[Any, Any], weight: np.ndarray[Any, Any] | None = None
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]: ...
def standardisation(rows: Any, weight: Any = None) -> Any:
    """Mean and standard deviation of each column; columns that are constant up to rounding get scale 1.

    Two passes in float64, whatever the input dtype, on columns scaled by a power of two. This is accurate for small
    differences on a large offset (1e9 +- 500), small values (589e-9 +- 1e-13) and extreme ones (1e-200, 1e200); the
    mean of equal values is exactly that value.

    Args:
        rows: Values (n, D) or (..., n, D), a tensor or array of any real type.
        weight: Non-negative row weights (..., n), not necessarily normalised; None weighs all rows equally. With a
            leading dimension B and rows (n, D), B means of D columns are returned.

    Returns:
        Mean and scale, (..., D), float64, tensors or arrays on the device of `rows`; NaN where a column has a NaN or an
        infinity.

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
    unit = power_of_two(rows)
    rows = rows / unit
    mean = weight @ rows
    rows = rows - mean
    correction = weight @ rows  # rounding error of the mean
    variance = (weight @ rows.square() - correction.square()).clamp_min(0).squeeze(-2)
    mean, unit = (mean + correction).squeeze(-2), unit.squeeze(-2)
    scale = torch.where(constant(variance, mean, count), 1.0 / unit, variance.sqrt())
    return mean * unit, scale * unit


#: In `blocks` of :func:`block_scale`: a column with a scale of its own, and one that is not scaled.
OWN = -1
UNSCALED = -2


def block_scale(scale: Tensor, blocks: Tensor | None) -> Tensor:
    """One scale for all columns of a block, the root of the sum of their variances.

    The inputs of a category then vary as much as one number, however many they are; for two categories it is the same
    as one standardised input of 0 and 1. An input that says where a rare thing is, such as a gap, is better not scaled:
    by its own deviation, rows with a gap would be far from all others.

    Args:
        scale: Of each column (D,), as from :func:`standardisation`: 1 where constant, and else below 1 in blocks.
        blocks: Number of each column's block (D,), or :data:`OWN`, or :data:`UNSCALED`. None: all have their own.
    """
    if blocks is None:
        return scale
    scale = torch.where(blocks == UNSCALED, 1.0, scale)
    for block in blocks[blocks >= 0].unique().tolist():
        own = blocks == block
        variance = torch.where(scale[own] == 1, 0.0, scale[own].square()).sum()
        scale[own] = variance.sqrt() if bool(variance > 0) else 1.0
    return scale


def standardised(rows: Tensor, mean: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Standardise raw rows; the result has type `dtype`.

    Rounding comes last: float32 cannot represent small differences on a large offset, such as times in milliseconds.

    Args:
        rows: Values (..., D) of any real type.
        mean: Subtracted; (D) or any shape that broadcasts.
        scale: Divides the difference; likewise.
        dtype: Type of the result.
    """
    if rows.is_complex():
        raise ValueError(f"inputs must be real numbers, not {rows.dtype}")
    if rows.dtype == torch.int64 or rows.dtype == torch.int32:
        rows = rows.double()
    exact = torch.promote_types(torch.promote_types(rows.dtype, mean.dtype), torch.float32)
    return ((rows.to(exact) - mean.to(exact)) / scale.to(exact)).to(dtype)


def power_of_two(rows: Tensor, dim: int | tuple[int, ...] = -2) -> Tensor:
    """A power of two near the largest magnitude along `dim`, which is kept: (..., 1, D); 1 where all are zero.

    Divided by it, numbers as large or small as their type can hold have squares that it can hold too.
    """
    if not rows.numel():
        return rows.new_ones(())
    largest = rows.abs().amax(dim, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000) - 1
    return torch.where(largest.isfinite() & (largest > 0), torch.ldexp(torch.ones_like(largest), exponent), 1.0)
