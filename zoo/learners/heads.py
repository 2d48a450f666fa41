r"""Closed-form classifiers from streaming statistics: nearest mean, ridge, and discriminants with shared covariance.

Every head is computed from :class:`~zoo.learners.statistics.ClassStatistics` alone, without the rows, and is a small
module on features: `head(phi)` returns one score per class, `head.predict(phi)` the classes.

    nearest mean   -|phi - s/n|^2
    ridge          W = (G + lambda I)^-1 sum phi y^T, one-hot y, no intercept
    LDA            mu^T S^-1 phi - mu^T S^-1 mu / 2 + log n, one covariance S for all classes
        mixture LDA    the same with a mean for every pair of task and class; logsumexp over the tasks of a class

Regularisation is chosen from the statistics too: the ridge by generalised cross-validation (Golub, Heath and Wahba,
Technometrics 1979), the shrinkage by the leave-one-out likelihood with equal leverages.

Estimators take a head by its registered name:

>>> @register_learner("mean", "nearest class means")
... def nearest_mean(statistics: ClassStatistics) -> NearestMean: ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels.linalg import Factor
from zoo.learners.ridge import left_out, ridge_factor
from zoo.learners.statistics import ClassStatistics
from zoo.ops.numerics import autocast_disabled
from zoo.support.register import Register

__all__ = [
    "Discriminant",
    "Mixture",
    "NearestMean",
    "Ridge",
    "choose_ridge",
    "choose_shrinkage",
    "lda",
    "mixture_lda",
    "nearest_mean",
    "register_learner",
    "ridge",
    "ridge_leave_one_out",
    "within_scatter",
]


#: Registers `head(statistics)`, which may take `shrinkage` and `ridge`: a learner by name.
register_learner: Register[Callable[..., nn.Module]] = Register("learner", "zoo.learners")


class _Head(nn.Module):
    """Scores (n, C) of features (n, D), in at least the features' precision, and the classes of their columns."""

    classes: Tensor

    def predict(self, F: Tensor) -> Tensor:
        """Class of the largest score (n,).

        Raises:
            ValueError: A feature is NaN or infinite, or so large that its score is.
        """
        scores = self(F)
        if not bool(scores.isfinite().all()):
            raise ValueError("the scores are not finite: the features have NaN or infinity, or are too large")
        return self.classes[scores.argmax(-1)]

    def predict_proba(self, F: Tensor) -> Tensor:
        """Softmax of the scores (n, C): model probabilities for discriminants, otherwise merely normalised scores."""
        return self(F).softmax(-1)


