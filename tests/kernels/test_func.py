"""`torch.func` over kernels, factors, solvers and the operators that have derivatives by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap

from zoo.kernels import (
    Gaussian,
    Kernel,
    Laplacian,
    Linear,
    Polynomial,
    PrecisionGaussian,
    cholesky,
    metric_gaussian,
)
from zoo.kernels.random_features import MAPS, VariationalRandomFeatures
from zoo.learners.kernel_ridge import KernelRidgeHead
from zoo.learners.ridge import solve_feature_ridge, solve_ridge
from zoo.models.continual import normalise_features
from zoo.ops import depthwise_conv2d, response_norm


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    return


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n: int, *batch: int) -> Tensor:
    z = normal(*batch, n, n + 2)
    return z @ z.mT + torch.eye(n).double()


KERNELS: dict[str, Kernel] = {
    "gaussian": Gaussian([1.0, 2.0, 0.5]),
    "laplacian": Laplacian(2.0),
    "precision": PrecisionGaussian(3),
    "linear": Linear(),
    "polynomial": Polynomial(3),
    "sum": 2.0 * Gaussian(2.0) + Laplacian(1.0) * Linear(),
}
RIDGE = torch.tensor(0.3).double()
HEADS = {name: KernelRidgeHead(name).double() for name in ("linear", "laplacian")}
DRAWN, EPS = VariationalRandomFeatures(3, 8).double(), normal(8, 3)

#: Operators with derivatives by hand, or branches: (function, shapes of its inputs).
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    **{f"kernel {name}": (k.double(), ((4, 3), (5, 3))) for name, k in KERNELS.items()},
    **{f"map {name}": (m(3, 8).double(), ((4, 3),)) for name, m in MAPS.items()},
    "unit rows": (lambda h: normalise_features(h, "l2"), ((4, 3),)),
    "minmax": (lambda h: normalise_features(h, "minmax_batch"), ((4, 3),)),
    "cholesky": (lambda B: cholesky(B @ B.mT + torch.eye(3).double()).lower, ((3, 3),)),
    "solve ridge": (lambda B, Y: solve_ridge(B @ B.mT, Y, RIDGE), ((3, 4), (3, 2))),
    "feature ridge": (lambda p, Y: solve_feature_ridge(p, Y, 0.1), ((5, 3), (5, 2))),
    "ridge head": (lambda s, q: HEADS["linear"](s, torch.eye(4).double(), q), ((4, 3), (5, 3))),
    "laplacian head": (
        lambda s, q: HEADS["laplacian"](s, torch.eye(4).double(), q),
        ((4, 3), (5, 3)),
    ),
    "drawn features": (
        lambda z, m, v: DRAWN.drawn_features(z, m, v, EPS),
        ((4, 3), (3,), (3,)),
    ),
    "units": (metric_gaussian, ((4, 3), (5, 3), (3, 2))),
    "units of themselves": (lambda x, L: metric_gaussian(x, x, L), ((4, 3), (3, 2))),
    "kernel of themselves": (lambda x: KERNELS["laplacian"](x), ((4, 3),)),
    "depthwise": (lambda x, w, b: depthwise_conv2d(x, w, b), ((2, 3, 5, 14), (3, 1, 3, 7), (3,))),
    "response norm": (lambda x, g: response_norm(x, g, None), ((2, 3, 3, 4), (1, 1, 1, 4))),
}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    want = want.detach()
    torch.testing.assert_close(got.detach(), want, rtol=tolerance, atol=tolerance * (1 + float(want.abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_may_be_transformed(name: str, dtype: torch.dtype) -> None:
    function, shapes = OPERATORS[name]
    given = [0.5 * normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    slopes = [normal(*shape, seed=10 + i) for i, shape in enumerate(shapes)]
    many = [torch.stack([t, t + 0.1 * s]) for t, s in zip(given, slopes, strict=True)]
    if dtype == torch.float32:  # the types that have loops in C
        single = [t.float() for t in many]
        owned, fixed = isinstance(function, torch.nn.Module), "head" in name or "drawn" in name
        if not owned and name not in ("cholesky", "solve ridge") and not fixed:
            with torch.no_grad():
                close(vmap(function)(*single), torch.stack([function(*one) for one in zip(*single, strict=True)]), 1e-4)
        return
    with torch.no_grad():
        close(vmap(function)(*many), torch.stack([function(*one) for one in zip(*many, strict=True)]))
    value, slope = jvp(function, tuple(given), tuple(slopes))
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (
            function(*(t + sign * step * s for t, s in zip(given, slopes, strict=True))) for sign in (1, -1)
        )
        close(value, function(*given))
        close(slope, (ahead - behind) / (2 * step), 1e-4)

    def along(s: Tensor) -> Tensor:
        return function(*(t + s * d for t, d in zip(given, slopes, strict=True))).square().sum()

    zero = torch.zeros(()).double()
    second = hessian(along)(zero)
    close(jacfwd(jacrev(along))(zero), second)

    def classic(s: float) -> Tensor:
        at = torch.tensor(s).double().requires_grad_()
        return torch.autograd.grad(along(at), at)[0]

    close(second, (classic(step) - classic(-step)) / (2 * step), 1e-3)
    at = zero.clone().requires_grad_()
    (first,) = torch.autograd.grad(along(at), at, create_graph=True)
    if first.requires_grad:
        close(torch.autograd.grad(first, at)[0], second)


@pytest.mark.parametrize("name", KERNELS)
def test_hessian_of_a_kernel(name: str) -> None:
    kernel, z = KERNELS[name].double(), normal(1, 3, seed=2)

    def value(x: Tensor) -> Tensor:
        return kernel(x.unsqueeze(0), z).squeeze()

    x, step = normal(3), 1e-5
    found = hessian(value)(x)
    gradient = torch.func.grad(value)
    units = torch.eye(3).double()
    numeric = torch.stack([(gradient(x + step * e) - gradient(x - step * e)) / (2 * step) for e in units])
    close(found, numeric, 1e-4)
    close(jacfwd(gradient)(x), numeric, 1e-4)
    close(torch.autograd.functional.hessian(value, x), numeric, 1e-4)  # type: ignore[arg-type]


def test_factors_of_many_have_the_jitter_of_each() -> None:
    A = spd(4, 3)
    A[1] = torch.ones(4, 4)  # singular
    A[2] = torch.ones(4, 4) - 1e-9 * torch.diag(torch.arange(4.0)).double()
    lower, jitter = vmap(lambda a: (lambda f: (f.lower, f.jitter))(cholesky(a)))(A)
    for i in range(3):
        alone = cholesky(A[i])
        close(jitter[i], alone.jitter, 1e-12)
        close(lower[i], alone.lower, 1e-9)
    bad = torch.stack([torch.eye(3), -torch.eye(3)]).double()
    lower = vmap(lambda a: cholesky(a).lower)(bad)
    assert lower[0].isfinite().all()
    assert lower[1].isnan().all()
