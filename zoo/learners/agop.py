r"""Kernel ridge regression whose metric is learned in closed form: the recursive feature machine.

The metric of the next iterate is the average gradient outer product (AGOP) of the last one's predictor (Radhakrishnan,
Beaglehole, Pandit and Belkin, arXiv 2212.13881; Beaglehole and others, xRFM, arXiv 2508.10053). Iterates, ridges,
bandwidths and exponents can be compared by the exact leave-one-out error, which a ridge solve gives for nothing.

>>> for kernel, coefficients in iterate(X, Y, ExponentialPower(2.0), ridge=0.1, iterations=3):
...     errors = leave_one_out_residuals(kernel(X), Y, 0.1).square().mean()
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.exponential_power import ExponentialPower
from zoo.kernels.linalg import cholesky

__all__ = ["Iterate", "iterate", "leave_one_out_residuals", "median_distance"]

Bandwidth = Literal["constant", "adaptive"]


class Iterate(NamedTuple):
    """One solve of :func:`iterate`."""

    kernel: ExponentialPower
    coefficients: Tensor  # (n, C)


def median_distance(d: Tensor) -> Tensor:
    """The lower median of the distances between different points, of a symmetric matrix (n, n)."""
    n = len(d)
    if n < 2:
        return d.new_ones(())
    rows, columns = torch.tril_indices(n, n, -1)
    return d[rows, columns].median()


def iterate(
    X: Tensor,
    Y: Tensor,
    kernel: ExponentialPower,
    ridge: float,
    iterations: int = 3,
    *,
    diagonal: bool = False,
    bandwidth: Bandwidth = "constant",
    scale: float = 1e-30,
    jitter: float = 0.0,
) -> Iterator[Iterate]:
    """The recursion as published: solve, average the gradients' outer products, divide by the largest entry, repeat.

    Args:
        X: Rows (n, D).
        Y: Targets (n, C), centred by the caller if wanted.
        kernel: The first kernel; it is not changed.
        ridge: Added to the diagonal of the kernel matrix.
        iterations: Updates of the metric; one more solve is yielded than this.
        diagonal: Keep only the metric's diagonal.
        bandwidth: `constant`: the kernel's lengthscale stays. `adaptive`: it is multiplied by the median distance under
            the metric at hand, before every solve.
        scale: Added to the largest entry that the metric is divided by.
        jitter: Added to the diagonal of a full metric.

    Yields:
        Kernel and coefficients (K + ridge I)^-1 Y of every solve.
    """
    kernel, first = copy.deepcopy(kernel), float(kernel.lengthscale.detach())
    for k in range(iterations + 1):
        kernel = copy.deepcopy(kernel)
        d = kernel.distances(X)
        if bandwidth == "adaptive":
            kernel.lengthscale = first * float(median_distance(d))
        K = kernel.of_distances(d)
        A = cholesky(_plus(K, ridge)).solve(Y.to(torch.float64)).to(Y)
        yield Iterate(kernel, A)
        if k < iterations:
            g = kernel.gradients_of(d, K, X, A).flatten(0, 1)
            M = g.square().sum(0) if diagonal else g.mT @ g
            M = M / (scale + M.max())
            kernel.set_metric(M if diagonal else _plus(M, jitter))


def _plus(K: Tensor, value: float) -> Tensor:
    return K + value * torch.eye(len(K), dtype=K.dtype, device=K.device)


def leave_one_out_residuals(K: Tensor, Y: Tensor, ridge: float, *, recentre: bool = False) -> Tensor:
    """y_i minus the prediction for row i of the ridge regression on all other rows, exactly.

    Args:
        K: Kernel matrix (n, n).
        Y: Targets (n, C). A fixed centring is the caller's: what is subtracted from all rows stays without row i.
        ridge: Added to the diagonal.
        recentre: Predict by the mean of the remaining targets plus the regression of what is left, as a refit without
            row i that centres anew would.

    Returns:
        (n, C): A_i / [(K + ridge I)^-1]_ii with A = (K + ridge I)^-1 Y.
    """
    inverse = cholesky(_plus(K, ridge)).solve(torch.eye(len(K), dtype=torch.float64, device=K.device))
    scale = inverse.diagonal()[:, None]
    Y = Y.to(torch.float64)
    if not recentre:
        return ((inverse @ Y) / scale).to(K)
    n = len(Y)
    means = (Y.sum(0) - Y) / (n - 1)  # (n, C): without row i
    # A for targets less the mean without row i: inverse @ Y - inverse @ 1 * mean_i, row i of it
    rows = inverse @ Y - inverse.sum(1, keepdim=True) * means
    return (rows / scale).to(K)
