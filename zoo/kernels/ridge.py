r"""Kernel ridge regression as a classifier whose support is a handful of points, real or generated.

    alpha  = (K(Z_s, Z_s) + lambda I)^-1 Y                            support (N, d), one-hot labels Y (N, C)
    logits = gamma K(Z_q, Z_s) alpha + beta                           queries (Q, d)

Derakhshani, Zhen, Shao, Snoek, "Kernel Continual Learning", ICML 2021. One Cholesky factor serves all classes, in
float64 and with autocast off; the backward pass uses the same factor again instead of differentiating through it.

>>> head = KernelRidgeHead("laplacian")
>>> logits = head(support, labels, queries)                           # (Q, C), differentiable in everything
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels import native
from zoo.kernels.base import Gaussian, Kernel, Laplacian, Linear, Polynomial, no_autocast, plain_gradients
from zoo.kernels.linalg import Factor, cholesky, solver_dtype
from zoo.kernels.named import NAMED_KERNELS
from zoo.kernels.watching import is_ordinary, is_recorded, is_transformed
from zoo.suggest import suggestion

__all__ = [
    "RIDGE_KERNELS",
    "KernelRidgeHead",
    "Solution",
    "SupportError",
    "VariationalRandomFeatures",
    "create_kernel",
    "diagonal_gaussian_kl",
    "leave_one_out_errors",
    "leave_one_out_ridge",
    "masked",
    "ridge_coefficients",
]

#: Kernels by name; `rbf` is what the KCL code calls its city-block kernel.
RIDGE_KERNELS = ("linear", "poly", "laplacian", "gaussian", "rff", *NAMED_KERNELS)
_ALIASES = {"rbf": "laplacian", "laplace": "laplacian", "gauss": "gaussian"}
_MASKED = -1e11  # logit of a class that does not belong to the task


class SupportError(ValueError):
    """Support points or features that no classifier can be made of; the message says what is wrong with them."""


def kernel_name(name: str) -> str:
    """The canonical name of a kernel.

    Raises:
        ValueError: There is none of that name.
    """
    name = _ALIASES.get(name, name)
    if name not in RIDGE_KERNELS:
        raise ValueError(f"unknown kernel {name!r}{suggestion(name, [*RIDGE_KERNELS, *_ALIASES])}")
    return name


def create_kernel(name: str, width: float | None = None, *, device=None, dtype=None) -> Kernel:
    """A kernel by its name, with fixed hyper-parameters.

    Args:
        name: `linear`, `poly` ((a.b + 1)^3), `laplacian` (exp(-width |a - b|_1)), `gaussian`
            (exp(-width |a - b|^2)), `rff`, whose points are random features and whose kernel is their product, or one
            of `zoo.kernels.named`.
        width: Of the Laplacian (0.25), the Gaussian kernel and the named ones (1.0).
        device: Where the hyper-parameters live.
        dtype: Their type.

    Raises:
        ValueError: The kernel is unknown, or the width is not positive.
    """
    name = kernel_name(name)
    if width is not None and not width > 0:
        raise ValueError(f"width={width} must be positive")
    options: dict[str, Any] = {"learnable": False, "device": device, "dtype": dtype}
    if name in NAMED_KERNELS:
        return NAMED_KERNELS[name](width or 1.0, **options)
    if name == "poly":
        return Polynomial(3, **options)
    if name == "laplacian":
        return Laplacian(1 / (width or 0.25), **options)
    if name == "gaussian":
        return Gaussian((2 * (width or 1.0)) ** -0.5, **options)
    return Linear()


# ---- the solution ------------------------------------------------------------------------------------------


class _Solve(torch.autograd.Function):
    """A^-1 Y; with h = A^-1 g, the gradients are -h alpha^T in A and h in Y."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, Y: Tensor) -> Tensor:
        factor = cholesky(A)
        alpha = factor.solve(Y)
        ctx.save_for_backward(A, Y, factor.lower, factor.jitter, alpha)
        return alpha

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        A, Y, lower, jitter, alpha = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(g):
            return plain_gradients(lambda A, Y: cholesky(A).solve(Y), (A, Y), ctx.needs_input_grad, g)
        h = Factor(lower, jitter).solve(g)
        return -h @ alpha.mT if ctx.needs_input_grad[0] else None, h if ctx.needs_input_grad[1] else None


