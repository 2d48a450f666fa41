"""GRBF against numbers computed by its authors' code.

Every `grbf*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.data.tabular import synthetic
from zoo.kernels import squared_distances
from zoo.models.grbf import GaussianRBFNetwork, eigen, importance_from_precision, network_loss

FOLDER = Path(os.environ.get("ZOO_GOLDEN_DIR") or Path(__file__).parents[1] / "golden")
FILES = sorted(FOLDER.glob("grbf*"))
Record = dict[str, Any]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    record = json.loads(path.read_text())
    checks = [check for knows, check in KINDS if knows(record)]
    if not checks:
        pytest.fail(f"{path.name}: no known kind of golden file, fields {sorted(record)}")
    for check in checks:
        check(record)


def test_golden_folder_is_not_empty() -> None:
    assert FILES, f"no grbf* in {FOLDER}"


# ---- comparisons -------------------------------------------------------------------------------------------


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor | float, wanted: Any, record: Record, name: str) -> None:
    tolerance = {"rtol": 1e-5, "atol": 1e-9} | record.get("meta", {}).get("tolerance", {})
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    torch.testing.assert_close(
        found, tensor(wanted), rtol=tolerance["rtol"], atol=tolerance["atol"], msg=lambda m: f"{name}: {m}"
    )


def probabilities(outputs: Tensor, task: str) -> Tensor:
    if task == "regression":
        return outputs.squeeze(-1)
    return outputs.softmax(-1) if task == "multiclass" else outputs.sigmoid().squeeze(-1)


def build(init: Record, hyper: Record) -> GaussianRBFNetwork:
    """The authors' network: no intercept, plain norms; a fixed-centre network still pays for its centres."""
    return GaussianRBFNetwork.from_authors(
        {k: tensor(v) for k, v in init.items() if k != "centers" or hyper["learnable_centers"]},
        tensor(init["centers"]),
        reg_precision=hyper["gaussian_regularizer"],
        reg_weights=hyper["weights_regularizer"],
        reg_centers=(hyper.get("centers_regularizer") or 0.0) if hyper["learnable_centers"] else 0.0,
        penalty="plain",
    )


DATA_TERM = {"regression": "mse", "binary": "cross_entropy", "multiclass": "official_nll"}


def own_names(values: Record) -> dict[str, Tensor]:
    """The authors' parameters under our names and in our layout."""
    found = {name: tensor(v) for name, v in values.items()}
    if "weights" in found:
        weights = found.pop("weights")
        found["head.weight"] = weights.reshape(len(weights), -1).mT
    return found


def check_parameters(values: dict[str, Tensor], wanted: Record, record: Record, what: str) -> None:
    for name, value in own_names(wanted).items():
        close(values[name], value.tolist(), record, f"{what} {name}")


# ---- kinds of files ----------------------------------------------------------------------------------------


def check_forward(record: Record, block: Record | None = None) -> None:
    """Kernel, outputs, every loss term and gradient, importances, and a few steps of Adam."""
    block = block or record
    hyper, task = record["hyper"], record["hyper"]["task"]
    X, y = tensor(record["X"]), tensor(record["y"])
    y = y.long() if task == "multiclass" else y
    network = build(block["init"], hyper)

    def loss() -> Tensor:
        return network_loss(network(X), y, DATA_TERM[task]) + sum(network.penalties().values())

    close(network.factor(), block["L"], record, "L")
    close(network.precision(), block["precision"], record, "precision")
    phi = network.forward_features(X)
    close(phi, block["phi"], record, "phi")
    L = network.factor()
    close(squared_distances(X @ L, network.centers @ L), block["sqdist"], record, "sqdist")  # phi may underflow
    close(probabilities(network(X), task), block["y_hat"], record, "y_hat")
    terms = {**network.penalties(), "data": network_loss(network(X), y, DATA_TERM[task])}
    for ours, theirs in {
        "precision": "gaussian",
        "weights": "weights",
        "centers": "centers",
        "data": "data",
    }.items():
        if ours in terms:
            close(terms[ours], block["loss_terms"][theirs], record, theirs)
    close(loss(), block["loss"], record, "loss")
    loss().backward()
    check_parameters({n: p.grad for n, p in network.named_parameters()}, block["grads"], record, "gradient of")  # type: ignore[misc]
    check_importances(network.precision().detach(), block, record)
    if "adam" in block:
        check_adam(network, loss, block["adam"], record)


def check_adam(network: GaussianRBFNetwork, loss: Callable[[], Tensor], wanted: Record, record: Record) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=wanted["lr"])
    before = []
    for _ in range(wanted["steps"]):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        before.append(value.item())
    close(tensor(before), wanted["loss_before_each_step"], record, "Adam losses")
    close(loss(), wanted["loss_after"], record, "loss after Adam")
    check_parameters(dict(network.named_parameters()), wanted["params_after"], record, "after Adam")
    close(network.feature_importance(), wanted["feature_importance_after"], record, "importance after Adam")


