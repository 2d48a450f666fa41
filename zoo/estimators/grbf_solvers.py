"""Solvers for tables: Adam, L-BFGS and variable projection, for one GRBF network or for many at once.

B networks of one shape (folds, settings of a grid, bootstrap samples, restarts) are tensors with a leading
dimension B, trained by batched matrix products with one Adam: their losses are summed, so each takes the steps
that it would take alone, and stops where it would. The rows may be shared by all networks; what differs are their
weights, zero where a network must not see a row.
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
    """B networks of one shape.

    Attributes:
        elements: Their metrics, (B, ...) as `GaussianRBFNetwork.precision_elements`.
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
        """What :func:`zoo.kernels.metric.metric_gaussian` takes."""
        return factor_of(self.elements, self.centers.shape[-1], self.form)

    def phi(self, X: Tensor) -> Tensor:
        """Activations (B, n, M) of rows (B, n, D) or (n, D)."""
        return metric_gaussian(X, self.centers, self.factor())

    def readout(self, phi: Tensor) -> Tensor:
        """Outputs (B, n, K) of activations."""
        outputs = phi @ self.weights.mT
        return outputs if self.bias is None else outputs + self.bias.unsqueeze(-2)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a solver may change, by name."""
        named = {"elements": self.elements, "centers": self.centers, "weights": self.weights, "bias": self.bias}
        return {name: value for name, value in named.items() if value is not None}

    def one(self, i: int) -> Networks:
        """Network i, still with its leading dimension."""
        parts: dict[str, Any] = {name: value[i : i + 1] for name, value in self.tensors().items()}
        return replace(self, **parts)

    def detached(self, learn: bool = False) -> Networks:
        """A copy without history."""
        copies: dict[str, Any] = {k: v.detach().clone().requires_grad_(learn) for k, v in self.tensors().items()}
        return replace(self, **copies)

    @torch.no_grad()
    def put(self, i: int, other: Networks) -> None:
        """Overwrite network i by the only one of `other`."""
        for name, value in self.tensors().items():
            value[i] = other.tensors()[name][0]


@dataclass(frozen=True)
class Objective:
    """Weighted data term plus weighted penalties of B networks.

    Attributes:
        X: Standardised rows, (n, D) for all or (B, n, D).
        y: Class indices (n,), or values (n, 1) or (B, n, 1).
        weight: Weight of each row in each network (B, n); every network's add up to 1.
        loss: `"mse"` or `"cross_entropy"`.
        reg_precision: (B,).
        reg_weights: (B,).
        reg_centers: (B,).
        penalty: `"squared"` or `"plain"`.
        anchor: Factor (B, D, R) that the penalty on L pulls to; None for zero.
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
        """Targets with the networks' dimension."""
        wanted = 3 if self.y.is_floating_point() else 2
        return self.y if self.y.ndim == wanted else self.y.expand(len(self.weight), *self.y.shape)

    def data(self, networks: Networks) -> Tensor:
        """Data term (B,)."""
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
        if self._centers_pay:
            total = total + self.reg_centers * penalty_term(networks.centers, self.penalty)
        return total

    def __call__(self, networks: Networks) -> Tensor:
        """Objective (B,)."""
        return self.data(networks) + self.penalties(networks)

    @torch.no_grad()
    def gradient(self, networks: Networks, learn_centers: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective (B,) and its derivative in every tensor of the networks, by hand.

        What autograd would compute, in a third of the operations.
        """
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
        pulled, reg = L if self.anchor is None else L - self.anchor, self.reg_precision
        if networks.form == "isotropic":  # one scale stands for D of them
            D = C.shape[-1]
            reg = reg * (D if self.penalty == "squared" else math.sqrt(D))
        blocks: list[tuple[Tensor, Tensor, Tensor | None]]
        blocks = [(pulled, reg, d_L), (W, self.reg_weights, grad["weights"])]
        if self._centers_pay:
            blocks.append((C, self.reg_centers, grad.get("centers")))
        for block, reg, slope in blocks:
            size = penalty_term(block, self.penalty)
            values = values + reg * size
            if slope is not None:
                push = 2.0 * reg if self.penalty == "squared" else reg / size.clamp_min(1e-30)
                slope.addcmul_(push[:, None, None], block)
        grad["elements"] = _pack_gradient(d_L, L, networks.form)
        return values, grad

    @cached_property
    def _centers_pay(self) -> bool:
        return bool((self.reg_centers > 0).any())

    def one(self, i: int) -> Objective:
        """The objective of network i alone."""
        values: dict[str, Any] = {
            k: getattr(self, k)[i : i + 1] for k in ("weight", "reg_precision", "reg_weights", "reg_centers")
        }
        values["X"] = self.X[i] if self.X.ndim == 3 else self.X
        anchor = None if self.anchor is None else self.anchor[i : i + 1]
        return replace(self, y=self.targets()[i], anchor=anchor, **values)

    def rows(self, chosen: Tensor) -> Objective:
        """The objective on some of the rows, scaled to stay an estimate of the whole."""
        X = self.X[..., chosen, :]
        y = self.targets()[:, chosen]
        return replace(self, X=X, y=y, weight=self.weight[:, chosen] * (self.weight.shape[1] / len(chosen)))


@dataclass
class Fit:
    """What a solver returns.

    Attributes:
        networks: The trained networks, detached.
        histories: Objective of each network at every evaluation: before each step of Adam, at each trial of a line
            search.
        steps: Steps that each network took.
        converged: Whether every objective had settled before `max_iter`.
    """

    networks: Networks
    histories: list[list[float]]
    steps: list[int]
    converged: bool

    @property
    def n_iter(self) -> int:
        """Steps of the network that took most."""
        return max(self.steps)

    @property
    def history(self) -> Tensor:
        """Objectives (evaluations, B); the last one of a network is repeated while others went on."""
        longest = max(map(len, self.histories))
        return torch.tensor([h + h[-1:] * (longest - len(h)) for h in self.histories], dtype=torch.float64).T


def _pack_gradient(d_factor: Tensor, factor: Tensor, form: str) -> Tensor:
    """Derivative in the stored parameter of a metric of this form, from that in its factor."""
    if form == "full":
        return d_factor.flatten(-2)[..., _triangle(d_factor.shape[-1], device=d_factor.device)]
    return d_factor if form == "low_rank" else (d_factor * factor).squeeze(-2)  # log-scales


_triangle = cache(triangle)  # thousands of steps need the same one


def _data_gradient(f: Tensor, y: Tensor, weight: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """Data term (B,) and its derivative in the outputs f (B, n, K), under row weights (B, n, 1)."""
    if loss == "mse":
        error = f - y
        slope = weight * error
        return (slope * error).sum((-2, -1)) / f.shape[-1], slope * (2 / f.shape[-1])
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
    """The library's Adam without its optimizer, whose bookkeeping takes longer than a step of a small network."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        values = list(parameters.values())
        self.means, self.squares = ([torch.zeros_like(p) for p in values] for _ in range(2))
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in values]
        self.fused = values[0].device.type in ("cpu", "cuda")

    def step(self, gradients: Mapping[str, Tensor], learning_rate: float) -> None:
        """Change the parameters in place."""
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
    """Adam on all parameters, with a cosine decay to zero.

    Args:
        networks: Where to start; not changed.
        objective: What to minimise.
        learn_centers: Train the centres.
        learning_rate: First rate.
        max_iter: Steps.
        batch_size: Rows of a step, drawn without replacement; None for all of them.
        tol: Stop when, without mini-batches, no network's objective has become this much better, relatively, ...
        n_iter_no_change: ... for so many steps (ten times as many evaluations with `validation`).
        validation: Stop by its data term instead, and return each network at its best.
        generator: Source of the order of the rows.
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
        # the objective of one batch says little: no stopping by it
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
                if step - best_at[i] >= n_iter_no_change:  # it stays as it is, the others go on
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
    """Minimise with strong-Wolfe L-BFGS; `evaluate` returns the objective and sets every gradient, each time."""
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
    """Networks one after another: a line search has one step length, which cannot serve several."""
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
    """L-BFGS on all parameters jointly, with the whole table in every evaluation."""

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
    """The networks with the output weights that are optimal for their metrics and centres.

    Weighted ridge regression on the activations, (Phi^T D Phi + reg I) w = Phi^T D y with an unpenalised intercept,
    solved with a Cholesky factor in float64; differentiable in the metric and the centres.

    Args:
        networks: Their metrics and centres are used.
        objective: Gives rows, weights and `reg_weights`; its loss is not used.
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
    """Variable projection: L-BFGS over the metric (and the centres), the output weights in closed form at every step.

    There is no learning rate and no start of the weights. A classifier's metric is fitted to the one-hot classes by
    least squares; its readout is then fitted by cross-entropy, which is convex.
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
        whole = replace(whole, reg_weights=own.reg_weights / K)  # the mean over K outputs, times K, is their sum

        def evaluate() -> Tensor:
            # at the optimal weights the objective's derivative in them is 0: what is left is the partial derivative
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
    """Fit the output weights alone, in place; a convex problem."""
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
    """Targets of least squares for classes: one column of +-1 for a single logit, centred one-hot columns otherwise."""
    if outputs == 1:
        return 2 * y.reshape(-1, 1) - 1
    return torch.nn.functional.one_hot(y.long(), outputs) - 1 / outputs