def ridge_coefficients(K: Tensor, Y: Tensor, ridge: float | Tensor) -> Tensor:
    """Alpha = (K + ridge I)^-1 Y, with a gradient that costs one more solve of the same factor.

    Args:
        K: Gram matrix of the support (N, N).
        Y: Targets (N, C).
        ridge: Positive number, or a tensor () that may carry a gradient.

    Returns:
        (N, C) in float64, where the device has it.

    Raises:
        NotPositiveDefiniteError: See :func:`zoo.kernels.cholesky`.
    """
    dtype = solver_dtype(K.device)
    with no_autocast(K.device):
        K, Y = K.to(dtype), Y.to(dtype)
        diagonal = torch.as_tensor(ridge, device=K.device).to(dtype).expand(K.shape[-1])
        A = K + torch.diag_embed(diagonal)
        if torch.compiler.is_compiling() or A.is_meta:  # no graph can hold the search for a jitter
            return torch.cholesky_solve(Y, torch.linalg.cholesky(A))
        if is_transformed(A):
            return cholesky(A).solve(Y)
        return _Solve.apply(A, Y)


class LinearScores(NamedTuple):
    """Scores of a linear kernel ridge classifier and what their gradient needs; no graph is recorded."""

    scores: Tensor  # (Q, C)
    support: Tensor  # (N, d)
    queries: Tensor  # (Q, d)
    alpha: Tensor  # (N, C)
    weight: Tensor  # (C, d)
    solve: Callable[[Tensor], Tensor]  # B to (K + ridge I)^-1 B


def linear_scores(support: Tensor, queries: Tensor, Y: Tensor, ridge: float) -> LinearScores:
    """Z_q Z_s^T A^-1 Y with A = Z_s Z_s^T + ridge I: through w = Z_s^T alpha, all products but A have C columns only.

    Args:
        support: Z_s (N, d).
        queries: Z_q (Q, d).
        Y: Targets (N, C).
        ridge: Positive number.
    """
    half = len(support) // 2
    K = support.new_zeros(len(support), len(support))  # of which only the lower triangle is read
    for part, upto in ((slice(half), half), (slice(half, None), len(support))):
        torch.mm(support[part], support[:upto].mT, out=K[part, :upto])
    solve = _solver(K, ridge)
    alpha = solve(Y.to(support.dtype))
    weight = alpha.mT @ support
    return LinearScores(queries @ weight.mT, support, queries, alpha, weight, solve)


def _plain_linear_scores(support: Tensor, queries: Tensor, Y: Tensor, ridge: Tensor) -> Tensor:
    """:func:`linear_scores` by the library's operators."""
    dtype = solver_dtype(support.device)
    points, eye = support.to(dtype), torch.eye(len(support), dtype=dtype, device=support.device)
    alpha = cholesky(points @ points.mT + ridge.to(dtype) * eye).solve(Y)
    return (queries.to(dtype) @ (points.mT @ alpha)).to(queries.dtype)


