"""The Gaussian mechanism, compositions and noise-free similarities against numbers of 50 digits.

Every `dp_*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.learners.private import (
    basic_composition,
    class_sums,
    classical_sigma,
    gaussian_delta,
    gaussian_eps,
    gaussian_sigma,
    release,
    rho_of,
    sigma_for_rho,
    squared_distance_sums,
    unit_norm,
    zcdp_eps,
)

FILES = files("dp_")

# what a table's column is, by the other columns of its row
COLUMNS: dict[str, Callable[[Record], float]] = {
    "sigma": lambda row: gaussian_sigma(row["eps"], row["delta"], row["sensitivity"]),
    "sigma_classical_formula": lambda row: classical_sigma(row["eps"], row["delta"], row["sensitivity"]),
    "eps": lambda row: gaussian_eps(row["sigma"], row["delta"], row["sensitivity"]),
    "delta": lambda row: gaussian_delta(row["sigma"], row["eps"], row["sensitivity"]),
    "sigma_each": lambda row: sigma_for_rho(row["rho"], row["sensitivity"], int(row["releases"])),
}
INPUTS = {"rho", "sensitivity", "releases"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        expected = case["expected"]
        if isinstance(expected, list):
            check_table(case)
        elif "rho" in expected:
            check_composition(case)
        elif "releases" in case:
            check_basic(case)
        elif "class_sums" in expected:
            check_similarity(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(expected)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def near(found: float, wanted: float, what: str, tolerance: float = 1e-9) -> None:
    assert math.isclose(found, wanted, rel_tol=tolerance, abs_tol=1e-300), f"{what}: {found!r}, wanted {wanted!r}"


def check_table(case: Record) -> None:
    """The last column that can be computed is what was asked for; further ones are computed from the same row."""
    columns, name = case["columns"], case["name"]
    known(columns, [*COLUMNS, *INPUTS], name)
    known(case, ["name", "columns", "expected", "note", "informative"], name)
    outputs = ["sigma", "sigma_classical_formula"] if "sigma_classical_formula" in columns else [columns[-1]]
    known(outputs, COLUMNS, name)
    for values in case["expected"]:
        row = dict(zip(columns, values, strict=True))
        for output in outputs:
            near(COLUMNS[output](row), row[output], f"{name}, {output} of {row}")


def check_composition(case: Record) -> None:
    expected, name = case["expected"], case["name"]
    known(case, ["name", "gaussians", "pure_eps", "expected", "note", "informative"], name)
    known(expected, ["rho", "conversions"], name)
    places = [case["gaussians"]["columns"].index(column) for column in ("sigma", "sensitivity")]
    gaussians = [(row[places[0]], row[places[1]]) for row in case["gaussians"]["rows"]]
    rho = rho_of(gaussians, case["pure_eps"])
    near(rho, expected["rho"], f"{name}, rho")
    for wanted in expected["conversions"]:
        delta = wanted["delta"]
        found = {
            "eps_zcdp_simple": zcdp_eps(rho, delta, "simple"),
            "eps_zcdp_optimal": zcdp_eps(rho, delta),
        }
        if not case["pure_eps"]:
            mu = math.sqrt(math.fsum((D / sigma) ** 2 for sigma, D in gaussians))
            found["eps_exact_gaussians_only"] = gaussian_eps(1 / mu, delta)
        known(wanted, [*found, "delta", "eps_exact_gaussians_only"], name)
        for field, value in wanted.items():
            if field != "delta" and value is not None:
                near(found[field], value, f"{name}, {field} at {delta}")


def check_basic(case: Record) -> None:
    columns, expected, name = case["releases"]["columns"], case["expected"], case["name"]
    known(expected, ["eps", "delta"], name)
    rows = [dict(zip(columns, values, strict=True)) for values in case["releases"]["rows"]]
    eps, delta = basic_composition([(row["eps"], row["delta"]) for row in rows])
    near(eps, expected["eps"], f"{name}, eps")
    near(delta, expected["delta"], f"{name}, delta")


def check_similarity(case: Record) -> None:
    expected, name = case["expected"], case["name"]
    X, queries, labels = tensor(case["X"]), tensor(case["queries"]), torch.tensor(case["labels"])
    known(case, ["name", "X", "labels", "queries", "frequencies", "D", "expected", "note", "informative"], name)
    if case["frequencies"] is None:
        phi = unit_norm
    else:
        frequencies, D = tensor(case["frequencies"]), case["D"]

        def phi(x: torch.Tensor) -> torch.Tensor:
            angles = x @ frequencies.T
            return torch.cat([angles.cos(), angles.sin()], -1) / (D / 2) ** 0.5

    classes = len(expected["counts"])
    found = release(phi, X, labels, classes=classes, budget=None)
    sums, counts = class_sums(phi(X), labels, classes)
    raw, _ = class_sums(X, labels, classes)
    squares, _ = class_sums(X.square().sum(1, keepdim=True), labels, classes)
    fields = {
        "class_sums": found.sums,
        "counts": counts,
        "scores": found(queries),
        "squared_l2_sums": squared_distance_sums(queries, raw, counts, squares[:, 0]),
        "sum_sq_norm": squares[:, 0],
    }
    assert torch.equal(sums, found.sums)
    known(expected, [*fields, "max_norm_deviation"], name)
    for field in set(expected) & set(fields):
        close(fields[field], expected[field], f"{name}, {field}", 1e-12)
    deviation = float((phi(X).norm(dim=1) - 1).abs().max())
    assert deviation <= expected.get("max_norm_deviation", 0.0) + 1e-15, name
