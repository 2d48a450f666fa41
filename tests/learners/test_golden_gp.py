"""Gaussian processes against numbers from explicit formulas, gpytorch and scikit-learn.

Every `gp_*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.learners.golden import Record, close, files, known, read, tensor
from tests.learners.trees import Places, build, check_gradients, raw_of
from zoo.learners.gaussian_process import GaussianProcess
from zoo.learners.laplace import LaplaceProcess, expected_sigmoid
from zoo.learners.means import BoxMean, ConstantMean, LinearMean, TrapezoidMean, ZeroMean
from zoo.learners.sparse_gp import SparseGaussianProcess

FILES = files("gp_")
MEANS = {
    "zero": (ZeroMean, ()),
    "constant": (ConstantMean, ("constant",)),
    "linear": (LinearMean, ("weight", "constant")),
    "box": (BoxMean, ("constant", "depth", "centre", "duration")),
    "trapezoid": (TrapezoidMean, ("constant", "depth", "centre", "duration", "ingress")),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "labels" in case:
            check_laplace(case)
        elif "inducing" in case:
            check_sparse(case)
        elif "log_marginal_likelihood" in case:
            check_exact(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def mean_of(case: Record) -> tuple[nn.Module, Places]:
    fields = dict(case["mean"])
    kind = fields.pop("type")
    if kind not in MEANS:
        pytest.fail(f"{case['name']}: no mean {kind!r}")
    make, names = MEANS[kind]
    known(fields, names, f"{case['name']}, mean")
    mean = make(*[fields[name] for name in names])
    fixed = {"centre", "duration"} if kind == "box" else set()
    return mean, {f"mean.{name}": (mean, name) for name in names if name not in fixed}


def check_exact(case: Record) -> None:
    name = case["name"]
    gradients = ["grad_log_marginal_likelihood", "grad_loo_log_pred_sum"]
    parts = ["log_marginal_likelihood", "data_fit", "log_det"]
    loo = ["loo_mean", "loo_var", "loo_log_pred", "loo_log_pred_sum"]
    predictions = ["pred_mean", "pred_var_latent", "pred_cov_latent", "pred_var_observed"]
    setting = ["name", "kernel", "mean", "noise_variance", "sigma", "X", "y", "X_test", "note", "informative"]
    known(case, [*setting, *parts, *loo, *predictions, *gradients], name)
    kernel, places = build(case["kernel"])
    mean, more = mean_of(case)
    process = GaussianProcess(kernel, mean, case["noise_variance"])
    places = {**places, **more}
    if case["noise_variance"] is not None:
        places["noise_variance"] = (process, "noise")
    X, y, X_test = tensor(case["X"]), tensor(case["y"]), tensor(case["X_test"])
    sigma = None if case.get("sigma") is None else tensor(case["sigma"])
    evidence = process.evidence(X, y, sigma)
    for field, value in zip(parts, evidence, strict=True):
        close(value.detach(), case[field], f"{name}, {field}", 1e-9)
    check_gradients(evidence.value, case[gradients[0]], places, f"{name}, evidence", 1e-8)
    left = process.leave_one_out(X, y, sigma)
    for field, value in zip(loo, (*left, left.log_density.sum()), strict=True):
        close(value.detach(), case[field], f"{name}, {field}", 1e-9)
    check_gradients(left.log_density.sum(), case[gradients[1]], places, f"{name}, leave-one-out", 1e-8)
    posterior = process.condition(X, y, sigma)
    assert float(posterior.factor.jitter) == 0
    found = [posterior.mean(X_test), posterior.variance(X_test), posterior.covariance(X_test)]
    found.append(posterior.variance(X_test, observed=True))
    for field, value in zip(predictions, found, strict=True):
        if field in case:
            close(value, case[field], f"{name}, {field}", 1e-9)


def check_sparse(case: Record) -> None:
    name = case["name"]
    setting = ["name", "kernel", "X", "y", "inducing", "X_test", "noise_variance", "jitter", "note", "informative"]
    known(case, [*setting, "sgpr", "fitc", "trace_K_minus_Q", "dtc_log_marginal", "exact_log_marginal"], name)
    assert case["jitter"] == 0
    X, y, X_test, U = (tensor(case[field]) for field in ("X", "y", "X_test", "inducing"))
    exact = GaussianProcess(build(case["kernel"])[0], None, case["noise_variance"]).evidence(X, y).value
    close(exact.detach(), case["exact_log_marginal"], f"{name}, exact", 1e-8)
    for method in ("sgpr", "fitc"):
        wanted, what = case[method], f"{name}, {method}"
        known(wanted, ["value", "grad", "grad_inducing", "pred_mean", "pred_var_latent"], what)
        kernel, places = build(case["kernel"])
        process = SparseGaussianProcess(kernel, U, None, case["noise_variance"], method=method)
        evidence = process.evidence(X, y)
        close(evidence.value.detach(), wanted["value"], f"{what}, value", 1e-8)
        trace = float(evidence.trace.detach())  # rounding where the inducing points explain all
        assert abs(trace - case["trace_K_minus_Q"]) <= 1e-8 * float(kernel.diag(X).sum().detach()), (
            f"{what}, trace: {trace}"
        )
        if method == "sgpr":
            close(evidence.log_marginal.detach(), case["dtc_log_marginal"], f"{what}, without the trace", 1e-8)
        places = {**places, "noise_variance": (process, "noise")}
        check_gradients(evidence.value, wanted["grad"], places, what, 1e-8)
        if "grad_inducing" in wanted:
            (slope,) = torch.autograd.grad(evidence.value, process.inducing)
            close(slope, wanted["grad_inducing"], f"{what}, gradient in the inducing points", 1e-8)
        posterior = process.condition(X, y)
        close(posterior.mean(X_test), wanted["pred_mean"], f"{what}, mean", 1e-8)
        close(posterior.variance(X_test), wanted["pred_var_latent"], f"{what}, variance", 1e-8)
        close(posterior.covariance(X_test).diagonal(), wanted["pred_var_latent"], f"{what}, covariance", 1e-8)


def check_laplace(case: Record) -> None:
    name = case["name"]
    fields = ["log_marginal_likelihood", "grad_log_marginal_likelihood", "mode_f"]
    predictions = ["latent_mean", "latent_var", "prob_integral"]
    informative = ["prob_sklearn_approx", "log_marginal_likelihood_sklearn", "note", "informative"]
    known(case, ["name", "kernel", "X", "labels", "X_test", *fields, *predictions, *informative], name)
    kernel, places = build(case["kernel"])
    for place in places.values():
        raw_of(*place)
    process, X, labels = LaplaceProcess(kernel), tensor(case["X"]), tensor(case["labels"])
    value = process.evidence(X, labels)
    close(value.detach(), case["log_marginal_likelihood"], f"{name}, evidence", 1e-8)
    check_gradients(value, case["grad_log_marginal_likelihood"], places, name, 1e-8)
    posterior, X_test = process.condition(X, labels), tensor(case["X_test"])
    close(posterior.mode, case["mode_f"], f"{name}, mode", 1e-8)
    found: list[Tensor] = [posterior.mean(X_test), posterior.variance(X_test), posterior.probability(X_test)]
    for field, values in zip(predictions, found, strict=True):
        close(values, case[field], f"{name}, {field}", 1e-8)
    given = expected_sigmoid(tensor(case["latent_mean"]), tensor(case["latent_var"]))
    close(given, case["prob_integral"], f"{name}, integral", 1e-8)
