"""Metrics learned from gradients against numbers of the released code, and leave-one-out errors against refits.

Every `agop*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learners.golden import FOLDER, Record, tensor
from zoo.kernels.exponential_power import ExponentialPower
from zoo.learners.agop import iterate
from zoo.learners.ridge import solve_left_out

FILES = sorted(FOLDER.glob("agop*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    record = json.loads(path.read_text())
    assert record["cases"]
    for case in record["cases"]:
        wanted = set(case["expected"])
        check = next((check for fields, check in KINDS if wanted & fields), None)
        if check is None:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(wanted)}")
        check(record, case)


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no agop* in {FOLDER}"


# ---- comparisons -------------------------------------------------------------------------------------------


def columns(values: Any) -> Tensor:
    found = tensor(values)
    return found[:, None] if found.ndim == 1 else found


def close(found: Tensor, wanted: Any, what: str, tolerance: float = 1e-8) -> None:
    expected = tensor(wanted).reshape(found.shape)
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
    assert apart <= tolerance, f"{what}: {apart:.1e} apart"


def kernel_of(params: Record, lengthscale: float, metric: Any = None) -> ExponentialPower:
    """`product` sums |.|^p / L^p, which is the p-norm to the power p; `l2` is the Euclidean norm."""
    if params["kernel"] not in ("l2", "lpq", "product"):
        pytest.fail(f"no kernel {params['kernel']!r}")
    norm = 2.0 if params["kernel"] == "l2" else params["p"]
    exponent = params["p"] if params["kernel"] == "product" else params["q"]
    chosen = None if metric is None else tensor(metric)
    return ExponentialPower(lengthscale, exponent, metric=chosen, norm=norm, dtype=torch.float64)


def of_case(record: Record, case: Record) -> ExponentialPower:
    return kernel_of(case["params"], case["params"]["L"], record["metrics"][case["metric"]])


def check_kernel(record: Record, case: Record) -> None:
    K = of_case(record, case)(tensor(record["x"]), tensor(record["z"]))
    close(K, case["expected"]["K_xz"], case["name"])


def check_gradients(record: Record, case: Record) -> None:
    kernel, expected, name = of_case(record, case), case["expected"], case["name"]
    X, A = tensor(record["x"]), columns(record["coefs"])
    G, d = kernel.outer_products(X, A), kernel.outer_products(X, A, diagonal=True)
    found = {
        "grads": lambda: kernel.gradients(X, A),
        "agop_sum": lambda: G,
        "agop_diag_sum": lambda: d,
        "agop_sum_centred_grads": lambda: kernel.outer_products(X, A, centred=True),
        "M_next_full": lambda: G / (G.max() + 1e-30),
        "M_next_diag": lambda: d / (d.max() + 1e-30),
    }
    for field in expected:
        if field not in found:
            pytest.fail(f"{name}: unknown field {field}")
        value = found[field]()
        wanted = expected[field]
        if field == "M_next_diag" and tensor(wanted).ndim == 2:
            value = value.diag()
        close(value, wanted, f"{name}, {field}")


def targets_of(record: Record, case: Record) -> Tensor:
    if case["targets"] == "Y":
        return columns(record["Y"])
    Y = torch.nn.functional.one_hot(torch.tensor(record["labels"])).double()
    if case["targets"] not in ("one-hot labels", "one-hot labels minus their mean"):
        pytest.fail(f"{case['name']}: unknown targets {case['targets']!r}")
    return Y - Y.mean(0) if "minus" in case["targets"] else Y


CENTRED = {"none": (False, False), "mean of all rows, kept while a row is left out": (True, False)}
CENTRED["mean of the remaining rows"] = (False, True)


def check_leave_one_out(record: Record, case: Record) -> None:
    params, expected, Y = case["params"], case["expected"], targets_of(record, case)
    centre, recentre = CENTRED[params["centring"]]
    X, mean = tensor(record["X"]), Y.mean(0) if centre else 0.0
    kernel = kernel_of(params, params["L"])
    found = solve_left_out(kernel(X), Y - mean, params["ridge"], recentre=recentre).residuals
    close(found, expected["residuals"], case["name"], 1e-9)
    close(found.square().mean(), expected["mse"], case["name"], 1e-9)
    if expected["accuracy"] is not None:
        right = (Y - found).argmax(1) == torch.tensor(record["labels"])
        close(right.double().mean(), expected["accuracy"], case["name"])


def check_iterations(record: Record, case: Record) -> None:
    params, trace = case["params"], case["expected"]["trace"]
    X, Z, Y = tensor(record["X"]), tensor(record["X_test"]), targets_of(record, case)
    states = iterate(
        X,
        Y,
        kernel_of(params, params["bandwidth"]),
        params["reg"],
        len(trace) - 1,
        diagonal=params["diag"],
        bandwidth=params["bandwidth_mode"],
        scale=params["max_eps"],
        jitter=params["jitter_full"],
    )
    for k, (state, wanted) in enumerate(zip(states, trace, strict=True)):
        name, tolerance = f"{case['name']}, {wanted['iterations']} updates", 1e-8 if k < 3 else 1e-6
        assert wanted["iterations"] == k
        close(state.coefficients, wanted["alpha"], f"{name}, alpha", tolerance)
        close(state.kernel(Z, X) @ state.coefficients, wanted["pred"], f"{name}, pred", tolerance)
        close(state.kernel.lengthscale, wanted["bandwidth_used"], f"{name}, bandwidth", tolerance)
        metric = torch.eye(X.shape[1], dtype=torch.float64) if state.kernel.metric is None else state.kernel.metric
        M = tensor(wanted["M"]) if wanted["M"] is not None else None
        if M is not None:
            metric = metric.diagonal() if M.ndim == 1 and metric.ndim == 2 else metric
            metric = metric.diag() if M.ndim == 2 and metric.ndim == 1 else metric
            close(metric, wanted["M"], f"{name}, M", tolerance)


KINDS: list[tuple[set[str], Callable[[Record, Record], None]]] = [
    ({"K_xz"}, check_kernel),
    ({"agop_sum", "grads"}, check_gradients),
    ({"residuals"}, check_leave_one_out),
    ({"trace"}, check_iterations),
]
