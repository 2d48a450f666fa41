"""Point selection and condensation against numbers by enumeration and of 30 digits.

Every `dpp*` and `condensation*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default:
tests/golden) is one test. What is checked follows from the fields of the file; a file without any known field fails.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.kernels.dot_product import Linear
from zoo.kernels.stationary import Gaussian
from zoo.learners.condensation import (
    clt_bandwidth,
    critical_bandwidth,
    empirical_rate,
    energies,
    pooled_bandwidth,
    probe,
    rate,
)
from zoo.learners.nystrom import effective_dimension, growth, nystrom, ridge_leverage_scores
from zoo.learners.selection import (
    Selection,
    christoffel_weights,
    fixed_size_inclusion,
    marginal_kernel,
    orthonormal,
    size_distribution,
    volume_rescaled_probabilities,
    weighted_least_squares,
)
from zoo.learners.volume_sampling import leverage_scores, subset_probabilities

DPP, CONDENSATION = files("dpp"), files("condensation")
TOLERANCE = 1e-9


@pytest.mark.parametrize("path", [*DPP, *CONDENSATION], ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    record = read(path)
    for case in record["cases"]:
        check = next((check for field, check in CHECKS.items() if field in case), None)
        if check is None:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")
        check(record, case)


def test_golden_folder_is_not_empty() -> None:
    assert DPP
    assert CONDENSATION


# ---- selection ---------------------------------------------------------------------------------------------


def check_fields(found: dict[str, object], wanted: Record, what: str) -> None:
    known(wanted, found, what)
    for field, value in wanted.items():
        close(found[field], value, f"{what}, {field}", TOLERANCE)


def check_projection(_: Record, case: Record) -> None:
    name, F, wanted = case["name"], tensor(case["features"]), case["expected"]
    known(case, ["name", "features", "n", "expected", "note", "informative"], name)
    assert case["n"] == F.shape[1]
    Q = orthonormal(F)
    K = Q @ Q.mT
    sets, chances = subset_probabilities(F, case["n"])
    table = tensor(wanted["set_probabilities"])
    assert table[:, :-1].long().tolist() == sets.tolist()
    pairs = K.diagonal()[:, None] * K.diagonal() - K.square()
    found = {
        "kernel": K,
        "set_probabilities": torch.cat([sets.double(), chances[:, None]], 1),
        "total": chances.sum(),
        "inclusion": leverage_scores(F),
        "pair_inclusion": pairs + torch.diag(K.diagonal()),
        "christoffel_weights": christoffel_weights(F),
    }
    check_fields(found, wanted, name)
    close(chances, table[:, -1].tolist(), f"{name}, probabilities", TOLERANCE)


def check_ensemble(_: Record, case: Record) -> None:
    name, L, n = case["name"], tensor(case["L"]), case["n"]
    known(case, ["name", "L", "n", "expected", "note", "informative"], name)
    K = marginal_kernel(L)
    sizes = size_distribution(L)
    found = {
        "marginal_kernel": K,
        "inclusion": K.diagonal(),
        "size_distribution": sizes,
        "fixed_size_inclusion": fixed_size_inclusion(L, n),
        "elementary_symmetric": sizes[n] * torch.linalg.det(L + torch.eye(len(L), dtype=L.dtype)),
    }
    check_fields(found, case["expected"], name)


def check_volume(record: Record, case: Record) -> None:
    name, k = case["name"], case["k"]
    known(case, ["name", "k", "expected", "note", "informative"], name)
    known(record, ["schema", "topic", "X", "y", "leverage", "cases"], name)
    X, y = tensor(record["X"]), tensor(record["y"])
    n, d = X.shape
    close(leverage_scores(X), record["leverage"], f"{name}, leverage", TOLERANCE)
    sets, chances = subset_probabilities(X, k)
    W = torch.stack([torch.linalg.lstsq(X[s], y[s, None]).solution[:, 0] for s in sets])
    grams = X[sets].mT @ X[sets]
    best = torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
    inverse = torch.linalg.inv(X.mT @ X)
    losses = (X @ W.mT - y[:, None]).square().sum(0)
    inclusion = torch.stack([chances[(sets == i).any(1)].sum() for i in range(n)])
    found = {
        "normaliser": torch.linalg.det(grams).sum(),
        "normaliser_formula": math.comb(n - d, k - d) * torch.linalg.det(X.mT @ X),
        "inclusion": inclusion,
        "E_w": chances @ W,
        "w_star": best,
        "E_inverse_gram": torch.einsum("s,sij->ij", chances, torch.linalg.inv(grams)),
        "E_inverse_gram_formula": (n - d + 1) / (k - d + 1) * inverse,
        "E_full_loss": chances @ losses,
        "best_loss": (X @ best - y).square().sum(),
    }
    check_fields(found, case["expected"], name)
    close(inclusion, (((k - d) + (n - k) * leverage_scores(X)) / (n - d)).tolist(), f"{name}, formula", TOLERANCE)


def check_rescaled(_: Record, case: Record) -> None:
    name, F, f, n = case["name"], tensor(case["pool_features"]), tensor(case["values"]), case["n"]
    known(case, ["name", "pool_features", "values", "m", "n", "expected", "note", "informative"], name)
    N, m = F.shape
    assert case["m"] == m
    wanted = dict(case["expected"])
    Q, weights, h = orthonormal(F), christoffel_weights(F), leverage_scores(F)
    sets, chances = volume_rescaled_probabilities(F, n)
    fits = [weighted_least_squares(Q, Selection(s, weights[s], 1), f[s]) for s in sets]
    mean = (chances[:, None] * torch.stack(fits)).sum(0)
    grams = (weights[sets][..., None] * Q[sets]).mT @ Q[sets] / n
    counts = torch.nn.functional.one_hot(sets, N).sum(1).double()
    formula = math.factorial(n) / (math.factorial(n - m) * m**m)
    for field, a in (("E_a", mean), ("a_star", Q.mT @ f)):  # columns of Q may have the other sign
        close(a.abs(), tensor(wanted.pop(field)).abs().tolist(), f"{name}, {field}", TOLERANCE)
    close(torch.einsum("s,sij->ij", chances, grams).abs(), tensor(wanted.pop("E_gram")).abs().tolist(), name, 1e-9)
    table = tensor(wanted.pop("multiset_probabilities"))
    order = {tuple(s): place for place, s in enumerate(sets.tolist())}
    places = [order[tuple(sorted(map(int, row)))] for row in table[:, :-1].tolist()]
    close(chances[places], table[:, -1].tolist(), f"{name}, multisets", TOLERANCE)
    found = {
        "leverage": h,
        "weights": weights,
        "total_before_normalising": chances.sum() * formula,
        "total_formula": formula,
        "expected_counts": chances @ counts,
        "expected_counts_formula": n * h / m,
    }
    check_fields(found, wanted, name)


def check_ridge(record: Record, case: Record) -> None:
    name, params, X = case["name"], case["params"], tensor(record["X"])
    known(case, ["name", "params", "expected", "dictionary", "note", "informative"], name)
    known(params, ["kernel", "length", "gamma"], name)
    kernels = {"rbf": lambda: Gaussian(params["length"], dtype=torch.float64), "linear": Linear}
    if params["kernel"] not in kernels:
        pytest.fail(f"{name}: no kernel {params['kernel']!r}")
    K, gamma = kernels[params["kernel"]]()(X).detach(), params["gamma"]
    found = {"K_first_row": K[0], "tau": ridge_leverage_scores(K, gamma), "d_eff": effective_dimension(K, gamma)}
    found["d_eff_after_each_row"] = torch.stack([effective_dimension(K[:t, :t], gamma) for t in range(1, len(K) + 1)])
    steps = [growth(K[:t, :t], K[:t, t], K[t, t], gamma).delta for t in range(1, len(K))]
    found["increment_formula"] = torch.stack(steps)
    check_fields(dict(found), case["expected"], name)
    if "dictionary" in case:
        given = case["dictionary"]
        known(given, ["indices", "weights", "eps", "expected"], name)
        near = nystrom(K, torch.tensor(given["indices"]), tensor(given["weights"]), gamma)
        scores = (1 + given["eps"]) / gamma * (K - near).diagonal()
        estimates = {"tau_estimate_before_clipping": scores, "tau_estimate": scores.clamp_max(1), "nystrom": near}
        check_fields(dict(estimates), given["expected"], f"{name}, dictionary")


# ---- condensation ------------------------------------------------------------------------------------------


def check_theory(_: Record, case: Record) -> None:
    known(case, ["name", "equation", "rows", "note"], case["name"])
    for row in case["rows"]:
        if "alpha" not in row:
            known(row, ["b", "I"], case["name"])
            assert abs(rate(row["b"]) / row["I"] - 1) <= (1e-6 if row["b"] < 1e-2 else 1e-12), row
            continue
        known(row, ["alpha", "b", "h_G", "h_G_30_digits", "h_CLT", "Y2_limit_at_half_h_G"], case["name"])
        h = critical_bandwidth(row["alpha"])
        wanted = {"h_G": h, "h_CLT": clt_bandwidth(row["alpha"]), "b": h**-2, "h_G_30_digits": h}
        for field, value in wanted.items():
            assert abs(value / float(row[field]) - 1) <= 1e-12, f"{row['alpha']}, {field}"
        assert row["Y2_limit_at_half_h_G"] == 1 - 0.5**2


def check_participation(_: Record, case: Record) -> None:
    name, X, Y = case["name"], tensor(case["X"]), tensor(case["Y"])
    known(case, ["name", "X", "Y", "rows", "alpha", "note"], name)
    close(math.log(len(Y)) / Y.shape[1], case["alpha"], f"{name}, alpha", 1e-12)
    for row in case["rows"]:
        report, what = probe(X, Y, row["h"]), f"{name}, h {row['h']}"
        found = {
            "h": report.h,
            "Y2_per_query": report.per_query,
            "Y2": report.y2,
            "n_eff": report.n_eff,
            "top1_share_mean": report.top_share,
            "held_out_log_density_mean": report.log_density,
        }
        known(row, found, what)
        for field, value in row.items():
            close(found[field], value, f"{what}, {field}", 1e-10)


def check_empirical(_: Record, case: Record) -> None:
    name, E = case["name"], energies(tensor(case["X"]), tensor(case["Y"]))
    known(case, ["name", "X", "Y", "definition", "per_query_rate", "log_n", "pooled_h_at_log_n", "note"], name)
    for row in case["per_query_rate"]:
        close(empirical_rate(E, row["h"]), row["I"], f"{name}, h {row['h']}", 1e-10)
    close(math.log(E.shape[1]), case["log_n"], f"{name}, log n", 1e-12)
    found: Tensor | float = pooled_bandwidth(E)
    close(found, case["pooled_h_at_log_n"], f"{name}, pooled", 1e-10)


CHECKS = {
    "pool_features": check_rescaled,
    "features": check_projection,
    "L": check_ensemble,
    "k": check_volume,
    "params": check_ridge,
    "per_query_rate": check_empirical,
    "Y": check_participation,
    "rows": check_theory,
}
