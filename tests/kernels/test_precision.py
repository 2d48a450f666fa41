"""Digits: points that lie far apart, half precision, rows of zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import Gaussian, Kernel, Laplacian, PrecisionGaussian, metric_gaussian, squared_distances
from zoo.kernels.random_features import MAPS, ReLUFeatures, arc_cosine, fourier_features
from zoo.models.continual.kcl import FeatureNorm, normalise_features

HALF = (torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- groups that lie far apart -----------------------------------------------------------------------------


def _differences(X: Tensor, Z: Tensor) -> Tensor:
    return X.unsqueeze(-2) - Z.unsqueeze(-3)


def _gaussian(X: Tensor, Z: Tensor) -> Tensor:
    return torch.exp(-_differences(X, Z).square().sum(-1) / 8)


KERNELS: dict[str, tuple[Kernel, Callable[[Tensor, Tensor], Tensor]]] = {
    "gaussian": (Gaussian(2.0), _gaussian),
    "gaussian, each": (Gaussian([2.0, 2.0, 2.0]), _gaussian),
    "precision": (PrecisionGaussian(3, torch.eye(3) / 4), _gaussian),
    "laplacian": (Laplacian(2.0), lambda X, Z: torch.exp(-_differences(X, Z).abs().sum(-1) / 2)),
    "units": (metric_gaussian, _gaussian),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("gap", [1.0, 15.0, 1_000.0, 10_000.0])
@pytest.mark.parametrize("rows", [40, 600])
@pytest.mark.parametrize("name", KERNELS)
def test_tight_groups_may_lie_far_apart(name: str, rows: int, gap: float) -> None:
    kernel, plain = KERNELS[name]
    X, Z, g = normal(rows, 3), normal(30, 3, seed=2), normal(rows, 30, seed=3)
    X[rows // 2 :] += gap
    Z[15:] += gap
    extra = (torch.eye(3) / 2,) if name == "units" else ()
    x, z = X.clone().requires_grad_(), Z.clone().requires_grad_()
    found = kernel(x, z, *extra)
    exact_x, exact_z = X.double().requires_grad_(), Z.double().requires_grad_()
    want = plain(exact_x, exact_z)
    assert found.dtype == torch.float32
    assert float((found - want).abs().max()) < 1e-5
    for got, exact in zip(
        torch.autograd.grad(found, (x, z), g), torch.autograd.grad(want, (exact_x, exact_z), g.double()), strict=True
    ):
        assert float((got - exact).abs().max()) < 1e-5 * (1 + float(exact.abs().max()))
    if name != "units":
        assert float((kernel(X) - plain(X.double(), X.double())).detach().abs().max()) < 1e-5
        assert torch.equal(kernel(X).diagonal(), torch.ones(rows))


def test_squared_distances_of_groups() -> None:
    X = torch.cat([normal(150, 4), 10_000 + normal(150, 4, seed=2)])
    exact = _differences(X.double(), X.double()).square().sum(-1)
    near = exact < 100
    for method in ("expand", "direct", "auto"):
        found = squared_distances(X, method=method)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert float((found - exact)[near].abs().max()) < 1e-5
    torch.testing.assert_close(squared_distances(X).double(), exact, rtol=1e-6, atol=1e-5)


# ---- half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_features_of_long_vectors(dtype: torch.dtype) -> None:
    for options in ({"centered": True}, {"centered": True, "bias": False}, {"constant": -1.0}, {}):
        features = ReLUFeatures(256, 64, **options)
        x = 278 / 16 * normal(5, 256)
        want = features(x)
        got = features(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02 * float(want.abs().max()))
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(features(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", MAPS)
def test_a_row_of_zeros(name: str, dtype: torch.dtype) -> None:
    options: list[dict[str, Any]] = [{"normalize": 1.0}, {"normalize": 1.0, "normalize_dim": 1}, {}]
    options += [{"centered": True, "bias": False}, {"centered": True}] if name == "relu" else []
    for chosen in options:
        features = MAPS[name](6, 16, **chosen).to(dtype)
        x = 0.3 * normal(2, 3, 6)
        x[0], x[1, 1] = 0, 0
        x = x.to(dtype).requires_grad_()
        y = features(x)
        assert y.dtype == dtype
        assert y.isfinite().all()
        if y.requires_grad:
            (slope,) = torch.autograd.grad(y.float().square().sum(), x)
            assert slope.isfinite().all()
        encoded = features.encode(x[0].detach(), torch.zeros(3, dtype=dtype) if features.bias else None)
        assert encoded.isfinite().all()


def test_normalising_keeps_other_rows() -> None:
    x = normal(7, 6)
    got = ReLUFeatures(6, 16, normalize=2.0)._scaled(x)
    assert torch.equal(got, torch.nn.functional.normalize(x, dim=-1) * 2.0)


@pytest.mark.parametrize("dtype", HALF)
def test_features_of_batches_in_half_precision(dtype: torch.dtype) -> None:
    h = normal(4, 7)
    h[1] = 0
    ways: tuple[FeatureNorm, ...] = ("minmax_batch", "l2")
    for how in ways:
        for given in (h, torch.zeros(3, 7)):
            x = given.to(dtype).requires_grad_()
            y = normalise_features(x, how)
            (slope,) = torch.autograd.grad(y.float().sum(), x)
            assert y.dtype == dtype
            assert y.isfinite().all()
            assert not slope.isnan().any()
            torch.testing.assert_close(y.float(), normalise_features(given, how), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", HALF)
def test_closed_forms_in_half_precision(dtype: torch.dtype) -> None:
    x, w = 100 * normal(4, 9), 100 * normal(4, 9, seed=2)
    assert arc_cosine(x.to(dtype), w.to(dtype)).isfinite().all() == (arc_cosine(x, w) < torch.finfo(dtype).max).all()
    omega = normal(5, 9, seed=3)
    exact = fourier_features(x.to(dtype).float(), omega.to(dtype).float())
    torch.testing.assert_close(fourier_features(x.to(dtype), omega.to(dtype)).float(), exact, rtol=0.01, atol=0.01)
    near = metric_gaussian((x / 10).to(dtype), (w / 10).to(dtype), torch.eye(9).to(dtype))
    assert near.dtype == dtype
    assert metric_gaussian(x.to(dtype), x.to(dtype), torch.eye(9).to(dtype)).diagonal().min() > 0.99
