"""Random features: unbiased, as noisy as the formulas say, repeatable, and honest about where they fail."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo.kernels import FeatureKernel, Gaussian
from zoo.kernels.random_features import (
    ACTIVATIONS,
    MAPS,
    ExpFeatures,
    FeatureMap,
    FourierFeatures,
    OscillatoryFeatures,
    PolynomialFeatures,
    Projection,
    ReLUFeatures,
    arc_cosine,
    clipped_linear,
    draw_projection,
    find_activation,
    fourier_features,
    fourier_series,
    hadamard,
)
from zoo.kernels.random_features.projections import generator_of

D, DRAWS = 7, 2000


def points() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(0.2 * torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, D), (4, D), (4,)))  # type: ignore[return-value]


CASES: dict[str, tuple[type[FeatureMap], dict[str, object]]] = {
    **{f"relu-{p}": (ReLUFeatures, {"projection": p}) for p in ("iid", "orthogonal", "hadamard")},
    "relu-antithetic": (ReLUFeatures, {"antithetic": True}),
    "relu-centered": (ReLUFeatures, {"centered": True}),
    "relu-clipped": (ReLUFeatures, {"constant": -0.5}),
    "step": (ReLUFeatures, {"order": 0, "projection": "iid"}),
    "square": (ReLUFeatures, {"order": 2}),
    **{
        name: (OscillatoryFeatures, {"activation": name, "projection": "iid"})
        for name in ("cos", "sin", "gaussian", "tanh", "sigmoid", "softplus", "erf", "gelu", "silu")
    },
    "cos-M": (OscillatoryFeatures, {"activation": "cos", "projection": "iid", "M": 0.05}),
    "cos-antithetic": (OscillatoryFeatures, {"activation": "cos", "antithetic": True}),
    "exp": (ExpFeatures, {"projection": "iid"}),
    "exp-M": (ExpFeatures, {"projection": "iid", "M": 0.03}),
    "polynomial": (PolynomialFeatures, {"activation": "tanh", "degree": 3}),
    "fourier": (FourierFeatures, {"projection": "iid", "lengthscale": 0.7}),
}


@pytest.mark.parametrize("name", CASES)
def test_mean_and_variance_over_draws(name: str) -> None:
    """The mean of 2,000 draws lies within four standard errors of the closed form, the variance within a tenth."""
    kind, options = CASES[name]
    x, w, b = points()
    first = kind(D, 12, dtype=torch.float64, **options)  # type: ignore[arg-type]
    bias = b if first.bias else None
    wanted = first.expectation(x, w, bias)
    total, square = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for seed in range(DRAWS):
        features = kind(D, 12, dtype=torch.float64, seed=seed + 10, **options)  # type: ignore[arg-type]
        error = features(x) @ features.encode(w, bias).mT - wanted
        total += error
        square += error.square()
    variance = square / DRAWS
    assert ((total / DRAWS).abs() <= 4 * (variance / DRAWS).sqrt()).all()
    independent = options.get("projection") == "iid" or kind is PolynomialFeatures
    if independent:
        formula = first.variance(x, w, bias)
        assert abs(float((variance / formula).median()) - 1) < 0.1  # one of twelve pairs may have long tails


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.identity])
def test_fourier_representation_is_the_function(name: str) -> None:
    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    known = ACTIVATIONS[name]
    torch.testing.assert_close(known.by_frequencies(z), known.function(z), rtol=0, atol=1e-12)


def test_power_series_are_the_functions() -> None:
    z = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
    for name, known in ACTIVATIONS.items():
        if known.series:
            value = sum(c * z**k for k, c in enumerate(known.series))
            torch.testing.assert_close(value, known.function(z), rtol=0, atol=2e-8, msg=name)


@pytest.mark.parametrize(("name", "error"), [("gelu", 7e-3), ("tanh", 2.1e-2), ("silu", 1e-3), ("sigmoid", 1e-3)])
def test_fourier_series_error(name: str, error: float) -> None:
    series = fourier_series(name, 3.2, 3)
    z = torch.linspace(-3.2, 3.2, 999, dtype=torch.float64)
    assert (series(z) - ACTIVATIONS[name].function(z)).abs().max() <= 1.001 * series.error + 1e-5
    assert series.error < error


def test_clipped_kernel_has_the_right_ends() -> None:
    x, w, _ = points()
    torch.testing.assert_close(clipped_linear(x[:, None], w[None], 0.0), arc_cosine(x[:, None], w[None]))
    torch.testing.assert_close(clipped_linear(x[:, None], w[None], -30.0), x @ w.mT)


# ---- projections -------------------------------------------------------------------------------------------


def test_orthogonal_blocks() -> None:
    G = draw_projection(10, 4, generator=torch.Generator().manual_seed(0))
    for block in G.split(4):
        gram = block @ block.mT
        assert (gram - gram.diag().diag()).abs().max() < 1e-12


@pytest.mark.parametrize("d", [2, 4, 16])
def test_orthogonal_rows_have_no_preferred_sign(d: int) -> None:
    """LAPACK's QR alone gives E relu(g_1)^2 = 0.26 for d = 2."""
    draws = [draw_projection(d, d, generator=torch.Generator().manual_seed(s)) for s in range(1500)]
    values = torch.stack(draws)[..., 0].relu().square().mean(1)
    assert abs(float(values.mean()) - 0.5) < 4 * float(values.std()) / math.sqrt(1500)


