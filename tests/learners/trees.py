"""Kernels of golden files: trees of types and numbers, and gradients in the numbers themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners.golden import Record, tensor
from zoo.kernels.active_dims import ActiveDims
from zoo.kernels.compose import Product, Scaled, Sum
from zoo.kernels.constant import Constant
from zoo.kernels.cosine import Cosine
from zoo.kernels.dot_product import Linear
from zoo.kernels.kernel import Kernel
from zoo.kernels.matern import Matern
from zoo.kernels.offset_linear import OffsetLinear
from zoo.kernels.periodic import Periodic
from zoo.kernels.product_state import ProductState
from zoo.kernels.rational_quadratic import RationalQuadratic
from zoo.kernels.spectral_mixture import GridSpectralMixture, SpectralMixture
from zoo.kernels.white_noise import WhiteNoise

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
Places = dict[str, tuple[nn.Module, str]]

#: Constructors of leaves, and which fields become arguments in which order.
LEAVES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "rbf": (lambda length: Matern(math.inf, length, **DOUBLE), ("lengthscale",)),
    "matern": (lambda nu, length: Matern(nu, length, **DOUBLE), ("nu", "lengthscale")),
    "rq": (lambda length, alpha: RationalQuadratic(length, alpha, **DOUBLE), ("lengthscale", "alpha")),
    "periodic": (lambda length, period: Periodic(length, period, **DOUBLE), ("lengthscale", "period")),
    "cosine": (lambda period: Cosine(period, **DOUBLE), ("period",)),
    "linear": (Linear, ()),
    "offset_linear": (lambda offset: OffsetLinear(offset, **DOUBLE), ("offset",)),
    "product_state": (lambda scale=1.0: ProductState(scale, **DOUBLE), ("scale",)),
    "constant": (lambda variance=1.0: Constant(variance, **DOUBLE), ("variance",)),
    "white": (lambda variance=1.0: WhiteNoise(variance, **DOUBLE), ("variance",)),
    "spectral_mixture": (lambda w, m, s: SpectralMixture(w, m, s, **DOUBLE), ("weights", "means", "scales")),
    "gsmp": (lambda theta, m, s: GridSpectralMixture(m, s, theta, **DOUBLE), ("theta", "means", "scales")),
}


def build(tree: Record, path: str = "") -> tuple[Kernel, Places]:
    """A kernel, and the module and name behind each path of a hyper-parameter."""
    kind, fields = tree["type"], dict(tree)
    if kind in ("sum", "product"):
        unknown = set(tree) - {"type", "terms"}
        assert not unknown, f"{kind}: unknown fields {sorted(unknown)}"
        parts = [build(term, f"{path}terms.{i}.") for i, term in enumerate(tree["terms"])]
        places = {name: place for _, found in parts for name, place in found.items()}
        return (Sum if kind == "sum" else Product)(*[kernel for kernel, _ in parts]), places
    if kind not in LEAVES:
        pytest.fail(f"no kernel {kind!r}")
    make, names = LEAVES[kind]
    arguments = [fields.pop(name) for name in names if name in fields]
    kernel: Kernel = make(*arguments)
    places = {
        path + name: (kernel, "weights" if name == "theta" else name) for name in names if name in set(tree) - {"nu"}
    }
    dims, variance = fields.pop("active_dims", None), fields.pop("variance", None)
    if dims is not None:
        kernel = ActiveDims(kernel, dims)
    if variance is not None:
        kernel = Scaled(kernel, tensor(variance), **DOUBLE)
        places[f"{path}variance"] = (kernel, "scale")
    unknown = set(fields) - {"type"}
    assert not unknown, f"{kind}: unknown fields {sorted(unknown)}"
    return kernel, places


def raw_of(module: nn.Module, name: str) -> Tensor:
    """The tensor behind a hyper-parameter, made ready for gradients."""
    raw = getattr(module, f"raw_{name}", None)
    raw = getattr(module, name) if raw is None else raw
    assert isinstance(raw, Tensor)
    return raw if raw.requires_grad else raw.requires_grad_()


def natural_gradient(value: Tensor, module: nn.Module, name: str) -> Tensor:
    """Gradient of a number in a hyper-parameter itself, not in the raw number behind it."""
    raw = raw_of(module, name)
    (slope,) = torch.autograd.grad(value, raw, retain_graph=True, allow_unused=True)
    if slope is None:
        return torch.zeros_like(raw)
    if not hasattr(module, f"raw_{name}"):
        return slope
    (stretch,) = torch.autograd.grad(getattr(module, name).sum(), raw)
    return slope / stretch


def check_gradients(value: Tensor, wanted: Record, places: Places, what: str, tolerance: float) -> None:
    """Gradients by path, relative to the largest component of all."""
    largest = max(float(tensor(0.0 if w is None else w).abs().max()) for w in wanted.values())
    scale = largest if largest > 1e-12 else 1.0  # where all are zero but for rounding
    for path, expected in wanted.items():
        if path not in places:
            pytest.fail(f"{what}: no hyper-parameter {path}")
        found = natural_gradient(value, *places[path])
        aim = torch.zeros_like(found) if expected is None else tensor(expected)
        assert found.shape == aim.shape, f"{what}, {path}: {tuple(found.shape)}, wanted {tuple(aim.shape)}"
        apart = float((found - aim).abs().max())
        assert apart <= tolerance * scale, f"{what}, gradient {path}: {apart / scale:.1e} apart"
