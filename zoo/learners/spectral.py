r"""Sparse weights of a grid of spectral components, learned centrally or by agents that do not share their rows.

The kernel sum_q theta_q K_q with fixed components (`zoo.kernels.spectral_mixture`) has the objective

    l(theta) = y^T C^-1 y + log |C|,     C = sum_q theta_q K_q + noise I,     theta_q >= 0

With log |C| bounded by its tangent, minimising the bound is a multiplicative update, under which l never increases:

    theta_q <- theta_q sqrt(y^T C^-1 K_q C^-1 y / tr(C^-1 K_q))

Weights that do not help go to zero. Agents j with their own rows agree on the weights by ADMM (Suwandi, Lin, Yin, Wang,
Theodoridis, "Sparsity-Aware Distributed Learning for Gaussian Processes with Linear Multiple Kernel"; ours minimises
the same bound without a cone solver): each minimises l_j + lam_j . (theta_j - theta) + rho / 2 |theta_j - theta|^2,
which under the bound is a cubic equation per weight. The messages may be rounded to a grid.

>>> kernel = GridSpectralMixture(frequency_grid(100), 0.001, 0.02, dtype=torch.float64)
>>> learn_weights(kernel, X, y, noise=0.04)
>>> posterior = GaussianProcess(kernel, noise=0.04).condition(X, y)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.spectral_mixture import GridSpectralMixture
from zoo.learners.gaussian_process import GaussianProcess, checked_rows
from zoo.learners.ridge import ridge_factor

__all__ = [
    "Consensus",
    "Round",
    "Rounding",
    "Trace",
    "WeightProblem",
    "cubic_minimiser",
    "fuse",
    "learn_weights",
    "rounding",
    "stochastic_round",
]

_KEPT = 2**26  # component elements cached between steps: half a GiB
_BLOCK = 2**24


class Terms(NamedTuple):
    """Objective and its terms at weights theta, from one factorisation."""

    objective: Tensor  # y^T C^-1 y + log |C|, ()
    fit: Tensor  # y^T C^-1 K_q C^-1 y (Q,)
    trace: Tensor  # tr(C^-1 K_q) (Q,)

    @property
    def gradient(self) -> Tensor:
        """Gradient of the objective in theta (Q,)."""
        return self.trace - self.fit


class WeightProblem:
    """Data of one agent and the components of a grid.

    Args:
        kernel: Provides the components; its weights are not used.
        X: Points (n, D).
        y: Targets (n,), already centred.
        noise: Noise variance, positive.

    Raises:
        ValueError: The noise is not positive, or shapes do not fit.
    """

    def __init__(self, kernel: GridSpectralMixture, X: Tensor, y: Tensor, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise ValueError(f"noise={noise} must be positive and finite")
        self.X, self.y, _ = checked_rows(X, y)
        self.noise, self.kernel = float(noise), kernel
        n, self.count = len(self.y), len(kernel.weights)
        self._step = max(1, _BLOCK // (n * n))
        self._kept = [block for _, block in self._compute_blocks()] if self.count * n * n <= _KEPT else None

    def _compute_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        means, scales = self.kernel.means, self.kernel.scales
        for i in range(0, self.count, self._step):
            part = slice(i, i + self._step)
            grid = GridSpectralMixture(means[part], scales[part], dtype=torch.float64)
            yield part, grid.components(self.X).flatten(1)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self._kept is None:
            yield from self._compute_blocks()
            return
        for k, block in enumerate(self._kept):
            yield slice(k * self._step, (k + 1) * self._step), block

    @torch.no_grad()
    def terms(self, theta: Tensor) -> Terms:
        """Objective, and fit and trace of every component, at non-negative weights (Q,).

        Raises:
            NotPositiveDefiniteError: The covariance has no factor.
        """
        n = len(self.y)
        K = self.y.new_zeros(n * n)
        for part, block in self._blocks():
            K += theta[part] @ block
        factor = ridge_factor(K.view(n, n), self.noise)
        alpha = factor.solve(self.y)
        both = torch.stack([torch.outer(alpha, alpha), torch.cholesky_inverse(factor.lower)])
        fit, trace = torch.cat([block @ both.flatten(1).mT for _, block in self._blocks()]).unbind(1)
        return Terms(self.y @ alpha + factor.log_det(), fit.clamp_min(0), trace)


class Trace(NamedTuple):
    """History of the training of weights."""

    objective: Tensor  # (steps + 1,), before each step and after the last
    theta: Tensor  # (steps + 1, Q)
    converged: bool


@torch.no_grad()
def learn_weights(
    kernel: GridSpectralMixture, X: Tensor, y: Tensor, *, noise: float, steps: int = 300, tol: float = 1e-9
) -> Trace:
    """Train a kernel's weights from their current values, by multiplicative updates that never increase the objective.

    Args:
        kernel: Modified in place.
        X: Points (n, D), spaced about one unit apart, so that frequencies up to 0.5 suffice.
        y: Targets (n,), already centred.
        noise: Noise variance.
        steps: Maximum number of steps.
        tol: Stop when the relative decrease of the objective is below this; 0: never.

    Raises:
        ValueError: An option is out of range, or shapes do not fit.
    """
    if steps < 1 or tol < 0:
        raise ValueError(f"steps={steps} must be at least 1, tol={tol} not negative")
    problem, theta = WeightProblem(kernel, X, y, noise), kernel.weights.double()
    found, path, converged = problem.terms(theta), [theta], False
    objective = [found.objective]
    for _ in range(steps):
        theta = theta * (found.fit / found.trace.clamp_min(1e-300)).sqrt()
        found = problem.terms(theta)
        path.append(theta)
        objective.append(found.objective)
        if float(objective[-2] - objective[-1]) <= tol * (1 + abs(float(objective[-1]))) and tol:
            converged = True
            break
    kernel.weights.copy_(theta)
    return Trace(torch.stack(objective), torch.stack(path), converged)


# ---- agents ------------------------------------------------------------------------------------------------


def cubic_minimiser(a: Tensor, b: Tensor, lam: Tensor, rho: float | Tensor, theta: Tensor) -> Tensor:
    """Minimiser t >= 0 of a / t + b t + lam t + rho / 2 (t - theta)^2, elementwise.

    It is the positive root of rho t^3 + (b + lam - rho theta) t^2 - a, or max(0, theta - (b + lam) / rho) if a is 0.
    Newton's method approaches it from above, where the cubic is convex.

    Args:
        a: Non-negative.
        b: Any number.
        lam: Multiplier.
        rho: Positive.
        theta: Consensus.
    """
    a, b, lam, theta = torch.broadcast_tensors(a, b, lam, theta)
    rho = torch.as_tensor(rho, dtype=a.dtype, device=a.device)
    c = b + lam - rho * theta
    cube = (a / rho) ** (1 / 3)
    square = torch.where(c > 0, (a / torch.where(c > 0, c, 1.0)).sqrt(), math.inf)
    t = torch.where(c > 0, torch.minimum(cube, square), cube - c / rho)
    for _ in range(100):
        slope = t * (3 * rho * t + 2 * c)
        step = torch.where(slope > 0, (t * t * (rho * t + c) - a) / torch.where(slope > 0, slope, 1.0), 0.0)
        new = torch.where(step > 0, t - step, t)
        if bool((new == t).all()):
            break
        t = new
    return torch.where(a > 0, t, (-c / rho).clamp_min(0))


class Round(NamedTuple):
    """Result of one round of :class:`Consensus`."""

    theta: Tensor  # consensus weights (Q,)
    theta_agents: Tensor  # (J, Q)
    lam: Tensor  # multipliers (J, Q)
    primal: float  # primal residual: distance of the agents from the consensus, norm over all of them
    dual: float  # dual residual: change of the consensus, times rho sqrt(J)
    rho: float  # of this round
    bits: int  # total sent by the agents


@dataclass
class Consensus:
    """Agents that train weights together by ADMM; their rows stay local.

    Args:
        agents: Their problems, on the same grid.
        theta: Initial weights (Q,).
        rho: Penalty parameter, positive.
        inner_steps: Sweeps per agent and round; each needs one factorisation.
        balance: Double rho if the primal residual is above ten times the dual one; halve it in the opposite case.
        step: Grid for unbiased stochastic rounding of the messages; None sends float64 numbers.
        generator: For the rounding.

    Raises:
        ValueError: There are no agents, their grids differ, or an option is out of range.
    """

    agents: Sequence[WeightProblem]
    theta: Tensor
    rho: float = 1.0
    inner_steps: int = 3
    balance: bool = False
    step: float | None = None
    generator: torch.Generator | None = None
    theta_agents: Tensor = field(init=False)
    lam: Tensor = field(init=False)

    def __post_init__(self) -> None:
        counts = {agent.count for agent in self.agents}
        if len(counts) != 1 or self.theta.shape != (next(iter(counts), 0),):
            raise ValueError(f"agents must be one or more of one grid of {tuple(self.theta.shape)} weights")
        if not 0 < self.rho < math.inf or self.inner_steps < 1 or not (self.step is None or 0 < self.step < math.inf):
            raise ValueError(f"rho={self.rho} and step={self.step} must be positive, inner_steps at least 1")
        self.theta = self.theta.double().clone()
        if not bool((self.theta.isfinite() & (self.theta >= 0)).all()):
            raise ValueError("weights must be finite and at least 0")
        self.theta_agents = self.theta.expand(len(self.agents), -1).clone()
        self.lam = torch.zeros_like(self.theta_agents)

    @torch.no_grad()
    def round(self) -> Round:
        """One round: the agents' sweeps, then the consensus, then the multipliers."""
        rho = self.rho
        for j, agent in enumerate(self.agents):
            own = self.theta_agents[j]
            for _ in range(self.inner_steps):
                found = agent.terms(own)
                own = cubic_minimiser(own.square() * found.fit, found.trace, self.lam[j], rho, self.theta)
            self.theta_agents[j] = own
        sent = self.theta_agents + self.lam / rho
        bits = 64 * sent.numel()
        if self.step is not None:
            sent = stochastic_round(sent, self.step, generator=self.generator)
            bits = _bits(sent / self.step)
        before, self.theta = self.theta, sent.mean(0).clamp_min(0)
        self.lam = self.lam + rho * (self.theta_agents - self.theta)
        primal = float((self.theta_agents - self.theta).norm())
        dual = rho * math.sqrt(len(self.agents)) * float((self.theta - before).norm())
        if self.balance:
            self.rho = 2 * rho if primal > 10 * dual else rho / 2 if dual > primal else rho
        return Round(self.theta, self.theta_agents.clone(), self.lam.clone(), primal, dual, rho, bits)

    def run(self, rounds: int = 100, tol: float = 1e-3) -> list[Round]:
        """Rounds until both residuals are below tol, absolutely and relative to the norms of weights or multipliers."""
        found = []
        for _ in range(rounds):
            found.append(self.round())
            size = max(float(self.theta_agents.norm()), math.sqrt(len(self.agents)) * float(self.theta.norm()))
            edge = tol * math.sqrt(self.theta_agents.numel())
            if found[-1].primal <= edge + tol * size and found[-1].dual <= edge + tol * float(self.lam.norm()):
                break
        return found

    @torch.no_grad()
    def predict(self, X: Tensor, *, own: bool = False) -> tuple[Tensor, Tensor]:
        """Means and variances, including noise, of every agent, (J, m) each, at points (m, D), from its own rows.

        Args:
            X: Points.
            own: Use the agent's own weights instead of the consensus.
        """
        means, variances = [], []
        for j, agent in enumerate(self.agents):
            theta = self.theta_agents[j] if own else self.theta
            kernel = GridSpectralMixture(agent.kernel.means, agent.kernel.scales, theta, dtype=torch.float64)
            posterior = GaussianProcess(kernel, noise=agent.noise).condition(agent.X, agent.y)
            means.append(posterior.mean(X))
            variances.append(posterior.variance(X, observed=True))
        return torch.stack(means), torch.stack(variances)