def test_hadamard_product_is_the_dense_matrix() -> None:
    H = hadamard(16, torch.float64)
    assert torch.equal(H @ H.mT, 16 * torch.eye(16, dtype=torch.float64))
    for d, m in ((1, 3), (5, 20), (16, 16), (37, 70)):
        G = Projection(m, d, "hadamard", seed=3, dtype=torch.float64)
        x = torch.randn(2, 3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        dense = draw_projection(m, d, "hadamard", generator=generator_of(3))
        torch.testing.assert_close(G(x), x @ dense.mT)
        torch.testing.assert_close(G.dense(), dense)


def test_every_draw_is_its_own() -> None:
    state = torch.get_rng_state()
    one, two = (ReLUFeatures(5, 8, seed=7) for _ in range(2))
    other = ReLUFeatures(5, 8, seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.projection.matrix, two.projection.matrix)
    assert not torch.equal(one.projection.matrix, other.projection.matrix)


def test_projections_survive_a_new_process(tmp_path) -> None:
    """Saved with the weights, or drawn again from the seed: the same outputs, to the bit."""
    x = torch.linspace(-1, 1, 12).view(2, 6)
    calls = []
    for i, kind in enumerate(("iid", "orthogonal", "hadamard")):
        for persistent in (True, False):
            features = ReLUFeatures(6, 16, projection=kind, seed=3, persistent=persistent)  # type: ignore[arg-type]
            path = tmp_path / f"{i}{persistent}"
            save_file(features.state_dict(), path)
            save_file({"x": x, "y": features(x)}, f"{path}.io")
            seed = 4 if persistent else 3  # what is saved wins over the seed
            calls.append(f"check({str(path)!r}, projection={kind!r}, persistent={persistent}, seed={seed})")
    code = """
import torch
from safetensors.torch import load_file
from zoo.kernels.random_features import ReLUFeatures
def check(path, **options):
    features = ReLUFeatures(6, 16, **options)
    features.load_state_dict(load_file(path))
    io = load_file(path + ".io")
    assert torch.equal(features(io["x"]), io["y"]), path
"""
    subprocess.run([sys.executable, "-c", code + "\n".join(calls)], check=True, timeout=120)


def test_wrong_seed_is_noticed(tmp_path) -> None:
    save_file(ReLUFeatures(6, 16, seed=3, persistent=False).state_dict(), tmp_path / "weights")
    with pytest.raises(RuntimeError, match="another random projection than seed=4"):
        ReLUFeatures(6, 16, seed=4, persistent=False).load_state_dict(load_file(tmp_path / "weights"))


# ---- as modules --------------------------------------------------------------------------------------------


def small_maps() -> list[FeatureMap]:
    return [
        ReLUFeatures(D, 12, antithetic=True),
        ReLUFeatures(D, 12, projection="hadamard"),
        OscillatoryFeatures(D, 12, "gelu"),
        ExpFeatures(D, 12, M=0.02),
        PolynomialFeatures(D, 12, "tanh", degree=3),
        FourierFeatures(D, 12),
    ]


@pytest.mark.parametrize("features", small_maps(), ids=lambda f: f"{type(f).__name__}-{f.projection.kind}")
def test_any_leading_dimensions_and_types(features: FeatureMap) -> None:
    x = 0.3 * torch.randn(2, 3, 4, D, generator=torch.Generator().manual_seed(0))
    full = features(x)
    assert full.shape == (2, 3, 4, features.out_features)
    torch.testing.assert_close(features(x[0, 0, 0]), full[0, 0, 0])
    assert features(x[:0]).shape == (0, 3, 4, features.out_features)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-4)):
        low = copy.deepcopy(features).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert float((low.double() - full).abs().max() / full.abs().max()) < tolerance
    with torch.autocast("cpu", torch.bfloat16):
        mixed = features(x)
    assert float((mixed.float() - full).abs().max() / full.abs().max()) < 0.1
    compiled = torch.compile(features, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), full)


