"""Combinations of families: heads of one family on the features of another.

>>> for line in heads(Path("results")): print(line)      # python -m zoo benchmark compose heads
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.benchmarks import measurement
from zoo.data.image import Digits
from zoo.data.sampling import stratified_split
from zoo.kernels import Gaussian, squared_distances
from zoo.learners.ridge import solve_ridge
from zoo.registry import bundled_weights
from zoo.results.records import Provenance, Records, markdown, mean_sd, put_section
from zoo.support.scaling import standardisation
from zoo.tools.evaluation import load

__all__ = ["HEADS", "MapAdapter", "adapt_maps", "adapters", "continual", "features", "heads", "target_parts"]

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
    """Scikit-learn's 8 x 8 digits, resized and normalised for a backbone: `train`, `val` and `test` images."""
    how = record["preprocessing"]
    data = Digits(image_size=how["input_size"][-1], augment=False)
    data.setup()
    mean, std = float(how["mean"][0]), float(how["std"][0])
    parts: Parts = {}
    for name, rows in data.datasets.items():
        images, targets = rows.batch(list(range(len(rows.targets))))
        parts[name] = ((images * data.std[0] + data.mean[0] - mean) / std, targets)
    return parts


def _subset(targets: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of a random subset with `per_class` rows of every class."""
    share = per_class * int(targets.max() + 1) / len(targets)
    _, chosen = stratified_split(targets.numpy(), share, seed)
    return torch.as_tensor(chosen)


# ---- heads -------------------------------------------------------------------------------------------------

Decision = Callable[[Tensor], Tensor]
Head = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Decision, dict[str, Any]]]


def _best(candidates: Sequence[Any], fit: Callable[[Any], Callable[[Tensor], Tensor]], X: Tensor, y: Tensor) -> Any:
    """The fitted candidate with the best validation accuracy, the first one in a tie."""
    fitted = [fit(candidate) for candidate in candidates]
    scores = [float((decide(X) == y).double().mean()) for decide in fitted]
    return fitted[int(np.argmax(scores))]


def linear_head(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Decision, dict[str, Any]]:
    """Logistic regression on standardised features."""
    from sklearn.linear_model import LogisticRegression

    mean, std = standardisation(X)

    def fit(C: float) -> Callable[[Tensor], Tensor]:
        model = LogisticRegression(C=C, max_iter=2000).fit(((X - mean) / std).numpy(), y.numpy())
        return lambda Z: torch.from_numpy(model.predict(((Z - mean) / std).numpy()))

    return _best((0.01, 0.1, 1.0), fit, X_val, y_val), {}


def ridge_head(X: Tensor, y: Tensor, X_val: Tensor, y_val: Tensor) -> tuple[Decision, dict[str, Any]]:
    """Kernel ridge regression of one-hot targets with a Gaussian kernel of 0.5, 1 or 2 times the median distance."""
    mean, std = standardisation(X)
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
    """GRBF with a precision matrix of rank 8; also returns the importance share of the ten strongest features."""
    from zoo.estimators import GRBFClassifier

    fitted: list[Any] = []

    def fit(reg: float) -> Callable[[Tensor], Tensor]:
        model = GRBFClassifier(
            solver="adam", n_centers=20, precision=8, reg_precision=reg, max_iter=200, random_state=0
        )
        with warnings.catch_warnings(action="ignore"):  # max_iter is small on purpose
            model.fit(X.numpy(), y.numpy())
        fitted.append(model)
        return lambda Z: torch.from_numpy(model.predict(Z.numpy()))

    candidates = (1e-3, 1e-2, 1e-1)
    decide = _best(candidates, fit, X_val, y_val)
    scores = [float((torch.from_numpy(m.predict(X_val.numpy())) == y_val).double().mean()) for m in fitted]
    shares = np.sort(fitted[int(np.argmax(scores))].feature_importance())[::-1]
    return decide, {"top_share": float(shares[:10].sum() / shares.sum())}


HEADS_CODE = ("zoo/estimators", "zoo/models/grbf.py", "zoo/learners/ridge.py")
CONTINUAL_CODE = ("zoo/models/continual", "zoo/kernels/random_features")
ADAPTERS_CODE = ("zoo/adapters", "zoo/kernels/random_features")

HEADS: dict[str, Head] = {"linear": linear_head, "kernel ridge": ridge_head, "GRBF": grbf_head}


def backbones() -> list[str]:
    """Shipped weights trained on MNIST digits, used as backbones."""
    return [name for name, record in bundled_weights.records().items() if record["tag"] == "mnist5k"]


@measurement("compose", "heads", "GRBF, kernel ridge and linear heads on frozen features")
def heads(folder: Path, seeds: int = SEEDS) -> Iterator[str]:
    """Heads on frozen backbones with few labelled 8 x 8 digits; the backbones were trained on other digits.

    Args:
        folder: Folder of `compose_heads.csv`; the table goes into RESULTS.md beside it.
        seeds: Number of random subsets of labelled rows.

    Yields:
        One line per measurement, then the table.
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
            chosen = _subset(y, count, seed)
            decide, told = HEADS[head](X[chosen], y[chosen], *parts["val"])
            X_test, y_test = parts["test"]
            score = float((decide(X_test) == y_test).double().mean())
            row = {"features": name, "head": head, "per_class": count, "seed": seed, "accuracy": score}
            records.add(row | {"top_share": told.get("top_share", "")})
            yield f"{name}, {head}, {count} a class, seed {seed}: {score:.4f}"
    source = Provenance(records.rows, HEADS_CODE)
    text = _table(records, names, source)
    put_section(folder.parent / "RESULTS.md", "compose heads", f"{_HEADS_TEXT}{source}\n\n{text}")
    yield text


_HEADS_TEXT = """## Composition: heads on frozen features

`python -m zoo benchmark compose heads`

Accuracy on the 359 test rows of scikit-learn's digits, at the size that the backbone knows, from few labels a class:
mean (standard deviation) over draws of the labelled rows. The backbones were trained on MNIST digits and are not
changed; every head chooses its setting on the 143 validation rows. Top ten: share of the GRBF importance on its ten
strongest features.
"""


def _inputs(name: str) -> Parts:
    if name == "pixels":
        data = Digits(augment=False)
        data.setup()
        batches = {n: rows.batch(list(range(len(rows.targets)))) for n, rows in data.datasets.items()}
        return {n: (x.flatten(1).double(), y) for n, (x, y) in batches.items()}
    model = load(name)
    return {part: (features(model, x), y) for part, (x, y) in target_parts(bundled_weights.record(name)).items()}


def _table(records: Records, names: Sequence[str], source: Provenance) -> str:
    rows: list[list[Any]] = []
    for name in names:
        for head in HEADS:
            cells = [mean_sd(v) if (v := records.numbers("accuracy", features=name, head=head, per_class=c)) else ""
                     for c in PER_CLASS]  # fmt: skip
            shares = [r["top_share"] for r in records.select(features=name, head=head) if r["top_share"]]
            share = f"{np.mean([float(s) for s in shares]):.2f}" if shares else ""
            n = len(records.select(features=name, head=head, per_class=PER_CLASS[0]))
            rows.append([name, head, *cells, str(n), share])
    header = ["features", "head", *(f"{c} labels a class" for c in PER_CLASS), "draws", "top ten"]
    return markdown(header, source.marked(rows, "features", "head"))


# ---- continual learning on frozen features -----------------------------------------------------------------


@measurement("compose", "continual", "incremental ridge on frozen features, class by class")
def continual(folder: Path, seeds: int = SEEDS) -> Iterator[str]:
    """`IncrementalRidge` on pixels and on frozen features: two classes per task, task id unknown.

    Arguments and lines are those of :func:`heads`; the file is `compose_continual.csv`.
    """
    records = Records(folder / "compose_continual.csv", ("features", "seed"), ("accuracy", "first_task", "all_at_once"))
    names = ["pixels", *backbones()]
    for name in names:
        todo = [seed for seed in range(seeds) if {"features": name, "seed": seed} not in records]
        parts = _inputs(name) if todo else {}
        for seed in todo:
            records.add({"features": name, "seed": seed} | learn_in_turn(parts, seed))
            yield f"{name}, seed {seed}: {records.rows[-1]['accuracy']}"
    rows: list[list[Any]] = []
    for name in names:
        cells = [mean_sd(records.numbers(c, features=name)) for c in ("accuracy", "first_task", "all_at_once")]
        rows.append([name, *cells, str(len(records.select(features=name)))])
    source = Provenance(records.rows, CONTINUAL_CODE)
    header = ["features", "all classes", "first task's rows", "ridge on all rows at once", "seeds"]
    text = markdown(header, source.marked(rows, "features"))
    put_section(folder.parent / "RESULTS.md", "compose continual", f"{_CONTINUAL_TEXT}{source}\n\n{text}")
    yield text


_CONTINUAL_TEXT = """## Composition: continual learning on frozen features

`python -m zoo benchmark compose continual`

Accuracy among all ten classes on the 359 test rows of scikit-learn's digits, learnt in five tasks of two classes
without the task id: mean (standard deviation) over draws of 1,000 random features. The backbones were trained on MNIST
digits and are not changed. Nothing is forgotten where the first column equals the third.
"""


def learn_in_turn(parts: Parts, seed: int, tasks: int = 5, num_bases: int = 1000) -> dict[str, float]:
    """One class-incremental run of `IncrementalRidge` on rows of unit norm.

    Returns:
        Test accuracy, that of the first task's classes, and that of the same learner trained on all classes at once.
    """
    from zoo.models.continual import IncrementalRidge

    unit = {name: (torch.nn.functional.normalize(X, dim=1), y) for name, (X, y) in parts.items()}
    X, y = unit["train"]
    X_test, y_test = unit["test"]
    classes = int(y.max()) + 1
    groups = torch.arange(classes).split(classes // tasks)

    def learner(count: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return IncrementalRidge(classes, X.shape[1], 1, count, num_bases, dtype=torch.float64)

    one, whole = learner(tasks), learner(1)
    with torch.no_grad():
        for t, group in enumerate(groups):
            rows = torch.isin(y, group)
            one.begin_task(t, X[rows, :, None, None], y[rows])
            one.end_task(t, X[rows, :, None, None], y[rows])
        whole.ridge_used.copy_(one.ridge_used)
        whole.begin_task(0, X[:, :, None, None], y)
        whole.end_task(0, X[:, :, None, None], y)
        right = one(X_test[:, :, None, None]).argmax(1) == y_test
        joint = whole(X_test[:, :, None, None]).argmax(1) == y_test
    early = torch.isin(y_test, groups[0])
    shares = {"accuracy": right, "first_task": right[early], "all_at_once": joint}
    return {name: float(hits.double().mean()) for name, hits in shares.items()}


# ---- adapters ----------------------------------------------------------------------------------------------


class MapAdapter(nn.Module):
    """A convolutional block followed by an SNNK adapter, applied to every pixel: y + v * Psi Phi(y)."""

    def __init__(self, base: nn.Module, dim: int, num_features: int = 16, seed: int = 0) -> None:
        super().__init__()
        from zoo.adapters import AdapterConfig, SNNKAdapter

        self.base = base
        self.adapter = SNNKAdapter(dim, AdapterConfig(num_features=num_features), seed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.adapter(self.base(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def adapt_maps(model: nn.Module, num_features: int = 16) -> nn.Module:
    """Freeze a UniRepLKNet except the head, and add a trainable adapter behind every block."""
    from zoo.models.unireplknet import UniRepLKNetBlock

    model.requires_grad_(False)
    blocks = [(name, m) for name, m in model.named_modules() if isinstance(m, UniRepLKNetBlock)]
    for i, (name, block) in enumerate(blocks):
        parent, _, own = name.rpartition(".")
        last: Any = block.pwconv2[0]
        dim = last.out_features
        setattr(model.get_submodule(parent), own, MapAdapter(block, int(dim), num_features, i))
    for module in model.modules():
        if isinstance(module, MapAdapter):
            module.adapter.requires_grad_()
    model.get_classifier().requires_grad_()  # type: ignore[operator]
    return model


def adapt_tokens(model: nn.Module, num_features: int = 16) -> nn.Module:
    """As `adapt_maps`, for a timm vision transformer."""
    from zoo.adapters import AdapterConfig, inject_adapters

    return inject_adapters(model, AdapterConfig(num_features=num_features, modules_to_save=("head",)))


def only_head(model: nn.Module) -> nn.Module:
    """Freeze everything except the head."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_()  # type: ignore[operator]
    return model


#: Trained parts: function that prepares the model, and learning rate.
TUNINGS: dict[str, tuple[Callable[[nn.Module], nn.Module], float]] = {
    "head": (only_head, 1e-2),
    "SNNK adapters and head": (adapt_maps, 1e-2),
    "everything": (lambda model: model.requires_grad_(), 1e-3),
}


@measurement("compose", "adapters", "SNNK adapters in a ConvNet and a transformer")
def adapters(folder: Path, seeds: int = 3, steps: int = 40, per_class: int = 10) -> Iterator[str]:
    """Fine-tune the head, adapters or all of two MNIST networks on few 8 x 8 digits.

    The networks are the shipped UniRepLKNet and a small timm vision transformer, trained here first.

    Args:
        folder: Folder of `compose_adapters.csv`; the table goes into RESULTS.md beside it.
        seeds: Number of random subsets of labelled rows.
        steps: Full-batch steps of AdamW.
        per_class: Labelled rows per class.

    Yields:
        One line per measurement, then the table.
    """
    records = Records(folder / "compose_adapters.csv", ("network", "trained", "seed"), ("parameters", "accuracy", "n"))
    names = {"unireplknet_z.mnist5k": _shipped_network, "timm vit, 3 x 64": _transformer}
    parts = target_parts(bundled_weights.record("unireplknet_z.mnist5k"))
    for network, build in names.items():
        for trained, (prepare, lr) in TUNINGS.items():
            for seed in range(seeds):
                key = {"network": network, "trained": trained, "seed": seed}
                if key in records:
                    continue
                if trained.startswith("SNNK") and "vit" in network:
                    prepare = adapt_tokens
                X, y = parts["train"]
                chosen = _subset(y, per_class, seed)
                torch.manual_seed(seed)
                model = prepare(build())
                count = sum(p.numel() for p in model.parameters() if p.requires_grad)
                score = tune(model, (X[chosen], y[chosen]), parts["test"], lr, steps)
                records.add(key | {"parameters": count, "accuracy": score, "n": len(parts["test"][1])})
                yield f"{network}, {trained}, seed {seed}: {score:.4f}"
    rows: list[list[Any]] = []
    for network in names:
        for trained in TUNINGS:
            found = records.select(network=network, trained=trained)
            scores = mean_sd([float(r["accuracy"]) for r in found])
            rows.append([network, trained, f"{int(found[0]['parameters']):,}", scores, str(len(found))])
    source, header = Provenance(records.rows, ADAPTERS_CODE), ["network", "trained", "trained parameters", "accuracy"]
    text = markdown([*header, "seeds"], source.marked(rows, "network", "trained"))
    put_section(folder.parent / "RESULTS.md", "compose adapters", f"{_ADAPTERS_TEXT}{source}\n\n{text}")
    yield text


_ADAPTERS_TEXT = """## Composition: SNNK adapters in a ConvNet and in a transformer

`python -m zoo benchmark compose adapters`

Networks that know MNIST digits, fine-tuned for 40 steps on ten 8 x 8 digits a class (resized to 28 x 28); accuracy on
the 359 test rows, mean (standard deviation) over draws of the labelled rows. Steps are the same for all; rates were not
tuned.
"""


def tune(model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], lr: float, steps: int) -> float:
    """Test accuracy after full-batch training; normalisation layers stay in eval mode."""
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    with torch.inference_mode():
        right = [model(x).argmax(1) == y for x, y in zip(test[0].split(256), test[1].split(256), strict=True)]
    return float(torch.cat(right).double().mean())


def _shipped_network() -> nn.Module:
    return load("unireplknet_z.mnist5k", deploy=False)


@functools.cache
def _trained_transformer() -> nn.Module:
    """A timm vision transformer trained for three epochs on MNIST-5k with a fixed seed."""
    from timm.models.vision_transformer import VisionTransformer

    from zoo.data.image import Mnist5k

    data = Mnist5k(augment=False)
    data.prepare_data()
    data.setup()
    rows = data.datasets["train"]
    images, targets = rows.batch(list(range(len(rows.targets))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(28, 7, 1, 10, embed_dim=64, depth=3, num_heads=4)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(3):
            for batch in torch.randperm(len(targets)).split(60):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
                optimizer.step()
    return model.eval()


def _transformer() -> nn.Module:
    return copy.deepcopy(_trained_transformer())
