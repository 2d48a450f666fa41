"""Kernels of infinitely wide networks, and finite ones' NTK, against numbers from neural-tangents.

Every `ntk*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.kernels.empirical_ntk import empirical_ntk
from zoo.kernels.infinite import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    InfiniteNetwork,
    Residual,
)
from zoo.learners.gradient_flow import GradientFlow, posterior

FILES = files("ntk")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "kernels" in case:
            check_predictions(case)
        elif "layers" in case:
            check_analytic(case)
        elif "network" in case:
            check_empirical(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


# ---- analytic kernels --------------------------------------------------------------------------------------

FIELDS: dict[str, list[str]] = {
    "dense": ["gain", "sb"],
    "conv": ["k", "stride", "padding", "pad", "out_hw", "gain", "sb"],
    "act": ["name", "slope"],
    "avgpool": ["window", "stride", "out_hw"],
    "flatten": [],
    "gap": [],
    "residual": ["branch", "shortcut"],
}


def layer_of(entry: Record) -> Any:
    op = entry["op"]
    if op not in FIELDS:
        pytest.fail(f"no layer {op!r}")
    known(entry, ["op", *FIELDS[op]], op)
    if op == "dense":
        return Dense(entry["gain"], entry["sb"])
    if op == "conv":
        pad = tuple((a, b) for a, b in entry["pad"])
        return Conv(entry["k"], entry["stride"], pad, entry["gain"], entry["sb"])  # type: ignore[arg-type]
    if op == "act":
        return Activation(entry["name"], entry.get("slope", 0.0))
    if op == "avgpool":
        return AvgPool(entry["window"], entry["stride"])
    if op == "residual":
        return Residual([layer_of(e) for e in entry["branch"]], [layer_of(e) for e in entry["shortcut"]])
    return Flatten() if op == "flatten" else GlobalAvgPool()


def points(values: Any) -> Tensor:
    """Vectors as they are, images (n, H, W, C) as flat (n, C * H * W)."""
    x = tensor(values)
    return x.permute(0, 3, 1, 2).flatten(1) if x.ndim == 4 else x


def check_analytic(case: Record) -> None:
    name, expected = case["name"], case["expected"]
    known(case, ["name", "layout", "layers", "x_train", "x_test", "expected", "diag_replaced_rel"], name)
    known(expected, [f"{k}_{w}" for k in ("nngp", "ntk") for w in ("train_train", "test_train", "test_diag")], name)
    if case.get("layout", "NHWC") != "NHWC":
        pytest.fail(f"{name}: unknown layout {case['layout']!r}")
    x = tensor(case["x_train"])
    shape = (x.shape[3], x.shape[1], x.shape[2]) if x.ndim == 4 else None
    train, test = points(case["x_train"]), points(case["x_test"])
    layers = [layer_of(entry) for entry in case["layers"]]
    for block in (2**24, 5000):  # in one piece, and in tiles of few points
        kernel = InfiniteNetwork(layers, shape=shape, block=block)
        for kind, square, cross in zip(("nngp", "ntk"), kernel.both(train), kernel.both(test, train), strict=True):
            close(square, expected[f"{kind}_train_train"], f"{name}, {kind}", 1e-9)
            close(cross, expected[f"{kind}_test_train"], f"{name}, {kind} of tests", 1e-9)
            diag = InfiniteNetwork(layers, kind=kind, shape=shape, block=block).diag(test)  # type: ignore[arg-type]
            close(diag, expected[f"{kind}_test_diag"], f"{name}, {kind}, diagonal", 1e-9)


# ---- predictions -------------------------------------------------------------------------------------------


def check_predictions(case: Record) -> None:
    name, expected, K = case["name"], case["expected"], {k: tensor(v) for k, v in case["kernels"].items()}
    inputs = ["x_train", "x_test", "y_train", "f0_train", "f0_test", "learning_rate", "effective_rate"]
    known(case, ["name", "layers", "kernels", "expected", *inputs], name)
    known(expected, ["gradient_flow", "ridgeless", "ensemble", "ridge"], name)
    y, f0, g0 = tensor(case["y_train"]), tensor(case["f0_train"]), tensor(case["f0_test"])
    rate = case["learning_rate"] / y.numel()
    close(rate, case["effective_rate"], f"{name}, rate", 1e-12)
    flow = GradientFlow(K["ntk_train_train"], y, rate=rate)
    for entry in [*expected["gradient_flow"], {"t": None, **expected["ridgeless"]}]:
        time = float("inf") if entry["t"] is None else entry["t"]
        close(flow.train(time, f0), entry["f_train"], f"{name}, t = {time}, training", 1e-9)
        close(flow.predict(K["ntk_test_train"], time, f0, g0), entry["f_test"], f"{name}, t = {time}", 1e-9)
    prior = [K[f"nngp_{which}"] for which in ("train_train", "test_train", "test_test")]
    for entry in expected["ensemble"]:
        known(entry, ["t", "ntk_mean", "ntk_cov", "nngp_mean", "nngp_cov"], name)
        time = float("inf") if entry["t"] is None else entry["t"]
        mean, cov = flow.ensemble(K["ntk_test_train"], *prior, time)
        if time:
            close(mean, entry["ntk_mean"], f"{name}, mean at {time}", 1e-9)
        else:
            assert not mean.any()
        close(cov, entry["ntk_cov"], f"{name}, covariance at {time}", 1e-9)
        if "nngp_mean" in entry:
            mean, cov = posterior(*prior, y)
            close(mean, entry["nngp_mean"], f"{name}, posterior mean", 1e-9)
            close(cov, entry["nngp_cov"], f"{name}, posterior covariance", 1e-9)
    ridge = expected["ridge"]
    known(ridge, ["reg", "nngp_mean", "nngp_cov", "ntk_mean"], name)
    mean, cov = posterior(*prior, y, ridge=ridge["reg"])
    close(mean, ridge["nngp_mean"], f"{name}, ridge", 1e-9)
    close(cov, ridge["nngp_cov"], f"{name}, ridge, covariance", 1e-9)
    tangent = (K["ntk_train_train"], K["ntk_test_train"], K["ntk_test_test"])
    close(posterior(*tangent, y, ridge=ridge["reg"])[0], ridge["ntk_mean"], f"{name}, ridge of the NTK", 1e-9)


# ---- finite networks ---------------------------------------------------------------------------------------

FUNCTIONS = {"relu": torch.relu, "erf": torch.erf, "gelu": nn.functional.gelu, "sin": torch.sin, "cos": torch.cos}


class Stored(nn.Module):
    """A network of stored weights in NTK parameterisation."""

    def __init__(self, case: Record) -> None:
        super().__init__()
        if case["network"] not in ("fc", "conv3x3-same+gap+dense") or case["activation"] not in FUNCTIONS:
            pytest.fail(f"{case['name']}: no network {case['network']!r} with {case['activation']!r}")
        layers = [(tensor(p["W"]), tensor(p["b"])) for p in case["params"]]
        weights = [W.permute(3, 2, 0, 1) if W.ndim == 4 else W.mT for W, _ in layers]
        self.weights = nn.ParameterList([nn.Parameter(W.contiguous()) for W in weights])
        self.biases = nn.ParameterList([nn.Parameter(b) for _, b in layers])
        self.gain, self.sb, self.activation = case["gain"], case["sb"], FUNCTIONS[case["activation"]]

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for i, (W, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            W = W * (self.gain / W[0].numel()) ** 0.5
            if W.ndim == 4:
                x = nn.functional.conv2d(x, W, self.sb * b, padding="same")
            else:
                x = (x.mean((-1, -2)) if x.ndim == 4 else x) @ W.mT + self.sb * b
            x = x if i == last else self.activation(x)
        return x


def check_empirical(case: Record) -> None:
    name, expected, model = case["name"], case["expected"], Stored(case)
    fields = ["name", "network", "activation", "gain", "sb", "weight_layout", "params", "x_train", "x_test", "expected"]
    known(case, fields, name)
    train, test = (tensor(case[f"x_{which}"]) for which in ("train", "test"))
    train, test = (x.permute(0, 3, 1, 2) if x.ndim == 4 else x for x in (train, test))
    full = functools.partial(empirical_ntk, model, outputs="full")
    found = {
        "f_train": lambda: model(train).detach(),
        "f_test": lambda: model(test).detach(),
        "ntk_train_train": lambda: full(train),
        "ntk_test_train": lambda: full(test, train),
        "ntk_train_train_trace": lambda: empirical_ntk(model, train),
    }
    known(expected, found, name)
    for field in expected:
        close(found[field](), expected[field], f"{name}, {field}", 1e-10)