def fuse(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Fuse predictions of agents (J, m) to means (m,) and variances (m,), weighted by inverse variances."""
    precision = (1 / variances).sum(0)
    return (means / variances).sum(0) / precision, 1 / precision


# ---- communication -----------------------------------------------------------------------------------------


class Rounding(NamedTuple):
    """The grid level below a number, and the probability of rounding up that makes the mean correct."""

    low: Tensor
    high: Tensor
    chance: Tensor

    @property
    def variance(self) -> Tensor:
        """Variance of the rounded number."""
        return self.chance * (1 - self.chance) * (self.high - self.low).square()


def rounding(x: Tensor, step: float) -> Rounding:
    """Grid level m with m step <= x < (m + 1) step, and r = x / step - m, elementwise; exact also for negatives.

    Raises:
        ValueError: The step is not positive.
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step={step} must be positive and finite")
    x = x.double()
    rest = torch.fmod(x, step)  # exact, unlike a quotient
    m = torch.round((x - rest) / step) - (rest < 0).double()
    chance = torch.where(rest < 0, rest + step, rest) / step
    return Rounding(m * step, (m + 1) * step, chance)


def stochastic_round(
    x: Tensor, step: float, *, uniforms: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Unbiased stochastic rounding to a grid: up if a uniform number is below r.

    Args:
        x: Numbers of any shape.
        step: Grid spacing.
        uniforms: Numbers in [0, 1) of the shape of x; drawn if None.
        generator: Source of randomness.
    """
    found = rounding(x, step)
    if uniforms is None:
        uniforms = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    return torch.where(uniforms < found.chance, found.high, found.low)


def _bits(levels: Tensor) -> int:
    """Bits of integers (J, Q): per agent, a sign and as many bits as its largest needs, and 8 bits for that width."""
    widths = [1 + max(1, int(row.abs().max()).bit_length()) for row in levels.round()]
    return sum(8 + width * levels.shape[1] for width in widths)
