"""The ridge solver: one numerics for every learner that solves (K + ridge I)^-1 Y or leaves a row out.

    dual      A = (K + ridge I)^-1 Y,                K (n, n) a Gram matrix
    primal    W = (phi^T phi + ridge I)^-1 phi^T Y,  phi (n, F) features
    left out  y_i - f_(-i)(x_i) = A_i / [(K + ridge I)^-1]_ii = (y_i - f(x_i)) / (1 - h_ii)

Everything is float64 with autocast off, whatever a network computes in, and comes from a Cholesky factor that reports
the jitter it needed (:func:`zoo.kernels.cholesky`). Rows that come in batches go through :class:`LeastSquares`, which
adds them, takes them away again, and has the optimum for every ridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.kernels.linalg import Factor, cholesky, solver_dtype
from zoo.ops.dispatch import is_plain_eager, values_known
from zoo.ops.numerics import autocast_disabled, differentiable_grad

__all__ = [
    "Head",
    "LeastSquares",
    "LeaveOneOut",
    "LeftOut",
    "best_ridge",
    "leave_one_out",
    "leave_one_out_errors",
    "leave_one_out_residuals",
    "left_out",
    "ridge_factor",
    "solve_feature_ridge",
    "solve_left_out",
    "solve_ridge",
]

Batches = Iterable[tuple[Tensor, Tensor]]


# ---- factorise and solve -----------------------------------------------------------------------------------


def ridge_factor(K: Tensor, ridge: float | Tensor) -> Factor:
    """The Cholesky factor of K + ridge I.

    Args:
        K: Symmetric positive semidefinite (..., n, n).
        ridge: A number, or one for each row: anything that broadcasts to (..., n).

    Raises:
        NotPositiveDefiniteError: See :func:`zoo.kernels.cholesky`.
    """
    return cholesky(_ridged(K, ridge))


def _ridged(K: Tensor, ridge: float | Tensor) -> Tensor:
    K = K.to(solver_dtype(K.device))
    ridge = torch.as_tensor(ridge, dtype=K.dtype, device=K.device)
    return K + torch.diag_embed(ridge.expand(torch.broadcast_shapes(ridge.shape, K.shape[:-1])))


class _Solve(torch.autograd.Function):
    """A^-1 Y; with h = A^-1 g, the gradients are -h (A^-1 Y)^T in A and h in Y: one more solve of the same factor."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, Y: Tensor) -> Tensor:
        factor = cholesky(A)
        solution = factor.solve(Y)
        ctx.save_for_backward(A, Y, factor.lower, factor.jitter, solution)
        return solution

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        A, Y, lower, jitter, solution = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain_eager([g]):
            return differentiable_grad(lambda A, Y: cholesky(A).solve(Y), (A, Y), ctx.needs_input_grad, g)
        h = Factor(lower, jitter).solve(g)
        return -h @ solution.mT if ctx.needs_input_grad[0] else None, h if ctx.needs_input_grad[1] else None


