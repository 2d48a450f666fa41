"""Leverage scores, streaming dictionaries and volume sampling against numbers from explicit formulas.

Every `nystrom*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one
test. What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.kernels import Gaussian
from zoo.learners.nystrom import (
    StreamingDictionary,
    effective_dimension,
    growth,
    nystrom,
    ridge_leverage_scores,
)
from zoo.learners.volume_sampling import leverage_scores, subset_probabilities

FILES = files("nystrom")
KERNEL = "exp(-|x-z|^2/(2 length^2))"
SETTING = ["name", "kernel", "length", "ridge", "X", "note", "informative"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "steps" in case:
            check_stream(case)
        elif "ridge_leverage_scores" in case:
            check_scores(case)
        elif "by_size" in case:
            check_volumes(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def kernel_of(case: Record) -> Gaussian:
    if case["kernel"] != KERNEL:
        pytest.fail(f"{case['name']}: no kernel {case['kernel']!r}")
    return Gaussian(case["length"], dtype=torch.float64)


def check_scores(case: Record) -> None:
    name, ridge = case["name"], case["ridge"]
    fields = ["ridge_leverage_scores", "effective_dimension", "effective_dimension_prefix", "delta_identity"]
    known(case, [*SETTING, *fields, "approximation"], name)
    with torch.no_grad():
        K = kernel_of(case)(tensor(case["X"]))
    close(ridge_leverage_scores(K, ridge), case["ridge_leverage_scores"], f"{name}, scores", 1e-9)
    close(effective_dimension(K, ridge), case["effective_dimension"], f"{name}, effective dimension", 1e-9)
    prefixes = torch.stack([effective_dimension(K[:n, :n], ridge) for n in range(1, len(K) + 1)])
    close(prefixes, case["effective_dimension_prefix"], f"{name}, effective dimension of prefixes", 1e-9)
    for t, wanted in enumerate(case["delta_identity"]):
        found = growth(K[:t, :t], K[:t, t], K[t, t], ridge)
        known(wanted, ["s", "A0c_norm2", "Delta"], name)
        for value, field in zip(found, ("s", "A0c_norm2", "Delta"), strict=True):
            assert abs(float(value) - wanted[field]) <= 1e-9 * max(1.0, abs(wanted[field])), f"{name}, {field} at {t}"
    if "approximation" in case:
        wanted = case["approximation"]
        extremes = ["max_eig_K_minus_K_tilde_over_ridge", "min_eig_K_minus_K_tilde"]
        known(wanted, ["columns", "weights", "K_tilde", *extremes], name)
        found_K = nystrom(K, torch.tensor(wanted["columns"]), tensor(wanted["weights"]), ridge)
        close(found_K, wanted["K_tilde"], f"{name}, K~", 1e-9)
        eigenvalues = torch.linalg.eigvalsh(K - found_K)
        close(eigenvalues[-1] / ridge, wanted[extremes[0]], f"{name}, largest eigenvalue", 1e-9)
        scale = float(K.diagonal().max())
        assert abs(float(eigenvalues[0]) - wanted[extremes[1]]) <= 1e-9 * scale, f"{name}, smallest eigenvalue"


def check_stream(case: Record) -> None:
    name = case["name"]
    settings = ["eps", "qbar", "mode", "keep_all", "steps", "exact_scores_final", "exact_d_eff_final", "final"]
    known(case, [*SETTING, *settings], name)
    X, kernel = tensor(case["X"]), kernel_of(case)
    outcomes = iter(case["steps"])
    asked: list[Tensor] = []

    def draw(counts: Tensor, chance: Tensor) -> Tensor:
        asked.append(chance)
        return torch.tensor(next(outcomes)["copies_outcome"])

    dictionary = StreamingDictionary(
        kernel,
        case["ridge"],
        case["qbar"],
        eps=case["eps"],
        mode=case["mode"],
        keep_all=case["keep_all"],
        draw=draw,
    )
    for x, wanted in zip(X, case["steps"], strict=False):
        found = dictionary.step(x)
        what = f"{name}, step {wanted['t']}"
        fields = {
            "dictionary": found.positions,
            "weights": found.weights,
            "Delta": found.delta,
            "d_tilde": found.effective_dimension,
            "tau_tilde": found.scores,
            "p_new": found.probabilities,
            "p_if_updated": found.probabilities,
        }
        if not case["keep_all"]:
            fields["shrink_probability"] = asked[-1]
        known(wanted, [*fields, "t", "copies_outcome"], what)
        for field in set(wanted) & set(fields):
            close(fields[field], wanted[field], f"{what}, {field}", 1e-9)
    assert int(dictionary.seen) == len(case["steps"])
    with torch.no_grad():
        K = kernel(X[: len(case["steps"])])
    if case["keep_all"]:  # nothing was dropped: the estimate is the truth
        close(dictionary.effective_dimension, case["exact_d_eff_final"], f"{name}, effective dimension", 1e-9)
    close(ridge_leverage_scores(K, case["ridge"]), case["exact_scores_final"], f"{name}, exact scores", 1e-9)
    close(effective_dimension(K, case["ridge"]), case["exact_d_eff_final"], f"{name}, exact dimension", 1e-9)
    if "final" in case:
        check_final(dictionary, K, X[: len(case["steps"])], case)


def check_final(dictionary: StreamingDictionary, K: Tensor, X: Tensor, case: Record) -> None:
    wanted, name = case["final"], f"{case['name']}, final"
    fields: dict[str, Callable[[], Tensor]] = {
        "dictionary": lambda: dictionary.positions,
        "copies": lambda: dictionary.copies,
        "p": lambda: dictionary.probabilities,
        "weights": lambda: dictionary.weights,
        "norm_K_minus_K_tilde_over_ridge": lambda: (
            torch.linalg.matrix_norm(K - dictionary.approximation(X), 2) / case["ridge"]
        ),
    }
    known(wanted, fields, name)
    with torch.no_grad():
        for field, value in wanted.items():
            close(fields[field](), value, f"{name}, {field}", 1e-9)
        close(
            dictionary.approximation(X),
            nystrom(K, dictionary.positions, dictionary.weights, case["ridge"]).tolist(),
            f"{name}, K~",
            1e-9,
        )


def check_volumes(case: Record) -> None:
    F, y, name = tensor(case["features"]), tensor(case["y"]), case["name"]
    scores = ["leverage_scores", "inverse_christoffel", "least_squares"]
    known(case, ["name", "features", "y", "by_size", "note", "informative", *scores], name)
    found = leverage_scores(F)
    close(found, case["leverage_scores"], f"{name}, leverage scores", 1e-9)
    close(found / F.shape[1], case["inverse_christoffel"], f"{name}, inverse Christoffel", 1e-9)
    close(solved(F, y), case["least_squares"], f"{name}, least squares", 1e-9)
    for wanted in case["by_size"]:
        what, size = f"{name}, size {wanted['size']}", wanted["size"]
        known(
            wanted, ["size", "subsets", "probabilities", "expected_solution", "inclusion_probabilities", "note"], what
        )
        sets, chance = subset_probabilities(F, size)
        order = {tuple(s): place for place, s in enumerate(sets.tolist())}
        places = [order[tuple(sorted(s))] for s in wanted["subsets"]]
        assert len(places) == len(sets), what
        close(chance[places], wanted["probabilities"], f"{what}, probabilities", 1e-9)
        mean = sum(p * solved(F[s], y[s]) for s, p in zip(sets, chance, strict=True))
        close(mean, wanted["expected_solution"], f"{what}, expectation", 1e-9)
        inclusion = torch.stack([chance[(sets == i).any(1)].sum() for i in range(len(F))])
        close(inclusion, wanted["inclusion_probabilities"], f"{what}, inclusion", 1e-9)


def solved(F: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.lstsq(F, y[:, None], driver="gelsd").solution[:, 0]
