"""Solvers for GRBF networks: Adam, L-BFGS and variable projection, batched over networks.

B networks of equal shape (folds, grid settings, bootstrap samples, restarts) are tensors with a leading dimension B.
Adam trains them together on the sum of their losses, so each takes the same steps as alone. Rows may be shared: a
network ignores rows of weight zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from zoo.kernels.metric import (
    coordinate_gradients,
    factor_gradient,
    metric_gaussian,
    point_gradient,
    triangle,
    unit_values,
)
from zoo.learners.ridge import solve_ridge
from zoo.models.grbf import Penalty, factor_of, network_loss, penalty_term

__all__ = ["Fit", "Networks", "Objective", "fit_adam", "fit_lbfgs", "fit_varpro"]


@dataclass
class Networks:
    """B networks of equal shape.

    Attributes:
        elements: Parameters of the metrics, (B, ...), as `GaussianRBFNetwork.precision_elements`.
        centers: (B, M, D).
        weights: (B, K, M).
        bias: (B, K); None for none.
        form: Form of the metrics.
    """

    elements: Tensor
    centers: Tensor
    weights: Tensor
    bias: Tensor | None
    form: str

    def factor(self) -> Tensor:
        """Factors of the metrics, as :func:`zoo.kernels.metric.metric_gaussian` takes them."""
        return factor_of(self.elements, self.centers.shape[-1], self.form)

    def phi(self, X: Tensor) -> Tensor:
        """Activations (B, n, M) of rows (B, n, D) or (n, D)."""
        return metric_gaussian(X, self.centers, self.factor())

    def readout(self, phi: Tensor) -> Tensor:
        """Outputs (B, n, K) of activations (B, n, M)."""
        outputs = phi @ self.weights.mT
        return outputs if self.bias is None else outputs + self.bias.unsqueeze(-2)

    def tensors(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        named = {"elements": self.elements, "centers": self.centers, "weights": self.weights, "bias": self.bias}
        return {name: value for name, value in named.items() if value is not None}

    def one(self, i: int) -> Networks:
        """Network i, as a batch of one."""
        parts: dict[str, Any] = {name: value[i : i + 1] for name, value in self.tensors().items()}
        return replace(self, **parts)

    def detached(self, learn: bool = False) -> Networks:
        """A detached copy; `learn` sets requires_grad."""
        copies: dict[str, Any] = {k: v.detach().clone().requires_grad_(learn) for k, v in self.tensors().items()}
        return replace(self, **copies)

    @torch.no_grad()
    def put(self, i: int, other: Networks) -> None:
        """Overwrite network i with `other`, a batch of one."""
        for name, value in self.tensors().items():
            value[i] = other.tensors()[name][0]


@dataclass(frozen=True)
class Objective:
    """Weighted loss plus penalties of B networks.

    Attributes:
        X: Standardised rows, (n, D) for all or (B, n, D).
        y: Class indices (n,), or values (n, 1) or (B, n, 1).
        weight: Row weights of each network (B, n), summing to 1.
        loss: `"mse"` or `"cross_entropy"`.
        reg_precision, reg_weights, reg_centers: Weights of the penalties, (B,) each.
        penalty: `"squared"` or `"plain"` norms.
        anchor: Factor (B, D, R) that the penalty shrinks L to; None for zero.
    """

    X: Tensor
    y: Tensor
    weight: Tensor
    loss: str
    reg_precision: Tensor
    reg_weights: Tensor
    reg_centers: Tensor
    penalty: Penalty = "squared"
    anchor: Tensor | None = None

    def targets(self) -> Tensor:
        """Targets with a leading dimension B."""
        wanted = 3 if self.y.is_floating_point() else 2
        return self.y if self.y.ndim == wanted else self.y.expand(len(self.weight), *self.y.shape)

    def data(self, networks: Networks) -> Tensor:
        """Weighted loss (B,)."""
        return network_loss(
            networks.readout(networks.phi(self.X)),
            self.targets(),
            self.loss,
            weight=self.weight,
            reduction="sum",
        )

    def penalties(self, networks: Networks) -> Tensor:
        """Sum of the weighted penalties (B,)."""
        L, D = networks.factor(), networks.centers.shape[-1]
        L = L if self.anchor is None else L - self.anchor
        L = L.expand(-1, 1, D) if networks.form == "isotropic" else L
        total = self.reg_precision * penalty_term(L, self.penalty)
        total = total + self.reg_weights * penalty_term(networks.weights, self.penalty)
        if self._penalizes_centers:
            total = total + self.reg_centers * penalty_term(networks.centers, self.penalty)
        return total

    def __call__(self, networks: Networks) -> Tensor:
        """Objective (B,)."""
        return self.data(networks) + self.penalties(networks)

    @torch.no_grad()
    def gradient(self, networks: Networks, learn_centers: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective (B,) and its gradient by tensor name, derived by hand: a third of autograd's operations."""
        C, W, L = networks.centers, networks.weights, networks.factor()
        X = self.X if self.X.ndim == 3 else self.X.unsqueeze(0)
        phi, z, k = unit_values(X, C, L)
        values, r = _data_gradient(networks.readout(phi), self.targets(), self.weight.unsqueeze(-1), self.loss)
        grad = {"weights": r.mT @ phi}
        if networks.bias is not None:
            grad["bias"] = r.sum(-2)
        d_z, d_k = coordinate_gradients((r @ W).mul_(phi), z, k)
        d_L = factor_gradient(X, d_z, L).add_(factor_gradient(C, d_k, L))
        if learn_centers:
            grad["centers"] = point_gradient(d_k, L)
        offset, reg = L if self.anchor is None else L - self.anchor, self.reg_precision
        if networks.form == "isotropic":  # one scale represents D equal ones
            D = C.shape[-1]
            reg = reg * (D if self.penalty == "squared" else math.sqrt(D))
        blocks: list[tuple[Tensor, Tensor, Tensor | None]]
        blocks = [(offset, reg, d_L), (W, self.reg_weights, grad["weights"])]
        if self._penalizes_centers:
            blocks.append((C, self.reg_centers, grad.get("centers")))
        for block, reg, g in blocks:
            size = penalty_term(block, self.penalty)
            values = values + reg * size
            if g is not None:
                factor = 2.0 * reg if self.penalty == "squared" else reg / size.clamp_min(1e-30)
                g.addcmul_(factor[:, None, None], block)
        grad["elements"] = _pack_gradient(d_L, L, networks.form)
        return values, grad

    @cached_property
    def _penalizes_centers(self) -> bool:
        return bool((self.reg_centers > 0).any())

    def one(self, i: int) -> Objective:
        """The objective of network i, as a batch of one."""
        values: dict[str, Any] = {
            k: getattr(self, k)[i : i + 1] for k in ("weight", "reg_precision", "reg_weights", "reg_centers")
        }
        values["X"] = self.X[i] if self.X.ndim == 3 else self.X
        anchor = None if self.anchor is None else self.anchor[i : i + 1]
        return replace(self, y=self.targets()[i], anchor=anchor, **values)

    def rows(self, chosen: Tensor) -> Objective:
        """The objective on some rows, scaled to an unbiased estimate of the whole."""
        X = self.X[..., chosen, :]
        y = self.targets()[:, chosen]
        return replace(self, X=X, y=y, weight=self.weight[:, chosen] * (self.weight.shape[1] / len(chosen)))


