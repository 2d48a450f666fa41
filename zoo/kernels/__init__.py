"""Kernel functions k(x, z) and their building blocks: one small file per kind."""

from typing import Any

from zoo.kernels.active_dims import ActiveDims
from zoo.kernels.alignment import alignment, label_kernel
from zoo.kernels.compose import Product, Scaled, Sum
from zoo.kernels.constant import Constant
from zoo.kernels.cosine import Cosine
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
from zoo.kernels.matern import Matern, Matern12, Matern32, Matern52
from zoo.kernels.metric import PrecisionGaussian, metric_gaussian
from zoo.kernels.offset_linear import OffsetLinear
from zoo.kernels.periodic import Periodic
from zoo.kernels.positive import PositiveParameter
from zoo.kernels.product_state import ProductState
from zoo.kernels.radial import Radial
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
from zoo.kernels.rational_quadratic import RationalQuadratic
from zoo.kernels.spectral_mixture import GridSpectralMixture, SpectralMixture, frequency_grid
from zoo.kernels.stationary import Gaussian, Laplacian
from zoo.kernels.white_noise import WhiteNoise
from zoo.ops import depthwise_conv2d
from zoo.support.renamed import renamed

__all__ = [
    "ActiveDims",
    "Constant",
    "Cosine",
    "ExpFeatures",
    "ExponentialPower",
    "Factor",
    "FeatureKernel",
    "FeatureMap",
    "FourierFeatures",
    "Gaussian",
    "GridSpectralMixture",
    "Kernel",
    "Laplacian",
    "Linear",
    "Matern",
    "Matern12",
    "Matern32",
    "Matern52",
    "NotPositiveDefiniteError",
    "OffsetLinear",
    "OscillatoryFeatures",
    "Periodic",
    "Polynomial",
    "PolynomialFeatures",
    "PositiveParameter",
    "PrecisionGaussian",
    "Product",
    "ProductState",
    "Projection",
    "Radial",
    "RationalQuadratic",
    "ReLUFeatures",
    "Scaled",
    "SpectralMixture",
    "Sum",
    "WhiteNoise",
    "alignment",
    "cholesky",
    "chunked_gram",
    "create_kernel",
    "depthwise_conv2d",
    "distances",
    "fourier_features",
    "frequency_grid",
    "gram_product",
    "kernel_names",
    "label_kernel",
    "log_det",
    "metric_gaussian",
    "register_kernel",
    "solve_spd",
    "squared_distances",
]


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
