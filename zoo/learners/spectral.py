r"""Weights of a grid of spectral components, sparse by themselves, and learned by agents that show no rows.

The kernel sum_q theta_q K_q with fixed components (`zoo.kernels.spectral_mixture`) has the objective

    l(theta) = y^T C^-1 y + log |C|,     C = sum_q theta_q K_q + noise I,     theta_q >= 0

With log |C| bounded by its tangent, the bound's minimum is a multiplication, and l never rises:

    theta_q <- theta_q sqrt(y^T C^-1 K_q C^-1 y / tr(C^-1 K_q))

Weights that do not help go to zero, and stay there. Agents j with rows of their own agree on the weights by ADMM
(Suwandi, Lin, Yin, Wang, Theodoridis, "Sparsity-Aware Distributed Learning for Gaussian Processes with Linear Multiple
Kernel"; ours minimises the same bound without a cone solver): each minimises l_j + lam_j . (theta_j - theta) + rho / 2
|theta_j - theta|^2, under the bound one cubic equation for each weight. What they exchange may be rounded to a grid.

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

_KEPT = 2**26  # numbers of components that are kept between steps: half a GiB
_BLOCK = 2**24


class Terms(NamedTuple):
    """What one factor says of the objective at weights theta."""

    objective: Tensor  # y^T C^-1 y + log |C|, ()
    fit: Tensor  # y^T C^-1 K_q C^-1 y (Q,)
    trace: Tensor  # tr(C^-1 K_q) (Q,)

    @property
    def gradient(self) -> Tensor:
        """Of the objective in theta (Q,)."""
        return self.trace - self.fit


class WeightProblem:
    """Rows of one agent and the components of a grid.

    Args:
        kernel: Whose components they are; its weights are not used.
        X: Points (n, D).
        y: Targets (n,), centred by the caller.
        noise: Variance of the noise, positive.

    Raises:
        ValueError: The noise is not positive, or rows do not fit together.
    """

    def __init__(self, kernel: GridSpectralMixture, X: Tensor, y: Tensor, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise ValueError(f"noise={noise} must be positive and finite")
        self.X, self.y, _ = checked_rows(X, y)
        self.noise, self.kernel = float(noise), kernel
        n, self.count = len(self.y), len(kernel.weights)
        self._step = max(1, _BLOCK // (n * n))
        self._kept = [block for _, block in self._made()] if self.count * n * n <= _KEPT else None

    def _made(self) -> Iterator[tuple[slice, Tensor]]:
        means, scales = self.kernel.means, self.kernel.scales
        for i in range(0, self.count, self._step):
            part = slice(i, i + self._step)
            grid = GridSpectralMixture(means[part], scales[part], dtype=torch.float64)
            yield part, grid.components(self.X).flatten(1)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self._kept is None:
            yield from self._made()
            return
        for k, block in enumerate(self._kept):
            yield slice(k * self._step, (k + 1) * self._step), block

    @torch.no_grad()
    def terms(self, theta: Tensor) -> Terms:
        """Objective, and for every component fit and trace, at weights (Q,) of at least 0: one factor.

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
    """How weights were learned."""

    objective: Tensor  # (steps + 1,), before each step and after the last
    theta: Tensor  # (steps + 1, Q)
    converged: bool


@torch.no_grad()
def learn_weights(
    kernel: GridSpectralMixture, X: Tensor, y: Tensor, *, noise: float, steps: int = 300, tol: float = 1e-9
) -> Trace:
    """Learn a kernel's weights from where they are, by multiplications that never raise the objective.

    Args:
        kernel: Its weights are replaced.
        X: Points (n, D), about a unit apart, so that frequencies up to 0.5 are all there are.
        y: Targets (n,), centred by the caller.
        noise: Variance of the noise.
        steps: At most.
        tol: Ends where the objective falls by less than this share of its size; 0: never.

    Raises:
        ValueError: An option is out of its range, or rows do not fit together.
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
    """The t >= 0 with the least a / t + b t + lam t + rho / 2 (t - theta)^2, elementwise.

    It is the one positive root of rho t^3 + (b + lam - rho theta) t^2 - a, or max(0, theta - (b + lam) / rho) where
    a is 0. Newton's method comes down to it from above, where the cubic is convex.

    Args:
        a: At least 0.
        b: Any number.
        lam: The multiplier.
        rho: PositiveParameter.
        theta: The consensus.
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
    """One round of :class:`Consensus`."""

    theta: Tensor  # agreed weights (Q,)
    theta_agents: Tensor  # (J, Q)
    lam: Tensor  # multipliers (J, Q)
    primal: float  # how far agents are from the agreement, in the norm over all of them
    dual: float  # how far the agreement moved, times rho and the root of J
    rho: float  # of this round
    bits: int  # that agents sent, in all


@dataclass
class Consensus:
    """Agents that learn weights together, by ADMM; rows stay where they are.

    Args:
        agents: Their problems, of one grid.
        theta: Start of the weights (Q,).
        rho: Strength of the agreement, positive.
        inner_steps: Sweeps of every agent in a round; each takes one factor.
        balance: Double rho where the primal residual is above ten times the dual one, halve it where below.
        step: Grid to which what agents send is rounded at random, without bias; None: float64 numbers.
        generator: Of the rounding.

    Raises:
        ValueError: There is no agent, their grids differ, or an option is out of its range.
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
        """Every agent's sweeps, then the agreement, then the multipliers."""
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
        """Rounds until both residuals are below tol, absolutely and relative to the weights' and multipliers' sizes."""
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
        """Every agent's means and variances, with noise, (J, m) each, at points (m, D), from its rows.

        Args:
            X: Points.
            own: By its own weights instead of the agreed ones.
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
    """One prediction (m,) and its variance (m,) from those of agents (J, m), weighted by inverse variances."""
    precision = (1 / variances).sum(0)
    return (means / variances).sum(0) / precision, 1 / precision


# ---- what is sent ------------------------------------------------------------------------------------------


class Rounding(NamedTuple):
    """The two grid points beside a number, and the chance of the higher one that makes the mean right."""

    low: Tensor
    high: Tensor
    chance: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the rounded number."""
        return self.chance * (1 - self.chance) * (self.high - self.low).square()


def rounding(x: Tensor, step: float) -> Rounding:
    """Grid points m step <= x < (m + 1) step, and r = x / step - m, elementwise; exact for negatives too.

    Raises:
        ValueError: The step is not positive.
    """
    if not 0 < step < math.inf:
        raise ValueError(f"step={step} must be positive and finite")
    x = x.double()
    rest = torch.fmod(x, step)  # exact, as a quotient is not
    m = torch.round((x - rest) / step) - (rest < 0).double()
    chance = torch.where(rest < 0, rest + step, rest) / step
    return Rounding(m * step, (m + 1) * step, chance)


def stochastic_round(
    x: Tensor, step: float, *, uniforms: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Round to a grid at random, without bias: up where a uniform number is below r.

    Args:
        x: Numbers of any shape.
        step: Of the grid.
        uniforms: Numbers in [0, 1) of the shape of x; drawn if None.
        generator: To draw with.
    """
    found = rounding(x, step)
    if uniforms is None:
        uniforms = torch.rand(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
    return torch.where(uniforms < found.chance, found.high, found.low)


def _bits(levels: Tensor) -> int:
    """Bits of whole numbers (J, Q), each agent's with a sign in as many bits as its largest needs, and 8 to say it."""
    widths = [1 + max(1, int(row.abs().max()).bit_length()) for row in levels.round()]
    return sum(8 + width * levels.shape[1] for width in widths)
