"""MuonH and HyperP against numbers of the released code in float64.

Every `muonh*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.optim.muonh import COEFFICIENTS, MuonH, newton_schulz, residual_factor, transferred_lr

FILES = files("muonh")
TOLERANCE = 1e-10


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    record = read(path)
    for case in record["cases"]:
        expected = case["expected"]
        if "columns" in case:
            check_transfer(case)
        elif "s" in case:
            check_scalars(record, case)
        elif "iterates" in expected:
            check_iterates(record, case)
        elif "momentum_last" in expected:
            check_steps(case)
        elif "W_sphere" in expected:
            check_head(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(expected)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def trained(case: Record, **options: Any) -> tuple[list[Tensor], list[Tensor], MuonH]:
    """The parameter after every step, the orthogonalised directions, and the optimizer."""
    W = nn.Parameter(tensor(case["W0"]))
    optimizer = MuonH([W], **options)
    seen, directions = [], []
    for gradient in tensor(case["grads"]):
        W.grad = gradient.clone()
        optimizer.step()
        seen.append(W.detach().clone())
        M = optimizer.state[W].get("momentum_buffer")
        if M is not None:
            U = newton_schulz((gradient + options["beta"] * M).flatten(1), options["ns_eps"])
            directions.append(U.view_as(W))
    return seen, directions, optimizer


def check_steps(case: Record) -> None:
    name, params, expected = case["name"], case["params"], case["expected"]
    known(case, ["name", "shape", "flatten", "params", "W0", "grads", "expected", "informative"], name)
    known(params, ["lr", "beta", "nesterov", "ns_eps", "norm_eps", "weight_decay", "steps"], name)
    known(expected, ["U", "W", "momentum_last", "fro_norm", "fro_norm_start", "U_fro_norm"], name)
    assert params["nesterov"] is True
    assert len(case["grads"]) == params["steps"]
    assert case["flatten"] in (None, "dim 0 x rest")
    options = {key: params[key] for key in ("lr", "beta", "ns_eps", "norm_eps", "weight_decay")}
    seen, directions, optimizer = trained(case, **options)
    W, U = torch.stack(seen), torch.stack(directions)
    close(W, expected["W"], f"{name}, W", TOLERANCE)
    close(U, expected["U"], f"{name}, U", TOLERANCE)
    close(W.flatten(1).norm(dim=1), expected["fro_norm"], f"{name}, norms", TOLERANCE)
    close(U.flatten(1).norm(dim=1), expected["U_fro_norm"], f"{name}, norms of U", TOLERANCE)
    close(tensor(case["W0"]).norm(), expected["fro_norm_start"], f"{name}, norm at the start", TOLERANCE)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    close(state["momentum_buffer"], expected["momentum_last"], f"{name}, momentum", TOLERANCE)


def check_head(case: Record) -> None:
    name, params, expected = case["name"], case["params"], case["expected"]
    known(case, ["name", "shape", "params", "W0", "grads", "expected"], name)
    known(params, ["lr", "betas", "adam_eps", "norm_eps", "weight_decay", "steps"], name)
    known(expected, ["W_sphere", "W_plain_adam", "exp_avg_last", "exp_avg_sq_last", "fro_norm"], name)
    options = {key: params[key] for key in ("lr", "betas", "norm_eps", "weight_decay")} | {"eps": params["adam_eps"]}
    for method, field in (("adam_sphere", "W_sphere"), ("adam", "W_plain_adam")):
        seen, _, optimizer = trained(case, method=method, **options)
        close(torch.stack(seen), expected[field], f"{name}, {method}", TOLERANCE)
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        close(state["exp_avg"], expected["exp_avg_last"], f"{name}, first moment", TOLERANCE)
        close(state["exp_avg_sq"], expected["exp_avg_sq_last"], f"{name}, second moment", TOLERANCE)
        if method == "adam_sphere":
            close(torch.stack(seen).flatten(1).norm(dim=1), expected["fro_norm"], f"{name}, norms", TOLERANCE)


def check_iterates(record: Record, case: Record) -> None:
    name, expected = case["name"], case["expected"]
    known(case, ["name", "shape", "transposed", "ns_eps", "G", "expected"], name)
    known(expected, ["iterates", "output", "singular_values"], name)
    close(COEFFICIENTS, record["coefficients"], "coefficients", 0.0)
    G, iterates = tensor(case["G"]), []
    output = newton_schulz(G, case["ns_eps"], iterates=iterates)
    assert case["transposed"] == (G.shape[0] > G.shape[1])
    close(torch.stack(iterates), expected["iterates"], f"{name}, iterates", TOLERANCE)
    close(output, expected["output"], f"{name}, output", TOLERANCE)
    close(torch.linalg.svdvals(output), expected["singular_values"], f"{name}, singular values", TOLERANCE)


def check_scalars(record: Record, case: Record) -> None:
    """What the steps do to one singular value."""
    known(case, ["name", "s", "expected"], case["name"])
    known(case["expected"], ["iterates"], case["name"])
    close(COEFFICIENTS, record["coefficients"], "coefficients", 0.0)
    s = tensor(case["s"])
    rows = [s]
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
        rows.append(s)
    close(torch.stack(rows, 1), case["expected"]["iterates"], case["name"], TOLERANCE)


def check_transfer(case: Record) -> None:
    params = case["params"]
    known(params, ["eta0", "L0", "B0", "T0", "exponent"], case["name"])
    assert case["columns"] == ["L", "B", "T", "eta", "residual_branch_factor"]
    base = {"base_depth": params["L0"], "base_batch": params["B0"], "base_data": params["T0"]}
    for L, B, T, eta, factor in case["expected"]:
        lr = transferred_lr(params["eta0"], depth=L, batch=B, data=T, exponent=params["exponent"], **base)
        assert lr == pytest.approx(eta, rel=1e-12)
        assert residual_factor(L) == pytest.approx(factor, rel=1e-12)
