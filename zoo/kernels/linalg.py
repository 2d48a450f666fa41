"""Linear algebra of symmetric positive definite matrices, for every closed-form learner.

Systems are solved with a Cholesky factor, in float64 and with autocast off, whatever the precision of the surrounding
network; nothing is inverted. If rounding makes a Gram matrix indefinite, a growing multiple of the identity is added
until the factor exists, reported by :class:`Factor`. Matrices too large to be built at once are built, or only
multiplied, in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.ops.dispatch import is_transformed, values_known
from zoo.ops.numerics import autocast_disabled
from zoo.support.renamed import renamed

__all__ = [
    "Factor",
    "NotPositiveDefiniteError",
    "cholesky",
    "chunked_gram",
    "gram_product",
    "log_det",
    "solve_spd",
]

#: A function of two point sets that returns their Gram matrix, such as a `Kernel`.
GramFunction = Callable[[Tensor, Tensor], Tensor]


class NotPositiveDefiniteError(torch.linalg.LinAlgError):
    """A matrix that has no Cholesky factor even with the largest allowed jitter."""


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor, A + jitter * I = L L^T, and computations with it.

    Attributes:
        lower: L (..., n, n), lower triangular.
        jitter: Amount added to the diagonal of each matrix (...); zero if none was needed.
    """

    lower: Tensor
    jitter: Tensor

    def solve(self, B: Tensor) -> Tensor:
        """X with A X = B, for B (..., n) or (..., n, k)."""
        columns, vector = _columns(self.lower, B)
        with autocast_disabled(self.lower.device):
            half = torch.linalg.solve_triangular(self.lower, columns, upper=False)
            X = torch.linalg.solve_triangular(self.lower.mT, half, upper=True)
        return X.squeeze(-1) if vector else X

    def whiten(self, B: Tensor) -> Tensor:
        """L^-1 B, for B (..., n) or (..., n, k): |L^-1 b|^2 = b^T A^-1 b."""
        columns, vector = _columns(self.lower, B)
        with autocast_disabled(self.lower.device):
            X = torch.linalg.solve_triangular(self.lower, columns, upper=False)
        return X.squeeze(-1) if vector else X

    def log_det(self) -> Tensor:
        """Log |A|, shape (...)."""
        return 2 * self.lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _columns(lower: Tensor, B: Tensor) -> tuple[Tensor, bool]:
    """B as a matrix of columns, and whether it was a vector (by the rule of `torch.linalg.solve`)."""
    n = lower.shape[-1]
    vector = B.ndim == 1 or (B.ndim == lower.ndim - 1 and B.shape == lower.shape[:-1])
    columns = (B.unsqueeze(-1) if vector else B).to(lower.dtype)
    if columns.shape[-2] != n:
        raise ValueError(f"the right-hand side has shape {tuple(B.shape)}; the matrix has {n} rows")
    return columns, vector


def solver_dtype(device: torch.device) -> torch.dtype:
    """float64 if the device supports it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def double(X: Tensor) -> Tensor:
    """Convert to float64 if the device supports it."""
    return X.to(solver_dtype(X.device))


def cholesky(A: Tensor, *, jitter: float = 1e-12, max_jitter: float = 1e-4) -> Factor:
    """Factor symmetric positive definite matrices, with as little jitter as each of them needs.

    Without jitter first; if that fails, with `jitter` times the mean diagonal, then ten times as much per attempt. The
    jitter is constant for derivatives. Only the lower triangle of A is read. Under `torch.func` the same jitter is
    found without control flow on values, and a factor that does not exist is NaN.

    Args:
        A: (..., n, n).
        jitter: First amount to add, relative to the mean of the diagonal.
        max_jitter: Last amount to try; 0 disables jitter.

    Returns:
        The float64 factor and the absolute jitter of each matrix.

    Raises:
        NotPositiveDefiniteError: The matrix is not finite, or not positive definite with the largest jitter.
        ValueError: A is not square.
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"a square matrix is needed, got shape {tuple(A.shape)}")
    with autocast_disabled(A.device):
        A = A.to(solver_dtype(A.device))
        if is_transformed(A):
            return _cholesky_without_branches(A, jitter, max_jitter)
        if not values_known(A):  # a graph cannot contain the search for a jitter
            return Factor(torch.linalg.cholesky(A), torch.zeros_like(A.diagonal(dim1=-2, dim2=-1)[..., :0].sum(-1)))
        if not bool(torch.isfinite(A.detach()).all()):
            raise NotPositiveDefiniteError("the matrix has entries that are not finite: check the kernel's inputs")
        scale = A.detach().diagonal(dim1=-2, dim2=-1).abs().mean(-1)
        lower, info = torch.linalg.cholesky_ex(A)
        added = torch.zeros_like(scale)
        relative = jitter
        while bool((info > 0).any()):
            if relative > max_jitter * (1 + 1e-9):  # 1e-12 * 10^8 is not exactly 1e-4 in floating point
                raise NotPositiveDefiniteError(_failure_message(A.detach(), info, max_jitter))
            added = torch.where(info > 0, relative * scale, added)
            eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
            lower, info = torch.linalg.cholesky_ex(A + added[..., None, None] * eye)
            relative *= 10
    return Factor(lower, added)


