"""Softmax regression on features by Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zoo.kernels.linalg import cholesky
from zoo.learners.ridge import Head

__all__ = ["fit_logistic"]


def fit_logistic(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    num_classes: int,
    ridge: float = 1e-3,
    *,
    bias: bool = True,
    max_iter: int = 50,
    tol: float = 1e-9,
) -> Head:
    """Softmax regression by Newton's method; each step is a weighted ridge system over all classes.

    Minimises sum_i -log softmax(A p_i + c)[y_i] + ridge |A|^2 / 2. With two classes this is iteratively reweighted
    least squares. Every step is one pass over the batches.

    Args:
        batches: Called once per step; batches of features (n, F) and class indices (n,).
        num_classes: At least 2.
        ridge: Positive: separable data have no optimum without it.
        bias: Fit an unpenalised intercept.
        max_iter: Maximum number of steps.
        tol: Stop when all entries of the mean gradient are smaller.

    Raises:
        ValueError: The ridge is not positive, or there are more than 12,000 unknowns.
        RuntimeError: No convergence within `max_iter` steps.
    """
    if not ridge > 0 or num_classes < 2:
        raise ValueError(f"ridge={ridge} must be positive and num_classes={num_classes} at least 2")
    width, A = 0, torch.empty(0, device="cpu")
    scale = 1.0

    def objective(A: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor, int]:
        value, rows = A.new_zeros(()), 0
        G, H = torch.zeros_like(A), A.new_zeros(A.shape + A.shape if second else (0,))
        for p, y in batches():
            P = p.double()
            P = torch.cat([P, torch.ones_like(P[:, :1])], 1) if bias else P
            logits = P @ A.mT
            q = logits.softmax(-1)
            value = value + (logits.logsumexp(-1) - logits.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)).sum()
            G += (q - torch.nn.functional.one_hot(y.long(), num_classes)).mT @ P
            if second:
                for k in range(num_classes):
                    for j in range(k, num_classes):
                        block = P.mT @ ((q[:, k] * ((1.0 if j == k else 0.0) - q[:, j])).unsqueeze(-1) * P)
                        H[k, :, j] += block
                        if j != k:
                            H[j, :, k] += block
            rows += len(P)
        penalty = torch.full_like(A, ridge)
        if bias:
            penalty[:, -1] = 0
        return value + 0.5 * (penalty * A.square()).sum(), G + penalty * A, H, rows

    for p, _ in batches():
        width = p.shape[-1] + bias
        A = torch.zeros(num_classes, width, dtype=torch.float64, device=p.device)
        break
    if not width:
        raise ValueError("there are no batches")
    if A.numel() > 12_000:
        raise ValueError(f"{A.numel()} unknowns are too many for Newton's method; use fewer features or gradients")
    penalty = torch.full_like(A, ridge)
    if bias:
        penalty[:, -1] = 1e-10 * max(ridge, 1.0)  # the common shift of all classes is undetermined: pin it
    for _ in range(max_iter):
        value, G, H, rows = objective(A, True)
        if float(G.abs().max()) / rows <= tol:
            return Head(A[:, : width - bias], A[:, -1] if bias else A.new_zeros(num_classes))
        step = cholesky(H.flatten(2).flatten(0, 1) + torch.diag(penalty.flatten())).solve(G.flatten()).view_as(A)
        scale = 1.0
        while scale > 1e-6 and float(objective(A - scale * step, False)[0]) > float(value) + 1e-12 * abs(float(value)):
            scale /= 2
        A = A - scale * step
    raise RuntimeError(f"softmax regression has not converged in {max_iter} steps: use a larger ridge")
