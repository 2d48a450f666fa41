r"""MAID: bilevel optimisation of hyper-parameters with inexact solvers of adaptive accuracy.

    min_theta g(x*(theta)),    x*(theta) = argmin_x h(x, theta),    h strongly convex and smooth in x

Salehi, Mukherjee, Roberts and Ehrhardt, "An adaptively inexact first-order method for bilevel optimization with
application to hyperparameter learning" (2023); the authors' code is MohammadSadeghSalehi/MAID. An inexact x is within
eps = |grad h| / mu of x*; conjugate gradients solve H q = grad g to a residual delta; z = -B^T q with B = d2h/dx dtheta
is the hypergradient up to a known error bound. Accuracies are increased while the bound is too large to guarantee a
descent direction, and the line search accounts for the errors of both losses.

>>> problem = RidgePenalties(A, b, A_val, b_val)                       # one penalty exp(theta_j) per feature
>>> result = maid(problem, torch.zeros(A.shape[1]))
>>> result.theta, result.x, result.values[-1]

All Lipschitz terms of the bound are kept: for penalties exp(theta) they do not vanish, although h is quadratic, and
are needed for the bound to hold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Bilevel",
    "LogisticPenalties",
    "MaidResult",
    "NotConvexError",
    "Penalties",
    "RidgePenalties",
    "conjugate_gradients",
    "decrease",
    "error_bound",
    "hypergradient",
    "maid",
    "minimise",
]


class NotConvexError(ValueError):
    """The lower problem is not strongly convex, or less than claimed."""


class Bilevel(ABC):
    """A bilevel problem and the constants of its error bounds; x and theta are float64 vectors."""

    #: Lipschitz constant of the gradient of g.
    upper_smoothness: float

    @abstractmethod
    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        """Lower loss h, a scalar."""

    @abstractmethod
    def upper(self, x: Tensor) -> Tensor:
        """Upper loss g, a scalar."""

    @abstractmethod
    def convexity(self, theta: Tensor) -> float:
        """Mu > 0: lower bound of the eigenvalues of d2h/dx2."""

    @abstractmethod
    def smoothness(self, theta: Tensor) -> float:
        """L: upper bound of these eigenvalues."""

    @abstractmethod
    def start(self) -> Tensor:
        """Initial x."""

    @abstractmethod
    def cross_norm(self, x: Tensor, theta: Tensor) -> float:
        """Spectral norm of B = d2h/dx dtheta, or an upper bound."""

    @abstractmethod
    def cross_lipschitz(self, theta: Tensor) -> float:
        """Lipschitz constant of B in x."""

    def inverse_lipschitz(self, theta: Tensor) -> float:
        """Lipschitz constant of the inverse of d2h/dx2 in x; zero if h is quadratic in x."""
        return 0.0

    def gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        """dh/dx."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.lower(x, theta.detach()), x)[0]

    def upper_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Upper loss g and dg/dx."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            g = self.upper(x)
            return float(g.detach()), torch.autograd.grad(g, x)[0]

    def curvature(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        """d2h/dx2 v."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(self.lower(x, theta.detach()), x, create_graph=True)[0]
            return torch.autograd.grad(slope @ v.detach(), x)[0]

    def cross(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        """B^T v, of the size of theta."""
        x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()
        with torch.enable_grad():
            slope = torch.autograd.grad(self.lower(x, theta), x, create_graph=True)[0]
            return torch.autograd.grad(slope @ v.detach(), theta)[0]


# ---- problems ----------------------------------------------------------------------------------------------


class Penalties(Bilevel):
    """h = loss(x) + 1/2 sum_j exp(theta_group(j)) x_j^2: penalties by feature, by class or by layer.

    Args:
        groups: Index of the penalty of each entry of x (D,), integers from 0; None: a separate one for each.
        dim: Dimension D.
    """

    def __init__(self, dim: int, groups: Tensor | None = None) -> None:
        self.groups = torch.arange(dim) if groups is None else torch.as_tensor(groups).long()
        if self.groups.shape != (dim,) or int(self.groups.min()) < 0:
            raise ValueError(
                f"groups {tuple(self.groups.shape)} must name one penalty, 0 or more, for each of {dim} numbers"
            )
        self.count = int(self.groups.max()) + 1

    @abstractmethod
    def loss(self, x: Tensor) -> Tensor:
        """Convex loss of x, without penalties."""

    @abstractmethod
    def loss_smoothness(self) -> float:
        """Lipschitz constant of the gradient of the loss."""

    def loss_convexity(self) -> float:
        """Least curvature of the loss; 0 is always valid."""
        return 0.0

    def weights(self, theta: Tensor) -> Tensor:
        """exp(theta) for each entry of x (D,)."""
        if theta.shape != (self.count,):
            raise ValueError(f"theta has shape {tuple(theta.shape)}; there are {self.count} penalties")
        return theta.exp()[self.groups]

    def lower(self, x: Tensor, theta: Tensor) -> Tensor:
        return self.loss(x) + (self.weights(theta) * x.square()).sum() / 2

    def convexity(self, theta: Tensor) -> float:
        return self.loss_convexity() + float(self.weights(theta).min())

    def smoothness(self, theta: Tensor) -> float:
        return self.loss_smoothness() + float(self.weights(theta).max())

    def cross(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(theta).index_add(0, self.groups, self.weights(theta) * x * v)

    def cross_norm(self, x: Tensor, theta: Tensor) -> float:
        squares = torch.zeros_like(theta).index_add(0, self.groups, (self.weights(theta) * x).square())
        return float(squares.max().sqrt())

    def cross_lipschitz(self, theta: Tensor) -> float:
        return float(theta.exp().max())

    def start(self) -> Tensor:
        return torch.zeros(len(self.groups), dtype=torch.float64)


class RidgePenalties(Penalties):
    """Least squares: h = 1/2 |A x - b|^2 + penalties, g = 1/2 |A_val x - b_val|^2.

    Args:
        A: Training rows (n, D).
        b: Targets (n,).
        A_val: Validation rows (m, D).
        b_val: Targets (m,).
        groups: As in :class:`Penalties`.
    """

    def __init__(self, A: Tensor, b: Tensor, A_val: Tensor, b_val: Tensor, groups: Tensor | None = None) -> None:
        if A.ndim != 2 or A_val.ndim != 2 or A.shape[1] != A_val.shape[1]:
            raise ValueError(f"A {tuple(A.shape)} and A_val {tuple(A_val.shape)} must have the same number of columns")
        if b.shape != A.shape[:1] or b_val.shape != A_val.shape[:1]:
            raise ValueError(f"b {tuple(b.shape)} and b_val {tuple(b_val.shape)} must have a number for each row")
        super().__init__(A.shape[1], groups)
        self.A, self.b, self.A_val, self.b_val = (t.detach().double() for t in (A, b, A_val, b_val))
        self.H = self.A.mT @ self.A
        values = torch.linalg.eigvalsh(self.H)
        self.least, self.largest = max(0.0, float(values[0])), float(values[-1])
        self.upper_smoothness = float(torch.linalg.matrix_norm(self.A_val, 2)) ** 2

    def loss(self, x: Tensor) -> Tensor:
        return (self.A @ x - self.b).square().sum() / 2

    def loss_smoothness(self) -> float:
        return self.largest

    def upper(self, x: Tensor) -> Tensor:
        return (self.A_val @ x - self.b_val).square().sum() / 2

    def hessian(self, theta: Tensor) -> Tensor:
        """d2h/dx2 (D, D)."""
        return self.H + torch.diag(self.weights(theta))

    def convexity(self, theta: Tensor) -> float:
        return float(torch.linalg.eigvalsh(self.hessian(theta))[0])

    def smoothness(self, theta: Tensor) -> float:
        return float(torch.linalg.eigvalsh(self.hessian(theta))[-1])

    def curvature(self, x: Tensor, theta: Tensor, v: Tensor) -> Tensor:
        return self.A.mT @ (self.A @ v) + self.weights(theta) * v

    def gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        return self.A.mT @ (self.A @ x - self.b) + self.weights(theta) * x

    def solve(self, theta: Tensor) -> Tensor:
        """The exact x*(theta)."""
        return torch.linalg.solve(self.hessian(theta), self.A.mT @ self.b)


class LogisticPenalties(Penalties):
    """Linear softmax classifier: mean cross-entropy and penalties; g is the mean cross-entropy of the validation rows.

    x holds the weights (C, D) row by row. Add a column of ones to the features for an intercept.

    Args:
        X: Training rows (n, D).
        y: Classes (n,).
        X_val: Validation rows (m, D).
        y_val: Classes (m,).
        classes: Number of classes C.
        by: One penalty per `"feature"`, per `"class"`, or a single one for `"all"`.
    """

    def __init__(self, X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor, classes: int, by: str = "feature") -> None:
        C, D = classes, X.shape[1]
        if X_val.shape[1] != D or len(X) != len(y) or len(X_val) != len(y_val):
            raise ValueError("training and validation rows must have the same features, and one class each")
        if min(int(y.min()), int(y_val.min())) < 0 or max(int(y.max()), int(y_val.max())) >= C:
            raise ValueError(f"classes are whole numbers from 0 to {C - 1}")
        if by not in ("feature", "class", "all"):
            raise ValueError(f"by={by!r} is not one of 'feature', 'class', 'all'")
        features, rows = torch.arange(D).repeat(C), torch.arange(C).repeat_interleave(D)
        super().__init__(C * D, {"feature": features, "class": rows, "all": torch.zeros_like(rows)}[by])
        self.shape, self.y, self.y_val = (C, D), y.long(), y_val.long()
        self.X, self.X_val = X.detach().double(), X_val.detach().double()
        # the Hessian of log sum exp lies between 0 and 1/2
        self.largest = float(torch.linalg.matrix_norm(self.X, 2)) ** 2 / (2 * len(X))
        self.upper_smoothness = float(torch.linalg.matrix_norm(self.X_val, 2)) ** 2 / (2 * len(X_val))
        # a third central moment is R^3 / (6 sqrt 3) at most over a range R, here sqrt(2) |x_i|
        self.third = float(self.X.norm(dim=1).pow(3).mean()) * 2 * math.sqrt(2) / (6 * math.sqrt(3))

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.X @ x.view(self.shape).mT, self.y)

    def loss_smoothness(self) -> float:
        return self.largest

    def upper(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.X_val @ x.view(self.shape).mT, self.y_val)

    def inverse_lipschitz(self, theta: Tensor) -> float:
        return self.third / self.convexity(theta) ** 2


# ---- inexact steps -----------------------------------------------------------------------------------------


def minimise(
    problem: Bilevel, theta: Tensor, x: Tensor, eps: float, *, max_iterations: int = 1_000_000
) -> tuple[Tensor, int]:
    """Nesterov's method with constant momentum until |grad h| <= mu eps, so that |x - x*| <= eps.

    Args:
        problem: Provides convexity mu and smoothness L.
        theta: Hyper-parameters.
        x: Initial value.
        eps: Accuracy of x.
        max_iterations: Maximum number of iterations.

    Returns:
        x, and the number of gradient evaluations.

    Raises:
        NotConvexError: The iteration diverges or does not converge.
    """
    mu, L = problem.convexity(theta), problem.smoothness(theta)
    if not 0 < mu <= L * (1 + 1e-12) < math.inf:
        raise NotConvexError(f"the lower problem must be strongly convex and smooth, but mu={mu:.3g} and L={L:.3g}")
    root = math.sqrt(min(1.0, mu / L))
    momentum = (1 - root) / (1 + root)
    y, first = x, None
    for i in range(1, max_iterations + 1):
        slope = problem.gradient(y, theta)
        size = float(slope.norm())
        if size <= mu * eps:
            return y, i
        first = size if first is None else first
        if not size <= 1e8 * (first + 1):
            break
        new = y - slope / L
        y, x = new + momentum * (new - x), new
    raise NotConvexError(
        f"the lower problem was not solved to {eps:.3g}: |gradient| is {size:.3g} after {i} steps; it is not as convex "
        f"(mu={mu:.3g}) or as smooth (L={L:.3g}) as it says, or this is beyond rounding"
    )


def conjugate_gradients(
    problem: Bilevel, x: Tensor, theta: Tensor, b: Tensor, delta: float, q: Tensor | None = None
) -> tuple[Tensor, float]:
    """Solve d2h/dx2 q = b to the residual delta, or to rounding.

    Args:
        problem: Provides the curvature.
        x: Point.
        theta: Hyper-parameters.
        b: Right-hand side.
        delta: Requested residual.
        q: Initial value; zeros if None.

    Returns:
        q, and its residual |d2h/dx2 q - b|.

    Raises:
        NotConvexError: A direction has non-positive curvature.
    """
    q = torch.zeros_like(b) if q is None else q
    r = b - problem.curvature(x, theta, q)
    p, rr = r, float(r @ r)
    for _ in range(10 * len(b) + 10):
        if math.sqrt(rr) <= delta:
            break
        Hp = problem.curvature(x, theta, p)
        curved = float(p @ Hp)
        if not curved > 0:
            raise NotConvexError(f"the lower problem is not convex: its curvature is {curved:.3g} in some direction")
        a = rr / curved
        q, r = q + a * p, r - a * Hp
        old, rr = rr, float(r @ r)
        p = r + rr / old * p
    return q, float((problem.curvature(x, theta, q) - b).norm())


def hypergradient(problem: Bilevel, x: Tensor, theta: Tensor, q: Tensor) -> Tensor:
    """The vector z = -B^T q: the gradient of g(x*(theta)) if x = x* and q solves H q = grad g."""
    return -problem.cross(x, theta, q)


def error_bound(problem: Bilevel, x: Tensor, theta: Tensor, eps: float, delta: float, mu: float | None = None) -> float:
    """Bound of the error of z as hypergradient.

    |B|/mu (L_g eps + delta) + (L_Hinv |grad g| |B| + L_B |grad g| / mu) eps + L_B L_g / mu eps^2, at the inexact x.

    Args:
        problem: Provides the constants.
        x: Point with |x - x*| <= eps.
        theta: Hyper-parameters.
        eps: Accuracy of x.
        delta: Residual of q.
        mu: Convexity; default: the problem's own.
    """
    mu = problem.convexity(theta) if mu is None else mu
    B, slope = problem.cross_norm(x, theta), float(problem.upper_gradient(x)[1].norm())
    Lg, LB, LH = problem.upper_smoothness, problem.cross_lipschitz(theta), problem.inverse_lipschitz(theta)
    first = B / mu * (Lg * eps + delta)
    return first + (LH * slope * B + LB * slope / mu) * eps + LB * Lg / mu * eps**2


def decrease(old: float, new: float, old_slope: float, new_slope: float, eps: float, smoothness: float) -> float:
    """Upper bound of the change of g, from values and gradient norms at inexact points; certain progress if negative.

    Args:
        old: The upper loss g at the old point.
        new: g at the new point.
        old_slope: |grad g| at the old point.
        new_slope: |grad g| at the new point.
        eps: Accuracy of both points.
        smoothness: L_g.
    """
    return new + new_slope * eps + smoothness * eps**2 / 2 - old + old_slope * eps


# ---- algorithm  --------------------------------------------------------------------------------------------


@dataclass
class MaidResult:
    """Result and history of a run.

    Attributes:
        theta: Hyper-parameters.
        x: Solution of the lower problem for them, to accuracy `eps`.
        values: g initially and after every step, at inexact x.
        thetas: Hyper-parameters initially and after every step.
        accuracies: eps after every step.
        steps: Accepted step sizes.
        lower_iterations: Total number of gradients of h.
        message: Why it stopped.
    """

    theta: Tensor
    x: Tensor
    values: list[float] = field(default_factory=list)
    thetas: list[Tensor] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    lower_iterations: int = 0
    message: str = ""


def maid(
    problem: Bilevel,
    theta: Tensor,
    *,
    iterations: int = 100,
    eps: float = 1e-1,
    delta: float = 1e-1,
    step: float = 1.0,
    tolerance: float = 1e-8,
    min_eps: float = 1e-12,
    max_lower: int = 1_000_000,
    rho: float = 0.5,
    eta: float = 0.9,
    lam: float = 0.45,
    searches: int = 10,
) -> MaidResult:
    """Gradient descent on the hyper-parameters with adaptive accuracies and steps; every step provably decreases g.

    Args:
        problem: The bilevel problem.
        theta: Initial value (T,).
        iterations: Maximum number of accepted steps.
        eps: Initial accuracy of x.
        delta: Initial residual of q.
        step: Initial step size.
        tolerance: Stop when the sum of |z| and its error bound is below this.
        min_eps: Stop when a better accuracy would be needed.
        max_lower: Stop after this many gradients of h.
        rho: Factor of the line search.
        eta: The error bound may be up to (1 - eta) |z|.
        lam: Fraction of the expected decrease that is required, below eta.
        searches: Step sizes to try initially; one more after each failure.

    Returns:
        The final state and the history.

    Raises:
        ValueError: An argument is out of range.
        NotConvexError: The lower problem is less convex or smooth than claimed.
    """
    if not (eps > 0 and delta > 0 and step > 0 and 0 < rho < 1 and 0 < lam < eta < 1 and searches >= 1):
        raise ValueError(
            "eps, delta and step must be positive, rho in (0, 1), 0 < lam < eta < 1, and searches at least 1"
        )
    theta = theta.detach().double().clone()
    found = MaidResult(theta, problem.start().double())
    x, spent = minimise(problem, theta, found.x, eps)
    g, slope = problem.upper_gradient(x)
    found.values.append(g)
    found.thetas.append(theta)
    q: Tensor | None = None
    while True:
        found.theta, found.x, found.lower_iterations = theta, x, spent
        if len(found.steps) >= iterations:
            found.message = f"{iterations} steps"
            break
        if spent >= max_lower:
            found.message = f"{spent} gradients of the lower problem"
            break
        q, residual = conjugate_gradients(problem, x, theta, slope, delta, q)
        z = hypergradient(problem, x, theta, q)
        size, bound = float(z.norm()), error_bound(problem, x, theta, eps, residual)
        if size + bound <= tolerance:
            found.message = f"|hypergradient| is at most {size + bound:.3g}"
            break
        if bound <= (1 - eta) * size:
            trial = _search(problem, theta, x, z, g, slope, eps, step, rho, lam, searches)
            spent += trial.spent
            if trial.step:
                theta, x, g, slope = trial.theta, trial.x, trial.g, trial.slope
                found.values.append(g)
                found.thetas.append(theta)
                found.accuracies.append(eps)
                found.steps.append(trial.step)
                step, eps, delta = trial.step * 10 / 9, eps * 1.05, delta * 1.05
                continue
            searches += 1
        if eps <= min_eps:
            found.message = f"a better accuracy than {eps:.3g} would be needed"
            break
        eps, delta = eps / 2, delta / 2
        x, some = minimise(problem, theta, x, eps)
        g, slope = problem.upper_gradient(x)
        spent += some
    return found


@dataclass
class _Trial:
    spent: int
    step: float = 0.0
    theta: Tensor = field(default_factory=lambda: torch.empty(0))
    x: Tensor = field(default_factory=lambda: torch.empty(0))
    g: float = 0.0
    slope: Tensor = field(default_factory=lambda: torch.empty(0))


def _search(
    problem: Bilevel,
    theta: Tensor,
    x: Tensor,
    z: Tensor,
    g: float,
    slope: Tensor,
    eps: float,
    step: float,
    rho: float,
    lam: float,
    searches: int,
) -> _Trial:
    """The first of the step sizes step, step rho, ... that provably decreases g."""
    trial, start = _Trial(0), x
    for _ in range(searches):
        new = theta - step * z
        start, some = minimise(problem, new, start, eps)
        trial.spent += some
        value, new_slope = problem.upper_gradient(start)
        change = decrease(g, value, float(slope.norm()), float(new_slope.norm()), eps, problem.upper_smoothness)
        if change <= -lam * step * float(z @ z):
            return _Trial(trial.spent, step, new, start, value, new_slope)
        step *= rho
    return trial
