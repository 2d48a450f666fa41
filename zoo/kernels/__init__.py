"""Kernel functions k(x, z) and what they are made of: one small file per kind."""

from typing import Any

from zoo.kernels.compose import Product, Scaled, Sum
from zoo.kernels.distances import distances, squared_distances
from zoo.kernels.dot_product import FeatureKernel, Linear, Polynomial
from zoo.kernels.exponential_power import ExponentialPower
from zoo.kernels.hyperzzw import LocalSlowNet, SlowNet, causal_conv, fold_product, global_product, local_conv, same_conv
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
    "LocalSlowNet",
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
    "SlowNet",
    "Sum",
    "causal_conv",
    "cholesky",
    "chunked_gram",
    "create_kernel",
    "depthwise_conv2d",
    "distances",
    "fold_product",
    "fourier_features",
    "global_product",
    "gram_product",
    "kernel_names",
    "local_conv",
    "log_det",
    "metric_gaussian",
    "register_kernel",
    "same_conv",
    "solve_spd",
    "squared_distances",
]

_MOVED = {
    "DepthwiseConv2d": "zoo.models.layers.dilated_reparam.DepthwiseConv2d",
    "DilatedReparamBlock": "zoo.models.layers.dilated_reparam.DilatedReparamBlock",
    "Head": "zoo.learners.ridge.Head",
    "LeastSquares": "zoo.learners.ridge.LeastSquares",
    "Positive": "zoo.kernels.positive.PositiveParameter",
    "fit_logistic": "zoo.learners.logistic.fit_logistic",
    "leave_one_out": "zoo.learners.ridge.leave_one_out",
    "solve_feature_ridge": "zoo.learners.ridge.solve_feature_ridge",
    "solve_ridge": "zoo.learners.ridge.solve_ridge",
}


def __getattr__(name: str) -> Any:
    """What moved or has another name, for one release."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import warnings

    home, _, own = _MOVED[name].rpartition(".")
    warnings.warn(f"zoo.kernels.{name} is now {home}.{own}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(home), own)
