"""Kernel functions k(x, z) and what they are made of: one small file per kind."""

from typing import Any

from zoo.kernels.compose import Product, Scaled, Sum
from zoo.kernels.distances import distances, squared_distances
from zoo.kernels.dot_product import FeatureKernel, Linear, Polynomial
from zoo.kernels.exponential_power import ExponentialPower
from zoo.kernels.kernel import Kernel, create_kernel, kernel_names, register_kernel
from zoo.kernels.linalg import (
    Factor,
    NotPositiveDefiniteError,
    cholesky,
    chunked_gram,
    gram_product,
    log_det,
    solve_spd,
)
from zoo.kernels.metric import PrecisionGaussian, metric_gaussian
from zoo.kernels.positive import PositiveParameter
from zoo.kernels.random_features import (
    ExpFeatures,
    FeatureMap,
    FourierFeatures,
    OscillatoryFeatures,
    PolynomialFeatures,
    Projection,
    ReLUFeatures,
    fourier_features,
)
from zoo.kernels.stationary import Gaussian, Laplacian
from zoo.ops import depthwise_conv2d
from zoo.support.renamed import renamed

__all__ = [
    "ExpFeatures",
    "ExponentialPower",
    "Factor",
    "FeatureKernel",
    "FeatureMap",
    "FourierFeatures",
    "Gaussian",
    "Kernel",
    "Laplacian",
    "Linear",
    "NotPositiveDefiniteError",
    "OscillatoryFeatures",
    "Polynomial",
    "PolynomialFeatures",
    "PositiveParameter",
    "PrecisionGaussian",
    "Product",
    "Projection",
    "ReLUFeatures",
    "Scaled",
    "Sum",
    "cholesky",
    "chunked_gram",
    "create_kernel",
    "depthwise_conv2d",
    "distances",
    "fourier_features",
    "gram_product",
    "kernel_names",
    "log_det",
    "metric_gaussian",
    "register_kernel",
    "solve_spd",
    "squared_distances",
]


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
