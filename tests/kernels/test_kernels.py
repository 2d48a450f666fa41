"""Kernel functions against closed forms, scikit-learn and float64."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import pairwise
from torch import Tensor, nn

from zoo.kernels import (
    Constant,
    ExponentialPower,
    FeatureKernel,
    FourierFeatures,
    Gaussian,
    Kernel,
    Laplacian,
    Linear,
    Matern,
    OffsetLinear,
    Polynomial,
    PositiveParameter,
    PrecisionGaussian,
    Product,
    Scaled,
    SpectralMixture,
    Sum,
    create_kernel,
    distances,
    squared_distances,
)
from zoo.testing import KernelTests, points

D = 3
DOUBLE = {"dtype": torch.float64}


def spd(seed: int = 0) -> Tensor:
    A = points(D, D, seed=seed)
    return A @ A.mT + 0.1 * torch.eye(D, **DOUBLE)


KERNELS = {
    "gaussian": lambda: Gaussian(0.7, **DOUBLE),
    "gaussian_per_dim": lambda: Gaussian([0.5, 1.0, 2.0], **DOUBLE),
    "precision": lambda: PrecisionGaussian(D, spd(), **DOUBLE),
    "precision_rank_1": lambda: PrecisionGaussian(D, spd(), rank=1, **DOUBLE),
    "laplacian": lambda: Laplacian(1.3, **DOUBLE),
    "laplacian_per_dim": lambda: Laplacian([0.5, 1.0, 2.0], **DOUBLE),
    "linear": Linear,
    "polynomial": lambda: Polynomial(3, 0.5, 1.5, **DOUBLE),
    "homogeneous": lambda: Polynomial(2, 0.5, 0, **DOUBLE),
    "features": lambda: FeatureKernel(nn.Linear(D, 4, **DOUBLE)),
    "sum": lambda: Gaussian(0.7, **DOUBLE) + Linear() + Polynomial(2, **DOUBLE),
    "product": lambda: Linear() * Polynomial(2, **DOUBLE),
    "scaled": lambda: 2.5 * Polynomial(2, **DOUBLE),
    "nested": lambda: Scaled(Linear() + Polynomial(2, **DOUBLE), 0.3, **DOUBLE) * Linear() + Linear(),
}


class TestKernels(KernelTests):
    """What every kernel keeps."""

    @pytest.fixture(params=KERNELS)
    def kernel(self, request: pytest.FixtureRequest) -> Kernel:
        torch.manual_seed(0)
        return KERNELS[request.param]()


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (Gaussian(0.7, **DOUBLE), lambda x, z: pairwise.rbf_kernel(x, z, gamma=1 / (2 * 0.7**2))),
        (Laplacian(0.4, **DOUBLE), lambda x, z: pairwise.laplacian_kernel(x, z, gamma=1 / 0.4)),
        (Linear(), pairwise.linear_kernel),
        (Polynomial(3, 0.5, 1.5, **DOUBLE), lambda x, z: pairwise.polynomial_kernel(x, z, 3, 0.5, 1.5)),
        (Polynomial(2, 0.5, 0, **DOUBLE), lambda x, z: pairwise.polynomial_kernel(x, z, 2, 0.5, 0)),
    ],
    ids=["gaussian", "laplacian", "linear", "polynomial", "homogeneous"],
)
def test_scikit_learn_agrees(kernel: Kernel, reference) -> None:
    X, Z = points(30, 8), points(20, 8, seed=1)
    torch.testing.assert_close(kernel(X, Z).detach(), torch.from_numpy(reference(X.numpy(), Z.numpy())))


def test_precision_is_the_matrix_of_a_quadratic_form() -> None:
    P = spd()
    kernel = PrecisionGaussian(D, P, **DOUBLE)
    torch.testing.assert_close(kernel.precision.detach(), P)
    X, Z = points(6, D), points(5, D, seed=1)
    difference = X[:, None] - Z
    expected = torch.exp(-0.5 * torch.einsum("nmd,de,nme->nm", difference, P, difference))
    torch.testing.assert_close(kernel(X, Z).detach(), expected)


def test_a_diagonal_precision_is_one_lengthscale_per_dimension() -> None:
    scales = torch.tensor([0.5, 1.0, 2.0], **DOUBLE)
    X, Z = points(6, D), points(5, D, seed=1)
    full = PrecisionGaussian(D, torch.diag(scales**-2), **DOUBLE)
    torch.testing.assert_close(full(X, Z), Gaussian(scales, **DOUBLE)(X, Z))
    torch.testing.assert_close(Gaussian([2.0] * D, **DOUBLE)(X, Z), Gaussian(2.0, **DOUBLE)(X, Z))


def test_precision_elements_fill_the_lower_triangle_row_by_row() -> None:
    kernel = PrecisionGaussian(D, **DOUBLE)
    with torch.no_grad():
        kernel.precision_elements.copy_(torch.arange(1.0, 7.0))
    assert kernel.factor.tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 6]]


def test_precision_may_be_singular_and_is_cut_to_the_rank() -> None:
    vector = points(D, 1)
    singular = vector @ vector.mT
    for rank in (1, 2, 3):
        torch.testing.assert_close(PrecisionGaussian(D, singular, rank=rank, **DOUBLE).precision.detach(), singular)
    P = spd()
    best = PrecisionGaussian(D, P, rank=2, **DOUBLE).precision.detach()
    torch.testing.assert_close(torch.linalg.matrix_norm(P - best, 2), torch.linalg.eigvalsh(P)[0])
    for wrong in (-torch.eye(D), points(D, D), torch.full((D, D), torch.nan)):
        with pytest.raises(ValueError, match="symmetric positive semidefinite"):
            PrecisionGaussian(D, wrong)
    with pytest.raises(ValueError, match="must be \\(3, 3\\)"):
        PrecisionGaussian(D, torch.eye(2))
    with pytest.raises(ValueError, match="rank between"):
        PrecisionGaussian(D, rank=4)


def test_composition_reads_as_mathematics() -> None:
    X, Z = points(6, D), points(5, D, seed=1)
    a, b, c = Gaussian(0.7, **DOUBLE), Linear(), Laplacian(**DOUBLE)
    torch.testing.assert_close((a + b * c)(X, Z), a(X, Z) + b(X, Z) * c(X, Z))
    torch.testing.assert_close((3 * a)(X, Z), 3 * a(X, Z))
    torch.testing.assert_close((a * 0.5 + b)(X, Z), 0.5 * a(X, Z) + b(X, Z))
    assert len((a + b + c).kernels) == 3  # flat, so that the state's names do not depend on brackets
    assert len((a * (b * c)).kernels) == 3
    with pytest.raises(TypeError):
        a + 1
    with pytest.raises(ValueError, match="must be positive"):
        -1 * a
    with pytest.raises(ValueError, match="one or more Kernels"):
        Sum()
    with pytest.raises(ValueError, match="one or more Kernels"):
        Product(nn.Identity())


def test_a_shared_network_is_a_kernel_and_trains() -> None:
    kernel = FeatureKernel(nn.Sequential(nn.Linear(D, 8), nn.Tanh())).bfloat16()
    X = points(6, D, dtype=torch.float32)
    assert kernel(X).dtype == torch.float32
    kernel(X).sum().backward()
    assert all(p.grad is not None for p in kernel.parameters())


# ---- hyper-parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e-4, 0.1, 1.0, 19.9, 20.1, 39.0, 45.0, 1e4])
def test_positive_views_return_what_was_set(value: float) -> None:
    for kernel in (Gaussian(value, **DOUBLE), Gaussian(**DOUBLE)):
        kernel.lengthscale = value
        torch.testing.assert_close(kernel.lengthscale.item(), value, rtol=1e-10, atol=0)
    scaled = Scaled(Linear(), value, **DOUBLE)
    torch.testing.assert_close(scaled.scale.item(), value, rtol=1e-12, atol=0)


def test_positive_stays_positive_wherever_training_goes() -> None:
    kernel = Gaussian([1.0, 2.0])
    with torch.no_grad():
        kernel.raw_lengthscale.fill_(-200.0)
    assert (kernel.lengthscale > 0).all()
    assert torch.isfinite(kernel(points(4, 2, dtype=torch.float32))).all()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), [1.0, -2.0]])
def test_not_positive_is_refused(value) -> None:
    with pytest.raises(ValueError, match="lengthscale must be positive"):
        Gaussian(value)


@pytest.mark.parametrize("value", [1.6e-162, 1e-100, 1e-30, 1e-7, 1e-6, 1.9e-6, 2.1e-6, 1e100, 1.3e154])
@pytest.mark.parametrize("kind", [Gaussian, Laplacian])
def test_any_scale_that_float64_can_square(kind, value: float) -> None:
    for own in (None, torch.float64):
        kernel = kind(value, dtype=own)
        for dtype in (torch.float32, torch.float64):
            X = points(6, 3, dtype=dtype)
            wanted = torch.eye(6, dtype=dtype) if value < 1 else torch.ones(6, 6, dtype=dtype)
            torch.testing.assert_close(kernel(X), wanted)
            torch.testing.assert_close(kernel(X, X.clone()), wanted)
        unit = points(6, 3)
        wanted = kind(1.0, **DOUBLE)(unit)
        torch.testing.assert_close(kernel(unit * value), wanted, rtol=1e-12 if own == torch.float64 else 1e-3, atol=0)


@pytest.mark.parametrize("kind", [Gaussian, Laplacian])
@pytest.mark.parametrize("value", [2e-162, 1e-30, 1e-7, 1e-3, 1e30])
def test_any_scale_between_many_points(kind, value: float) -> None:
    """Coinciding points of two sets, where squares of norms over squares of scales have no digit left for them."""
    for dtype in (torch.float32, torch.float64):
        X = points(300, 3, dtype=dtype)
        kernel = kind(value, dtype=torch.float64)
        wanted = torch.eye(300, dtype=dtype) if value < 1e-5 else kind(value, dtype=torch.float64)(X.double()).to(dtype)
        for found in (kernel(X), kernel(X, X.clone())):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_near_pairs_of_a_wide_spread_have_their_derivatives() -> None:
    X = torch.cat([points(30, 200), points(30, 200) + 1e7]).requires_grad_()
    Z = X.detach() + 0.1 * points(60, 200)
    found = squared_distances(X, Z)
    exact = squared_distances(X, Z, method="direct")
    inside = exact.detach() < 1e4
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(found[inside], exact[inside], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[~inside], exact[~inside], rtol=1e-9, atol=0)
    slopes = [torch.autograd.grad(q[inside].sum(), X, retain_graph=True)[0] for q in (found, exact)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [1e-163, 1e155])
def test_scales_beyond_float64_are_refused(value: float) -> None:
    for kind in (Gaussian, Laplacian):
        with pytest.raises(ValueError, match="so must its square"):
            kind(value)
        with pytest.raises(ValueError, match=r"lengthscale is too large for torch.float16; .*float64"):
            kind(1e6, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"too large for torch\.float32"):
            kind().lengthscale = 1e100
    with pytest.raises(ValueError, match="so must its square"):
        FourierFeatures(3, 4, lengthscale=value)


def test_small_factors_are_accepted_too() -> None:
    X = points(5, 3)
    kernel = Polynomial(2, gamma=1e-7, offset=1e-9, **DOUBLE)
    torch.testing.assert_close(kernel(1e4 * X), (10 * X @ X.mT + 1e-9) ** 2)
    torch.testing.assert_close((1e-200 * Gaussian(**DOUBLE))(X), 1e-200 * Gaussian(**DOUBLE)(X), rtol=1e-12, atol=0)


def test_setting_keeps_the_shape() -> None:
    kernel = Gaussian([1.0, 2.0, 3.0])
    kernel.lengthscale = 4.0
    assert kernel.lengthscale.shape == (3,)
    with pytest.raises(ValueError, match="does not fit"):
        kernel.lengthscale = [1.0, 2.0]
    with pytest.raises(ValueError, match="one per dimension"):
        Gaussian(torch.ones(2, 2))
    with pytest.raises(ValueError, match="lengthscale has 3"):
        kernel(points(2, 4))
    homogeneous = Polynomial(offset=0)
    assert homogeneous.offset == 0
    with pytest.raises(ValueError, match="fixed at 0"):
        homogeneous.offset = 1.0
    with pytest.raises(ValueError, match="degree"):
        Polynomial(0)
    with pytest.raises(ValueError, match="softplus"):
        PositiveParameter("square")  # type: ignore[arg-type]


def test_fixed_hyper_parameters_are_saved_but_not_trained() -> None:
    for build in (Gaussian, Laplacian, Polynomial, lambda **k: PrecisionGaussian(2, **k)):
        kernel = build(learnable=False)
        assert not list(kernel.parameters())
        assert set(kernel.state_dict()) == set(build().state_dict())


# ---- distances ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["expand", "direct", "auto"])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_float32_distances_far_from_zero(method, shift: float) -> None:
    X, Z = points(300, 16, dtype=torch.float32) + shift, points(200, 16, seed=1, dtype=torch.float32) + shift
    exact = squared_distances(X.double(), Z.double(), method="direct")
    q = squared_distances(X, Z, method=method)
    torch.testing.assert_close(q.double(), exact, rtol=1e-5, atol=1e-5)
    for kernel in (Gaussian(2.0), PrecisionGaussian(16), Laplacian(10.0)):
        exact_gram = kernel.double()(X.double(), Z.double())
        torch.testing.assert_close(kernel.float()(X, Z).double(), exact_gram, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["expand", "direct"])
def test_distances_at_coinciding_points(method) -> None:
    X = points(20, 5, dtype=torch.float32)
    assert (squared_distances(X, method=method).diagonal() == 0).all()
    assert (squared_distances(X, X.clone(), method=method) >= 0).all()
    twice = torch.cat([points(2, 3), points(2, 3)]).requires_grad_()
    fixed = twice.detach().clone()

    def gram(Y: Tensor) -> Tensor:
        return torch.exp(-0.5 * squared_distances(Y, fixed, method=method))

    assert torch.autograd.gradcheck(gram, (twice,))
    assert torch.autograd.gradgradcheck(gram, (twice,))


@pytest.mark.parametrize("method", ["expand", "direct"])
def test_root_of_the_distance_has_a_finite_derivative(method) -> None:
    X = points(5, 3).requires_grad_()
    distances(X, method=method).sum().backward()
    assert X.grad is not None
    assert torch.isfinite(X.grad).all()
    Z = points(4, 3, seed=1)
    torch.testing.assert_close(distances(X, Z, method=method), torch.cdist(X, Z))
    assert torch.autograd.gradcheck(lambda x: distances(x, Z, method=method), (X,))


def test_distances_keep_their_digits_when_products_may_lose_theirs() -> None:
    X, Z = points(100, 64, dtype=torch.float32), points(90, 64, seed=1, dtype=torch.float32)
    exact = squared_distances(X.double(), Z.double(), method="direct")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.testing.assert_close(squared_distances(X, Z, method="expand").double(), exact, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


def test_method_is_checked() -> None:
    with pytest.raises(ValueError, match="expand"):
        squared_distances(points(2, 2), method="fast")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_on_a_gpu_as_on_the_cpu(precision: str) -> None:
    X, Z = points(500, 64, dtype=torch.float32) + 1e3, points(300, 64, seed=1, dtype=torch.float32) + 1e3
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for kernel in (Gaussian(8.0), PrecisionGaussian(64, 0.02 * torch.eye(64)), Laplacian(50.0)):
            exact = kernel.double()(X.double(), Z.double())
            kernel.float().cuda()
            with torch.autocast("cuda", torch.bfloat16):
                torch.testing.assert_close(kernel(X.cuda(), Z.cuda()).double().cpu(), exact, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "bad", [None, "a", 1j, object(), torch.ones(2, dtype=torch.complex64)], ids=lambda bad: type(bad).__name__
)
def test_options_that_are_no_numbers_are_refused(bad):
    calls = {
        "lengthscale": Gaussian,
        "variance": Constant,
        "offset": OffsetLinear,
        "exponent": lambda value: ExponentialPower(exponent=value),
        "norm": lambda value: ExponentialPower(norm=value),
        "degree": Polynomial,
        "nu": Matern,
        "dim": PrecisionGaussian,
        "means": lambda value: SpectralMixture([1.0], value, [[1.0]]),
        "width": lambda value: create_kernel("gaussian", value if value is not None else "None"),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=name):
            call(bad)