def linear_slopes(found: LinearScores, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the support, the queries and the ridge, from g in the scores.

    With G = Z_q^T g and h = A^-1 Z_s G, that in Z_s is alpha (G - Z_s^T h)^T - h w^T.
    """
    _, support, queries, alpha, weight, solve = found
    G = g.mT @ queries
    h = solve(support @ G.mT)
    d_support = (alpha @ (G - h.mT @ support)).addmm_(h, weight, alpha=-1)
    return d_support, g @ weight, -torch.dot(h.flatten(), alpha.flatten())


_NATIVE_ROWS = 400  # more rows are the library's


def _solver(K: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """B to (K + ridge I)^-1 B, solved in float64."""
    if len(K) <= _NATIVE_ROWS and native.available(K, gradients=True):
        with suppress(native.Unsuited):
            factor = native.spd_factor(K, ridge)
            if factor is not None:
                return partial(native.spd_solve, factor)
    A = K.to(solver_dtype(K.device))
    A.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(A)
    lower = cholesky(A).lower if bool(failed) else lower  # which looks for a jitter
    return lambda B: torch.cholesky_solve(B.to(A.dtype), lower).to(B.dtype)


class _LinearRidge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, support: Tensor, queries: Tensor, Y: Tensor, ridge: Tensor) -> Tensor:
        *tensors, ctx.solve = linear_scores(support, queries, Y, float(ridge))
        ctx.save_for_backward(*tensors[1:], Y, ridge)
        return tensors[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        support, queries, alpha, weight, Y, ridge = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(g):
            return plain_gradients(_plain_linear_scores, (support, queries, Y, ridge), ctx.needs_input_grad, g)
        found = LinearScores(g, support, queries, alpha, weight, ctx.solve)
        d_support, d_queries, d_ridge = linear_slopes(found, g)
        return d_support, d_queries, None, d_ridge


class Solution(NamedTuple):
    """A classifier without its training data: what evaluation keeps of a task."""

    support: Tensor  # (N, d)
    alpha: Tensor  # (N, C), at least float32
    gamma: Tensor  # ()
    beta: Tensor  # ()
    weight: Tensor | None = None  # (C, d): alpha^T support, for the linear kernel


def masked(logits: Tensor, active: Tensor | None) -> Tensor:
    """Logits (B, C) with the columns outside `active` (C,) or (B, C) at -1e11, or as low as their type goes."""
    return logits if active is None else logits.masked_fill(~active, max(_MASKED, torch.finfo(logits.dtype).min))


def check_finite(features: Tensor, what: str) -> None:
    """Refuse features (B, d) that hold NaN or infinity.

    Args:
        features: What is checked.
        what: Its name in the message.

    Raises:
        SupportError: A feature is not finite.
    """
    if features.is_meta or is_recorded(features) or bool(features.detach().sum().isfinite()):
        return  # a sum of finite numbers may overflow; only then is every number looked at
    bad = ~torch.isfinite(features.detach())
    if bool(bad.any()):
        rows = int(bad.any(-1).sum())
        raise SupportError(
            f"{rows} of {len(features)} {what} features hold NaN or infinity: check the inputs and the rate"
        )


def _full(z: Tensor) -> Tensor:
    """At least float32: a Gram matrix of half precision has no Cholesky factor."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check_features(name: str, points: Tensor) -> None:
    if points.ndim != 2 or not points.is_floating_point():
        raise SupportError(f"{name} is {points.dtype} of shape {tuple(points.shape)}; features are floating (N, d)")


def _check_queries(queries: Tensor, support: Tensor) -> None:
    _check_features("queries", queries)
    if queries.shape[1] != support.shape[1]:
        raise SupportError(f"queries have {queries.shape[1]} features, the support has {support.shape[1]}")


def _check_targets(targets: Tensor, count: int) -> None:
    if targets.ndim != (2 if targets.is_floating_point() else 1):
        raise SupportError(f"targets are {targets.dtype} of shape {tuple(targets.shape)}; give floating (N, C) or "
                           "classes (N,)")  # fmt: skip
    if len(targets) != count:
        raise SupportError(f"there are {count} support points and {len(targets)} targets")


def _check_active(active: Tensor, columns: int) -> None:
    if active.dtype != torch.bool or active.shape[-1:] != (columns,) or active.ndim > 2:
        raise SupportError(
            f"active is {active.dtype} of shape {tuple(active.shape)}; it must be torch.bool, one for each of the "
            f"{columns} classes"
        )


def _check_classes(name: str, classes: Tensor, count: int, columns: int | None) -> None:
    """Refuse classes that are not (count,) numbers from 0 to columns - 1 of type int64."""
    if classes.dtype != torch.int64 or classes.shape != (count,):
        raise SupportError(f"{name} is {classes.dtype} of shape {tuple(classes.shape)}; it must be int64 ({count},)")
    if classes.is_meta or is_recorded(classes) or not count:
        return
    low, high = (int(v) for v in torch.aminmax(classes))
    if low < 0 or (columns is not None and high >= columns):
        allowed = "of at least 0" if columns is None else f"from 0 to {columns - 1}"
        raise SupportError(f"{name} holds {low if low < 0 else high}; classes are numbers {allowed}")


class KernelRidgeHead(nn.Module):
    """Kernel ridge regression with one ridge, scale and shift per task.

    The ridge is |lambda_t| + 0.01, as in the KCL code. Columns of classes that the support does not have are exactly
    beta_t.

    Args:
        kernel: See :func:`create_kernel`.
        n_tasks: Length of the vectors `lam`, `gamma`, `beta`.
        lambda_init: Where `lam` starts.
        width: Of the kernels that have one.
        learn: Train the three vectors; otherwise they are buffers.
        floor: What is added to |lambda_t|.
        device: Where the numbers live.
        dtype: Their type.

    Raises:
        ValueError: The kernel is unknown.
    """

    lam: Tensor
    gamma: Tensor
    beta: Tensor

    def __init__(
        self,
        kernel: str = "linear",
        n_tasks: int = 1,
        lambda_init: float = 0.1,
        *,
        width: float | None = None,
        learn: bool = True,
        floor: float = 0.01,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.name, self.floor = kernel_name(kernel), floor
        self.kernel = create_kernel(kernel, width, device=device, dtype=dtype)
        for name, value in (("lam", lambda_init), ("gamma", 1.0), ("beta", 0.0)):
            start = torch.full((n_tasks,), value, device=device, dtype=dtype)
            if learn:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)

    def ridge(self, task: int = 0) -> Tensor:
        """|lambda_t| + floor, shape ()."""
        return self.lam[task].abs() + self.floor

    def solve(
        self,
        support: Tensor,
        targets: Tensor,
        task: int = 0,
        num_classes: int | None = None,
        *,
        gamma_of: int | None = None,
    ) -> Solution:
        """Fit the support.

        Args:
            support: Features (N, d).
            targets: One-hot or any other targets (N, C), or class indices (N,).
            task: Whose ridge, scale and shift.
            num_classes: Columns, where targets are indices; the largest index + 1 if None.
            gamma_of: Task whose parameters are used instead; the KCL code takes the current one at evaluation.

        Raises:
            SupportError: There is no support point, or a feature is not finite.
        """
        Y = self._targets(support, targets, task, num_classes)
        task = task if gamma_of is None else gamma_of
        support = _full(support)
        # without gradients a Gram matrix in float64 is cheap, and its rounding errors are not divided by the ridge
        points = support if torch.is_grad_enabled() else support.to(solver_dtype(support.device))
        alpha = ridge_coefficients(self.kernel(points), Y, self.ridge(task))
        weight = None
        if isinstance(self.kernel, Linear):
            with no_autocast(support.device):
                weight = (alpha.mT @ points.to(alpha.dtype)).to(support.dtype)
        return Solution(support, alpha.to(support.dtype), self.gamma[task], self.beta[task], weight)

    def predict(self, queries: Tensor, solution: Solution, active: Tensor | None = None) -> Tensor:
        """Logits (Q, C) of features (Q, d); with `active` (C,) the columns of other classes are -1e11.

        Raises:
            SupportError: A feature is not finite.
        """
        _check_queries(queries, solution.support)
        if active is not None:
            _check_active(active, solution.alpha.shape[-1])
        check_finite(queries, "query")
        with no_autocast(queries.device):
            points = _full(queries)
            if solution.weight is not None:
                scores = points @ solution.weight.mT.to(points.dtype)
            else:
                scores = self.kernel(points, _full(solution.support)) @ solution.alpha.to(points.dtype)
            logits = (solution.gamma * scores + solution.beta).to(queries.dtype)
        return masked(logits, active)

    def forward(
        self, support: Tensor, targets: Tensor, queries: Tensor, task: int = 0, active: Tensor | None = None
    ) -> Tensor:
        """Fit and predict: see :meth:`solve` and :meth:`predict`."""
        columns = None if active is None else len(active)
        if not isinstance(self.kernel, Linear) or not self._differentiates(support, targets):
            return self.predict(queries, self.solve(support, targets, task, columns), active)
        Y = self._targets(support, targets, task, columns)
        _check_queries(queries, support)
        if active is not None:
            _check_active(active, Y.shape[-1])
        check_finite(queries, "query")
        with no_autocast(queries.device):
            points = _full(support)
            scores = _LinearRidge.apply(points, _full(queries).to(points.dtype), Y, self.ridge(task))
            logits = (self.gamma[task] * scores + self.beta[task]).to(queries.dtype)
        return masked(logits, active)

    def loss_and_slopes(
        self, support: Tensor, targets: Tensor, queries: Tensor, y: Tensor, task: int, active: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean cross-entropy () of the answers, and its gradients in the support, the queries and the three vectors.

        Args:
            support: Features (N, d).
            targets: One-hot (N, C).
            queries: Features (Q, d).
            y: Classes of the queries (Q,).
            task: Whose ridge, scale and shift.
            active: See :meth:`predict`.

        Returns:
            (); (N, d), (Q, d), and (3, T) for `lam`, `gamma` and `beta`.

        Raises:
            SupportError: A feature is not finite, or the tensors don't belong together.
        """
        self._check_task(task)
        _check_features("support", support)
        _check_queries(queries, support)
        _check_targets(targets, len(support))
        columns = targets.shape[-1] if targets.is_floating_point() else len(active)
        _check_active(active, columns)
        _check_classes("y", y, len(queries), columns)
        check_finite(support, "support")
        check_finite(queries, "query")
        vectors = self.lam, self.gamma, self.beta
        d_vectors = self.lam.new_zeros(3, len(self.lam))
        if self.name in ("linear", "poly") and 0 < len(support) <= _NATIVE_ROWS:
            floats = support, queries, targets, *vectors
            if native.available(*floats, gradients=True):
                of_task = [v.detach()[task] for v in vectors]
                with suppress(native.Unsuited):
                    found = native.ridge_loss(
                        support, queries, targets, y, active, of_task, self.floor, self.name == "poly"
                    )
                    if found is not None and math.isfinite(found[0]):
                        d_vectors[:, task] = found[3]
                        return *found[:3], d_vectors
        with torch.enable_grad():
            zs, zq = (z.detach().requires_grad_() for z in (support, queries))
            loss = F.cross_entropy(self(zs, targets, zq, task, active), y)
            learnt = [i for i, v in enumerate(vectors) if v.requires_grad]
            slopes = torch.autograd.grad(loss, (zs, zq, *(vectors[i] for i in learnt)))
        for i, slope in zip(learnt, slopes[2:], strict=True):
            d_vectors[i] = slope
        return loss.detach(), slopes[0], slopes[1], d_vectors

    @staticmethod
    def _differentiates(support: Tensor, targets: Tensor) -> bool:
        """Whether a backward pass through the features may follow, in which a solution's many small steps are slow."""
        recording = torch.is_grad_enabled() and not targets.requires_grad
        return recording and not support.is_meta and not is_recorded(support)

    def _targets(self, support: Tensor, targets: Tensor, task: int, num_classes: int | None) -> Tensor:
        """Targets (N, C) of a support that a classifier can be made of."""
        self._check_task(task)
        _check_features("support", support)
        if not len(support):
            raise SupportError(f"the coreset of task {task} is empty: a kernel classifier needs points of each class")
        _check_targets(targets, len(support))
        check_finite(support, "support")
        if targets.is_floating_point():
            if num_classes is not None and targets.shape[-1] != num_classes:
                raise SupportError(f"targets have {targets.shape[-1]} columns, there are {num_classes} classes")
            return targets
        _check_classes("targets", targets, len(support), num_classes)
        return F.one_hot(targets, num_classes or int(targets.max()) + 1)

    def _check_task(self, task: int) -> None:
        if not -len(self.lam) <= task < len(self.lam):
            raise SupportError(f"task={task}: the classifier was built for {len(self.lam)} tasks")

    def extra_repr(self) -> str:
        return f"{self.name}, n_tasks={len(self.lam)}"


# ---- choosing the ridge ------------------------------------------------------------------------------------


def leave_one_out_errors(K: Tensor, Y: Tensor, ridges: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    """Exact leave-one-out predictions of kernel ridge regression for many ridges from one eigen-decomposition.

    With K = U diag(s) U^T, the residual of point i without point i is alpha_i / [(K + ridge I)^-1]_ii.

    Args:
        K: Gram matrix (N, N).
        Y: Targets (N, C).
        ridges: Candidates (R,).

    Returns:
        Mean squared error (R,) and, for one-hot targets, the share of wrong decisions (R,).

    Raises:
        ValueError: A ridge is not positive.
    """
    dtype = solver_dtype(K.device)
    candidates = torch.as_tensor(ridges, dtype=dtype, device=K.device)
    if not bool((candidates > 0).all()):
        raise ValueError("every ridge must be positive")
    with no_autocast(K.device):
        K, Y = K.to(dtype), Y.to(dtype)
        s, U = torch.linalg.eigh(K)
        weights = 1 / (s.clamp_min(0) + candidates[:, None])  # (R, N)
        alpha = torch.einsum("in,rn,nc->ric", U, weights, U.mT @ Y)
        residual = alpha / (U.square() @ weights.mT).mT.unsqueeze(-1)
        wrong = ((Y - residual).argmax(-1) != Y.argmax(-1)).to(dtype).mean(-1)
    return residual.square().mean((-1, -2)), wrong


def leave_one_out_ridge(K: Tensor, Y: Tensor, ridges: Sequence[float] | Tensor | None = None) -> float:
    """The ridge with the smallest leave-one-out squared error.

    Args:
        K: Gram matrix (N, N).
        Y: Targets (N, C).
        ridges: Candidates; None takes 31 from 1e-6 to 1e3 times the mean of the diagonal.
    """
    if ridges is None:
        ridges = torch.logspace(-6, 3, 31, dtype=torch.float64, device="cpu") * float(K.diagonal().mean())
    errors, _ = leave_one_out_errors(K, Y, ridges)
    return float(torch.as_tensor(ridges, device="cpu")[int(errors.argmin())])


# ---- variational random features ---------------------------------------------------------------------------


def diagonal_gaussian_kl(mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(prior_mean, exp(prior_log_variance))), summed over the last dimension."""
    ratio = (log_variance.exp() + (prior_mean - mean).square()) / prior_log_variance.exp()
    return 0.5 * (prior_log_variance - log_variance + ratio - 1).sum(-1)


class _DrawnFeatures(torch.autograd.Function):
    """sqrt(2 / D) cos(W z + b) with W = mean + eps sigma; neither W nor its gradient is ever made.

    With g the gradient in W z + b and t = g eps, those in z, mean and log sigma^2 are (g 1) mean^T + t sigma,
    Z^T g 1 and sigma 1^T (Z * t) / 2.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor, phase: Tensor) -> Tensor:
        sigma = (0.5 * log_variance).exp()
        angle = torch.addmm(phase, z * sigma, eps.mT).add_((z @ mean).unsqueeze(-1))
        ctx.save_for_backward(z, mean, sigma, eps, angle, log_variance, phase)
        return angle.cos().mul_(math.sqrt(2 / len(phase)))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, sigma, eps, angle, log_variance, phase = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_ordinary(g):
            return plain_gradients(_plain_drawn, (z, mean, log_variance, eps, phase), ctx.needs_input_grad, g)
        g = angle.sin().mul_(g).mul_(-math.sqrt(2 / len(eps)))
        total, t = g.sum(-1), g @ eps
        return torch.outer(total, mean).addcmul_(t, sigma), total @ z, 0.5 * sigma * (z * t).sum(0), None, None


def _plain_drawn(z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor, phase: Tensor) -> Tensor:
    basis = mean + eps * (0.5 * log_variance).exp()
    return math.sqrt(2 / len(phase)) * torch.cos(z @ basis.mT + phase)


class GaussianNet(nn.Module):
    """Mean and log-variance (d,) from the mean feature of a batch, by two networks of their own."""

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}

        def network() -> nn.Sequential:
            inner = [nn.Linear(dim, dim, **dd), nn.ELU(), nn.Linear(dim, dim, **dd), nn.ELU()]
            return nn.Sequential(*inner, nn.Linear(dim, dim, **dd))

        self.mean, self.log_variance = network(), network()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Of features (N, d)."""
        center = z.mean(0)
        return self.mean(center), self.log_variance(center)


class VariationalRandomFeatures(nn.Module):
    """Random Fourier features whose spectral basis is drawn from a posterior given the support.

    phi(z) = sqrt(2 / D) cos(W z + b), rows of W from q = N(mean, exp(log_variance)) of the mean support feature; the
    prior is the same of the mean query feature, and their KL joins the loss. The phases b are drawn once.
    Source: Zhen et al., "Learning to Learn Kernels with Variational Random Features", 2020, as KCL uses it.

    Args:
        dim: Features d.
        num_bases: D.
        variational: Learn posterior and prior; False draws W from N(0, I) once.
        device: Where everything lives.
        dtype: Its type.
    """

    phase: Tensor
    eps: Tensor

    def __init__(self, dim: int, num_bases: int = 1024, *, variational: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        if dim < 1 or num_bases < 1:
            raise ValueError(f"dim={dim} and num_bases={num_bases} must be positive")
        self.dim, self.num_bases, self.variational = dim, num_bases, variational
        self.register_buffer("phase", 2 * math.pi * torch.rand(num_bases, device=device, dtype=dtype))
        # what a fixed basis is, and what evaluation draws: the same normal numbers in every run of the model
        self.register_buffer("eps", torch.randn(num_bases, dim, device=device, dtype=dtype))
        if variational:
            self.posterior = GaussianNet(dim, device=device, dtype=dtype)
            self.prior = GaussianNet(dim, device=device, dtype=dtype)

    def sample(
        self, mean: Tensor, log_variance: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A basis W (D, d) of N(mean, exp(log_variance)).

        Args:
            mean: (d,).
            log_variance: (d,).
            eps: Standard normal numbers (D, d); drawn if None.
            generator: Source of the draw.
        """
        if eps is None:
            shape = (self.num_bases, self.dim)
            eps = torch.randn(shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + eps * (0.5 * log_variance).exp()

    def drawn_features(self, z: Tensor, mean: Tensor, log_variance: Tensor, eps: Tensor | None = None) -> Tensor:
        """Phi (N, D) for a basis that is drawn, or made of `eps` (D, d), and not kept: what a training step takes."""
        if eps is None:
            eps = torch.randn(self.num_bases, self.dim, device=mean.device, dtype=mean.dtype)
        if is_recorded(z):
            return self.features(z.to(mean.dtype), self.sample(mean, log_variance, eps))
        with no_autocast(z.device):
            return _DrawnFeatures.apply(z.to(mean.dtype), mean, log_variance, eps, self.phase)

    def features(self, z: Tensor, basis: Tensor) -> Tensor:
        """Phi (N, D) of features (N, d) for a basis (D, d)."""
        scale, z = math.sqrt(2 / self.num_bases), z.to(basis.dtype)
        with no_autocast(z.device):
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return scale * torch.cos(z @ basis.mT + self.phase)
            return torch.addmm(self.phase, z, basis.mT).cos_().mul_(scale)

    def kl(self, support: Tensor, queries: Tensor) -> Tensor:
        """KL of the posterior from the prior, over d once."""
        return diagonal_gaussian_kl(*self.posterior(support), *self.prior(queries))
