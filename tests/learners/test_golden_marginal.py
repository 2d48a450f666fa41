"""Evidences of Gaussian processes and marginalised predictions against grids, integrals and nested sampling.

Every `gpmarginal*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is
read; each of its cases is one test. What is checked follows from its fields; one without any known field fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.kernels.compose import Scaled
from zoo.kernels.dot_product import Linear
from zoo.kernels.kernel import Kernel
from zoo.kernels.matern import Matern
from zoo.kernels.offset_linear import OffsetLinear
from zoo.kernels.rational_quadratic import RationalQuadratic
from zoo.learners.bayesian_linear import bayesian_linear
from zoo.learners.gaussian_process import GaussianProcess
from zoo.learners.marginal_gp import Candidate, Grid, Marginal, Uniform, marginalise, tension
from zoo.learners.means import ConstantMean, LinearMean

FILES = files("gpmarginal")
D64: dict[str, Any] = {"dtype": torch.float64}
KERNELS: dict[str, Callable[[Tensor], Kernel]] = {
    "squared_exponential": lambda length: Matern(math.inf, length[:, None], **D64),
    "matern3": lambda length: Matern(1.5, length[:, None], **D64),
    "matern5": lambda length: Matern(2.5, length[:, None], **D64),
    "exponential": lambda length: Matern(0.5, length[:, None], **D64),
    "rational_quadratic_alpha1": lambda length: RationalQuadratic(length[:, None], 1.0, **D64),
    "offset_linear": lambda length: OffsetLinear(length, **D64),
}
FINE = {"amplitude": 48, "length": 80}  # integrates to eight digits
RULE = "equally spaced points including both ends"


CASES = [(path.name, case) for path in FILES for case in read(path)["cases"]]


@pytest.mark.parametrize(("file", "case"), CASES, ids=[f"golden-{file}-{case['name']}" for file, case in CASES])
def test_golden_case(file: str, case: Record) -> None:
    check = next((check for field, check in CHECKS.items() if field in case), None)
    if check is None:
        pytest.fail(f"{file}, {case['name']}: no known kind of case, fields {sorted(case)}")
    check(case)


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def candidate(kernel: str, priors: Record, *, mean: str = "zero", noise: str = "known") -> Candidate:
    if kernel not in KERNELS or mean not in ("zero", "constant") or noise not in ("known", "known_plus_white"):
        pytest.fail(f"no candidate {kernel!r}, {mean!r}, {noise!r}")
    names = ["amplitude", "length", *(["constant"] if mean == "constant" else [])]
    names += ["white_std"] if noise == "known_plus_white" else []

    def build(amplitude: Tensor, length: Tensor, constant: Any = None, white_std: Any = None) -> GaussianProcess:
        k = Scaled(KERNELS[kernel](length), amplitude.square(), **D64)
        variance = None if white_std is None else white_std.square()
        return GaussianProcess(k, None if constant is None else ConstantMean(constant), variance)

    return Candidate(f"{kernel}, {mean}, {noise}", build, {name: priors[name] for name in names})


def priors_of(case: Record) -> Record:
    return {"amplitude": Uniform(*case["prior_amplitude"]), "length": Uniform(*case["prior_length"])}


def points_of(case: Record) -> Record:
    return dict(zip(("amplitude", "length"), case["grid"], strict=True))


def rows_of(case: Record) -> tuple[Tensor, Tensor, Tensor]:
    return tensor(case["z"])[:, None], tensor(case["H"]), tensor(case["sigma"])


def check_averages(case: Record) -> None:
    name = case["name"]
    setting = ["name", "data", "z", "H", "sigma", "prior_amplitude", "prior_length", "grid", "grid_rule", "x_predict"]
    known(case, [*setting, "per_kernel", "marginal", "nested_sampling", "note", "informative"], name)
    assert case["grid_rule"] == "same" or case["grid_rule"].startswith(RULE), case["grid_rule"]
    candidates = [candidate(wanted["kernel"], priors_of(case)) for wanted in case["per_kernel"]]
    rows, X_test = rows_of(case), tensor(case["x_predict"])[:, None]
    grid = marginalise(candidates, *rows, X_test, points=points_of(case))
    needed = any(field.endswith("converged") for wanted in (*case["per_kernel"], case["marginal"]) for field in wanted)
    exact = marginalise(candidates, *rows, X_test, points=FINE, rule="legendre") if needed else grid
    kept = {"kernel", "formula", "converged_change", "note"}
    for wanted, on_grid, converged in zip(case["per_kernel"], grid.results, exact.results, strict=True):
        what = f"{name}, {wanted['kernel']}"
        fields = {
            "log_z_grid": (on_grid.log_z, 1e-8),
            "f_mean_grid": (on_grid.mean, 1e-7),
            "f_std_grid": (on_grid.std, 1e-7),
            "log_z_converged": (converged.log_z, 1e-6),
            "f_mean_converged": (converged.mean, 1e-6),
            "f_std_converged": (converged.std, 1e-6),
        }
        known(wanted, [*fields, *kept], what)
        for field in set(wanted) - kept:
            found, tolerance = fields[field]
            if field.startswith("log_z"):
                assert abs(found - wanted[field]) <= tolerance, f"{what}, {field}: {found - wanted[field]:.1e} apart"
            else:
                close(found, wanted[field], f"{what}, {field}", tolerance)
    known(case["marginal"], ["grid", "converged"], name)
    for field, found, tolerance in (("grid", grid, 1e-7), ("converged", exact, 1e-6)):
        if field in case["marginal"]:
            check_marginal(found, case["marginal"][field], f"{name}, {field}", tolerance)
    for sampled in case.get("nested_sampling", []):
        check_sampled(sampled, case, exact)


def check_marginal(found: Marginal, wanted: Record, what: str, tolerance: float) -> None:
    known(wanted, ["posterior", "log_z_model_average", "f_mean", "f_std"], what)
    assert abs(found.log_z - wanted["log_z_model_average"]) <= tolerance, what
    for field, value in (("posterior", found.posterior), ("f_mean", found.mean), ("f_std", found.std)):
        close(value, wanted[field], f"{what}, {field}", tolerance)


def check_sampled(sampled: Record, case: Record, exact: Marginal) -> None:
    """Another sampler's evidence lies within three of its errors of our integral."""
    fields = ["kernel", "sampler", "nlive", "dlogz", "seed", "log_z", "log_z_err", "f0_mean", "f0_std"]
    known(sampled, [*fields, "information_nats"], case["name"])
    kernels = [wanted["kernel"] for wanted in case["per_kernel"]]
    result = exact.results[kernels.index(sampled["kernel"])]
    assert abs(sampled["log_z"] - result.log_z) <= 3 * sampled["log_z_err"], sampled
    assert abs(sampled["f0_mean"] - float(result.mean[0])) <= 0.2 * float(result.std[0]), sampled
    assert abs(sampled["f0_std"] / float(result.std[0]) - 1) <= 0.2, sampled


