r"""Streaming Nystroem landmarks, chosen in one pass and bounded memory by estimated ridge leverage scores.

The ridge leverage score of a row, tau_i = [K (K + ridge I)^-1]_ii, is large if the other rows do not explain it; the
sum is the effective dimension. :class:`StreamingDictionary` keeps a sample of the rows seen so far, with probabilities
proportional to their scores, and estimates the scores from the sample itself (Calandriello, Lazaric and Valko,
INK-ESTIMATE, AISTATS 2016). Its :meth:`~StreamingDictionary.features` are a feature map for
`zoo.learners.statistics` or for ridge regression.

>>> dictionary = StreamingDictionary(Gaussian(5.0), ridge=1.0, budget=60)
>>> for x in stream:
...     dictionary.step(x)
>>> learner = ClassStatistics(dictionary.features())
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from zoo.kernels.linalg import solver_dtype
from zoo.learners.ridge import ridge_factor
from zoo.support.files import CheckpointError, read_checkpoint, write_atomic, writer_of

__all__ = [
    "Estimate",
    "Growth",
    "NystromFeatures",
    "StreamingDictionary",
    "effective_dimension",
    "growth",
    "nystrom",
    "ridge_leverage_scores",
]

Mode = Literal["budget", "unnormalised"]
Draw = Callable[[Tensor, Tensor], Tensor]

_STATE = ("points", "copies", "probabilities", "positions", "effective_dimension", "seen", "random")


# ---- functions of the whole kernel matrix ------------------------------------------------------------------


def ridge_leverage_scores(K: Tensor, ridge: float) -> Tensor:
    """Diagonal of K (K + ridge I)^-1 (n,), between 0 and 1.

    Args:
        K: Kernel matrix (n, n).
        ridge: Positive.

    Raises:
        ValueError: The ridge is not positive.
    """
    _check_ridge(ridge)
    factor = ridge_factor(K, ridge)
    return 1 - ridge * factor.whiten(torch.eye(len(K), dtype=factor.lower.dtype, device=K.device)).square().sum(0)


def effective_dimension(K: Tensor, ridge: float) -> Tensor:
    """Sum of the ridge leverage scores, trace K (K + ridge I)^-1."""
    return ridge_leverage_scores(K, ridge).sum()


class Growth(NamedTuple):
    """Contribution of one more row to the effective dimension, exact if all earlier rows are given."""

    s: Tensor  # part of k(x, x) that the other rows do not explain
    norm2: Tensor  # |A0 c|^2 with A0 = (K + ridge I)^-1
    delta: Tensor  # (s - ridge |A0 c|^2) / (s + ridge)


def growth(K: Tensor, c: Tensor, own: Tensor | float, ridge: float) -> Growth:
    """Growth of the effective dimension of K (n, n) by a row with kernel values c (n,) and k(x, x) = `own`."""
    _check_ridge(ridge)
    A0c = ridge_factor(K, ridge).solve(c) if len(c) else c.to(solver_dtype(c.device))
    s, norm2 = own - c.to(A0c) @ A0c, A0c.square().sum()
    return Growth(s, norm2, (s - ridge * norm2) / (s + ridge))


def nystrom(K: Tensor, columns: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """The regularised approximation K S (S^T K S + ridge I)^-1 S^T K (n, n), below K.

    Args:
        K: Kernel matrix (n, n).
        columns: Indices of the landmarks (m,).
        weights: Their weights, the entries of S (m,).
        ridge: Positive.
    """
    _check_ridge(ridge)
    KS = K[:, columns] * weights
    factor = ridge_factor(weights[:, None] * KS[columns], ridge)
    half = factor.whiten(KS.mT)
    return half.mT @ half


# ---- streaming ---------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Result of :meth:`StreamingDictionary.estimate` for a dictionary of m rows and a new row, which comes last."""

    positions: Tensor  # (m + 1,), places in the stream
    weights: Tensor  # (m + 1,), 1 for the new row
    delta: Tensor  # estimated growth of the effective dimension
    effective_dimension: Tensor  # including this row
    scores: Tensor  # (m + 1,), estimated ridge leverage scores
    probabilities: Tensor  # (m + 1,), never larger than before


