"""Linear heads in closed form, on features that come in batches.

A head A minimises a loss over rows of features p (n, F) and targets y (n, o). :class:`LeastSquares` sees every batch
once, keeps the rows themselves while there are fewer than features and their moments from then on, and then has the
optimum for every ridge. Everything is float64, whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.kernels.base import no_autocast
from zoo.kernels.linalg import cholesky

__all__ = ["Head", "LeastSquares", "LeaveOneOut", "fit_logistic", "leave_one_out"]

Batches = Iterable[tuple[Tensor, Tensor]]


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
        self.features = P.shape[1]
        self.rows += len(P)
        root = D.sqrt().unsqueeze(-1)
        if self.bias:  # a column of ones; what it needs is centred later
            P = torch.cat([P, torch.ones_like(P[:, :1])], 1)
        P, Y = P * root, Y * root
        if self._kept is not None:
            self._kept.append((P, Y))
            if self.rows > self.features:
                kept, self._kept = self._kept, None
                for rows in kept:
                    self._accumulate(*rows)
        else:
            self._accumulate(P, Y)

    def _accumulate(self, P: Tensor, Y: Tensor) -> None:
        with no_autocast(P.device):
            for name, value in {"PP": P.mT @ P, "PY": P.mT @ Y, "YY": Y.square().sum()}.items():
                self._sums[name] = self._sums[name] + value if name in self._sums else value

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
        with no_autocast(PP.device):
            M = PP + ridge * torch.eye(len(PP), dtype=PP.dtype, device=PP.device)
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


# ---- leave-one-out -----------------------------------------------------------------------------------------


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
        residual = (T - y - z @ coefficients) / (1 - leverage).mT.clamp_min(1e-12).unsqueeze(-1)  # (r, n, o)
        total += residual.square().sum((1, 2))
        right += ((T - residual).argmax(-1) == T.argmax(-1)).sum(1)
        rows += len(T)
    errors = (total / (rows * PY.shape[1])).tolist()
    return LeaveOneOut(
        list(ridges), errors, (right / rows).tolist(), ridges[min(range(len(errors)), key=errors.__getitem__)]
    )


# ---- no closed form ----------------------------------------------------------------------------------------


def fit_logistic(
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    num_classes: int,
    ridge: float = 1e-3,
    *,
    bias: bool = True,
    max_iter: int = 50,
    tol: float = 1e-9,
) -> Head:
    """Softmax regression by Newton's method, each step one weighted ridge over all classes.

    Minimises sum_i -log softmax(A p_i + c)[y_i] + ridge |A|^2 / 2. With two classes this is iteratively reweighted
    least squares. Every step is one pass over the batches.

    Args:
        batches: Called once a step; batches of features (n, F) and class indices (n,).
        num_classes: At least 2.
        ridge: Positive: without it separable data have no optimum.
        bias: Fit an unpenalised intercept.
        max_iter: Most steps.
        tol: Stop when no entry of the mean gradient is larger.

    Raises:
        ValueError: The ridge is not positive, or there are more than 12,000 unknowns.
        RuntimeError: It has not converged.
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
        penalty[:, -1] = 1e-10 * max(ridge, 1.0)  # a shift that all classes share changes nothing: pin it
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
