r"""Volume sampling: unbiased least squares on a few rows.

Volume sampling selects a set S of k rows with probability proportional to det(F_S^T F_S). The expectation of the
least-squares solution on S is the solution on all rows (Derezinski and Warmuth, JMLR 2018); with k equal to the number
of features it is the projection DPP, whose inclusion probabilities are the leverage scores.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["leverage_scores", "subset_probabilities", "volume_sample"]


def leverage_scores(features: Tensor) -> Tensor:
    """Diagonal of F (F^T F)^-1 F^T (n,); the scores sum to d; divided by d, they are the inverse Christoffel function.

    Args:
        features: F (n, d), of full column rank.

    Raises:
        ValueError: The features are linearly dependent, or there are fewer rows than features.
    """
    return _basis(features).square().sum(1)


def subset_probabilities(features: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every set of `size` rows and its probability, by enumeration, for small n.

    Args:
        features: F (n, d).
        size: d to n.

    Returns:
        Sets (m, size) in lexicographic order and probabilities (m,).

    Raises:
        ValueError: The size is out of range, or the features are linearly dependent.
    """
    Q = _basis(features)
    _check_size(size, *Q.shape)
    sets = torch.tensor(list(combinations(range(len(Q)), size)), device=Q.device)
    volumes = torch.linalg.det(Q[sets].mT @ Q[sets]).clamp_min(0)
    return sets, volumes / volumes.sum()


def volume_sample(features: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Sample `size` rows, by removing one after the other: row i of S with probability (1 - h_i) / (|S| - d).

    Args:
        features: F (n, d).
        size: d to n.
        generator: Source of randomness.

    Returns:
        Sorted indices (size,).

    Raises:
        ValueError: The size is out of range, or the features are linearly dependent.
    """
    Q = _basis(features)
    _check_size(size, *Q.shape)
    left = torch.arange(len(Q), device=Q.device)
    while len(left) > size:
        away = (1 - _basis(Q[left]).square().sum(1)).clamp_min(0)
        gone = torch.multinomial(away.cpu(), 1, generator=generator).to(left)
        left = left[torch.arange(len(left), device=left.device) != gone]
    return left


def _basis(features: Tensor) -> Tensor:
    F = features.double()
    if F.ndim != 2 or len(F) < F.shape[1] or not bool(F.isfinite().all()):
        raise ValueError(f"features must be finite, (n, d) with at least d rows; got {tuple(F.shape)}")
    Q, R = torch.linalg.qr(F)
    diagonal = R.diagonal().abs()
    if bool(diagonal.min() <= 1e-13 * diagonal.max()):
        raise ValueError("the features are linearly dependent: leave out those that are combinations of others")
    return Q


def _check_size(size: int, n: int, d: int) -> None:
    if not d <= size <= n:
        raise ValueError(f"size={size} must be between the {d} features and the {n} rows")