def _cholesky_without_branches(A: Tensor, jitter: float, max_jitter: float) -> Factor:
    """:func:`cholesky` without branches, for graphs and `vmap`: the first sufficient jitter is selected."""
    fixed, eye = A.detach(), torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    scale = fixed.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
    _, info = torch.linalg.cholesky_ex(fixed)
    added, relative = torch.zeros_like(scale), jitter
    while 0 < relative <= max_jitter * (1 + 1e-9):
        added = torch.where(info > 0, relative * scale, added)
        _, info = torch.linalg.cholesky_ex(fixed + added[..., None, None] * eye)
        relative *= 10
    lower, info = torch.linalg.cholesky_ex(A + added[..., None, None] * eye)
    return Factor(torch.where((info > 0)[..., None, None], torch.nan, lower), added)


def _failure_message(A: Tensor, info: Tensor, max_jitter: float) -> str:
    n = A.shape[-1]
    bad = A[info > 0] if A.ndim > 2 else A.unsqueeze(0)
    symmetric = torch.tril(bad[0]) + torch.tril(bad[0], -1).mT
    smallest = f" (smallest eigenvalue {torch.linalg.eigvalsh(symmetric)[0].item():.3g})" if n <= 4096 else ""
    return (
        f"the {n} x {n} matrix is not positive definite{smallest}, even with {max_jitter:g} of its mean "
        "diagonal added: use a larger ridge, or check that it comes from a positive definite kernel"
    )


def solve_spd(A: Tensor, B: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Solve A X = B for symmetric positive definite A.

    Args:
        A: (..., n, n).
        B: (..., n) or (..., n, k).
        dtype: Dtype of the result; float64 if None.

    Raises:
        NotPositiveDefiniteError: See :func:`cholesky`.
    """
    X = cholesky(A).solve(B)
    return X if dtype is None else X.to(dtype)


def log_det(A: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Log |A| (...) of symmetric positive definite matrices A (..., n, n), in float64 or in `dtype`."""
    value = cholesky(A).log_det()
    return value if dtype is None else value.to(dtype)


# ---- in blocks ---------------------------------------------------------------------------------------------


def chunked_gram(kernel: GramFunction, X: Tensor, Z: Tensor | None = None, *, chunk_size: int = 1024) -> Tensor:
    """Build a Gram matrix in blocks of rows, for kernels with intermediate results larger than the matrix.

    With gradients, each block is recomputed in the backward pass instead of being stored.

    Args:
        kernel: A kernel, or any function of two point sets.
        X: Points (..., n, D).
        Z: Points (..., m, D); X itself if None.
        chunk_size: Rows per block.

    Returns:
        (..., n, m), equal to `kernel(X, Z)` up to rounding.
    """
    blocks = list(_blocks(kernel, X, X if Z is None else Z, chunk_size))
    gram = torch.cat(blocks, -2) if blocks else kernel(X, X if Z is None else Z)
    diag = getattr(kernel, "diag", None)
    if Z is None and callable(diag):  # blocks do not see that Z is X; the diagonal must be exact
        eye = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
        gram = torch.where(eye, diag(X).unsqueeze(-1), gram)
    return gram


def gram_product(kernel: GramFunction, X: Tensor, Z: Tensor, V: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """k(X, Z) @ V without storing the n x m matrix, such as kernel ridge predictions for many queries.

    Args:
        kernel: A kernel, or any function of two point sets.
        X: Points (..., n, D).
        Z: Points (..., m, D).
        V: Coefficients (..., m, k) or (m,).
        chunk_size: Rows per block.

    Returns:
        (..., n, k) or (..., n), in the dtype of V.
    """

    def rows(x: Tensor, z: Tensor) -> Tensor:
        gram = kernel(x, z).to(V.dtype)
        with autocast_disabled(V.device):
            return gram @ V.unsqueeze(-1) if V.ndim == 1 else gram @ V

    product = torch.cat(list(_blocks(rows, X, Z, chunk_size)) or [rows(X, Z)], -2)
    return product.squeeze(-1) if V.ndim == 1 else product


def _blocks(function: GramFunction, X: Tensor, Z: Tensor, chunk_size: int) -> Iterator[Tensor]:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    for x in X.split(chunk_size, dim=-2) if X.shape[-2] else ():
        if torch.is_grad_enabled():
            yield checkpoint(function, x, Z, use_reentrant=False)
        else:
            yield function(x, Z)


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