@dataclass
class Fit:
    """Result of a solver.

    Attributes:
        networks: The trained networks, detached.
        histories: Objective of each network at every evaluation: before each step of Adam, or in each line search.
        steps: Number of steps of each network.
        converged: Whether all networks converged before `max_iter`.
    """

    networks: Networks
    histories: list[list[float]]
    steps: list[int]
    converged: bool

    @property
    def n_iter(self) -> int:
        """Largest number of steps over the networks."""
        return max(self.steps)

    @property
    def history(self) -> Tensor:
        """Objectives (evaluations, B); shorter histories are padded with their last value."""
        longest = max(map(len, self.histories))
        return torch.tensor([h + h[-1:] * (longest - len(h)) for h in self.histories], dtype=torch.float64).T


def _pack_gradient(d_factor: Tensor, factor: Tensor, form: str) -> Tensor:
    """Gradient with respect to the stored parameters of a metric, from that with respect to its factor."""
    if form == "full":
        return d_factor.flatten(-2)[..., _triangle(d_factor.shape[-1], device=d_factor.device)]
    return d_factor if form == "low_rank" else (d_factor * factor).squeeze(-2)  # log-scales


_triangle = cache(triangle)


def _data_gradient(f: Tensor, y: Tensor, weight: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Weighted loss (B,) and its gradient with respect to the outputs f (B, n, K); weights are (B, n, 1)."""
    if loss == "mse":
        error = f - y
        weighted = weight * error
        return (weighted * error).sum((-2, -1)) / f.shape[-1], weighted * (2 / f.shape[-1])
    if f.shape[-1] == 1:
        value = F.binary_cross_entropy_with_logits(f, y, weight, reduction="none").sum((-2, -1))
        return value, f.sigmoid().sub_(y).mul_(weight)
    log_p = f.log_softmax(-1)
    place = y.unsqueeze(-1)
    value = -(weight * log_p.gather(-1, place)).sum((-2, -1))
    p = log_p.exp_()
    return value, weight * p.scatter_add_(-1, place, -torch.ones_like(place, dtype=p.dtype))


# ---- Adam --------------------------------------------------------------------------------------------------


class Adam:
    """torch's functional Adam: the optimizer class's overhead exceeds a step of a small network."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        values = list(parameters.values())
        self.means, self.squares = ([torch.zeros_like(p) for p in values] for _ in range(2))
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in values]
        self.fused = values[0].device.type in ("cpu", "cuda")

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Update the parameters in place."""
        adam(
            list(self.parameters.values()),
            [gradients[name] for name in self.parameters],
            self.means,
            self.squares,
            [],
            self.steps,
            fused=self.fused,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )


def fit_adam(
    networks: Networks,
    objective: Objective,
    *,
    learn_centers: bool = True,
    learning_rate: float = 0.02,
    max_iter: int = 500,
    batch_size: int | None = None,
    tol: float = 1e-6,
    n_iter_no_change: int = 50,
    validation: Objective | None = None,
    generator: torch.Generator | None = None,
) -> Fit:
    """Adam on all parameters, with cosine decay to zero.

    Args:
        networks: Initial networks; not changed.
        objective: Objective to minimise.
        learn_centers: Train the centres.
        learning_rate: Initial learning rate.
        max_iter: Largest number of steps.
        batch_size: Mini-batch size, sampled without replacement; None for all rows.
        tol: A network stops when the relative improvement over `n_iter_no_change` steps is below this; not used with
            mini-batches, unless there is a `validation`.
        n_iter_no_change: Number of steps for `tol`.
        validation: Judge by its loss instead, every ten steps, and return each network at its best.
        generator: Generator of the mini-batches.
    """
    state = networks.detached()
    parameters = {name: p for name, p in state.tensors().items() if learn_centers or name != "centers"}
    optimizer = Adam(parameters)
    batches = _batches(objective, batch_size, generator)
    history: list[Tensor] = []
    B = len(state.centers)
    best, best_at, kept = [math.inf] * B, [0] * B, state.detached()
    steps, going = [max_iter] * B, set(range(B))
    for step in range(max_iter):
        values, gradients = next(batches).gradient(state, learn_centers)
        history.append(values)
        # the objective of a mini-batch is too noisy to stop by
        if (validation is None and batch_size is None) or (validation is not None and step % 10 == 0):
            with torch.no_grad():
                scores = (values if validation is None else validation.data(state)).tolist()
            for i in sorted(going):
                if scores[i] < best[i]:
                    if math.isinf(best[i]) or best[i] - scores[i] > tol * max(abs(best[i]), 1e-3):
                        best_at[i] = step
                    best[i] = scores[i]
                    if validation is not None:
                        kept.put(i, state.one(i))
                if step - best_at[i] >= n_iter_no_change:  # this network is done
                    going.remove(i)
                    steps[i] = step + 1
                    if validation is None:
                        kept.put(i, state.one(i))
            if not going:
                break
        optimizer.step(gradients, learning_rate * 0.5 * (1 + math.cos(math.pi * step / max_iter)))
    if validation is None:
        for i in going:
            kept.put(i, state.one(i))
    table = torch.stack(history, 1).tolist()
    histories = [losses[:count] for losses, count in zip(table, steps, strict=True)]
    return Fit(kept, histories, steps, max(steps) < max_iter)


def _batches(objective: Objective, size: int | None, generator: torch.Generator | None) -> Iterator[Objective]:
    n = objective.weight.shape[1]
    if size is None or size >= n:
        while True:
            yield objective
    while True:
        order = torch.randperm(n, generator=generator).to(objective.weight.device)
        for start in range(0, n - size + 1, size):
            yield objective.rows(order[start : start + size])


# ---- L-BFGS ------------------------------------------------------------------------------------------------


def _lbfgs(
    parameters: list[Tensor], evaluate: Callable[[], Tensor], max_iter: int, tol: float
) -> tuple[list[float], int]:
    """L-BFGS with strong-Wolfe line search; `evaluate` returns the objective and sets the gradients.

    Returns:
        Objectives at all evaluations, and the number of steps.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=1e-7,
        tolerance_change=tol * 1e-3,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    seen: list[float] = []

    def closure() -> Tensor:
        loss = evaluate()
        seen.append(float(loss))
        return loss

    optimizer.step(closure)
    return seen, int(optimizer.state[parameters[0]].get("n_iter", 1))


