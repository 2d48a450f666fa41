"""What only this zoo can do: heads of one family on the features of another, each as a measurement.

>>> for line in heads(Path("results")): print(line)      # python -m zoo benchmark compose heads
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.benchmarks.records import Records, markdown, mean_sd, put_section, surroundings
from zoo.data.image import Digits
from zoo.data.sampling import stratified_split
from zoo.kernels import Gaussian, solve_ridge, squared_distances
from zoo.models import shipped
from zoo.tools.evaluation import load

__all__ = ["HEADS", "features", "heads", "target_parts"]

SEEDS = 5
PER_CLASS = (5, 20)
Parts = dict[str, tuple[Tensor, Tensor]]


@torch.inference_mode()
def features(model: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """Pooled features (B, num_features) of a spatial model in eval mode, float64."""
    model.eval()
    parts = []
    for chunk in images.split(batch):
        maps = model.forward_features(chunk)  # type: ignore[operator]
        parts.append(model.forward_head(maps, pre_logits=True).double())  # type: ignore[operator]
    return torch.cat(parts)


def target_parts(record: dict[str, Any]) -> Parts:
    """The 8 x 8 digits of scikit-learn, sized and normalised for a backbone: `train`, `val` and `test` images."""
    how = record["preprocessing"]
    data = Digits(image_size=how["input_size"][-1], augment=False)
    data.setup()
    mean, std = float(how["mean"][0]), float(how["std"][0])
    parts: Parts = {}
    for name, rows in data.datasets.items():
        images, targets = rows.batch(list(range(len(rows.targets))))
        parts[name] = ((images * data.std[0] + data.mean[0] - mean) / std, targets)
    return parts


def _few(targets: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of a draw with as many rows of every class."""
    share = per_class * int(targets.max() + 1) / len(targets)
    _, chosen = stratified_split(targets.numpy(), share, seed)
    return torch.as_tensor(chosen)


# ---- heads -------------------------------------------------------------------------------------------------

Decision = Callable[[Tensor], Tensor]
Head = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Decision, dict[str, Any]]]


def _best(candidates: Sequence[Any], fit: Callable[[Any], Callable[[Tensor], Tensor]], X: Tensor, y: Tensor) -> Any:
    """The fitted candidate with the best accuracy on the validation rows; the first of equals."""
    fitted = [fit(candidate) for candidate in candidates]
    scores = [float((decide(X) == y).double().mean()) for decide in fitted]
    return fitted[int(np.argmax(scores))]


def linear_head(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Decision, dict[str, Any]]:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression

    mean, std = X.mean(0), X.std(0).clamp_min(1e-9)

    def fit(C: float) -> Callable[[Tensor], Tensor]:
        model = LogisticRegression(C=C, max_iter=2000).fit(((X - mean) / std).numpy(), y.numpy())
        return lambda Z: torch.from_numpy(model.predict(((Z - mean) / std).numpy()))

    return _best((0.01, 0.1, 1.0), fit, X_val, y_val), {}


def ridge_head(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Decision, dict[str, Any]]:
    """Kernel ridge regression of one-hot targets with a Gaussian kernel whose width is a multiple of the median
    distance.
    """
    mean, std = X.mean(0), X.std(0).clamp_min(1e-9)
    rows = (X - mean) / std
    median = float(squared_distances(rows).median().sqrt())
    Y = torch.nn.functional.one_hot(y).double() - 1 / (int(y.max()) + 1)

    def fit(setting: tuple[float, float]) -> Callable[[Tensor], Tensor]:
        kernel = Gaussian(lengthscale=setting[0] * median).double()
        with torch.no_grad():
            weights = solve_ridge(kernel(rows), Y, setting[1])

        def decide(Z: Tensor) -> Tensor:
            with torch.no_grad():
                return (kernel((Z - mean) / std, rows) @ weights).argmax(1)

        return decide

    return _best([(width, ridge) for width in (0.5, 1.0, 2.0) for ridge in (1e-3, 1e-1)], fit, X_val, y_val), {}