def check_importances(precision: Tensor, block: Record, record: Record) -> None:
    values, components = eigen(precision)
    if not bool(values.any()):  # where theirs are not numbers, ours are equal shares
        with pytest.warns(RuntimeWarning, match="zero"):
            assert importance_from_precision(precision).unique().numel() == 1
        return
    close(importance_from_precision(precision), block["feature_importance"], record, "importance")
    close(values.flip(-1), block["eigenvalues_ascending"], record, "eigenvalues")
    vectors, wanted = components.flip(0).abs(), tensor(block["abs_eigenvectors_columns"]).mT
    apart = torch.diff(values.flip(-1)).abs() > 1e-8 * values.sum()  # inside a repeated eigenvalue any basis is right
    alone = torch.cat([torch.tensor([True]), apart]) & torch.cat([apart, torch.tensor([True])])
    close(vectors[alone], wanted[alone].tolist(), record, "eigenvectors")


def check_multi(record: Record) -> None:
    """Both of the authors' multi-class losses, and cross-entropy on logits."""
    official = record["official_2024_nll_on_probabilities"]
    check_forward(record, official)
    X, y, hyper = tensor(record["X"]), torch.tensor(record["y"]), record["hyper"]
    if "official_2023_ce_on_probabilities" in record:
        wanted = record["official_2023_ce_on_probabilities"]
        init = official["init"]
        trained = len(wanted["flat_grad"]) > tensor(init["weights"]).numel() + len(init["precision_elements"])
        network = build(init, {**hyper, "learnable_centers": trained})
        total = network_loss(network(X), y, "official_ce") + sum(network.penalties().values())
        close(total, wanted["loss"], record, "loss of 2023")
        total.backward()
        assert isinstance(network.head, torch.nn.Linear)
        parts = [network.centers.grad] if trained else []
        parts += [network.head.weight.grad.mT, network.precision_elements.grad]  # type: ignore[union-attr,list-item]
        flat = torch.cat([part.flatten() for part in parts])  # type: ignore[union-attr]
        close(flat, wanted["flat_grad"], record, "gradient of 2023")
    if "corrected_cross_entropy_on_logits" in record:
        wanted = record["corrected_cross_entropy_on_logits"]
        network = build(official["init"], hyper)
        close(network(X), wanted["logits"], record, "logits")
        data = network_loss(network(X), y)
        close(data, wanted["data"], record, "cross-entropy")
        total = data + sum(network.penalties().values())
        close(total, wanted["loss"], record, "corrected loss")
        total.backward()
        check_parameters({n: p.grad for n, p in network.named_parameters()}, wanted["grads"], record, "gradient of")  # type: ignore[misc]


