"""What every kernel keeps, kept by the kernels of Gaussian processes; values against scikit-learn; wrong input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import kernels as sk
from torch import Tensor

from tests.kernels.test_kernels import DOUBLE, D
from zoo.kernels.active_dims import ActiveDims
from zoo.kernels.alignment import alignment, label_kernel
from zoo.kernels.compose import Scaled
from zoo.kernels.constant import Constant
from zoo.kernels.cosine import Cosine
from zoo.kernels.dot_product import Linear
from zoo.kernels.kernel import Kernel, create_kernel
from zoo.kernels.linalg import chunked_gram
from zoo.kernels.matern import Matern
from zoo.kernels.offset_linear import OffsetLinear
from zoo.kernels.periodic import Periodic
from zoo.kernels.product_state import ProductState
from zoo.kernels.rational_quadratic import RationalQuadratic
from zoo.kernels.spectral_mixture import GridSpectralMixture, SpectralMixture, frequency_grid
from zoo.kernels.stationary import Gaussian
from zoo.kernels.white_noise import WhiteNoise
from zoo.learners.nystrom import NystromFeatures, StreamingDictionary
from zoo.testing import KernelTests, points

MEANS = [[0.1, 0.2, 0.05], [0.3, 0.0, 0.2]]
SCALES = [[0.1, 0.05, 0.2], [0.02, 0.1, 0.3]]

KERNELS: dict[str, Callable[[], Kernel]] = {
    "matern12": lambda: Matern(0.5, 0.7, **DOUBLE),
    "matern32": lambda: Matern(1.5, [0.5, 1.0, 2.0], **DOUBLE),
    "matern52": lambda: Matern(2.5, 0.7, **DOUBLE),
    "matern_infinite": lambda: Matern(math.inf, 0.7, **DOUBLE),
    "rational_quadratic": lambda: RationalQuadratic([0.5, 1.0, 2.0], 0.8, **DOUBLE),
    "periodic": lambda: Periodic([1.1, 0.8, 1.5], 1.7, **DOUBLE),
    "cosine": lambda: ActiveDims(Cosine(2.1, **DOUBLE), [1]),
    "constant": lambda: Constant(2.5, **DOUBLE),
    "offset_linear": lambda: OffsetLinear(0.6, **DOUBLE),
    "spectral_mixture": lambda: SpectralMixture([1.5, 0.7], MEANS, SCALES, **DOUBLE),
    "grid_spectral_mixture": lambda: GridSpectralMixture(MEANS, SCALES, [0.5, 0.0], **DOUBLE),
    "product_state": lambda: ProductState(0.6, **DOUBLE),
    "active_dims": lambda: ActiveDims(Gaussian([0.5, 2.0], **DOUBLE), [2, 0]) * ActiveDims(Linear(), [1]),
    "sum": lambda: 0.5 * Matern(1.5, **DOUBLE) + ActiveDims(Cosine(2.0, **DOUBLE), [0]) * Constant(2.0, **DOUBLE),
}


class TestKernels(KernelTests):
    """What every kernel keeps."""

    @pytest.fixture(params=KERNELS)
    def kernel(self, request: pytest.FixtureRequest) -> Kernel:
        return KERNELS[request.param]()


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (Matern(0.5, [0.5, 1.0, 2.0], **DOUBLE), sk.Matern([0.5, 1.0, 2.0], nu=0.5)),
        (Matern(1.5, [0.5, 1.0, 2.0], **DOUBLE), sk.Matern([0.5, 1.0, 2.0], nu=1.5)),
        (Matern(2.5, 1.3, **DOUBLE), sk.Matern(1.3, nu=2.5)),
        (Matern(math.inf, 1.3, **DOUBLE), sk.RBF(1.3)),
        (RationalQuadratic(1.3, 0.7, **DOUBLE), sk.RationalQuadratic(1.3, 0.7)),
        (ActiveDims(Periodic(1.3, 1.7, **DOUBLE), [0]), sk.ExpSineSquared(1.3, 1.7)),
        (Constant(1.7, **DOUBLE), sk.ConstantKernel(1.7)),
        (WhiteNoise(0.3, **DOUBLE), sk.WhiteKernel(0.3)),
        (Linear() + Constant(1.7**2, **DOUBLE), sk.DotProduct(1.7)),
        (0.4 * Matern(1.5, **DOUBLE) * Linear(), sk.ConstantKernel(0.4) * sk.Matern(1.0, nu=1.5) * sk.DotProduct(0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scikit_learn_agrees(kernel: Kernel, reference: Any) -> None:
    for n, shift in ((30, 0.0), (400, 0.0), (30, 1000.0)):  # differences, expanded squares, far from zero
        X, Z = points(n, 3) + shift, points(20, 3, seed=1) + shift
        Z[:3] = X[:3]
        given = (X[:, :1], Z[:, :1]) if isinstance(reference, sk.ExpSineSquared) else (X, Z)
        for other in (None, given[1]):
            wanted = reference(given[0].numpy(), None if other is None else other.numpy())
            found = kernel(X, None if other is None else Z).detach().numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_special_cases_meet() -> None:
    X, Z = points(20, D), points(15, D, seed=1)
    gaussian = Gaussian(1.3, **DOUBLE)(X, Z).detach()
    torch.testing.assert_close(Matern(math.inf, 1.3, **DOUBLE)(X, Z).detach(), gaussian)
    torch.testing.assert_close(RationalQuadratic(1.3, 1e9, **DOUBLE)(X, Z).detach(), gaussian, rtol=1e-6, atol=1e-6)
    mixture = SpectralMixture([1.0], [[0.0] * D], [[1 / (2 * math.pi * 1.3)] * D], **DOUBLE)
    torch.testing.assert_close(mixture(X, Z).detach(), gaussian)
    grid = GridSpectralMixture([[0.0] * D], 1 / (2 * math.pi * 1.3), **DOUBLE)
    torch.testing.assert_close(grid(X, Z), gaussian)
    x, z = X[:, :1], Z[:, :1]
    spectral = SpectralMixture([1.0], [[1 / 2.1]], [[1e-12]], **DOUBLE)
    torch.testing.assert_close(spectral(x, z), Cosine(2.1, **DOUBLE)(x, z))


def test_second_derivatives_where_points_coincide() -> None:
    """What the covariance of a derivative is made of: -f''(0) of k = f(x - z)."""
    wanted = {"matern32": 3 / 4, "matern52": 5 / 12, "infinite": 1 / 4, "rq": 1 / 4, "cosine": (2 * math.pi / 2) ** 2}
    kernels = {
        "matern32": Matern(1.5, 2.0, **DOUBLE),
        "matern52": Matern(2.5, 2.0, **DOUBLE),
        "infinite": Matern(math.inf, 2.0, **DOUBLE),
        "rq": RationalQuadratic(2.0, **DOUBLE),
        "cosine": Cosine(2.0, **DOUBLE),
    }
    for name, kernel in kernels.items():
        x, z = torch.zeros(1, 1, **DOUBLE, requires_grad=True), torch.zeros(1, 1, **DOUBLE, requires_grad=True)
        (slope,) = torch.autograd.grad(kernel(x, z).sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), z)
        torch.testing.assert_close(curve.item(), wanted[name], msg=name)


def test_exponential_kernel_of_coinciding_points_among_many() -> None:
    """A root of rounded squares would be off by 1e-8 there."""
    X = points(300, D) * 5
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        found = Matern(0.5, **DOUBLE)(X.to(dtype), X.to(dtype).clone()).diagonal().detach()
        assert float((found - 1).abs().max()) <= tolerance


def test_white_noise_is_of_rows_not_of_places() -> None:
    X = points(5, D)
    kernel = Matern(1.5, **DOUBLE) + WhiteNoise(0.3, **DOUBLE)
    smooth = Matern(1.5, **DOUBLE)
    torch.testing.assert_close(kernel(X), smooth(X) + 0.3 * torch.eye(5, **DOUBLE))
    torch.testing.assert_close(kernel(X, X), smooth(X, X))
    torch.testing.assert_close(kernel.diag(X), smooth.diag(X) + 0.3)
    torch.testing.assert_close(chunked_gram(kernel, X, chunk_size=2), kernel(X))
    assert WhiteNoise(0.3)(X[:0]).shape == (0, 0)
    many = WhiteNoise([0.3, 0.5], **DOUBLE)(points(2, 4, D))
    torch.testing.assert_close(many, torch.eye(4, **DOUBLE) * torch.tensor([0.3, 0.5], **DOUBLE)[:, None, None])


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Matern(0.5, v, **DOUBLE),
        lambda v: Matern(2.5, v, **DOUBLE),
        lambda v: RationalQuadratic(v, v[:, 0], **DOUBLE),
        lambda v: Periodic(v, v[:, :1], **DOUBLE),
        lambda v: Cosine(v[:, 0], **DOUBLE),
        lambda v: Constant(v[:, 0], **DOUBLE),
        lambda v: WhiteNoise(v[:, 0], **DOUBLE),
        lambda v: OffsetLinear(v[:, 0], **DOUBLE),
        lambda v: ProductState(v[:, 0], **DOUBLE),
        lambda v: Scaled(ActiveDims(Matern(1.5, v[:, :2], **DOUBLE), [0, 2]), v[:, 1], **DOUBLE) * Linear(),
    ],
    ids=["matern12", "matern52", "rq", "periodic", "cosine", "constant", "white", "offset", "state", "composed"],
)
def test_a_batch_of_hyperparameters_is_many_kernels(make: Callable[[Tensor], Kernel]) -> None:
    values = 0.5 + torch.rand(4, D, generator=torch.Generator().manual_seed(0), **DOUBLE)
    X, Z = points(4, 6, D), points(4, 5, D, seed=1)
    many = make(values)
    for i in range(4):
        one = make(values[i : i + 1])
        torch.testing.assert_close(many(X, Z)[i], one(X[i : i + 1], Z[i : i + 1])[0])
        torch.testing.assert_close(many(X)[i], one(X[i : i + 1])[0])
        torch.testing.assert_close(many.diag(X)[i], one.diag(X[i : i + 1])[0])
    torch.testing.assert_close(many(X[0], Z[0]), many(X[:1].expand(4, -1, -1), Z[:1].expand(4, -1, -1)))


def test_components_of_a_grid_sum_up() -> None:
    X, Z = points(2, 7, 2), points(5, 2, seed=1)
    kernel = GridSpectralMixture(frequency_grid(6, 2, "sobol"), 0.1, torch.rand(6).double(), **DOUBLE)
    parts = kernel.components(X, Z)
    assert parts.shape == (6, 2, 7, 5)
    torch.testing.assert_close(torch.einsum("q,qbnm->bnm", kernel.weights, parts), kernel(X, Z))
    torch.testing.assert_close(kernel.components(X).diagonal(dim1=-2, dim2=-1), torch.ones(6, 2, 7, **DOUBLE))
    lowest = torch.linalg.eigvalsh(kernel.components(X))[..., 0]
    assert float(lowest.min()) > -1e-12


@pytest.mark.parametrize("kind", ["diagonal", "random", "sobol"])
def test_frequency_grids(kind: Any) -> None:
    grid = frequency_grid(50, 3, kind, low=0.1, high=0.4, seed=3)
    assert grid.shape == (50, 3)
    assert 0.1 <= float(grid.min()) < 0.11
    assert 0.39 < float(grid.max()) <= 0.4
    torch.testing.assert_close(grid, frequency_grid(50, 3, kind, low=0.1, high=0.4, seed=3))
    same = bool((grid[:, 0] == grid[:, 1]).all())
    assert same == (kind == "diagonal")


def test_alignment_is_one_for_the_target_and_blind_to_scale_and_constants() -> None:
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    Y = label_kernel(y)
    torch.testing.assert_close(alignment(Y, y), torch.tensor(1.0, **DOUBLE))
    X = points(7, D)
    K = Gaussian(1.0, **DOUBLE)(X).detach()
    torch.testing.assert_close(alignment(3 * K + 2, y), alignment(K, y))
    assert float(alignment(3 * K + 2, y, centred=False)) != float(alignment(K, y, centred=False))
    torch.testing.assert_close(alignment(torch.stack([K, Y]), y)[1], alignment(Y, y))
    with pytest.raises(ValueError, match="both are"):
        alignment(K[:, :4], y)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("matern12", Matern(0.5, 2.0, **DOUBLE)),
        ("matern32", Matern(1.5, 2.0, **DOUBLE)),
        ("matern52", Matern(2.5, 2.0, **DOUBLE)),
        ("rational_quadratic", RationalQuadratic(2.0, 1.0, **DOUBLE)),
        ("product_state", ProductState(0.5, **DOUBLE)),
    ],
)
def test_kernels_by_name_and_width(name: str, wanted: Kernel) -> None:
    kernel, X = create_kernel(name, 0.5, **DOUBLE), points(5, D)
    assert isinstance(kernel, type(wanted))
    assert not list(kernel.parameters())
    torch.testing.assert_close(kernel(X), wanted(X).detach())
    torch.testing.assert_close(create_kernel(name, **DOUBLE)(X), create_kernel(name, 1.0, **DOUBLE)(X))


def test_a_batch_of_scales_has_features() -> None:
    X = points(4, D)
    kernel = Scaled(Linear(), torch.tensor([0.5, 2.0]), **DOUBLE)
    phi = kernel.features(X)
    torch.testing.assert_close(phi @ phi.mT, kernel(X))


# ---- in learners -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_streams_and_landmarks_take_every_kernel(name: str) -> None:
    kernel, X = KERNELS[name]().requires_grad_(False), points(6, D)
    dictionary = StreamingDictionary(kernel, ridge=0.1, budget=60)
    for x in X:
        dictionary.step(x)
    assert dictionary.features()(X).shape == (6, len(dictionary))
    phi = NystromFeatures(kernel, X, torch.ones(6, **DOUBLE), ridge=1e-9)(X).detach()
    wanted = kernel(X).detach()
    torch.testing.assert_close(phi @ phi.mT, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))


# ---- wrong input -------------------------------------------------------------------------------------------


def test_wrong_settings_are_told() -> None:
    X = points(4, D)
    for make, message in (
        (lambda: Matern(2.0), r"nu=2\.0 must be 0\.5, 1\.5, 2\.5 or infinity"),
        (lambda: Matern(1.5, -1.0), "lengthscale must be positive"),
        (lambda: RationalQuadratic(1.0, 0.0), "alpha must be positive"),
        (lambda: Periodic(1.0, math.nan), "period must be positive"),
        (lambda: Constant(-1.0), "variance must be positive"),
        (lambda: OffsetLinear(math.inf), "offset=inf must be finite"),
        (lambda: ActiveDims(Linear(), []), "one or more different whole numbers"),
        (lambda: ActiveDims(Linear(), [0, 0]), "one or more different whole numbers"),
        (lambda: ActiveDims(Linear(), [-1]), "one or more different whole numbers"),
        (lambda: ActiveDims(Linear(), [3])(X), "there is no column 3"),
        (lambda: Matern(1.5, [1.0, 2.0])(X), "3 dimensions, the lengthscale has 2"),
        (lambda: Periodic(1.0, [1.0, 2.0])(X), "3 dimensions, the period has 2"),
        (lambda: SpectralMixture([1.0, 2.0], MEANS, SCALES[:1]), r"must be \(Q,\), \(Q, D\) and \(Q, D\)"),
        (lambda: SpectralMixture([1.0], [0.1], [0.1]), r"means must be finite numbers \(Q, D\)"),
        (lambda: GridSpectralMixture(MEANS, SCALES, [1.0, -1.0]), "weights must be finite and at least 0"),
        (lambda: GridSpectralMixture(MEANS, SCALES)(X[:, :2]), "2 dimensions, the frequencies 3"),
        (lambda: frequency_grid(0), "must be at least 1"),
        (lambda: frequency_grid(4, kind="spiral"), "must be one of diagonal, random, sobol"),  # type: ignore[arg-type]
        (lambda: ProductState().features(points(2, 13)), r"3\^13 features"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_grid_is_state_and_a_mixture_is_parameters() -> None:
    kernel = GridSpectralMixture(MEANS, SCALES, [0.5, 0.2], **DOUBLE)
    other = GridSpectralMixture(MEANS, 0.3, 0.0, **DOUBLE)
    other.load_state_dict(copy.deepcopy(kernel.state_dict()))
    X = points(4, D)
    torch.testing.assert_close(other(X), kernel(X))
    assert not list(kernel.parameters())
    assert {name for name, _ in SpectralMixture([1.0], MEANS[:1], SCALES[:1]).named_parameters()} == {
        "raw_weights",
        "raw_scales",
        "means",
    }