class StreamingDictionary(nn.Module):
    """A weighted sample of a stream's rows, by estimated ridge leverage scores, usable at any time.

    A row has up to `budget` copies, each of which is in the dictionary with the row's probability p; its weight is
    sqrt(copies / (budget p)). For every new row, the scores of all rows in the dictionary are re-estimated, their
    probabilities decrease, copies are dropped accordingly, and the copies of the new row are drawn.

    Args:
        kernel: k(x, z); must not change during the stream.
        ridge: Ridge of the scores, in units of the kernel.
        budget: Copies per row. In mode `budget` about this many columns are kept in total, whatever the stream; in mode
            `unnormalised` about `budget` times the effective dimension.
        eps: Scores are inflated by 1 + eps, for safety.
        mode: `budget`: probabilities are scores divided by the effective dimension. `unnormalised`: the scores
            themselves.
        seed: Random seed; the generator's state is part of the module's state.
        keep_all: Keep every row with weight 1; the scores are then exact up to the factor 1 + eps.
        draw: Binomial sampler for counts and probabilities (m,); None uses the seed.

    Attributes:
        points: Rows in the dictionary (m, ...).
        copies: Their copies (m,).
        probabilities: Their probabilities (m,).
        positions: Their indices in the stream (m,).
        effective_dimension: Estimate for all rows seen.
        seen: Number of rows seen.

    Raises:
        ValueError: A setting is out of range.
    """

    points: Tensor
    copies: Tensor
    probabilities: Tensor
    positions: Tensor
    effective_dimension: Tensor
    seen: Tensor
    random: Tensor

    def __init__(
        self,
        kernel: Callable[[Tensor, Tensor], Tensor],
        ridge: float,
        budget: int,
        *,
        eps: float = 0.5,
        mode: Mode = "budget",
        seed: int = 0,
        keep_all: bool = False,
        draw: Draw | None = None,
    ) -> None:
        super().__init__()
        _check_ridge(ridge)
        if budget < 1 or not 0 <= eps < 1:
            raise ValueError(f"budget={budget} must be at least 1, eps={eps} at least 0 and below 1")
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r} must be one of {', '.join(get_args(Mode))}")
        self.kernel, self.ridge, self.budget, self.eps, self.mode = kernel, float(ridge), int(budget), eps, mode
        self.keep_all, self.draw = keep_all, draw
        numbers = torch.zeros(0, dtype=torch.float64)
        self.register_buffer("points", numbers.float())
        self.register_buffer("copies", numbers.long())
        self.register_buffer("probabilities", numbers)
        self.register_buffer("positions", numbers.long())
        self.register_buffer("effective_dimension", numbers.new_zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("random", torch.Generator().manual_seed(seed).get_state())

    @property
    def weights(self) -> Tensor:
        """Weights sqrt(copies / (budget p)) (m,), the entries of S."""
        return (self.copies / (self.budget * self.probabilities)).sqrt()

    def __len__(self) -> int:
        """Number of rows in the dictionary."""
        return len(self.copies)

    @torch.no_grad()
    def estimate(self, x: Tensor) -> Estimate:
        """Scores and probabilities with one more row (D,), without adding it.

        Raises:
            ValueError: The row is not finite, or has another shape than earlier rows.
        """
        x = self._checked(x)
        D = torch.cat([self.points, x[None]]) if len(self) else x[None]
        w = torch.cat([self.weights, self.probabilities.new_ones(1)])
        K = self.kernel(D, D).to(w)
        WK = w[:, None] * K
        factor = ridge_factor(WK * w, self.ridge)
        # the new row is last: the leading block of the factor is that of the old dictionary
        lower, own = factor.lower[:-1, :-1], K[-1, -1]
        half = torch.linalg.solve_triangular(lower, WK[:-1, -1:], upper=False)
        A0c = torch.linalg.solve_triangular(lower.mT, half, upper=True)
        s = own - half.square().sum()
        delta = (s - self.ridge * A0c.square().sum()) / (s + self.ridge)
        total = self.effective_dimension + delta
        left = K.diagonal() - factor.whiten(WK).square().sum(0)
        scores = ((1 + self.eps) / self.ridge * left).clamp(0, 1)
        new = scores / total.clamp_min(1e-300) if self.mode == "budget" else scores
        before = torch.cat([self.probabilities, self.probabilities.new_ones(1)])
        positions = torch.cat([self.positions, self.seen[None]])
        return Estimate(positions, w, delta, total, scores, torch.minimum(new, before))

    @torch.no_grad()
    def step(self, x: Tensor) -> Estimate:
        """Process one row (D,): update scores, probabilities and copies.

        Raises:
            ValueError: As for :meth:`estimate`; the dictionary is then unchanged.
        """
        found = self.estimate(x)
        points = torch.cat([self.points, self._checked(x)[None]]) if len(self) else self._checked(x)[None]
        had = torch.cat([self.copies, self.copies.new_full((1,), self.budget)])
        if self.keep_all:
            copies, p = had, torch.ones_like(found.probabilities)
        else:
            before = torch.cat([self.probabilities, self.probabilities.new_ones(1)])
            p = found.probabilities
            copies = self._binomial(had, p / before)
        alive = copies > 0
        self.points, self.copies, self.probabilities = points[alive], copies[alive], p[alive]
        self.positions, self.effective_dimension = found.positions[alive], found.effective_dimension
        self.seen = self.seen + 1
        return found

    def update(self, X: Tensor | Iterable[Tensor]) -> StreamingDictionary:
        """Process rows one after the other: a tensor (n, D), or an iterable of rows (D,)."""
        if isinstance(X, Tensor) and (X.ndim < 2 or not bool(X.isfinite().all())):
            raise ValueError(f"rows must be finite, (n, D); got {tuple(X.shape)}")
        for x in X:
            self.step(x)
        return self

    def features(self) -> NystromFeatures:
        """Feature map of the current dictionary: phi(x) . phi(z) approximates k(x, z).

        Raises:
            ValueError: The dictionary is empty.
        """
        if not len(self):
            raise ValueError("the dictionary is empty: take in rows first")
        return NystromFeatures(self.kernel, self.points.clone(), self.weights, self.ridge)

    def approximation(self, X: Tensor) -> Tensor:
        """Approximate kernel matrix of rows X (n, D), (n, n), below the exact one."""
        phi = self.features()(X)
        return phi @ phi.mT

    def _checked(self, x: Tensor) -> Tensor:
        if not x.is_floating_point() or not x.ndim or not bool(x.isfinite().all()):
            raise ValueError(f"a row must be a vector of finite numbers, got {x.dtype} {tuple(x.shape)}")
        if len(self) and x.shape != self.points.shape[1:]:
            raise ValueError(f"the row has shape {tuple(x.shape)}, those before have {tuple(self.points.shape[1:])}")
        return x.to(self.points if len(self) else self.points.to(x.dtype))

    def _binomial(self, counts: Tensor, chance: Tensor) -> Tensor:
        if self.draw is not None:
            return self.draw(counts, chance).to(counts)
        generator = torch.Generator()
        generator.set_state(self.random.cpu())
        drawn = torch.binomial(counts.double().cpu(), chance.double().cpu().clamp(0, 1), generator=generator)
        self.random = generator.get_state()
        return drawn.to(counts)

    # ---- state ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the dictionary, its estimates and the state of its generator to a safetensors file.

        Raises:
            CheckpointError: The file cannot be written.
        """
        from safetensors.torch import save

        tensors = {name: getattr(self, name).detach().cpu().contiguous().clone() for name in _STATE}
        write_atomic(path, writer_of(save(tensors)))

    def restore(self, path: str | Path) -> StreamingDictionary:
        """Load a saved state and continue, with the same random numbers.

        Raises:
            CheckpointError: The file is damaged, or does not hold a dictionary.
        """
        tensors = read_checkpoint(path)
        if set(tensors) != set(_STATE):
            raise CheckpointError(f"{path} does not hold a StreamingDictionary: it has {', '.join(sorted(tensors))}")
        _check_state(tensors, self.budget, f"{path} is damaged")
        for name in _STATE:
            setattr(self, name, tensors[name].to(self.copies.device if name != "random" else "cpu"))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept a dictionary of another size."""
        found = {name: state_dict[prefix + name] for name in _STATE if prefix + name in state_dict}
        if len(found) == len(_STATE):
            _check_state(found, self.budget, "the state dict does not hold this StreamingDictionary")
            for name, value in found.items():
                setattr(self, name, torch.empty_like(value, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamingDictionary:
        """Keep probabilities in float64, and the generator state on the CPU."""
        kept = {name: getattr(self, name) for name in ("probabilities", "effective_dimension", "random")}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, value if name == "random" else value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Settings and size."""
        return f"ridge={self.ridge:g}, budget={self.budget}, mode={self.mode}, rows={len(self)} of {int(self.seen)}"


class NystromFeatures(nn.Module):
    """phi(x) = L^-1 diag(w) k(D, x) with L L^T = diag(w) K_D diag(w) + ridge I; one feature per landmark.

    Args:
        kernel: k(x, z).
        points: Landmarks D (m, ...).
        weights: Their weights (m,).
        ridge: Positive.

    Attributes:
        points: (m, ...).
        weight: L^-1 diag(w) (m, m), in float64.
    """

    points: Tensor
    weight: Tensor

    def __init__(
        self, kernel: Callable[[Tensor, Tensor], Tensor], points: Tensor, weights: Tensor, ridge: float
    ) -> None:
        super().__init__()
        _check_ridge(ridge)
        self.kernel = kernel
        with torch.no_grad():
            K = kernel(points, points).to(weights)
            factor = ridge_factor(weights[:, None] * K * weights, ridge)
            weight = factor.whiten(torch.diag(weights))
        self.register_buffer("points", points)
        self.register_buffer("weight", weight)

    def forward(self, X: Tensor) -> Tensor:
        """Rows (n, ...) -> features (n, m), in the dtype of `weight`."""
        return self.kernel(X, self.points.to(X.dtype)).to(self.weight.dtype) @ self.weight.mT


# ---- helpers -----------------------------------------------------------------------------------------------


def _check_ridge(ridge: float) -> None:
    if not 0 < ridge < float("inf"):
        raise ValueError(f"ridge={ridge} must be above 0 and finite")


def _check_state(found: dict[str, Tensor], budget: int, problem: str) -> None:
    m = len(found["copies"]) if found["copies"].ndim == 1 else -1
    shapes = {"copies": (m,), "probabilities": (m,), "positions": (m,), "effective_dimension": (), "seen": ()}
    wrong = [name for name, shape in shapes.items() if found[name].shape != shape]
    wrong += [name for name in ("copies", "positions", "seen") if found[name].dtype != torch.int64]
    p = found["probabilities"]
    if (
        wrong
        or not found["points"].ndim
        or len(found["points"]) != m
        or not p.is_floating_point()
        or found["random"].dtype != torch.uint8
    ):
        raise CheckpointError(
            f"{problem}: {wrong[0] if wrong else 'points, probabilities or random'} is of another kind"
        )
    if bool(((p <= 0) | (p > 1)).any()) or bool(((found["copies"] < 1) | (found["copies"] > budget)).any()):
        raise CheckpointError(f"{problem}: it has copies outside 1 to {budget}, or probabilities outside 0 to 1")
    if not bool(found["points"].isfinite().all()) or not bool(found["effective_dimension"].isfinite()):
        raise CheckpointError(f"{problem}: not all of its numbers are finite")