def check_legacy(record: Record) -> None:
    """The losses of 2023 on one flat vector: sums over the rows, plain norms, trained centres."""
    X = tensor(record["X"])
    (n, D), flat = X.shape, tensor(record["flat"])
    M = (len(flat) - D * (D + 1) // 2) // (D + 1)
    centers, weights, elements = flat.split([M * D, M, D * (D + 1) // 2])
    init = {
        "centers": centers.reshape(M, D).tolist(),
        "weights": weights.tolist(),
        "precision_elements": elements.tolist(),
    }
    cases = {
        "regression": (X, record["y"], "mse", 1 / n),
        "regression_minibatch_first5": (X[:5], record["y"][:5], "mse", 1 / n),
        "binary": (X, record["y_binary"], "cross_entropy", 1.0),
    }
    for name in cases.keys() & record.keys():
        rows, y, kind, weight = cases[name]
        network = build(init, {**record["hyper"], "learnable_centers": True})
        weights = torch.full((len(rows),), weight, dtype=torch.float64)
        data = network_loss(network(rows), tensor(y), kind, weight=weights, reduction="sum")
        total = data + sum(network.penalties().values())
        close(total, record[name]["loss"], record, name)
        total.backward()
        assert isinstance(network.head, torch.nn.Linear)
        gradients = [network.centers.grad, network.head.weight.grad, network.precision_elements.grad]
        close(
            torch.cat([g.flatten() for g in gradients]),
            record[name]["flat_grad"],
            record,
            f"gradient of {name}",
        )  # type: ignore[union-attr]


def check_extraction(record: Record) -> None:
    """Importances, spectrum and projection of given precision matrices."""
    for name, case in record["cases"].items():
        P = tensor(case["P"])
        check_importances(P, case, record)
        values = eigen(P).values
        close(values / values.sum(), case["explained_ratio_descending"], record, name)
        close(values.cumsum(0) / values.sum(), case["cumulative_descending"], record, name)
        close(importance_from_precision(P, "trace"), case["trace_importance"], record, name)


def check_projection(record: Record) -> None:
    wanted = record["projection"]
    _, components = eigen(tensor(wanted["P"]))
    close(components.mT, wanted["V_descending_signed"], record, "eigenvectors with signs")
    Z = tensor(wanted["X"]) @ components[:2].mT
    close(Z, wanted["Z_top2"], record, "projection")
    close(Z @ components[:2], wanted["X_back_from_top2"], record, "back-projection")


def check_synthetic(record: Record) -> None:
    """Rows and checksums of the synthetic problems, `<problem>_n<rows>_seed<seed>`."""
    for name, case in record["cases"].items():
        problem, n, seed = name.split("_")
        X, y = synthetic(problem, int(n.removeprefix("n")), int(seed.removeprefix("seed")))
        found = {"first3": X[:3], "y_first10": y[:10], "X_sum": X.sum(), "X_sumsq": (X**2).sum()}
        found |= {"y_sum": y.sum(), "col_means": X.mean(0)}
        for key, value in found.items():
            close(torch.as_tensor(value), case[key], record, f"{name} {key}")


def recipe_data(recipe: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised rows and 0/1 targets of training and test, from `load_<table>; keep classes a and b; y=1 for class
    b; train_test_split(test_size=..., random_state=...)`.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    def read(pattern: str) -> str:
        found = re.search(pattern, recipe)
        assert found, f"the recipe does not say {pattern!r}: {recipe}"
        return found[1]

    X, y = getattr(datasets, f"load_{read(r'load_([a-z_]+)')}")(return_X_y=True)
    if "keep classes" in recipe:
        kept = np.isin(y, [int(read(r"keep classes (\d+)")), int(read(r"keep classes \d+ and (\d+)"))])
        X, y = X[kept], y[kept]
    y = (y == int(read(r"y=1 for class (\d+)"))).astype(float)
    share, seed = float(read(r"test_size=([\d.]+\d)")), int(read(r"random_state=(\d+)"))
    train, test, y_train, y_test = train_test_split(X, y, test_size=share, random_state=seed)
    scaler = StandardScaler().fit(train)
    rows = [torch.from_numpy(scaler.transform(part)) for part in (train, test)]
    return rows[0], rows[1], torch.from_numpy(y_train), torch.from_numpy(y_test)


def check_training(record: Record) -> None:
    """Full-batch Adam from the recorded start: every recorded loss, then what the network says."""
    train, test, y_train, y_test = recipe_data(record["recipe"])
    hyper = record["hyper"]
    network = build(record["init"], {"centers_regularizer": 0.0, **hyper})
    if "at_init" in record:
        start = record["at_init"]
        close(network.precision().trace(), start["trace_precision"], record, "trace at the start")
        largest = network.forward_features(train).max().log()
        close(largest, math.log(start["max_phi"]), record, "largest activation at the start")
    optimizer = torch.optim.Adam(network.parameters(), lr=hyper["lr"])

    def loss() -> Tensor:
        return network_loss(network(train), y_train) + sum(network.penalties().values())

    wanted = {int(step): value for step, value in record["loss"].items()}
    for step in range(hyper["epochs"]):
        optimizer.zero_grad()
        value = loss()
        if step in wanted:
            close(value, wanted[step], record, f"loss before step {step}")
        value.backward()
        optimizer.step()
    close(loss(), record["final_loss"], record, "final loss")
    close(network.feature_importance(), record["feature_importance"], record, "importance")
    top = record["eigenvalues_top4"]
    close(network.spectrum().values[: len(top)], top, record, "eigenvalues")
    for rows, targets, key in ((train, y_train, "train_accuracy"), (test, y_test, "test_accuracy")):
        decided = (
            network(rows).sigmoid().squeeze(-1) > 0.5
        )  # far from all centres the logit is 1e-27, and the answer no
        close((decided == (targets > 0.5)).double().mean(), record[key], record, key)


def of_cases(record: Record, field: str) -> bool:
    return isinstance(record.get("cases"), dict) and all(field in case for case in record["cases"].values())


def fields(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(name in record for name in names)


KINDS: list[tuple[Callable[[Record], bool], Callable[[Record], None]]] = [
    (fields("hyper", "X", "init", "phi"), check_forward),
    (fields("official_2024_nll_on_probabilities", "X", "y"), check_multi),
    (fields("flat", "hyper", "X"), check_legacy),
    (fields("hyper", "init", "final_loss"), check_training),
    (fields("projection"), check_projection),
    (lambda record: of_cases(record, "P"), check_extraction),
    (lambda record: of_cases(record, "X_sumsq"), check_synthetic),
]
