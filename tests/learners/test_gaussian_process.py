"""Gaussian processes: derivatives, oracles, fits, every kernel, wrong input."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk
from torch import Tensor

from tests.kernels.test_gaussian_process_kernels import KERNELS
from zoo.kernels.active_dims import ActiveDims
from zoo.kernels.compose import Scaled
from zoo.kernels.constant import Constant
from zoo.kernels.dot_product import Linear, Polynomial
from zoo.kernels.hyperparameters import hyperparameters
from zoo.kernels.linalg import NotPositiveDefiniteError
from zoo.kernels.matern import Matern
from zoo.kernels.periodic import Periodic
from zoo.kernels.stationary import Gaussian
from zoo.kernels.white_noise import WhiteNoise
from zoo.learners.gaussian_process import GaussianProcess, gaussian_evidence, leave_one_out, maximise
from zoo.learners.kernel_ridge import KernelRidgeHead
from zoo.learners.laplace import LaplaceProcess, expected_sigmoid
from zoo.learners.means import BoxMean, ConstantMean, LinearMean, TrapezoidMean
from zoo.learners.sparse_gp import SparseGaussianProcess

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **DOUBLE)


def rows(n: int = 40, d: int = 2, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    X = points(n, d)
    return X, torch.sin(2 * X[:, 0]) + 0.3 * X[:, -1] + noise * points(n, seed=1)


def smooth(variance: float = 1.0, *lengthscale: float) -> Scaled:
    return Scaled(Matern(2.5, list(lengthscale) or 1.0, **DOUBLE), variance, **DOUBLE)


# ---- evidence ----------------------------------------------------------------------------------------------


def test_evidence_has_all_derivatives() -> None:
    A, r = points(3, 5, 5).requires_grad_(), points(5, seed=1).requires_grad_()

    def evidence(A: Tensor, r: Tensor) -> Tensor:
        return gaussian_evidence(A @ A.mT + torch.eye(5, **DOUBLE), r).value

    assert evidence(A, r).shape == (3,)
    assert torch.autograd.gradcheck(evidence, (A, r))
    assert torch.autograd.gradgradcheck(evidence, (A, r))
    one = A[0].detach()
    hessian = torch.func.hessian(lambda r: evidence(one, r))(r.detach())
    torch.testing.assert_close(hessian, -torch.linalg.inv(one @ one.mT + torch.eye(5, **DOUBLE)))
    density = torch.distributions.MultivariateNormal(torch.zeros(5, **DOUBLE), one @ one.mT + torch.eye(5, **DOUBLE))
    torch.testing.assert_close(evidence(one, r), density.log_prob(r))


def test_scikit_learn_has_the_same_evidence_gradient_and_prediction() -> None:
    X, y = rows()
    X_test = points(7, 2, seed=3)
    oracle = GaussianProcessRegressor(
        sk.ConstantKernel(1.4) * sk.Matern([0.7, 1.2], nu=2.5) + sk.WhiteKernel(0.05), optimizer=None, alpha=0.0
    ).fit(X.numpy(), y.numpy())
    wanted, slopes = oracle.log_marginal_likelihood(oracle.kernel_.theta, eval_gradient=True)
    process = GaussianProcess(smooth(1.4, 0.7, 1.2), noise=0.05)
    found = process.evidence(X, y).value
    np.testing.assert_allclose(float(found.detach()), wanted, rtol=1e-9)
    places = hyperparameters(process)
    values = [places[name].value for name in ("kernel.scale", "kernel.kernel.lengthscale", "noise")]
    raws = [places[name].raw for name in ("kernel.scale", "kernel.kernel.lengthscale", "noise")]
    grads = torch.autograd.grad(found, raws)
    stretch = [torch.autograd.grad(value.sum(), raw)[0] for value, raw in zip(values, raws, strict=True)]
    logs = [(g / s * v).reshape(-1) for g, s, v in zip(grads, stretch, values, strict=True)]
    np.testing.assert_allclose(torch.cat(logs).detach().numpy(), slopes, rtol=1e-8)
    posterior = process.condition(X, y)
    mean, std = oracle.predict(X_test.numpy(), return_std=True)
    np.testing.assert_allclose(posterior.mean(X_test).numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(posterior.variance(X_test, observed=True).sqrt().numpy(), std, rtol=1e-9)


def test_leaving_one_out_is_fitting_without_it() -> None:
    X, y = rows(12)
    sigma = 0.1 + torch.rand(12, generator=torch.Generator().manual_seed(0), **DOUBLE)
    process = GaussianProcess(smooth(), ConstantMean(0.3), noise=0.2)
    found = process.leave_one_out(X, y, sigma)
    for i in range(12):
        rest = torch.arange(12) != i
        posterior = process.condition(X[rest], y[rest], sigma[rest])
        variance = posterior.variance(X[i : i + 1], observed=True) + sigma[i].square()
        torch.testing.assert_close(found.mean[i : i + 1].detach(), posterior.mean(X[i : i + 1]))
        torch.testing.assert_close(found.variance[i : i + 1].detach(), variance)
        density = torch.distributions.Normal(found.mean[i].detach(), variance.sqrt()).log_prob(y[i])
        torch.testing.assert_close(found.log_density[i : i + 1].detach(), density)


@pytest.mark.parametrize("name", [*KERNELS, "polynomial", "gaussian"])
def test_every_kernel_in_every_process(name: str) -> None:
    make = {**KERNELS, "polynomial": lambda: Polynomial(2, 0.5, **DOUBLE), "gaussian": lambda: Gaussian(**DOUBLE)}
    X, y = rows(10, 3)
    labels = (y > 0).double()
    processes = [GaussianProcess(make[name](), noise=0.1), SparseGaussianProcess(make[name](), X[:3], noise=0.1)]
    for process in processes:
        process.evidence(X, y).value.backward()
        posterior = process.condition(X, y)
        assert posterior.variance(X).shape == posterior.mean(X).shape == (10,)
        assert bool(posterior.sample(X, 2, torch.Generator().manual_seed(0)).isfinite().all())
    classes = LaplaceProcess(make[name]())
    value = classes.evidence(X, labels)
    assert bool(value.isfinite())
    chances = classes.condition(X, labels).probability(X)
    assert bool(((chances > 0) & (chances < 1)).all())
    for process in (*processes, classes):
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in process.parameters())


@pytest.mark.parametrize("name", ["matern12", "matern32", "matern52", "rational_quadratic", "product_state"])
def test_named_kernels_are_heads(name: str) -> None:
    X = points(12, 4).requires_grad_()
    head = KernelRidgeHead(name, width=0.8)
    logits = head(X, torch.arange(12) % 3, points(5, 4, seed=1))
    assert logits.shape == (5, 3)
    logits.sum().backward()
    assert X.grad is not None
    assert bool(X.grad.isfinite().all())


# ---- fits --------------------------------------------------------------------------------------------------


def test_a_fit_finds_what_the_rows_were_drawn_from() -> None:
    X = 4 * torch.rand(150, 1, generator=torch.Generator().manual_seed(0), **DOUBLE)
    truth = GaussianProcess(smooth(2.0, 0.6), noise=0.04)
    lower = torch.linalg.cholesky(truth.covariance(X).detach())
    y = lower @ points(150, seed=2)
    process = GaussianProcess(smooth(1.0, 2.0), noise=1.0)
    report = process.fit(X, y, restarts=1, max_iter=60)
    assert report.value >= float(truth.evidence(X, y).value.detach())
    assert report.value == max(report.values)
    assert report.converged
    assert float(process.noise) == pytest.approx(0.04, rel=0.35)
    assert float(process.kernel.kernel.lengthscale) == pytest.approx(0.6, rel=0.4)
    again = GaussianProcess(smooth(1.0, 2.0), noise=1.0)
    assert again.fit(X, y, restarts=1, max_iter=60) == report
    left = GaussianProcess(smooth(1.0, 2.0), noise=1.0)
    before = float(left.leave_one_out(X, y).log_density.sum())
    assert left.fit(X, y, objective="leave_one_out", restarts=0, max_iter=30).value > before


def test_a_prior_pulls_and_a_fixed_number_stays() -> None:
    X, y = rows(30)
    prior = {"kernel.kernel.lengthscale": torch.distributions.LogNormal(math.log(5.0), 0.01)}
    process = GaussianProcess(smooth(1.0, 1.0), noise=0.1, priors=prior)
    process.kernel.raw_scale.requires_grad_(False)
    process.fit(X, y, restarts=0, max_iter=50)
    assert float(process.kernel.kernel.lengthscale) == pytest.approx(5.0, rel=0.1)
    assert float(process.kernel.scale) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"priors of \['length'\]; there are"):
        GaussianProcess(smooth(), priors={"length": prior["kernel.kernel.lengthscale"]})


def test_a_transit_is_found_below_correlated_noise() -> None:
    t = torch.linspace(0, 10, 80, **DOUBLE)[:, None]
    truth = TrapezoidMean(1.0, 0.4, 5.2, 3.0, 0.5)
    y = (truth(t) + 0.05 * torch.sin(1.3 * t[:, 0]) + 0.02 * points(80)).detach()
    mean = TrapezoidMean(0.9, 0.2, 5.0, 2.5, 0.8)
    process = GaussianProcess(smooth(0.01, 1.0), mean, noise=None)
    process.fit(t, y, torch.full((80,), 0.02, **DOUBLE), restarts=0, max_iter=40)
    assert float(mean.depth) == pytest.approx(0.4, abs=0.06)
    assert float(mean.centre) == pytest.approx(5.2, abs=0.05)
    assert not [name for name in hyperparameters(process) if "noise" in name]


def test_samples_have_the_moments_of_the_posterior() -> None:
    X, y = rows(15)
    posterior = GaussianProcess(smooth(), noise=0.1).condition(X, y)
    X_test = points(3, 2, seed=5)
    drawn = posterior.sample(X_test, 20000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), posterior.mean(X_test), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.T.cov(), posterior.covariance(X_test), rtol=0, atol=0.03)
    torch.testing.assert_close(posterior.covariance(X_test).diagonal(), posterior.variance(X_test))
    assert bool((posterior.variance(X_test, observed=True) > posterior.variance(X_test)).all())


def test_a_process_is_state_and_a_posterior_pickles() -> None:
    X, y = rows(10)
    process = GaussianProcess(smooth(1.3, 0.4, 0.8), ConstantMean(0.2), noise=0.3)
    other = GaussianProcess(smooth(1.0, 1.0, 1.0), ConstantMean(), noise=0.1)
    other.load_state_dict(process.state_dict())
    assert float(other.evidence(X, y).value) == float(process.evidence(X, y).value)
    posterior = process.condition(X, y)
    again = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(again.mean(X), posterior.mean(X), rtol=0, atol=0)


def test_hyperparameters_are_read_and_set_by_path() -> None:
    process = GaussianProcess(2.0 * Periodic(1.5, 0.7, **DOUBLE) + ActiveDims(Linear(), [0]), LinearMean([0.1, 0.2]))
    places = hyperparameters(process)
    paths = {"kernel.kernels.0.scale", "kernel.kernels.0.kernel.lengthscale", "kernel.kernels.0.kernel.period"}
    assert set(places) == {*paths, "mean.weight", "mean.constant", "noise"}
    assert float(places["kernel.kernels.0.kernel.period"].value) == pytest.approx(0.7)
    places["kernel.kernels.0.kernel.period"].set(0.9)
    places["mean.weight"].set([1.0, -2.0])
    assert float(process.kernel.kernels[0].kernel.period) == pytest.approx(0.9)
    assert process.mean.weight.tolist() == [1.0, -2.0]
    with pytest.raises(ValueError, match="must be positive"):
        places["noise"].set(-1.0)
    with pytest.raises(ValueError, match="constant must be finite"):
        places["mean.constant"].set(math.nan)


# ---- sparse and classes ------------------------------------------------------------------------------------


def test_inducing_points_bound_the_evidence_and_a_fit_raises_it() -> None:
    X, y = rows(60)
    exact = float(GaussianProcess(smooth(), noise=0.1).evidence(X, y).value)
    process = SparseGaussianProcess(smooth(), X[:6], noise=0.1)
    before = float(process.evidence(X, y).value)
    assert before < exact
    report = process.fit(X, y, max_iter=30)
    assert report.value > before
    assert not torch.equal(process.inducing, X[:6])
    fixed = SparseGaussianProcess(smooth(), X, noise=0.1, learn_inducing=False)
    assert float(fixed.evidence(X, y).value) == pytest.approx(exact, rel=1e-9)
    full = GaussianProcess(smooth(), noise=0.1).condition(X, y)
    torch.testing.assert_close(fixed.condition(X, y).mean(X[:5]), full.mean(X[:5]))
    torch.testing.assert_close(fixed.condition(X, y).covariance(X[:5]), full.covariance(X[:5]))


def test_classes_by_laplace_as_scikit_learn() -> None:
    X, y = rows(40)
    labels = (y > 0.2).double()
    kernel = sk.ConstantKernel(2.0) * sk.RBF([0.8, 1.5])
    oracle = GaussianProcessClassifier(kernel, optimizer=None, max_iter_predict=500).fit(X.numpy(), labels.numpy())
    process = LaplaceProcess(Scaled(Gaussian([0.8, 1.5], **DOUBLE), 2.0, **DOUBLE))
    assert float(process.evidence(X, labels)) == pytest.approx(oracle.log_marginal_likelihood_value_, rel=1e-8)
    found = process.condition(X, labels).probability(X).numpy()
    np.testing.assert_allclose(found, oracle.predict_proba(X.numpy())[:, 1], atol=1e-4)  # its integral is a fit
    before = float(process.evidence(X, labels))
    assert process.fit(X, labels, max_iter=20).value > before


@pytest.mark.parametrize(("mean", "variance"), [(0.3, 0.0), (1.2, 0.5), (-2.0, 4.0), (3.0, 100.0), (40.0, 1e-4)])
def test_mean_of_a_sigmoid(mean: float, variance: float) -> None:
    s = math.sqrt(variance)
    wanted = 1 / (1 + math.exp(-mean))
    if s:
        wanted, _ = quad(
            lambda t: math.exp(-t * t / 2) / math.sqrt(2 * math.pi) / (1 + math.exp(-(mean + s * t))),
            -12,
            12,
            epsabs=1e-13,
            epsrel=1e-13,
            limit=500,
        )
    found = expected_sigmoid(torch.tensor(mean, **DOUBLE), torch.tensor(variance, **DOUBLE))
    assert float(found) == pytest.approx(wanted, abs=1e-12)


# ---- awkward input -----------------------------------------------------------------------------------------


def test_duplicates_one_row_and_constant_targets() -> None:
    X, y = rows(10)
    process = GaussianProcess(smooth(), noise=None)
    twice = process.condition(torch.cat([X, X]), torch.cat([y, y]))
    torch.testing.assert_close(twice.mean(X), y, rtol=0, atol=1e-3)
    with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
        GaussianProcess(Scaled(_Indefinite(), 1.0), noise=None).condition(X, y)
    one = GaussianProcess(smooth(), noise=0.1)
    one.fit(X[:1], y[:1], max_iter=20)
    assert bool(one.condition(X[:1], y[:1]).variance(X).isfinite().all())
    flat = GaussianProcess(smooth(), noise=0.1)
    flat.fit(X, torch.zeros(10), max_iter=50)
    assert float(flat.condition(X, torch.zeros(10)).mean(X).abs().max()) == 0


class _Indefinite(Linear):
    def _gram(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return -super()._gram(X, Z)


def test_wrong_input_is_told() -> None:
    X, y = rows(6)
    process = GaussianProcess(smooth(), noise=0.1)
    nan = torch.full((6,), math.nan)
    for make, message in (
        (lambda: process.evidence(X, y[:5]), r"X must be \(n, D\)"),
        (lambda: process.evidence(X[:0], y[:0]), "n of at least 1"),
        (lambda: process.evidence(X, nan), "y has entries that are not finite"),
        (lambda: process.evidence(X * math.inf, y), "X has entries that are not finite"),
        (lambda: process.evidence(X, y, -torch.ones(6)), "must be finite and not negative"),
        (lambda: process.evidence(X, y, torch.ones(5)), r"sigma must be one number or \(n,\)"),
        (lambda: process.fit(X, y, objective="sum"), "objective='sum' must be"),  # type: ignore[arg-type]
        (lambda: process.fit(X, y, restarts=-1), "restarts=-1"),
        (lambda: GaussianProcess(smooth(), noise=-1.0), "noise must be positive"),
        (lambda: SparseGaussianProcess(WhiteNoise(), X), "WhiteNoise"),
        (lambda: SparseGaussianProcess(smooth(), X[0]), "inducing points must be finite"),
        (lambda: SparseGaussianProcess(smooth(), X, method="dtc"), "must be one of sgpr, fitc"),  # type: ignore[arg-type]
        (lambda: LaplaceProcess(smooth()).evidence(X, y), "labels must be 0 and 1"),
        (lambda: BoxMean()(X), "a function of time"),
        (lambda: BoxMean(duration=0.0), "duration=0.0 must be positive"),
        (lambda: LinearMean([1.0])(X), "2 dimensions, the weight 1"),
        (lambda: ConstantMean(math.inf), "constant=inf must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_nothing_to_learn_is_said_and_no_factor_is_raised() -> None:
    X, y = rows(6)
    process = GaussianProcess(Linear(), noise=0.1).requires_grad_(False)
    report = process.fit(X, y)
    assert report.converged
    assert "no hyper-parameters" in report.message
    bad = GaussianProcess(Scaled(_Indefinite(), 1.0) + Constant(1e-9), noise=None)
    before = copy.deepcopy(bad.state_dict())
    with pytest.raises(NotPositiveDefiniteError):
        bad.fit(X, y, restarts=1, max_iter=5)
    assert all(torch.equal(value, before[name]) for name, value in bad.state_dict().items())
    with pytest.raises(ValueError, match="bounds"):
        maximise(process, lambda: torch.zeros(()), bounds=(1.0, 0.5))
    found = leave_one_out(torch.eye(3, **DOUBLE), torch.ones(3, **DOUBLE))
    torch.testing.assert_close(found.mean, torch.zeros(3, **DOUBLE))
