"""Kernels of Gaussian processes, their gradients and kernel-target alignment against numbers from explicit formulas.

Every `gpkernel*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one
test. What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.learners.golden import Record, close, files, known, read, tensor
from tests.learners.trees import build, check_gradients, raw_of
from zoo.kernels.alignment import alignment, label_kernel

FILES = files("gpkernel")
MATRICES = ["K_XX", "K_XZ", "diag_X", "sum_W_K_XZ", "grad_sum_W_K_XZ", "grad_X_sum_W_K_XZ"]
SETTING = ["name", "kernel", "X", "Z", "W", "note", "formula", "batch", "informative"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if case.get("kind") == "kta":
            check_alignment(case)
        elif "K_XZ" in case or "K_XX" in case:
            check_matrices(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def check_matrices(case: Record) -> None:
    name = case["name"]
    known(case, [*SETTING, *MATRICES, "K_XZ_product_of_sums"], name)
    kernel, places = build(case["kernel"])
    for place in places.values():
        raw_of(*place)
    X, Z = tensor(case["X"]).requires_grad_("grad_X_sum_W_K_XZ" in case), tensor(case["Z"])
    K = kernel(X, Z)
    if "K_XX" in case:
        close(kernel(X).detach(), case["K_XX"], f"{name}, K_XX", 1e-10)
        close(kernel.diag(X).detach(), case["diag_X"], f"{name}, diagonal", 1e-10)
    close(K.detach(), case["K_XZ"], f"{name}, K_XZ", 1e-10)
    if "K_XZ_product_of_sums" in case:  # what is something else on purpose
        assert float((K.detach() - tensor(case["K_XZ_product_of_sums"])).abs().max()) > 1e-3
    if "W" not in case:
        return
    value = (tensor(case["W"]) * K).sum()
    close(value.detach(), case["sum_W_K_XZ"], f"{name}, sum", 1e-10)
    check_gradients(value, case["grad_sum_W_K_XZ"], places, name, 1e-10)
    if X.requires_grad:
        (slope,) = torch.autograd.grad(value, X)
        close(slope, case["grad_X_sum_W_K_XZ"], f"{name}, gradient in X", 1e-10)


def check_alignment(case: Record) -> None:
    name = case["name"]
    wanted = ["K", "kta_centred", "kta_uncentred", "grad_kta_centred", "grad_kta_uncentred"]
    known(case, ["name", "kind", "kernel", "X", "y", "target", "note", *wanted], name)
    y = tensor(case["y"])
    targets = {"binary-outer": y, "one-hot": y.long()}
    if case["target"] not in targets:
        pytest.fail(f"{name}: no target {case['target']!r}")
    kernel, places = build(case["kernel"])
    K, target = kernel(tensor(case["X"])), targets[case["target"]]
    close(K.detach(), case["K"], f"{name}, K", 1e-10)
    for field, centred in (("kta_centred", True), ("kta_uncentred", False)):
        value = alignment(K, target, centred=centred)
        close(value.detach(), case[field], f"{name}, {field}", 1e-10)
        close(alignment(K, label_kernel(target), centred=centred).detach(), case[field], f"{name}, {field}", 1e-10)
        if f"grad_{field}" in case:
            check_gradients(value, case[f"grad_{field}"], places, f"{name}, {field}", 1e-10)