def grbf_head(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Decision, dict[str, Any]]:
    """GRBF with a precision matrix of rank 8, which tells how many of the features matter."""
    from zoo.estimators import GRBFClassifier

    fitted: list[Any] = []

    def fit(reg: float) -> Callable[[Tensor], Tensor]:
        model = GRBFClassifier(n_centers=20, precision=8, reg_precision=reg, max_iter=200, random_state=0)
        with warnings.catch_warnings(action="ignore"):  # it is stopped early on purpose
            model.fit(X.numpy(), y.numpy())
        fitted.append(model)
        return lambda Z: torch.from_numpy(model.predict(Z.numpy()))

    candidates = (1e-3, 1e-2, 1e-1)
    decide = _best(candidates, fit, X_val, y_val)
    scores = [float((torch.from_numpy(m.predict(X_val.numpy())) == y_val).double().mean()) for m in fitted]
    shares = np.sort(fitted[int(np.argmax(scores))].feature_importance())[::-1]
    return decide, {"top_share": float(shares[:10].sum() / shares.sum())}


HEADS: dict[str, Head] = {"linear": linear_head, "kernel ridge": ridge_head, "GRBF": grbf_head}


def backbones() -> list[str]:
    """Shipped weights of spatial models for grey images of 28 x 28, whose features a head can take."""
    return [
        name
        for name, record in shipped.records().items()
        if record["preprocessing"].get("input_size") == [1, 28, 28] and record["class_names"]
    ]


def heads(folder: Path, seeds: int = SEEDS) -> Iterator[str]:
    """Few labelled 8 x 8 digits, heads on frozen backbones that were trained on other digits.

    Args:
        folder: Where `compose_heads.csv` is kept; the table goes into RESULTS.md beside the folder.
        seeds: Draws of the labelled rows.

    Yields:
        One line a measurement, then the table.
    """
    records = Records(
        folder / "compose_heads.csv", ("features", "head", "per_class", "seed"), ("accuracy", "top_share")
    )
    names = ["pixels", *backbones()]
    for name in names:
        todo = [
            (head, count, seed)
            for head in HEADS
            for count in PER_CLASS
            for seed in range(seeds)
            if {"features": name, "head": head, "per_class": count, "seed": seed} not in records
        ]
        if not todo:
            continue
        parts = _inputs(name)
        for head, count, seed in todo:
            X, y = parts["train"]
            chosen = _few(y, count, seed)
            decide, told = HEADS[head](X[chosen], y[chosen], *parts["val"])
            X_test, y_test = parts["test"]
            score = float((decide(X_test) == y_test).double().mean())
            row = {"features": name, "head": head, "per_class": count, "seed": seed, "accuracy": score}
            records.add(row | {"top_share": told.get("top_share", "")})
            yield f"{name}, {head}, {count} a class, seed {seed}: {score:.4f}"
    text = _table(records, names)
    put_section(folder.parent / "RESULTS.md", "compose heads", _HEADS_TEXT + f"{surroundings()}.\n\n{text}")
    yield text


_HEADS_TEXT = """## Composition: heads on frozen features

`python -m zoo benchmark compose heads`

Accuracy on the 359 test rows of scikit-learn's digits, resized to 28 x 28, from few labels a class: mean (standard
deviation) over draws of the labelled rows. The backbones were trained on MNIST digits and are not changed; every head
chooses its setting on the 143 validation rows. Top ten: share of the GRBF importance on its ten strongest features.
"""


def _inputs(name: str) -> Parts:
    if name == "pixels":
        data = Digits(augment=False)
        data.setup()
        batches = {n: rows.batch(list(range(len(rows.targets)))) for n, rows in data.datasets.items()}
        return {n: (x.flatten(1).double(), y) for n, (x, y) in batches.items()}
    model = load(name)
    return {part: (features(model, x), y) for part, (x, y) in target_parts(shipped.record(name)).items()}


def _table(records: Records, names: Sequence[str]) -> str:
    rows = []
    for name in names:
        for head in HEADS:
            cells = [mean_sd(v) if (v := records.numbers("accuracy", features=name, head=head, per_class=c)) else ""
                     for c in PER_CLASS]  # fmt: skip
            shares = [r["top_share"] for r in records.select(features=name, head=head) if r["top_share"]]
            share = f"{np.mean([float(s) for s in shares]):.2f}" if shares else ""
            n = len(records.select(features=name, head=head, per_class=PER_CLASS[0]))
            rows.append([name, head, *cells, n, share])
    return markdown(["features", "head", *(f"{c} labels a class" for c in PER_CLASS), "draws", "top ten"], rows)
