"""Few-shot heads against numbers of the released code: every layer, and gradients of what is learned.

Every `unem*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.learners.few_shot import (
    DirichletLayer,
    UNEMDirichlet,
    UNEMGaussian,
    dirichlet_layers,
    em_dirichlet,
    gaussian_layers,
    min_max_scaled,
    nll,
    paddle,
)

FILES = files("unem")
GRADIENTS = {"d_nll_d_": "nll", "d_ce_official_d_": "ce_double_softmax_official"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        fields = set(case["expected"])
        if "alpha" in fields:
            check_dirichlet(case)
        elif "W_in_official_scaled_space" in fields:
            check_paddle(case)
        elif {"U", "W"} & fields:
            check_gaussian(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(fields)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def episode(case: Record) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.tensor(case["support_labels"]).reshape(tensor(case["support"]).shape[:-1])
    return tensor(case["support"]), labels, tensor(case["query"]), torch.tensor(case["query_labels"])


def double_softmax(U: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(U.flatten(0, -2), labels.flatten())


def check_losses(case: Record, head: torch.nn.Module, U: Tensor, labels: Tensor, tolerance: float) -> list[str]:
    """Losses and their gradients; returns the fields that it knows."""
    expected, name = case["expected"], case["name"]
    losses = {"nll": nll(U, labels), "ce_double_softmax_official": double_softmax(U, labels)}
    numbers = dict(head.named_parameters())
    checked = list(losses)
    for field, value in losses.items():
        if field in expected:
            close(value.detach(), expected[field], f"{name}, {field}", tolerance)
    for start, loss in GRADIENTS.items():
        if any(field.startswith(start) for field in expected):
            found = dict(
                zip(numbers, torch.autograd.grad(losses[loss], list(numbers.values()), retain_graph=True), strict=True)
            )
            for letter, gradient in found.items():
                checked.append(start + letter)
                if start + letter in expected:
                    close(gradient, expected[start + letter], f"{name}, {start}{letter}", tolerance * 100)
    return checked


def check_gaussian(case: Record) -> None:
    params, expected, name = case["params"], case["expected"], case["name"]
    support, labels, query, wanted = episode(case)
    head = UNEMGaussian(params["layers"], eps=params["v_eps"], dtype=torch.float64)
    for letter in "abc":
        getattr(head, letter).data = tensor(params[letter])
    for field, value in {"lam": head.lam, "T": head.temperature, "t": head.scale}.items():
        close(value.detach(), params[field], f"{name}, {field}", 1e-12)
    K = params["n_classes"]
    layers = list(head.layers(support, labels, query, K))
    U = head(support, labels, query, K)
    R = torch.nn.functional.one_hot(labels, K).double()
    found = {
        "W0": R.mT @ (head.scale * support) / R.sum(-2)[..., None],
        "V0": tensor(1.0),
        "U": torch.stack([layer.assignments for layer in layers]),
        "V": torch.stack([layer.balance for layer in layers]),
        "W": torch.stack([layer.means for layer in layers]),
        "pred": U.argmax(-1),
    }
    for field in expected:
        if field in found:
            close(found[field].detach(), expected[field], f"{name}, {field}", 1e-9)
    known(expected, [*found, *check_losses(case, head, U, wanted, 1e-9)], name)


def check_paddle(case: Record) -> None:
    params, expected, name = case["params"], case["expected"], case["name"]
    support, labels, query, _ = episode(case)
    known(expected, ["U", "V", "W_in_official_scaled_space", "pred"], name)
    ours = min_max_scaled(support, query)
    low, high = query.amin(-2, keepdim=True), query.amax(-2, keepdim=True)
    shift = low / (high - low) - low  # the release divides first and takes the minimum away afterwards
    for field, value in zip(("scaled_support_official", "scaled_query_official"), ours, strict=True):
        if field in case:
            close(value + shift, case[field], f"{name}, {field}", 1e-9)
    last, K = max(params["iterations"]), len(expected["U"][0][0][0])
    lam = torch.full((last,), float(params["lam"]), dtype=torch.float64)
    T = torch.full_like(lam, params["T"])
    layers = list(gaussian_layers(ours[0], labels, ours[1], lam, T, K, eps=params["v_eps"], offset=0.0))
    for place, count in enumerate(params["iterations"]):
        layer, what = layers[count - 1], f"{name}, {count} iterations"
        close(layer.assignments, expected["U"][place], f"{what}, U", 1e-9)
        close(layer.balance, expected["V"][place], f"{what}, V", 1e-9)
        close(layer.means + shift, expected["W_in_official_scaled_space"][place], f"{what}, W", 1e-9)
        if params["T"] == 1:
            U = paddle(support, labels, query, K, lam=params["lam"], iterations=count, eps=params["v_eps"])
            close(U, expected["U"][place], f"{what}, U of paddle", 1e-9)
    assert layers[-1].assignments.argmax(-1).tolist() == expected["pred"], name


def check_dirichlet(case: Record) -> None:
    params, expected, name = case["params"], case["expected"], case["name"]
    support, labels, query, wanted = episode(case)
    settings = {
        "eps": params["eps"],
        "max_steps": params["mm_steps_max"],
        "tolerance": params["mm_tol"],
        "check_every": params["mm_check_every"],
    }
    checked: list[str] = []
    if "a" in params:
        head = UNEMDirichlet(params["layers"], max_steps=params["mm_steps_max"], dtype=torch.float64)
        head.a.data, head.b.data, head.t.data = (tensor(params[field]) for field in ("a", "b", "t_raw"))
        lam, T, t = head.lam, head.temperature, head.t
        close(lam.detach(), params["lam"], f"{name}, lam", 1e-12)
        close(T.detach(), params["T"], f"{name}, T", 1e-12)
    else:
        lam = torch.full((params["layers"],), float(params["lam"]), dtype=torch.float64)
        T, t = torch.full_like(lam, params["T"]), tensor(params["t_raw"])
        if params["T"] == 1 and params["lam"] == params["n_classes"] // params["k_eff"]:
            U = em_dirichlet(
                support,
                labels,
                query,
                present=params["k_eff"],
                scale=params["t_raw"],
                iterations=params["layers"],
                max_steps=params["mm_steps_max"],
            )
            close(U, expected["U"][-1], f"{name}, em_dirichlet", 1e-7)
    p, q = (t * support).softmax(-1), (t * query).softmax(-1)
    layers: list[DirichletLayer] = list(dirichlet_layers(p, labels, q, lam, T, **settings))
    found = {
        "p_query": q,
        "p_support": p,
        "m": torch.stack([layer.mean_log for layer in layers]),
        "alpha": torch.stack([layer.alpha for layer in layers]),
        "mm_steps": torch.tensor([layer.steps for layer in layers]),
        "V": torch.stack([layer.balance for layer in layers]),
        "U": torch.stack([layer.assignments for layer in layers]),
        "pred": layers[-1].assignments.argmax(-1),
    }
    for field in expected:
        if field in found:
            close(found[field].detach(), expected[field], f"{name}, {field}", 1e-7)
    if "a" in params:
        U = layers[-1].assignments
        checked = check_losses(case, head, U, wanted, 1e-8)
    known(expected, [*found, *checked], name)
