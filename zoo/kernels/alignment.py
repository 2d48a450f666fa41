r"""Kernel-target alignment: how well a kernel fits a target, without training a learner.

    A(K, Y) = <H K H, H Y H> / (|H K H| |H Y H|),     H = I - 1 1^T / n

Cortes, Mohri and Rostamizadeh, "Algorithms for Learning Kernels Based on Centered Alignment", JMLR 2012; without the
centring, Cristianini, Shawe-Taylor, Elisseeff and Kandola, "On Kernel-Target Alignment", NIPS 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.linalg import solver_dtype
from zoo.ops.numerics import autocast_disabled

__all__ = ["alignment", "label_kernel"]


def label_kernel(y: Tensor) -> Tensor:
    """The kernel of a target (n, n) in float64.

    Args:
        y: Numbers (n,), such as labels of +1 and -1, for the kernel y y^T; or classes (n,) of an integer type, for the
            kernel that is 1 where two rows have the same class, else 0.
    """
    if y.ndim != 1:
        raise ValueError(f"a target is (n,), got {tuple(y.shape)}")
    if y.is_floating_point():
        y = y.to(solver_dtype(y.device))
        return y[:, None] * y
    return (y[:, None] == y).to(solver_dtype(y.device))


def alignment(K: Tensor, target: Tensor, *, centred: bool = True) -> Tensor:
    """Alignment of a kernel matrix with a target: between -1 and 1; 1 if they are proportional.

    Args:
        K: Kernel matrix (..., n, n).
        target: The target's kernel (..., n, n), see :func:`label_kernel`, or the target itself (n,).
        centred: Centre the features first, which makes the alignment invariant to a constant.

    (...), in float64; differentiable. NaN if one of the matrices is constant.
        (...), in float64; differentiable. Not a number where one of the matrices is constant.

    Raises:
        ValueError: The shapes do not fit.
    """
    Y = label_kernel(target) if target.ndim == 1 else target
    if K.ndim < 2 or K.shape[-1] != K.shape[-2] or Y.shape[-2:] != K.shape[-2:]:
        raise ValueError(f"the kernel matrix is {tuple(K.shape)}, the target's {tuple(Y.shape)}; both are (n, n)")
    dtype = solver_dtype(K.device)
    with autocast_disabled(K.device):
        K, Y = K.to(dtype), Y.to(K.device, dtype)
        if centred:
            K, Y = _centred(K), _centred(Y)
        inner = (K * Y).sum((-2, -1))
        return inner / (torch.linalg.matrix_norm(K) * torch.linalg.matrix_norm(Y))


def _centred(K: Tensor) -> Tensor:
    K = K - K.mean(-1, keepdim=True)
    return K - K.mean(-2, keepdim=True)
