"""Kernels of infinitely wide networks: closed forms, quadrature, finite networks, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zoo.kernels.infinite import (
    DUALS,
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    Hierarchical,
    InfiniteNetwork,
    Residual,
    dual_activation,
    read_layers,
)
from zoo.learners.ridge import solve_ridge

FUNCTIONS = {
    "relu": torch.relu,
    "abs": torch.abs,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "gelu": nn.functional.gelu,
    "identity": lambda x: x,
}


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- duals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DUALS, "leaky_relu"])
def test_duals_are_expectations(name: str) -> None:
    """Against Gauss-Hermite quadrature in polar form for kinks, and their derivatives against autograd (Price)."""
    a, b = torch.tensor([0.3, 1.0, 2.5]).double(), torch.tensor([0.8, 1.0, 0.4]).double()
    c = torch.tensor([0.2, -0.9, 0.0]).double().requires_grad_()
    value, slopes = dual_activation(name, a, b, c, slope=0.2)
    derivative = torch.autograd.grad(value.sum(), c)[0]
    torch.testing.assert_close(slopes.detach(), derivative, rtol=1e-9, atol=1e-12)
    function = FUNCTIONS.get(name, lambda x: torch.where(x > 0, x, 0.2 * x))
    for i in range(3):
        found = expectation(function, float(a[i]), float(b[i]), float(c[i]))
        assert float(value.detach()[i]) == pytest.approx(found, rel=2e-5, abs=1e-8)


def expectation(function, a: float, b: float, c: float) -> float:
    """E f(u) f(v) on a polar grid: the angle by the midpoint rule, the radius by Gauss-Laguerre in r^2 / 2."""
    t, w = np.polynomial.legendre.leggauss(200)
    r, w = torch.from_numpy(5 * (t + 1)), torch.from_numpy(5 * w)
    angles = (torch.arange(4000).double() + 0.5) * (2 * math.pi / 4000)
    w = w * r * torch.exp(-r.square() / 2)
    x, y = r[:, None] * torch.cos(angles), r[:, None] * torch.sin(angles)
    u, v = math.sqrt(a) * x, c / math.sqrt(a) * x + math.sqrt(b - c**2 / a) * y
    return float((w[:, None] * function(u) * function(v)).sum() / 4000)


def test_two_layers_have_a_closed_form() -> None:
    X = points(12, 10)
    norms = X.norm(dim=1)
    scale = norms[:, None] * norms / (2 * math.pi * 10)
    u = (X @ X.mT / (norms[:, None] * norms)).clamp(-1, 1)
    h = 2 * u * (math.pi - torch.acos(u)) + (1 - u.square()).sqrt()
    found = InfiniteNetwork([Dense(1.0), "relu", Dense(1.0)])(X)
    torch.testing.assert_close(found.fill_diagonal_(0), (scale * h).fill_diagonal_(0), rtol=1e-12, atol=1e-14)


# ---- as a kernel -------------------------------------------------------------------------------------------

DEEP = [Dense(2.0, 0.1), "relu", Dense(2.0, 0.1), "erf", Dense(1.5)]
IMAGES = [Conv(3, 1, 1), "relu", AvgPool(2), Residual([Conv(3, 1, 1), "gelu"]), GlobalAvgPool(), Dense()]


@pytest.mark.parametrize(
    "kernel",
    [
        InfiniteNetwork(DEEP),
        InfiniteNetwork(DEEP, kind="nngp", block=10),
        InfiniteNetwork(IMAGES, shape=(2, 4, 6), block=3000),
        Hierarchical((2, 3, 8)),
        Hierarchical((12, 4), kind="nngp"),
    ],
    ids=["ntk", "nngp", "images", "hierarchical", "hierarchical nngp"],
)
def test_a_kernel_is_one(kernel: InfiniteNetwork | Hierarchical) -> None:
    X, Z = points(7, 48), points(3, 48, 1)
    K = kernel(X)
    assert torch.equal(K, K.mT)
    assert torch.linalg.eigvalsh(K)[0] > -1e-10 * K.diagonal().max()
    torch.testing.assert_close(K.diagonal(), kernel.diag(X), rtol=1e-14, atol=0)
    torch.testing.assert_close(kernel(X, X.clone()), K, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(kernel(X, Z), kernel(Z, X).mT, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(kernel(torch.cat([X, Z]))[:7, 7:], kernel(X, Z), rtol=1e-10, atol=1e-12)
    stacked = kernel(torch.stack([X, X + 1]), Z)
    assert stacked.shape == (2, 7, 3)
    torch.testing.assert_close(stacked[0], kernel(X, Z), rtol=1e-14, atol=0)
    single = kernel(X.float(), Z.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), kernel(X, Z), rtol=1e-4, atol=1e-5)
    assert kernel(X[:0], Z).shape == (0, 3)
    coefficients = solve_ridge(K, X[:, :1], 1e-3)
    assert (kernel(Z, X) @ coefficients).isfinite().all()
    both = (2.0 * kernel + kernel)(X)
    torch.testing.assert_close(both, 3 * K, rtol=1e-6, atol=1e-6)


def test_relu_kernels_are_homogeneous() -> None:
    kernel, X = InfiniteNetwork([Dense(), "relu", Dense(), "relu", Dense()]), points(5, 4)
    torch.testing.assert_close(kernel(2 * X, 3 * X), 6 * kernel(X, X.clone()), rtol=1e-6, atol=1e-7)
    zero = kernel(torch.cat([X, 0 * X]))
    assert not zero[5:].any()
    # a gain of two keeps variances
    assert torch.allclose(InfiniteNetwork(kernel.layers, kind="nngp").diag(X), 2 * X.square().mean(1))


def test_gradients_of_points() -> None:
    X, Z = points(3, 4).requires_grad_(), points(2, 4, 1).requires_grad_()
    kernel = InfiniteNetwork([Dense(2.0, 0.3), "relu", Dense(), "gelu", Dense()])
    assert torch.autograd.gradcheck(lambda x, z: kernel(x, z), (X, Z), atol=1e-6)
    for points_ in (X, torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)):
        g = torch.autograd.grad(kernel(points_).sum(), points_)[0]
        assert g.isfinite().all()


def test_hierarchical_is_a_convolution_without_overlap() -> None:
    X = points(5, 24)
    X = nn.functional.normalize(X.unflatten(1, (8, 3)), dim=-1).flatten(1) * math.sqrt(3)
    layers = [Conv((1, 3), (1, 3), 0, 1.0), "relu", Conv((1, 4), (1, 4)), "relu", Conv((1, 2), (1, 2)), "relu"]
    wide = InfiniteNetwork([*layers, Flatten(), Dense()], shape=(1, 1, 24)).both(X)
    for kind, wanted in zip(("nngp", "ntk"), wide, strict=True):
        found = Hierarchical((3, 4, 2), kind=kind)(X)  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# ---- finite networks ---------------------------------------------------------------------------------------


def gradients(widths: list[int], X: Tensor, seed: int) -> Tensor:
    """The NTK of a finite ReLU network of gain 2, one hidden layer after the other, by hand."""
    g = torch.Generator().manual_seed(seed)
    sizes = [X.shape[1], *widths, 1]
    weights = [torch.randn(o, i, generator=g, dtype=torch.float64) for i, o in itertools.pairwise(sizes)]
    inputs, slopes, h = [X], [], X
    for W in weights[:-1]:
        z = h @ W.mT * math.sqrt(2 / W.shape[1])
        h = z.relu()
        inputs.append(h)
        slopes.append((z > 0).double())
    K, back = torch.zeros(len(X), len(X), dtype=torch.float64), torch.ones(len(X), 1, dtype=torch.float64)
    for i in reversed(range(len(weights))):
        factor = 2 / weights[i].shape[1]
        K += factor * (inputs[i] @ inputs[i].mT) * (back @ back.mT)
        if i:
            back = (back @ weights[i] * math.sqrt(factor)) * slopes[i - 1]
    return K


@pytest.mark.parametrize("depth", [1, 2])
def test_wide_networks_approach_it(depth: int) -> None:
    X = points(8, 10)
    K = InfiniteNetwork([*[Dense(), "relu"] * depth, Dense()])(X)
    errors = []
    for width in (64, 1024):
        runs = [gradients([width] * depth, X, seed) for seed in range(4)]
        errors.append(float(torch.stack([(run - K).norm() / K.norm() for run in runs]).mean()))
        assert errors[-1] < 6 / math.sqrt(width)
    assert errors[1] < errors[0] / 2


# ---- modules -----------------------------------------------------------------------------------------------


def test_layers_of_a_module() -> None:
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.LeakyReLU(0.1)),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, (3, 1), stride=2, padding=(1, 0), bias=False),
        nn.GELU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )
    assert read_layers(net, gain=1.5, bias=0.2) == (
        Conv((3, 3), (1, 1), ((1, 1), (1, 1)), 1.5, 0.2),
        Activation("leaky_relu", 0.1),
        AvgPool(2, 2),
        Conv((3, 1), (2, 2), ((1, 1), (0, 0)), 1.5, 0.0),
        Activation("gelu"),
        GlobalAvgPool(),
        Flatten(),
        Dense(1.5, 0.2),
    )
    assert InfiniteNetwork(read_layers(net), shape=(3, 6, 6))(points(2, 108)).shape == (2, 2)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), "0.1: BatchNorm1d has no kernel"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "0: Conv2d has a kernel without groups"),
        (nn.Sequential(nn.GELU("tanh")), "0: GELU has no kernel with these settings"),
    ],
)
def test_modules_without_a_kernel(module: nn.Module, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        read_layers(module)


@pytest.mark.parametrize(
    ("layers", "options", "match"),
    [
        (["rleu"], {}, "'rleu' has no kernel; did you mean relu"),
        ([nn.ReLU()], {}, "layer 0 is a ReLU"),
        ([Dense(0.0)], {}, "gain=0.0 must be positive"),
        ([Conv()], {}, "Conv needs images"),
        ([Conv(5), Flatten()], {"shape": (1, 4, 4)}, "a window of 5 does not fit into 4 pixels"),
        ([Conv(3)], {"shape": (1, 4, 4)}, "end with an image"),
        ([Dense()], {"shape": (1, 4, 4)}, "Dense gets an image"),
        ([Residual([Conv(3)]), Flatten()], {"shape": (1, 4, 4)}, "its shortcut with"),
        ([Conv(0), Flatten()], {"shape": (1, 4, 4)}, "sizes and strides of 1 at least"),
        ([Dense()], {"kind": "nkt"}, "kind='nkt'"),
    ],
)
def test_what_is_refused(layers: list, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        InfiniteNetwork(layers, **options)


def test_points_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images of shape"):
        InfiniteNetwork(IMAGES, shape=(2, 4, 6))(points(2, 47))
    with pytest.raises(ValueError, match="make 12"):
        Hierarchical((3, 4))(points(2, 11))