def check_tension(case: Record) -> None:
    name = case["name"]
    setting = ["name", "z", "H", "sigma", "kernel", "prior_amplitude", "prior_length", "grid", "split", "grid_rule"]
    known(case, [*setting, "log_z_AB", "log_z_A", "log_z_B", "log_R", "note", "informative"], name)
    assert case["split"] == "A = rows 0,2,4,...; B = rows 1,3,5,...", case["split"]
    c, n = candidate(case["kernel"], priors_of(case)), points_of(case)
    rows = rows_of(case)
    A, B = ((X[k::2], y[k::2], s[k::2]) for k, (X, y, s) in enumerate((rows, rows)))
    for field, part in (("log_z_AB", rows), ("log_z_A", A), ("log_z_B", B)):
        found = marginalise([c], *part, points=n).log_z
        assert abs(found - case[field]) <= 1e-8, f"{name}, {field}: {found - case[field]:.1e} apart"
    assert abs(tension(c, A, B, points=n) - case["log_R"]) <= 3e-8, name


def check_table(case: Record) -> None:
    name = case["name"]
    known(case, ["name", "x", "y", "sigma", "grids", "models", "posterior", "note", "informative"], name)
    priors = {field: Grid(values) for field, values in case["grids"].items()}
    candidates = []
    for model in case["models"]:
        known(model, ["kernel", "mean", "noise", "log_z", "grid_points"], name)
        candidates.append(candidate(model["kernel"], priors, mean=model["mean"], noise=model["noise"]))
    found = marginalise(candidates, tensor(case["x"])[:, None], tensor(case["y"]), tensor(case["sigma"]))
    for result, model in zip(found.results, case["models"], strict=True):
        what = f"{name}, {result.name}"
        assert len(result.weights) == model["grid_points"], what
        assert abs(result.log_z - model["log_z"]) <= 1e-8, f"{what}: {result.log_z - model['log_z']:.1e} apart"
    close(found.posterior, case["posterior"], f"{name}, posterior", 1e-7)


def check_linear(case: Record) -> None:
    name = case["name"]
    fields = ["log_evidence", "log_evidence_dense", "posterior_mean", "posterior_cov", "pred_mean", "pred_var_latent"]
    setting = ["name", "X", "y", "prior_mean", "prior_std", "noise_variance", "X_test", "note", "informative"]
    known(case, [*setting, *fields], name)
    X, y, mean, std = (tensor(case[field]) for field in ("X", "y", "prior_mean", "prior_std"))
    noise, X_test = case["noise_variance"], tensor(case["X_test"])
    found = bayesian_linear(X, y, noise=noise, prior_mean=mean, prior_std=std)
    process = GaussianProcess(Linear(), LinearMean(mean / std), noise)  # of columns times their deviations
    dense = process.evidence(X * std, y).value.detach()
    predicted = found.predict(X_test)
    values = [found.log_evidence, dense, found.mean, found.covariance, *predicted]
    for field, value in zip(fields, values, strict=True):
        close(value, case[field], f"{name}, {field}", 1e-9)
    posterior = process.condition(X * std, y)
    close(posterior.mean(X_test * std), case["pred_mean"], f"{name}, process", 1e-9)
    close(posterior.variance(X_test * std), case["pred_var_latent"], f"{name}, process", 1e-9)


CHECKS = {
    "per_kernel": check_averages,
    "log_R": check_tension,
    "grids": check_table,
    "log_evidence": check_linear,
}