def _each(
    networks: Networks, solve: Callable[[int, Networks], tuple[Networks, list[float], int]], max_iter: int
) -> Fit:
    """Solve the networks one by one: each needs its own line search."""
    result = networks.detached()
    histories, steps = [], []
    for i in range(len(networks.centers)):
        one, seen, n_iter = solve(i, networks.one(i))
        result.put(i, one.detached())
        histories.append(seen)
        steps.append(n_iter)
    return Fit(result, histories, [max(1, count) for count in steps], max(steps) < max_iter)


def fit_lbfgs(
    networks: Networks,
    objective: Objective,
    *,
    learn_centers: bool = True,
    max_iter: int = 500,
    tol: float = 1e-6,
) -> Fit:
    """Full-batch L-BFGS on all parameters."""

    def solve(i: int, start: Networks) -> tuple[Networks, list[float], int]:
        state, own = start.detached(), objective.one(i)
        free = {name: p for name, p in state.tensors().items() if learn_centers or name != "centers"}

        def evaluate() -> Tensor:
            value, gradients = own.gradient(state, learn_centers)
            for name, parameter in free.items():
                parameter.grad = gradients[name]
            return value.sum()

        return state, *_lbfgs(list(free.values()), evaluate, max_iter, tol)

    return _each(networks, solve, max_iter)


