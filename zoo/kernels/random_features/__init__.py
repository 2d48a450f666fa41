"""Random features: maps whose plain dot products estimate kernels without bias, for layers that stay small.

    E[ Phi(x) . Psi(w, b) ] = k(x, (w, b))

The two sides share one random projection and nothing else, so a layer whose weights have gone through Psi never sees
them again (scalable neural network kernels, arXiv 2310.13225). Every map here says which kernel it estimates
(`expectation`) and how far one draw lies from it (`variance`).

- :class:`ReLUFeatures`: positive parts of projections. The kernel is an arc-cosine one (Cho and Saul, 2009), not the
  activation itself: fit Psi by least squares to get a layer back.
- :class:`OscillatoryFeatures`: f(w . x + b) through the Fourier transform or a Fourier series of f ("universal random
  features"), in the balanced real form. The error grows like exp(|x| |w|): it wants normalised inputs.
- :class:`ExpFeatures`: positive features of exp(w . x + b) with the variance-reducing parameter M.
- :class:`PolynomialFeatures`: products of random signs for a power series (Kar and Karnick, 2012).
- :class:`FourierFeatures`: the usual cosines and sines of the Gaussian kernel (Rahimi and Recht, 2007).

Every draw comes from a generator of its own that is seeded by the caller; the global state of torch is not touched.
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