class NearestMean(_Head):
    """Negative squared distance to the class means.

    Attributes:
        classes: (C,).
        means: (C, D).
    """

    means: Tensor

    def __init__(self, classes: Tensor, means: Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", classes)
        self.register_buffer("means", means)

    def forward(self, F: Tensor) -> Tensor:
        """(n, D) -> (n, C)."""
        F = _fitting(F, self.means.shape[1], self.means)
        with autocast_disabled(F.device):
            return -torch.stack([(F - mean).square().sum(-1) for mean in self.means], -1)


class Ridge(_Head):
    """Ridge regression of one-hot targets without an intercept.

    Attributes:
        classes: (C,).
        weight: W (D, C).
        ridge: Lambda, as a number.
    """

    weight: Tensor

    def __init__(self, classes: Tensor, weight: Tensor, ridge: float) -> None:
        super().__init__()
        self.register_buffer("classes", classes)
        self.register_buffer("weight", weight)
        self.ridge = ridge

    def forward(self, F: Tensor) -> Tensor:
        """(n, D) -> (n, C)."""
        F = _fitting(F, len(self.weight), self.weight)
        with autocast_disabled(F.device):
            return F @ self.weight


class Discriminant(_Head):
    """Gaussian classes with a shared covariance: linear scores.

    Attributes:
        classes: (C,).
        means: (C, D).
        weight: S^-1 mu (D, C).
        bias: log n - mu^T S^-1 mu / 2 (C,).
        lower: Cholesky factor of the shrunk covariance (D, D).
        shrinkage: The shrinkage, in units of the mean variance.
        added: The resulting amount on the diagonal.
    """

    means: Tensor
    weight: Tensor
    bias: Tensor
    lower: Tensor

    def __init__(
        self, classes: Tensor, means: Tensor, counts: Tensor, factor: Factor, shrinkage: float, added: float
    ) -> None:
        super().__init__()
        weight = factor.solve(means.mT)
        self.register_buffer("classes", classes)
        self.register_buffer("means", means)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", counts.to(means).log() - (means.mT * weight).sum(0) / 2)
        self.register_buffer("lower", factor.lower)
        self.shrinkage, self.added = shrinkage, added

    def component_scores(self, F: Tensor) -> Tensor:
        """(n, D) -> log of n_k N(phi; mu_k, S) up to a common constant (n, K)."""
        F = _fitting(F, len(self.weight), self.weight)
        with autocast_disabled(F.device):
            return F @ self.weight + self.bias

    def forward(self, F: Tensor) -> Tensor:
        """(n, D) -> (n, C)."""
        return self.component_scores(F)

    def mahalanobis(self, F: Tensor) -> Tensor:
        """Squared Mahalanobis distances to the means (n, K): large to all of them for outliers."""
        F = _fitting(F, len(self.weight), self.weight)
        with autocast_disabled(F.device):
            z = torch.linalg.solve_triangular(self.lower, F.mT, upper=False)
            m = torch.linalg.solve_triangular(self.lower, self.means.mT, upper=False)
            return torch.stack([(z - mean[:, None]).square().sum(0) for mean in m.mT], -1)

    def sample(self, label: int, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Sample features (n, D) of a class from its Gaussian (or mixture of Gaussians).

        Raises:
            ValueError: The class is unknown.
        """
        mine = (self._component_classes() == label).nonzero().flatten()
        if not len(mine):
            raise ValueError(f"class {label} was never seen; known classes: {self.classes.tolist()}")
        weights = (self.bias + (self.means.mT * self.weight).sum(0) / 2)[mine].softmax(0)  # counts, normalised
        chosen = mine[torch.multinomial(weights, n, replacement=True, generator=generator)] if n else mine[:0]
        noise = torch.randn(n, len(self.weight), generator=generator, dtype=self.lower.dtype, device=self.lower.device)
        return self.means[chosen] + noise @ self.lower.mT

    def _component_classes(self) -> Tensor:
        return self.classes


class Mixture(Discriminant):
    """A mean for each pair of task and class; a class score is the logsumexp over its tasks.

    Attributes:
        components: (K, 2), task and class of each mean.
        classes: (C,).
    """

    components: Tensor

    def __init__(
        self, components: Tensor, means: Tensor, counts: Tensor, factor: Factor, shrinkage: float, added: float
    ) -> None:
        super().__init__(components[:, 1].unique(), means, counts, factor, shrinkage, added)
        self.register_buffer("components", components)

    def forward(self, F: Tensor) -> Tensor:
        """(n, D) -> (n, C)."""
        scores = self.component_scores(F)
        return torch.stack([scores[:, self.components[:, 1] == c].logsumexp(-1) for c in self.classes], -1)

    def predict_task(self, F: Tensor) -> Tensor:
        """Task of the best pair of task and class (n,)."""
        return self.components[self.component_scores(F).argmax(-1), 0]

    def _component_classes(self) -> Tensor:
        return self.components[:, 1]


# ---- heads from statistics ---------------------------------------------------------------------------------


@register_learner("mean", "nearest class means")
def nearest_mean(statistics: ClassStatistics) -> NearestMean:
    """Nearest-class-mean head.

    Raises:
        ValueError: No data were seen.
    """
    statistics.need(gram=False)
    counts, sums = statistics.by_class()
    return NearestMean(statistics.classes, sums / counts[:, None])


@register_learner("ridge", "ridge regression of one-hot targets")
def ridge(statistics: ClassStatistics, ridge: float | None = None) -> Ridge:
    """Ridge regression head for one-hot targets.

    Args:
        statistics: Statistics with G.
        ridge: Added to the diagonal of G; None for :func:`choose_ridge`.

    Raises:
        ValueError: No data were seen, G was not kept, or the ridge is negative.
    """
    statistics.need()
    ridge = choose_ridge(statistics) if ridge is None else ridge
    if not ridge >= 0:
        raise ValueError(f"ridge={ridge} must not be negative")
    _, sums = statistics.by_class()
    return Ridge(statistics.classes, ridge_factor(statistics.gram, ridge).solve(sums.mT), ridge)


@register_learner("lda", "a Gaussian for each class, one covariance")
def lda(statistics: ClassStatistics, shrinkage: float | None = None) -> Discriminant:
    """Linear discriminants: one Gaussian per class, over all tasks, with a shared covariance.

    Args:
        statistics: Statistics with G.
        shrinkage: Added to the diagonal of the within-class covariance, in units of its mean variance; None for
            :func:`choose_shrinkage`.

    Raises:
        ValueError: No data were seen, G was not kept, or the shrinkage is negative.
    """
    statistics.need()
    counts, sums = statistics.by_class()
    factor, shrinkage, added = _shrunk(statistics, counts, sums, shrinkage)
    return Discriminant(statistics.classes, sums / counts[:, None], counts, factor, shrinkage, added)


@register_learner("mixture", "a Gaussian for each class in each task, one covariance")
def mixture_lda(statistics: ClassStatistics, shrinkage: float | None = None) -> Mixture:
    """Linear discriminants with one Gaussian per pair of task and class, and a shared within-pair covariance.

    Args:
        statistics: Statistics with G.
        shrinkage: As in :func:`lda`.

    Raises:
        ValueError: No data were seen, G was not kept, or the shrinkage is negative.
    """
    statistics.need()
    counts, sums = statistics.counts, statistics.sums
    factor, shrinkage, added = _shrunk(statistics, counts, sums, shrinkage)
    return Mixture(statistics.components, sums / counts[:, None], counts, factor, shrinkage, added)


def within_scatter(statistics: ClassStatistics, *, by_task: bool = False) -> Tensor:
    """G - sum n mu mu^T (D, D), the scatter around the class means, or the means of pairs of task and class."""
    statistics.need()
    counts, sums = (statistics.counts, statistics.sums) if by_task else statistics.by_class()
    return _scatter(statistics, counts, sums)


def _scatter(statistics: ClassStatistics, counts: Tensor, sums: Tensor) -> Tensor:
    scatter = statistics.gram - (sums.mT / counts) @ sums
    return (scatter + scatter.mT) / 2


def _shrunk(
    statistics: ClassStatistics, counts: Tensor, sums: Tensor, shrinkage: float | None
) -> tuple[Factor, float, float]:
    S = _scatter(statistics, counts, sums) / statistics.rows
    if shrinkage is None:
        shrinkage = _best_shrinkage(S, statistics.rows, len(counts))
    if not shrinkage >= 0:
        raise ValueError(f"shrinkage={shrinkage} must not be negative")
    variance = float(S.diagonal().mean())
    if variance <= 1e-14 * float(statistics.gram.diagonal().mean()) / statistics.rows:  # one row per class: no scatter
        variance = max(float(statistics.gram.diagonal().mean()) / statistics.rows, 1e-300)
        S, shrinkage = torch.zeros_like(S), max(shrinkage, 1e-6)
    added = shrinkage * variance
    return ridge_factor(S, added), shrinkage, added


# ---- choice of the regularisation --------------------------------------------------------------------------


class _Spectrum(NamedTuple):
    values: Tensor  # (D,), not negative
    vectors: Tensor  # (D, D)


def _spectrum(A: Tensor) -> _Spectrum:
    values, vectors = torch.linalg.eigh(A)
    return _Spectrum(values.clamp_min(0), vectors)


def choose_ridge(statistics: ClassStatistics, candidates: Tensor | None = None) -> float:
    """Ridge that minimises the generalised cross-validation error, n |Y - F W|^2 / (n - trace H)^2.

    This is the leave-one-out error with all leverages replaced by their mean, so it needs no rows:
    |Y - F W|^2 = n - 2 tr(W^T B) + tr(W^T G W) with B = sum phi y^T.

    Args:
        statistics: Statistics with G.
        candidates: Positive ridges (r,); None for 37 from 1e-8 to 10 times the mean of G's diagonal.

    Raises:
        ValueError: No data were seen, or G was not kept.
    """
    statistics.need()
    _, sums = statistics.by_class()
    values, vectors = _spectrum(statistics.gram)
    if candidates is None:
        candidates = values.mean().clamp_min(1e-300) * torch.logspace(-8, 1, 37, dtype=values.dtype).to(values.device)
    squares = (vectors.mT @ sums.mT).square().sum(1)  # (D,): sums over classes
    shrink = 1 / (values + candidates.to(values)[:, None])  # (r, D)
    n = statistics.rows
    residual = n - (2 * shrink - values * shrink.square()) @ squares
    free = n - (values * shrink).sum(1)
    score = torch.where(free > 1e-9 * n, residual.clamp_min(0) / free.square(), torch.inf)
    return float(candidates[score.argmin()])


def choose_shrinkage(statistics: ClassStatistics, *, by_task: bool = False) -> float:
    """Shrinkage that maximises the leave-one-out likelihood of the Gaussian model, from the statistics.

    Removing a row of leverage h turns A = n (S + added I) into A - phi phi^T: its log determinant changes by log(1 - h)
    and the row's squared distance becomes h / (1 - h). Every h is replaced by the mean, tr(A^-1 n S) / n.

    Args:
        statistics: Statistics with G.
        by_task: For :func:`mixture_lda`: scatter within pairs of task and class.

    Raises:
        ValueError: No data were seen, or G was not kept.
    """
    statistics.need()
    counts, sums = (statistics.counts, statistics.sums) if by_task else statistics.by_class()
    return _best_shrinkage(_scatter(statistics, counts, sums) / statistics.rows, statistics.rows, len(counts))


_SHRINKAGES = [10 ** (k / 4) for k in range(-24, 5)]  # 1e-6 to 10


def _best_shrinkage(S: Tensor, rows: int, means: int) -> float:
    values = torch.linalg.eigvalsh(S).clamp_min(0)
    variance = float(values.mean())
    if variance <= 0 or rows <= means:
        return 1.0  # the spread is unknown
    chosen = values.new_tensor(_SHRINKAGES)
    shrunk = values + chosen[:, None] * variance  # (s, D)
    # means take up degrees of freedom: leverage in the space of residuals, of dimension rows - means
    leverage = (values / shrunk).sum(1) / (rows - means)
    spread = rows * leverage / (1 - leverage)
    likelihood = -(shrunk.log().sum(1) + torch.log1p(-leverage) + spread)
    return float(chosen[torch.where(leverage < 1, likelihood, -torch.inf).argmax()])


def ridge_leave_one_out(F: Tensor, labels: Tensor, statistics: ClassStatistics, ridge: float) -> Tensor:
    """Exact leave-one-out residuals of the ridge head for given rows.

    Args:
        F: Features (n, D), part of the statistics.
        labels: Their classes (n,).
        statistics: Statistics with G of these rows and possibly others.
        ridge: Added to the diagonal of G.

    Returns:
        (n, C): (Y - F W)_i / (1 - phi_i^T (G + ridge I)^-1 phi_i), columns in the order of `statistics.classes`.

    Raises:
        ValueError: A class is unknown, or the shapes do not fit.
    """
    statistics.need()
    classes = statistics.classes
    labels = torch.as_tensor(labels, device=classes.device)
    unknown = sorted(set(labels.tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(f"class {unknown[0]} was never seen; known classes: {classes.tolist()}")
    F = _fitting(F, statistics.dim, statistics.gram)
    factor = ridge_factor(statistics.gram, ridge)
    _, sums = statistics.by_class()
    Y = (labels[:, None] == classes).to(F)
    leverage = factor.whiten(F.mT).square().sum(0)
    return left_out(Y - F @ factor.solve(sums.mT), leverage)


# ---- helpers -----------------------------------------------------------------------------------------------


def _fitting(F: Tensor, dim: int, like: Tensor) -> Tensor:
    """Features as a matrix in the head's dtype."""
    if not isinstance(F, Tensor):
        raise ValueError(f"the features are a {type(F).__name__}, not a tensor: use torch.as_tensor")
    if F.is_complex():
        raise ValueError("the features are complex numbers; the head takes real ones")
    if F.ndim != 2 or F.shape[1] != dim:
        raise ValueError(f"the head takes features (n, {dim}), got {tuple(F.shape)}")
    return F.to(like.dtype)
