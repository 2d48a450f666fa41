"""Kernel functions: pure tensors in and out, usable on their own."""

from typing import Any

from zoo.kernels.base import (
    FeatureKernel,
    Gaussian,
    Kernel,
    Laplacian,
    Linear,
    Polynomial,
    Positive,
    PrecisionGaussian,
    Product,
    Scaled,
    Sum,
    distances,
    squared_distances,
)
from zoo.kernels.heads import Head, LeastSquares, fit_logistic, leave_one_out
from zoo.kernels.linalg import (
    Factor,
    NotPositiveDefiniteError,
    cholesky,
    chunked_gram,
    gram_product,
    log_det,
    solve_feature_ridge,
    solve_ridge,
    solve_spd,
)
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
from zoo.ops import depthwise_conv2d

__all__ = [
    "ExpFeatures",
    "Factor",
    "FeatureKernel",
    "FeatureMap",
    "FourierFeatures",
    "Gaussian",
    "Head",
    "Kernel",
    "Laplacian",
    "LeastSquares",
    "Linear",
    "NotPositiveDefiniteError",
    "OscillatoryFeatures",
    "Polynomial",
    "PolynomialFeatures",
    "Positive",
    "PrecisionGaussian",
    "Product",
    "Projection",
    "ReLUFeatures",
    "Scaled",
    "Sum",
    "cholesky",
    "chunked_gram",
    "depthwise_conv2d",
    "distances",
    "fit_logistic",
    "fourier_features",
    "gram_product",
    "leave_one_out",
    "log_det",
    "solve_feature_ridge",
    "solve_ridge",
    "solve_spd",
    "squared_distances",
]

_LAYERS, _SLOW = "zoo.models.layers.dilated_reparam", "zoo.models.slow_nets"
_MOVED = {
    "DepthwiseConv2d": _LAYERS,
    "DilatedReparamBlock": _LAYERS,
    "LocalSlowNet": _SLOW,
    "SlowNet": _SLOW,
} | dict.fromkeys(("causal_conv", "fold_product", "global_product", "local_conv", "same_conv"), "zoo.ops.hyperzzw")


def __getattr__(name: str) -> Any:
    """Layers and operators that moved, for one release."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import warnings

    home = _MOVED[name]
    warnings.warn(f"zoo.kernels.{name} is now {home}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(home), name)