def solve_ridge(K: Tensor, Y: Tensor, ridge: float | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Dual coefficients of kernel ridge regression, (K + ridge I)^-1 Y; predictions are K(query, support) @ them.

    Args:
        K: Gram matrix of the support (..., n, n).
        Y: Targets (..., n) or (..., n, k).
        ridge: Non-negative number, or tensor of shape (...), which may carry a gradient.
        dtype: Type of the answer; float64 if None.

    Raises:
        NotPositiveDefiniteError: See :func:`zoo.kernels.cholesky`.
        ValueError: The ridge is negative or not a number.
    """
    ridge = _checked_ridge(ridge, K.device)
    with autocast_disabled(K.device):
        A = _ridged(K, ridge.unsqueeze(-1))
        vector = Y.ndim == 1 or Y.shape == A.shape[:-1]
        columns = (Y.unsqueeze(-1) if vector else Y).to(A.dtype)
        if not values_known(A, columns):
            X = cholesky(A).solve(columns)
        else:
            batch = torch.broadcast_shapes(A.shape[:-2], columns.shape[:-2])
            X = _Solve.apply(A.expand(*batch, *A.shape[-2:]), columns.expand(*batch, *columns.shape[-2:]))
    X = X.squeeze(-1) if vector else X
    return X if dtype is None else X.to(dtype)


def solve_feature_ridge(phi: Tensor, Y: Tensor, ridge: float | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Primal coefficients of ridge regression on features, (phi^T phi + ridge I)^-1 phi^T Y.

    With more features than points the equal expression phi^T (phi phi^T + ridge I)^-1 Y is solved, so the
    matrix is never larger than the smaller side.

    Args:
        phi: Features (..., n, F).
        Y: Targets (..., n) or (..., n, k).
        ridge: Non-negative number, or tensor of shape (...).
        dtype: Type of the answer; float64 if None.

    Returns:
        (..., F) or (..., F, k): predictions are phi @ them.

    Raises:
        NotPositiveDefiniteError: See :func:`zoo.kernels.cholesky`.
        ValueError: The ridge is negative or not a number.
    """
    vector = Y.ndim == phi.ndim - 1
    phi = phi.to(solver_dtype(phi.device))
    Y = (Y.unsqueeze(-1) if vector else Y).to(phi.dtype)
    with autocast_disabled(phi.device):
        if phi.shape[-1] <= phi.shape[-2]:
            W = solve_ridge(phi.mT @ phi, phi.mT @ Y, ridge)
        else:
            W = phi.mT @ solve_ridge(phi @ phi.mT, Y, ridge)
    W = W.squeeze(-1) if vector else W
    return W if dtype is None else W.to(dtype)


def _checked_ridge(ridge: float | Tensor, device: torch.device) -> Tensor:
    ridge = torch.as_tensor(ridge, dtype=solver_dtype(device), device=device)  # a number keeps all of its digits
    if values_known(ridge) and not bool((ridge.detach() >= 0).all()):
        raise ValueError(f"ridge={ridge.detach().flatten()[:4].tolist()} must not be negative")
    return ridge


# ---- leave one out -----------------------------------------------------------------------------------------


class LeftOut(NamedTuple):
    """A solved system and what each row would be predicted as by all others."""

    coefficients: Tensor  # (n, C)
    residuals: Tensor  # (n, C), y_i less the prediction without row i


def left_out(residuals: Tensor, leverage: Tensor, copies: Tensor | None = None) -> Tensor:
    """Residuals (..., n, C) of a fit to all rows as those of fits without each row: r_i / (1 - h_i), h (..., n).

    A row that stands for m `copies` (n,) has their weight and leverage; one of them is left out: r_i / (1 - h_i / m).
    """
    leverage = leverage if copies is None else leverage / copies
    return residuals / (1 - leverage).clamp_min(1e-12).unsqueeze(-1)


@torch.no_grad()
def solve_left_out(
    K: Tensor, Y: Tensor, ridge: float | Tensor, *, recentre: bool = False, copies: Tensor | None = None
) -> LeftOut:
    """Kernel ridge regression with its exact leave-one-out residuals, A_i / [(K + ridge I)^-1]_ii.

    Args:
        K: Kernel matrix (n, n).
        Y: Targets (n, C). A fixed centring is the caller's: what is subtracted from all rows stays without row i.
        ridge: Added to the diagonal: a number, or one for each row (n,).
        recentre: Residuals of predictions by the mean of the remaining targets plus the regression of what is left, as
            a refit without row i that centres anew would make.
        copies: Number m of equal rows that each row stands for (n,), whose ridge is that of one of them over m. One of
            them is left out: m r_i A_i / (m - 1 + r_i [(K + r I)^-1]_ii), with r the ridge. Not with `recentre`.

    Returns:
        Both (n, C), float64.

    Raises:
        ValueError: Both `recentre` and `copies` are given.
    """
    if recentre and copies is not None:
        raise ValueError("recentre=True leaves out whole rows: copies must be None")
    inverse = torch.cholesky_inverse(ridge_factor(K, ridge).lower)
    Y = Y.to(inverse.dtype)
    coefficients = rows = inverse @ Y
    if recentre:  # row i of the solution for targets less the mean without row i
        means = (Y.sum(0) - Y) / (len(Y) - 1)
        rows = coefficients - inverse.sum(1, keepdim=True) * means
    if copies is not None:
        copies = copies.to(inverse)
        own = ridge * torch.ones_like(copies)
        return LeftOut(coefficients, (copies * own / (copies - 1 + own * inverse.diagonal()))[:, None] * coefficients)
    return LeftOut(coefficients, rows / inverse.diagonal()[:, None])


def leave_one_out_residuals(K: Tensor, Y: Tensor, ridge: float | Tensor, *, recentre: bool = False) -> Tensor:
    """The residuals (n, C) of :func:`solve_left_out`, in the type of K."""
    return solve_left_out(K, Y, ridge, recentre=recentre).residuals.to(K)


@torch.no_grad()
def leave_one_out_errors(K: Tensor, Y: Tensor, ridges: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Exact leave-one-out errors of kernel ridge regression for many ridges from one eigen-decomposition of K.

    Args:
        K: Gram matrix (n, n).
        Y: Targets (n, C).
        ridges: Candidates (R,).

    Returns:
        Mean squared error (R,) and, for one-hot targets, the share of wrong decisions (R,).

    Raises:
        ValueError: A ridge is not positive.
    """
    K, Y = (t.to(solver_dtype(t.device)) for t in (K, Y))
    candidates = torch.as_tensor(ridges, dtype=K.dtype, device=K.device)
    if not bool((candidates > 0).all()):
        raise ValueError("every ridge must be positive")
    with autocast_disabled(K.device):
        s, U = torch.linalg.eigh(K)
        shrink = 1 / (s.clamp_min(0) + candidates[:, None])  # (R, n)
        coefficients = torch.einsum("in,rn,nc->ric", U, shrink, U.mT @ Y)
        residuals = coefficients / (U.square() @ shrink.mT).mT.unsqueeze(-1)
        wrong = ((Y - residuals).argmax(-1) != Y.argmax(-1)).to(K.dtype).mean(-1)
    return residuals.square().mean((-1, -2)), wrong


def best_ridge(K: Tensor, Y: Tensor, ridges: Sequence[float] | Tensor | None = None) -> float:
    """The ridge with the smallest leave-one-out squared error.

    Args:
        K: Gram matrix (n, n).
        Y: Targets (n, C).
        ridges: Candidates; None takes 31 from 1e-6 to 1e3 times the mean of the diagonal.
    """
    if ridges is None:
        ridges = torch.logspace(-6, 3, 31, dtype=torch.float64, device="cpu") * float(K.diagonal().mean())
    errors, _ = leave_one_out_errors(K, Y, ridges)
    return float(torch.as_tensor(ridges, device="cpu")[int(errors.argmin())])


# ---- rows in batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """Outputs are p @ weight.T + bias, with weight (o, F) and bias (o), float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, p: Tensor) -> Tensor:
        """Features (..., F) to outputs (..., o)."""
        return p.to(self.weight.dtype) @ self.weight.mT + self.bias


class LeastSquares:
    """Sums over batches of features and targets, and the heads that follow from them.

    Args:
        bias: Fit a free, unpenalised intercept.

    Attributes:
        rows: Number of rows seen.
    """

    def __init__(self, bias: bool = True) -> None:
        self.bias, self.rows, self.features = bias, 0, 0
        self._kept: list[tuple[Tensor, Tensor]] | None = []
        self._sums: dict[str, Tensor] = {}

    def add(self, p: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Take in features (..., F), targets (..., o), and weights of the rows (...), ones if None.

        Raises:
            ValueError: The shapes do not belong together, a number is not finite, or a weight is negative.
        """
        P, Y = self._checked(p, y, weight)
        self.features = P.shape[1] - self.bias
        self.rows += len(P)
        if self._kept is None:
            self._accumulate(P, Y)
            return
        self._kept.append((P, Y))
        if self.rows > self.features:
            self._forget_rows()

    def remove(self, p: Tensor, y: Tensor, weight: Tensor | None = None) -> None:
        """Take away rows that were added, with the weight they had; what is left is as if they had never been.

        Raises:
            ValueError: As in :meth:`add`, or there are fewer rows than these.
        """
        P, Y = self._checked(p, y, weight)
        if len(P) > self.rows:
            raise ValueError(f"{len(P)} rows cannot be taken from {self.rows}")
        self._forget_rows()
        self._accumulate(P, Y, -1)
        self.rows -= len(P)

    def _checked(self, p: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows in float64, times the roots of their weights, with a column of ones where there is an intercept."""
        if y.ndim == p.ndim - 1:
            y = y.unsqueeze(-1)
        if p.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"features {tuple(p.shape)} and targets {tuple(y.shape)} have different rows")
        P, Y = (v.detach().flatten(0, -2).double() for v in (p, y))
        D = P.new_ones(len(P)) if weight is None else weight.detach().reshape(-1).double()
        if not all(bool(v.isfinite().all()) for v in (P, Y, D)) or bool((D < 0).any()):
            raise ValueError("features, targets and weights must be finite, and weights not negative")
        if self.rows and P.shape[1] != self.features:
            raise ValueError(f"a batch has {P.shape[1]} features, the first one had {self.features}")
        if self.bias:  # what the ones need is centred later
            P = torch.cat([P, torch.ones_like(P[:, :1])], 1)
        root = D.sqrt().unsqueeze(-1)
        return P * root, Y * root

    def _forget_rows(self) -> None:
        """Keep moments from now on."""
        kept, self._kept = self._kept or [], None
        for rows in kept:
            self._accumulate(*rows)

    def _accumulate(self, P: Tensor, Y: Tensor, sign: int = 1) -> None:
        with autocast_disabled(P.device):
            for name, value in {"PP": P.mT @ P, "PY": P.mT @ Y, "YY": Y.square().sum()}.items():
                self._sums[name] = self._sums[name] + sign * value if name in self._sums else value

    def _rows(self) -> tuple[Tensor, Tensor]:
        assert self._kept is not None
        return torch.cat([p for p, _ in self._kept]), torch.cat([y for _, y in self._kept])

    def _moments(self) -> tuple[Tensor, Tensor]:
        if not self.rows:
            raise ValueError("no rows were added")
        if self._kept is None:
            return self._sums["PP"], self._sums["PY"]
        P, Y = self._rows()
        return P.mT @ P, P.mT @ Y

    def _centered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Moments around the (weighted) means, and the means."""
        PP, PY = self._moments()
        if not self.bias:
            return PP, PY, PP.new_zeros(len(PP)), PY.new_zeros(PY.shape[1])
        total = PP[-1, -1]
        p, y = PP[:-1, -1] / total, PY[-1] / total
        return PP[:-1, :-1] - total * p.outer(p), PY[:-1] - total * p.outer(y), p, y

    def ridge(self, ridge: float = 0.0, output_covariance: Tensor | None = None) -> Head:
        """The minimum of sum_i d_i |y_i - A p_i - c|^2 + ridge |A|^2; of smallest norm where there are many.

        Args:
            ridge: Not negative.
            output_covariance: Covariance S (o, o) of the noise in the outputs: residuals are then measured by S^-1,
                which changes A only together with a ridge.

        Raises:
            ValueError: The ridge is negative.
        """
        if not ridge >= 0:
            raise ValueError(f"ridge={ridge} must not be negative")
        if not self.rows:
            raise ValueError("no rows were added")
        if ridge and output_covariance is not None:
            return self._generalised(ridge, output_covariance.double())
        if self._kept is not None:
            return self._from_rows(ridge)
        PP, PY, p, y = self._centered()
        if ridge:
            A = self._solve(PP, PY, ridge)
        else:
            A = torch.linalg.lstsq(PP, PY, driver="gelsd").solution if not _regular(PP) else self._solve(PP, PY, 0.0)
        return Head(A.mT, y - p @ A)

    @staticmethod
    def _solve(PP: Tensor, PY: Tensor, ridge: float) -> Tensor:
        with autocast_disabled(PP.device):
            M = _ridged(PP, ridge)
            factor = cholesky(M)
            A = factor.solve(PY)
            return A + factor.solve(PY - M @ A)  # one step of refinement: the gradient then vanishes to rounding

    def _generalised(self, ridge: float, S: Tensor) -> Head:
        """P^T P A^T + ridge A^T S = P^T Y, one ridge for each eigenvector of S."""
        PP, PY, p, y = self._centered()
        values, vectors = torch.linalg.eigh(S)
        if len(S) != PY.shape[1] or not bool((values > 0).all()):
            raise ValueError(f"output_covariance must be positive definite, {PY.shape[1]} x {PY.shape[1]}")
        columns = [
            self._solve(PP, PY @ v.unsqueeze(-1), ridge * float(s)) for s, v in zip(values, vectors.mT, strict=True)
        ]
        A = torch.cat(columns, 1) @ vectors.mT
        return Head(A.mT, y - p @ A)

    def _from_rows(self, ridge: float) -> Head:
        """Fewer rows than features: the dual, or the pseudo-inverse for no ridge."""
        P, Y = self._rows()
        p, y = P.new_zeros(self.features), Y.new_zeros(Y.shape[1])
        if self.bias:
            root = P[:, -1:]
            total = root.square().sum()
            p, y = (root * P[:, :-1]).sum(0) / total, (root * Y).sum(0) / total
            P, Y = P[:, :-1] - root * p, Y - root * y
        if ridge:
            A = P.mT @ self._solve(P @ P.mT, Y, ridge)
        else:
            A = torch.linalg.lstsq(P, Y, driver="gelsd").solution
        return Head(A.mT, y - p @ A)

    def inner_product(self) -> Head:
        """The maximum of sum_i y_i . A p_i over |A|_F = 1."""
        _, PY = self._moments()
        PY = PY[: self.features]
        return Head((PY / PY.norm()).mT, PY.new_zeros(PY.shape[1]))

    def procrustes(self) -> Head:
        """The maximum of sum_i y_i . A p_i over A with orthonormal rows (columns where o > F)."""
        _, PY = self._moments()
        U, _, Vh = torch.linalg.svd(PY[: self.features].mT, full_matrices=False)
        return Head(U @ Vh, PY.new_zeros(PY.shape[1]))

    def scale(self) -> float:
        """Mean of the diagonal of P^T P, the unit that a ridge is best given in."""
        return float(self._moments()[0].diagonal()[: self.features].mean())

    def residual(self, head: Head) -> float:
        """Sum of the squared residuals of a head over all rows."""
        if self._kept is not None:
            P, Y = self._rows()
            return float((Y - P @ self._matrix(head).mT).square().sum())
        A = self._matrix(head)
        PP, PY = self._moments()
        return max(float(self._sums["YY"] - 2 * (A.mT * PY).sum() + ((A @ PP) * A).sum()), 0.0)

    def _matrix(self, head: Head) -> Tensor:
        A = head.weight.double()
        return torch.cat([A, head.bias.double().unsqueeze(-1)], 1) if self.bias else A

    def gradient(self, head: Head, ridge: float = 0.0) -> Tensor:
        """Largest entry of the gradient of the mean squared error (and its ridge) at a head: 0 at the optimum."""
        PP, PY = self._moments()
        A = self._matrix(head)
        penalty = ridge * A
        if self.bias:
            penalty[:, -1] = 0
        return ((A @ PP - PY.mT + penalty) * (2 / self.rows)).abs().max()


def _regular(PP: Tensor) -> bool:
    values = torch.linalg.eigvalsh(PP)
    return bool(values[0] > 1e-12 * values[-1])


@dataclass(frozen=True)
class LeaveOneOut:
    """Leave-one-out errors of a ridge head.

    Attributes:
        ridges: Candidates.
        errors: Mean squared leave-one-out residual of each candidate.
        accuracy: Share of rows whose largest output is right when they are left out; for one-hot targets.
        best: The candidate of smallest error.
    """

    ridges: list[float]
    errors: list[float]
    accuracy: list[float]
    best: float


def leave_one_out(
    system: LeastSquares, batches: Callable[[], Batches], ridges: Sequence[float] | None = None
) -> LeaveOneOut:
    """Exact leave-one-out errors for many ridges at once: (y_i - A p_i) / (1 - h_ii), without a refit.

    The moments are decomposed once; a second pass over the batches then serves all candidates.

    Args:
        system: What was accumulated, without row weights.
        batches: Called once; gives the same batches of features (..., F) and targets (..., o) again.
        ridges: Candidates; None: 13 from 1e-8 to 10 times the mean of the diagonal of P^T P.

    Raises:
        ValueError: A ridge is negative, or zero where the features are dependent.
    """
    PP, PY, p, y = system._centered()
    values, V = torch.linalg.eigh(PP)
    values = values.clamp_min(0)
    if ridges is None:
        ridges = (float(values.mean()) * torch.logspace(-8, 1, 13, dtype=torch.float64, device="cpu")).tolist()
    if not all(r >= 0 for r in ridges) or (min(ridges) == 0 and values[0] <= 1e-12 * values[-1]):
        raise ValueError("ridges must not be negative, nor zero where the features depend on each other")
    shrink = 1 / (values + torch.tensor(ridges, dtype=values.dtype, device=values.device).unsqueeze(-1))  # (r, F)
    coefficients = shrink.unsqueeze(-1) * (V.mT @ PY)  # (r, F, o)
    total = torch.zeros(len(ridges), dtype=values.dtype, device=values.device)
    right, rows = torch.zeros_like(total), 0
    for features, targets in batches():
        T = (targets.unsqueeze(-1) if targets.ndim == features.ndim - 1 else targets).flatten(0, -2).double()
        z = (features.flatten(0, -2).double() - p) @ V
        leverage = z.square() @ shrink.mT + (1 / system.rows if system.bias else 0.0)  # (n, r)
        residual = left_out(T - y - z @ coefficients, leverage.mT)  # (r, n, o)
        total += residual.square().sum((1, 2))
        right += ((T - residual).argmax(-1) == T.argmax(-1)).sum(1)
        rows += len(T)
    errors = (total / (rows * PY.shape[1])).tolist()
    return LeaveOneOut(
        list(ridges), errors, (right / rows).tolist(), ridges[min(range(len(errors)), key=errors.__getitem__)]
    )