# ---- variable projection -----------------------------------------------------------------------------------


@torch.no_grad()
def project_weights(networks: Networks, objective: Objective, targets: Tensor) -> Networks:
    """Replace the output weights by the optimal ones for the metrics and centres.

    Weighted ridge regression on the activations, (Phi^T D Phi + reg I) w = Phi^T D y, with an unpenalised intercept,
    in float64.

    Args:
        networks: Networks whose metrics and centres are used.
        objective: Provides rows, weights and `reg_weights`; its loss is not used.
        targets: Values (n, K) or (B, n, K).
    """
    phi = networks.phi(objective.X).double()  # (B, n, M)
    weight = objective.weight.double().unsqueeze(-1)
    y = targets.double().expand(len(phi), -1, -1)
    shift = torch.zeros((), dtype=phi.dtype), torch.zeros((), dtype=phi.dtype)
    if networks.bias is not None:
        shift = (weight * phi).sum(-2, keepdim=True), (weight * y).sum(-2, keepdim=True)
    phi_c, y_c = phi - shift[0], y - shift[1]
    gram = phi_c.mT @ (weight * phi_c)
    w = solve_ridge(gram, phi_c.mT @ (weight * y_c), objective.reg_weights.double())
    own = networks.weights.dtype
    bias = None if networks.bias is None else (shift[1] - shift[0] @ w).squeeze(-2).to(own)
    return replace(networks, weights=w.mT.to(own), bias=bias)


