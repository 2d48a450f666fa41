"""Learning spectral weights, alone and together, against numbers from explicit formulas.

Every `slim*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.kernels.spectral_mixture import GridSpectralMixture
from zoo.learners.gaussian_process import GaussianProcess
from zoo.learners.spectral import (
    Consensus,
    WeightProblem,
    cubic_minimiser,
    fuse,
    learn_weights,
    rounding,
    stochastic_round,
)

FILES = files("slim")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        check = next((check for field, check in CHECKS.items() if field in case), None)
        if check is None and all("root" in row for row in case.get("rows", [{}])):
            check = check_cubic
        elif check is None and all("Delta" in row for row in case.get("rows", [{}])):
            check = check_moments
        if check is None:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")
        check(case)


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def grid_of(case: Record, theta: Tensor | None = None) -> GridSpectralMixture:
    weights = 1.0 if theta is None else theta
    return GridSpectralMixture(case["means"], tensor(case["scales"]), weights, dtype=torch.float64)


def check_weights(case: Record) -> None:
    name, X, y, noise = case["name"], tensor(case["X"]), tensor(case["y"]), case["noise_variance"]
    setting = ["name", "X", "y", "means", "scales", "noise_variance", "theta0", "X_test", "note", "informative"]
    path = ["objective", "theta", "theta_steps", "grad_objective_at_theta0"]
    late = ["objective_late", "monotone_all_steps", "top5_late", "weights_above_1e-4_late"]
    predictions = ["pred_mean_at_last_stored_theta", "pred_var_latent_at_last_stored_theta"]
    known(case, [*setting, *path, *late, *predictions], name)
    theta0 = tensor(case["theta0"])
    start = WeightProblem(grid_of(case), X, y, noise).terms(theta0)
    close(start.gradient, case["grad_objective_at_theta0"], f"{name}, gradient", 1e-9)
    last = max(map(int, case.get("objective_late", {"0": 0})))
    steps = max(last, len(case["objective"]) - 1, *case["theta_steps"])
    kernel = grid_of(case, theta0)
    trace = learn_weights(kernel, X, y, noise=noise, steps=steps, tol=0.0)
    stored = tensor(case["objective"])
    close(trace.objective[: len(stored)], case["objective"], f"{name}, objective", 1e-9)
    close(trace.theta[case["theta_steps"]], case["theta"], f"{name}, weights", 1e-9)
    close(kernel.weights, trace.theta[-1].tolist(), f"{name}, kernel", 0.0)
    for step, value in case.get("objective_late", {}).items():
        close(trace.objective[int(step)], value, f"{name}, objective after {step}", 1e-7)
    if "monotone_all_steps" in case:
        falls = bool((trace.objective.diff() <= 1e-9 * trace.objective.abs().max()).all())
        assert falls == case["monotone_all_steps"], name
    if "top5_late" in case:
        order = trace.theta[-1].argsort(descending=True)[: len(case["top5_late"])]
        found = torch.stack([order.double(), kernel.means[order, 0], trace.theta[-1][order]], 1)
        assert found[:, 0].tolist() == [row[0] for row in case["top5_late"]], name
        close(found[:, 1], [row[1] for row in case["top5_late"]], f"{name}, frequencies", 1e-9)
        close(found[:, 2], [row[2] for row in case["top5_late"]], f"{name}, largest weights", 1e-5)
    if "weights_above_1e-4_late" in case:
        assert int((trace.theta[-1] > 1e-4).sum()) == case["weights_above_1e-4_late"], name
    if predictions[0] in case:
        final = grid_of(case, trace.theta[case["theta_steps"][-1]])
        posterior, X_test = GaussianProcess(final, noise=noise).condition(X, y), tensor(case["X_test"])
        close(posterior.mean(X_test), case[predictions[0]], f"{name}, mean", 1e-9)
        close(posterior.variance(X_test), case[predictions[1]], f"{name}, variance", 1e-9)


def check_cubic(case: Record) -> None:
    known(case, ["name", "equation", "rows", "note"], case["name"])
    for row in case["rows"]:
        known(row, ["a", "b", "lam", "rho", "theta", "root", "all_real_roots"], case["name"])
        numbers = [tensor([row[field]]) for field in ("a", "b", "lam", "rho", "theta")]
        found = float(cubic_minimiser(*numbers))
        assert abs(found - row["root"]) <= 1e-11 * abs(row["root"]), row
        if row["all_real_roots"] is not None:
            assert any(abs(found - root) <= 1e-9 * max(abs(found), 1e-9) for root in row["all_real_roots"]), row


def check_consensus(case: Record) -> None:
    name = case["name"]
    setting = ["name", "agents", "means", "scales", "noise_variance", "theta0", "rho", "inner_steps", "order", "rounds"]
    known(case, [*setting, "X_test", "agent_pred_mean", "agent_pred_var_observed", "fused_mean", "fused_var"], name)
    assert case["order"].startswith("all agents: inner_steps cubic sweeps"), case["order"]
    kernel, noise = grid_of(case), case["noise_variance"]
    agents = []
    for agent in case["agents"]:
        known(agent, ["X", "y"], name)
        agents.append(WeightProblem(kernel, tensor(agent["X"]), tensor(agent["y"]), noise))
    learner = Consensus(agents, tensor(case["theta0"]), case["rho"], case["inner_steps"])
    for k, wanted in enumerate(case["rounds"]):
        found = learner.round()
        fields = {
            "theta_agents": found.theta_agents,
            "theta": found.theta,
            "lam": found.lam,
            "primal_residual": found.primal,
            "dual_residual": found.dual,
        }
        known(wanted, fields, f"{name}, round {k}")
        for field, value in wanted.items():
            close(fields[field], value, f"{name}, round {k}, {field}", 1e-8)
    if "X_test" in case:
        means, variances = learner.predict(tensor(case["X_test"]))
        close(means, case["agent_pred_mean"], f"{name}, agents' means", 1e-8)
        close(variances, case["agent_pred_var_observed"], f"{name}, agents' variances", 1e-8)
        mean, variance = fuse(means, variances)
        close(mean, case["fused_mean"], f"{name}, mean", 1e-8)
        close(variance, case["fused_var"], f"{name}, variance", 1e-8)


def check_moments(case: Record) -> None:
    known(case, ["name", "rows", "note"], case["name"])
    for row in case["rows"]:
        found = rounding(tensor([row["x"]]), row["Delta"])
        fields = {
            "x": tensor([row["x"]]),
            "Delta": (found.high - found.low),
            "m": (found.low / row["Delta"]).round(),
            "r": found.chance,
            "low": found.low,
            "high": found.high,
            "prob_low": 1 - found.chance,
            "prob_high": found.chance,
            "mean": found.low + found.chance * (found.high - found.low),
            "variance": found.variance,
        }
        known(row, fields, case["name"])
        for field, value in row.items():
            assert abs(float(fields[field]) - value) <= 1e-12 * max(1.0, abs(value)), f"{row}, {field}"


def check_given(case: Record) -> None:
    known(case, ["name", "rule", "x", "Delta", "u", "rounded", "note"], case["name"])
    found = stochastic_round(tensor(case["x"]), case["Delta"], uniforms=tensor(case["u"]))
    close(found, case["rounded"], case["name"], 1e-12)


CHECKS = {"rounds": check_consensus, "theta_steps": check_weights, "rounded": check_given}
