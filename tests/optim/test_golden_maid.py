"""Hypergradients, their error bounds and the test of a step against numbers from explicit formulas.

Every `maid*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.optim.maid import RidgePenalties, conjugate_gradients, decrease, error_bound, hypergradient

FILES = files("maid")
DATA = ["name", "A", "b", "A_val", "b_val", "theta"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "states" in case:
            check_bounds(case)
        elif "x_star" in case.get("expected", {}):
            check_hypergradient(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def problem_of(case: Record, groups: Tensor | None = None) -> RidgePenalties:
    return RidgePenalties(*(tensor(case[field]) for field in ("A", "b", "A_val", "b_val")), groups)


def exact(problem: RidgePenalties, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x*, q and the hypergradient."""
    x = problem.solve(theta)
    q = torch.linalg.solve(problem.hessian(theta), problem.upper_gradient(x)[1])
    return x, q, hypergradient(problem, x, theta, q)


def check_hypergradient(case: Record) -> None:
    name, expected, problem, theta = case["name"], case["expected"], problem_of(case), tensor(case["theta"])
    known(case, [*DATA, "expected", "grouped"], name)
    x, q, z = exact(problem, theta)
    g, slope = problem.upper_gradient(x)
    found = {
        "x_star": x,
        "h_star": problem.lower(x, theta),
        "g": g,
        "grad_g": slope,
        "q": q,
        "hypergradient": z,
        "mu": problem.convexity(theta),
        "L": problem.smoothness(theta),
        "L_g": problem.upper_smoothness,
    }
    differences = {"fd_central_h1e5": z, "fd_fourth_order_h1e3": z}
    known(expected, [*found, *differences, "sum_by_group"], name)
    for field, value in found.items():
        close(value, expected[field], f"{name}, {field}", 1e-9)
    for field, value in differences.items():
        close(value, expected[field], f"{name}, {field}", 1e-7)
    by_gradients, residual = conjugate_gradients(problem, x, theta, slope, 1e-13)
    assert residual < 1e-10
    close(hypergradient(problem, x, theta, by_gradients), expected["hypergradient"], f"{name}, by CG", 1e-9)
    grouped = case["grouped"]
    known(grouped, ["group", "theta", "expected"], name)
    groups = torch.tensor(grouped["group"])
    close(torch.zeros(int(groups.max()) + 1).double().index_add(0, groups, z), expected["sum_by_group"], name, 1e-9)
    _, _, z = exact(problem_of(case, groups), tensor(grouped["theta"]))
    close(z, grouped["expected"]["hypergradient"], f"{name}, grouped", 1e-9)


def check_bounds(case: Record) -> None:
    name, problem, theta = case["name"], problem_of(case), tensor(case["theta"])
    known(case, [*DATA, "z_exact", "states", "line_search"], name)
    best, _, z = exact(problem, theta)
    close(z, case["z_exact"], f"{name}, hypergradient", 1e-9)
    for state in case["states"]:
        known(state, ["x", "q", "expected"], name)
        check_state(problem, theta, tensor(state["x"]), tensor(state["q"]), state["expected"], best, z, name)
    check_line_search(problem, theta, case["line_search"], best, z, name)


def near(found: float, wanted: float, what: str, absolute: float = 1e-12) -> None:
    """Relative 1e-9, or what rounding leaves of residuals that vanish."""
    assert found == pytest.approx(wanted, rel=1e-9, abs=absolute), what


def check_state(
    problem: RidgePenalties, theta: Tensor, x: Tensor, q: Tensor, expected: Record, best: Tensor, z: Tensor, name: str
) -> None:
    _, slope = problem.upper_gradient(x)
    found = hypergradient(problem, x, theta, q)
    residual = float((problem.curvature(x, theta, q) - slope).norm())
    lower = float(problem.gradient(x, theta).norm())
    numbers = {
        "grad_lower_norm": lower,
        "residual_norm": residual,
        "B_norm": problem.cross_norm(x, theta),
        "grad_g_norm": slope.norm(),
        "L_B": problem.cross_lipschitz(theta),
        "L_Hinv": problem.inverse_lipschitz(theta),
        "L_g": problem.upper_smoothness,
        "true_error": (found - z).norm(),
        "true_error_x": (x - best).norm(),
    }
    known(expected, ["z", *numbers, "bounds", "accept_eta_0_9", "omega_for_fixed_eps_delta", "columns_fixed"], name)
    if any(expected["z"]):
        close(found, expected["z"], f"{name}, z", 1e-9)
    for field, value in numbers.items():
        near(float(value), expected[field], f"{name}, {field}")
    convexity = {"mu_exact": problem.convexity(theta), "mu_smallest_ridge_weight": float(theta.exp().min())}
    known(expected["bounds"], convexity, name)
    for kind, bound in expected["bounds"].items():
        known(bound, ["mu", "eps", "delta", "omega", "omega_without_L_B_terms", "omega_reference_code_form"], name)
        mu = convexity[kind]
        close(mu, bound["mu"], f"{name}, mu", 1e-9)
        near(lower / mu, bound["eps"], f"{name}, eps")
        near(residual, bound["delta"], f"{name}, delta")
        omega = error_bound(problem, x, theta, lower / mu, residual, mu)
        near(omega, bound["omega"], f"{name}, {kind}", 1e-9)
        assert omega >= expected["true_error"]
        short = problem.cross_norm(x, theta) / mu * (problem.upper_smoothness * lower / mu + residual)
        near(short, bound["omega_without_L_B_terms"], f"{name}, without terms", 1e-9)
        if kind == "mu_exact":
            assert (omega <= (1 - 0.9) * float(found.norm())) == expected["accept_eta_0_9"]
    assert expected["columns_fixed"] == ["eps", "delta", "omega"]
    for eps, delta, omega in expected["omega_for_fixed_eps_delta"]:
        close(error_bound(problem, x, theta, eps, delta), omega, f"{name}, fixed accuracies", 1e-9)


def check_line_search(
    problem: RidgePenalties, theta: Tensor, search: Record, best: Tensor, z: Tensor, name: str
) -> None:
    known(search, ["params", "note", "columns", "expected"], name)
    params = search["params"]
    known(params, ["eps", "alpha", "rho", "lam"], name)
    columns = ["i", "g_old", "g_new", "norm_grad_g_old", "norm_grad_g_new", "lhs", "rhs", "accept"]
    assert search["columns"] == columns
    eps = params["eps"]
    aside = torch.full_like(best, eps / math.sqrt(len(best)))
    old, old_slope = problem.upper_gradient(best + aside)
    for i, *numbers, accepted in search["expected"]:
        step = params["alpha"] * params["rho"] ** i
        new, new_slope = problem.upper_gradient(problem.solve(theta - step * z) - aside)
        norms = float(old_slope.norm()), float(new_slope.norm())
        change = decrease(old, new, *norms, eps, problem.upper_smoothness)
        wanted = -params["lam"] * step * float(z @ z)
        close([old, new, *norms, change, wanted], numbers, f"{name}, step {i}", 1e-9)
        assert (change <= wanted) == accepted
