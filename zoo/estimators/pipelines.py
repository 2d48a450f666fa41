"""Fitted estimators as torch modules, from rows in their own units to what `predict_proba` or `predict` gives.

>>> module = estimator.to_pipeline()                 # rows (n, D) -> float32 (n, K) probabilities, or (n, 1) values
>>> torch.export.export(module, (rows,), ...)

An estimator of a package of its own can be exported too if it has such a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.learners.agop import MetricMachine
from zoo.learners.gaussian_process import noiseless_diag
from zoo.learners.heads import Mixture
from zoo.learners.laplace import expected_sigmoid
from zoo.learners.sparse_gp import SparsePosterior

__all__ = ["OfClasses", "OfProcess", "OfProcesses", "OfStream", "OfValues"]


class OfValues(nn.Module):
    """A network's outputs as they are: rows (n, D) -> (n, 1).

    Args:
        network: A GRBF network or machine.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def outputs(self, rows: Tensor) -> Tensor:
        """(n, K)."""
        return self.network.whole(rows) if isinstance(self.network, MetricMachine) else self.network(rows)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, 1), float32."""
        return self.outputs(rows).float()


class OfClasses(OfValues):
    """Probabilities of a network's logits; a single one is that of the second class."""

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, K), float32."""
        logits = self.outputs(rows)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return logits.softmax(1).float()


class _Scaled(nn.Module):
    """Base of pipelines that standardise the columns."""

    mean_of_columns: Tensor
    scale_of_columns: Tensor

    def __init__(self, mean: np.ndarray, scale: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean_of_columns", torch.from_numpy(mean.copy()))
        self.register_buffer("scale_of_columns", torch.from_numpy(scale.copy()))

    def standardised(self, rows: Tensor) -> Tensor:
        """(n, D), float64."""
        return (rows.double() - self.mean_of_columns) / self.scale_of_columns


class OfProcess(_Scaled):
    """The mean of a Gaussian process.

    Args:
        posterior: Of rows that are standardised.
        mean: Of the columns (D,).
        scale: Of the columns (D,).
        shift: Mean of the targets.
        spread: Standard deviation of the targets.
    """

    points: Tensor
    alpha: Tensor

    def __init__(self, posterior: Any, mean: np.ndarray, scale: np.ndarray, shift: float, spread: float) -> None:
        super().__init__(mean, scale)
        self.kernel, self.prior = posterior.process.kernel, posterior.process.mean
        self.shift, self.spread = shift, spread
        self.register_buffer("points", posterior.points)
        if isinstance(posterior, SparsePosterior):  # solved ahead: recorded programs have no triangular systems
            upper = posterior.factor.lower.mT
            alpha = torch.linalg.solve_triangular(upper, posterior.beta[:, None], upper=True)[:, 0]
        else:
            alpha = posterior.alpha
        self.register_buffer("alpha", alpha)

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, 1), float32."""
        rows = self.standardised(rows)
        values = self.prior(rows) + self.kernel(rows, self.points) @ self.alpha
        return (values * self.spread + self.shift)[:, None].float()


class OfProcesses(_Scaled):
    """Probabilities of one Laplace approximation for two classes, else of one per class."""

    def __init__(self, posteriors: Sequence[Any], mean: np.ndarray, scale: np.ndarray) -> None:
        super().__init__(mean, scale)
        self.parts = nn.ModuleList(map(_Binary, posteriors))

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, K), float32."""
        rows = self.standardised(rows)
        found = torch.stack([part(rows) for part in self.parts], 1)
        if len(self.parts) == 1:
            return torch.cat([1 - found, found], 1).float()
        return (found / found.sum(1, keepdim=True)).float()


class _Binary(nn.Module):
    """Probability of class 1; triangular systems are solved ahead."""

    points: Tensor
    slopes: Tensor
    whiten: Tensor

    def __init__(self, posterior: Any) -> None:
        super().__init__()
        self.kernel = posterior.process.kernel
        self.register_buffer("points", posterior.points)
        self.register_buffer("slopes", posterior.slopes)
        self.register_buffer("whiten", posterior.factor.whiten(posterior.root.diag()))

    def forward(self, rows: Tensor) -> Tensor:
        covariance = self.kernel(rows, self.points)
        half = covariance @ self.whiten.mT
        variance = (noiseless_diag(self.kernel, rows) - half.square().sum(1)).clamp_min(0)
        return expected_sigmoid(covariance @ self.slopes, variance, _ndtr)


def _ndtr(x: Tensor) -> Tensor:
    """In float32: onnxruntime has no erf of float64."""
    return torch.special.ndtr(x.float()).double()


class OfStream(_Scaled):
    """Probabilities of a closed-form head on features.

    Args:
        features: Rows to features (n, F).
        head: Fitted; its scores become probabilities by softmax.
        columns: Column of the head for each class, in the estimator's order.
        mean: Of the columns (D,).
        scale: Of the columns (D,).
    """

    def __init__(
        self, features: nn.Module, head: Any, columns: Sequence[int], mean: np.ndarray, scale: np.ndarray
    ) -> None:
        super().__init__(mean, scale)
        self.features, self.head, self.columns = features, head, list(columns)
        self.groups = None  # columns of the components of each class
        if isinstance(head, Mixture):
            owners = head.components[:, 1]
            self.groups = [(owners == c).nonzero()[:, 0].tolist() for c in head.classes.tolist()]

    def forward(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, K), float32."""
        features = self.features(self.standardised(rows))
        if self.groups is None:
            scores = self.head(features)
        else:
            each = self.head.component_scores(features)
            scores = torch.stack([each[:, group].logsumexp(1) for group in self.groups], 1)
        return scores[:, self.columns].softmax(1).float()
