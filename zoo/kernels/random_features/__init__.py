"""Random features: maps whose dot products are unbiased estimates of kernels, and compact layers built from them.

    E[ Phi(x) . Psi(w, b) ] = k(x, (w, b))

The two sides share only one random projection, so a layer encoded by Psi no longer needs its weights (scalable neural
network kernels, arXiv 2310.13225). Every map states which kernel it estimates (`expectation`) and with what variance
per sample (`variance`).

- :class:`ReLUFeatures`: positive parts of projections. The kernel is an arc-cosine kernel (Cho and Saul, 2009), not the
  activation itself: fit Psi by least squares to approximate a layer.
- :class:`OscillatoryFeatures`: f(w . x + b) by the Fourier transform or a Fourier series of f ("universal random
  features"), in the balanced real form. The error grows like exp(|x| |w|): normalise the inputs.
- :class:`ExpFeatures`: positive features of exp(w . x + b) with the variance-reducing parameter M.
- :class:`PolynomialFeatures`: products of random signs for a power series (Kar and Karnick, 2012).
- :class:`FourierFeatures`: cosines and sines for the Gaussian kernel (Rahimi and Recht, 2007).

Samples are drawn from a separate generator with a given seed; torch's global random state is not touched.
"""

from __future__ import annotations

from zoo.kernels.random_features.activations import ACTIVATIONS, Activation, find_activation, fourier_series
from zoo.kernels.random_features.closed_forms import (
    arc_cosine,
    arc_cosine_variance,
    clipped_linear,
    optimal_variance_parameter,
    softmax_features,
    urf_moments,
    urf_variance,
)
from zoo.kernels.random_features.maps import (
    MAPS,
    ExpFeatures,
    FeatureMap,
    FourierFeatures,
    OscillatoryFeatures,
    PolynomialFeatures,
    ReLUFeatures,
    fourier_features,
)
from zoo.kernels.random_features.projections import Projection, ProjectionKind, draw_projection, hadamard
from zoo.kernels.random_features.variational import GaussianNet, VariationalRandomFeatures, diagonal_gaussian_kl

__all__ = [
    "ACTIVATIONS",
    "MAPS",
    "Activation",
    "ExpFeatures",
    "FeatureMap",
    "FourierFeatures",
    "GaussianNet",
    "OscillatoryFeatures",
    "PolynomialFeatures",
    "Projection",
    "ProjectionKind",
    "ReLUFeatures",
    "VariationalRandomFeatures",
    "arc_cosine",
    "arc_cosine_variance",
    "clipped_linear",
    "diagonal_gaussian_kl",
    "draw_projection",
    "find_activation",
    "fourier_features",
    "fourier_series",
    "hadamard",
    "optimal_variance_parameter",
    "softmax_features",
    "urf_moments",
    "urf_variance",
]