def fit_varpro(
    networks: Networks,
    objective: Objective,
    *,
    learn_centers: bool = True,
    max_iter: int = 500,
    tol: float = 1e-6,
) -> Fit:
    """Variable projection (Golub and Pereyra, 1973): L-BFGS on the metric and centres, with optimal output weights.

    A classifier's metric is fitted to the one-hot classes by least squares, then its output weights by cross-entropy,
    which is convex.

    Raises:
        ValueError: The penalty is not `"squared"`.
    """
    if objective.penalty != "squared":
        raise ValueError('variable projection solves for squared norms: use penalty="squared"')

    def solve(i: int, start: Networks) -> tuple[Networks, list[float], int]:
        state, own = start.detached(), objective.one(i)
        classes = own.loss == "cross_entropy"
        targets = _as_values(own.y, start.weights.shape[1]).to(start.weights) if classes else own.y
        squared = replace(own, loss="mse", y=targets)
        free = {"elements": state.elements} | ({"centers": state.centers} if learn_centers else {})
        K = targets.shape[-1]
        whole = replace(squared, reg_precision=own.reg_precision / K, reg_centers=own.reg_centers / K)
        whole = replace(whole, reg_weights=own.reg_weights / K)  # sum over the K outputs: K times their mean

        def evaluate() -> Tensor:
            # at the optimal weights their gradient is zero, so the partial gradients are the total ones
            solved = project_weights(state, squared, targets)
            value, gradients = whole.gradient(solved, learn_centers)
            for name, parameter in free.items():
                parameter.grad = K * gradients[name]
            return K * value.sum()

        seen, n_iter = _lbfgs(list(free.values()), evaluate, max_iter, tol)
        result = project_weights(state, squared, targets).detached()
        if classes:
            _fit_readout(result, own, max_iter, tol)
        return result, seen, n_iter

    return _each(networks, solve, max_iter)


def _fit_readout(networks: Networks, objective: Objective, max_iter: int, tol: float) -> None:
    """Fit only the output weights, in place; a convex problem."""
    free = {k: v for k, v in networks.tensors().items() if k in ("weights", "bias")}
    phi = networks.phi(objective.X)

    def evaluate() -> Tensor:
        value, r = _data_gradient(
            networks.readout(phi), objective.targets(), objective.weight.unsqueeze(-1), objective.loss
        )
        reg, W = objective.reg_weights[:, None, None], networks.weights
        networks.weights.grad = r.mT @ phi + 2 * reg * W
        if networks.bias is not None:
            networks.bias.grad = r.sum(-2)
        return value.sum() + (reg * W.square()).sum()

    _lbfgs(list(free.values()), evaluate, max_iter, tol)


def _as_values(y: Tensor, outputs: int) -> Tensor:
    """Least-squares targets of classes: +-1 (n, 1) for a single logit, else centred one-hot (n, K)."""
    if outputs == 1:
        return 2 * y.reshape(-1, 1) - 1
    return torch.nn.functional.one_hot(y.long(), outputs) - 1 / outputs
