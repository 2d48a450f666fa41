"""Closed-form heads against numbers from explicit formulas: after an update, another one, and after forgetting rows.

Every `heads*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.learners.heads import (
    Discriminant,
    lda,
    mixture_lda,
    nearest_mean,
    ridge,
    ridge_leave_one_out,
    within_scatter,
)
from zoo.learners.statistics import ClassStatistics

FILES = files("heads")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "states" in case:
            check_states(case)
        elif "residuals" in case.get("expected", {}):
            check_leave_one_out(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def check_leave_one_out(case: Record) -> None:
    F, y, expected = tensor(case["features"]), torch.tensor(case["label"]), case["expected"]
    known(expected, ["residuals", "mse"], case["name"])
    found = ridge_leave_one_out(F, y, ClassStatistics().update(F, y), case["params"]["ridge_lambda"])
    close(found, expected["residuals"], case["name"], 1e-8)
    close(found.square().mean(), expected["mse"], case["name"], 1e-8)


def check_states(case: Record) -> None:
    learner, name = ClassStatistics(), case["name"]
    known(
        case,
        ["name", "params", "batch1", "batch2", "forget_rows_of_batch1", "queries", "states", "note", "informative"],
        name,
    )
    first, forgotten = rows_of(case["batch1"]), torch.tensor(case["forget_rows_of_batch1"], dtype=torch.long)
    steps = [
        lambda: learner.update(*first),
        lambda: learner.update(*rows_of(case["batch2"])),
        lambda: learner.downdate(*(values[forgotten] for values in first)),
    ]
    for step, state in zip(steps, case["states"], strict=True):
        step()
        check_state(learner, case, state["expected"], f"{name}, {state['state']}")


def rows_of(batch: Record) -> tuple[Tensor, Tensor, Tensor]:
    return tensor(batch["features"]), torch.tensor(batch["label"]), torch.tensor(batch["task"])


def check_state(learner: ClassStatistics, case: Record, expected: Record, what: str) -> None:
    params, queries = case["params"], tensor(case["queries"])
    shape = (params["tasks"], params["classes"])
    n = torch.zeros(shape, dtype=torch.float64)
    s = torch.zeros(*shape, params["D"], dtype=torch.float64)
    n[tuple(learner.components.T)] = learner.counts.double()
    s[tuple(learner.components.T)] = learner.sums
    of_ridge = ridge(learner, params["ridge_lambda"])
    means, single = nearest_mean(learner), lda(learner, params["shrinkage"])
    mixture = mixture_lda(learner, params["shrinkage"])
    some, K = learner.classes, params["classes"]
    weight = torch.zeros(params["D"], K, dtype=torch.float64)
    weight[:, some] = of_ridge.weight
    scores = torch.zeros(len(queries), K, dtype=torch.float64)
    scores[:, some] = of_ridge(queries)
    pred = {
        "ridge": of_ridge.predict(queries),
        "lda": single.predict(queries),
        "mixture": mixture.predict(queries),
        "ncm": means.predict(queries),
    }
    whole = {
        "n": n,
        "s": s,
        "G": learner.gram,
        "ridge_W": weight,
        "ridge_scores": scores,
        "lda_cov": within_scatter(learner) / learner.rows,
        "lda_shrink_added": tensor(single.added),
        "mixture_cov": within_scatter(learner, by_task=True) / learner.rows,
        "mixture_shrink_added": tensor(mixture.added),
        "mixture_components": mixture.components,
        "mixture_component_scores": mixture.component_scores(queries),
        "mixture_class_scores": mixture(queries),
        "mixture_classes": mixture.classes,
        "mixture_task": mixture.predict_task(queries),
    }
    # columns of classes that have rows: the others have no score
    seen = {
        "lda_scores": single(queries),
        "lda_mahalanobis_sq": single.mahalanobis(queries),
        "ncm_dist_sq": -means(queries),
    }
    known(expected, [*whole, *seen, "pred"], what)
    for field, wanted in expected.items():
        if field in whole:
            close(whole[field], wanted, f"{what}, {field}", 1e-8)
        elif field in seen:
            close(seen[field], of_classes(wanted, some, K), f"{what}, {field}", 1e-8)
    known(expected.get("pred", {}), pred, what)
    for head, wanted in expected.get("pred", {}).items():
        assert pred[head].tolist() == wanted, f"{what}, {head}"
    check_shrunk(single, whole["lda_cov"], what)


def of_classes(wanted: list[list[Any]], classes: Tensor, count: int) -> list[list[Any]]:
    chosen = classes.tolist() if len(wanted[0]) == count else range(len(classes))
    return [[row[c] for c in chosen] for row in wanted]


def check_shrunk(head: Discriminant, covariance: Tensor, what: str) -> None:
    rebuilt = head.lower @ head.lower.T - head.added * torch.eye(len(covariance), dtype=torch.float64)
    close(rebuilt, covariance.tolist(), f"{what}, factor", 1e-8)