@pytest.mark.parametrize("features", small_maps()[2:], ids=lambda f: type(f).__name__)
def test_gradients_are_right(features: FeatureMap) -> None:
    x = (0.3 * torch.randn(2, D, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
    assert torch.autograd.gradcheck(features.double(), (x,))


def test_gaussian_kernel_of_the_zoo() -> None:
    """Other families take the features as they are."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = FourierFeatures(4, 20_000, lengthscale=2.0, dtype=torch.float64)
    exact = Gaussian(2.0)(x)
    assert (FeatureKernel(features)(x) - exact).abs().max() < 0.03
    omega = draw_projection(20_000, 4, generator=torch.Generator().manual_seed(0)) / 2
    assert (fourier_features(x, omega) @ fourier_features(x, omega).mT - exact).abs().max() < 0.03


def test_antithetic_pairs_cut_the_error() -> None:
    """Measured elsewhere as a factor of about two for m >= 4 d."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.nn.functional.normalize(torch.randn(30, 32, generator=generator).double()) for _ in range(2))
    errors = []
    for antithetic in (False, True):
        total = 0.0
        for seed in range(6):
            f = ReLUFeatures(32, 128, bias=False, antithetic=antithetic, seed=seed, dtype=torch.float64)
            total += float((f(x) @ f.encode(w).mT - f.expectation(x, w)).square().mean())
        errors.append(math.sqrt(total))
    assert errors[1] < errors[0] / 1.6


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReLUFeatures(5, 0), "num_features=0"),
        (lambda: ReLUFeatures(5, 4, projection="orthogonl"), "orthogonal"),
        (lambda: ReLUFeatures(5, 4, projection="signs"), "does not suit"),
        (lambda: ReLUFeatures(5, 4, order=3), "order=3"),
        (lambda: ReLUFeatures(5, 4, constant=-1.0, centered=True), "one of them"),
        (lambda: ReLUFeatures(5, 4, normalize=0.0), "normalize"),
        (lambda: ReLUFeatures(5, 4)(torch.zeros(2, 6)), "6 features, the map takes 5"),
        (lambda: ReLUFeatures(5, 4).encode(torch.zeros(2, 6)), "do not fit"),
        (lambda: ReLUFeatures(5, 4, bias=False).encode(torch.zeros(2, 5), torch.zeros(2)), "bias=False"),
        (lambda: OscillatoryFeatures(5, 16, "relu"), "not analytic"),
        (lambda: OscillatoryFeatures(5, 16, "gellu"), "gelu"),
        (lambda: OscillatoryFeatures(5, 16, "exp"), "ExpFeatures"),
        (lambda: OscillatoryFeatures(5, 2, "gelu"), "less than the"),
        (lambda: OscillatoryFeatures(5, 16, "cos", M=-0.2), "-1/8"),
        (lambda: ExpFeatures(5, 16, M=-0.5), "-1/8"),
        (lambda: PolynomialFeatures(5, 16, "relu"), "no power series"),
        (lambda: FourierFeatures(5, 16, lengthscale=0.0), "lengthscale"),
        (lambda: hadamard(6), "power of two"),
        (lambda: find_activation("tan"), "tanh"),
    ],
)
def test_bad_input_is_told(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_unnormalised_states_are_warned_about() -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="noise"):
        OscillatoryFeatures(64, 128, "cos", input_norm=8.0, weight_norm=8.0).encode(w)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OscillatoryFeatures(64, 128, "cos", normalize=1.0).encode(w)
    with pytest.warns(RuntimeWarning, match="does not converge"):
        PolynomialFeatures(64, 128, "tanh").encode(w)


def test_maps_by_name() -> None:
    assert all(issubclass(kind, FeatureMap) for kind in MAPS.values())
