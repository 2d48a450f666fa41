"""Response layers and hyper-parameters of self-tuning networks against numbers of the released code.

Every `stn*` file in the folder named by the environment variable ZOO_GOLDEN_DIR (default: tests/golden) is one test.
What is checked follows from the fields of the file; a file without any known field fails, it is not skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.learners.golden import Record, close, files, known, read, tensor
from zoo.optim.self_tuning import Hyperparameter, Hyperparameters, Response, ResponseConv2d, ResponseLinear

FILES = files("stn")
TOLERANCE = 1e-10


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"golden-{path.name}")
def test_golden_file(path: Path) -> None:
    for case in read(path)["cases"]:
        if "cotangent" in case:
            check_layer(case)
        elif "columns" in case:
            check_starts(case)
        elif "noise" in case:
            check_perturbed(case)
        elif "sigma" in case:
            check_entropy(case)
        elif "params" in case:
            check_mapping(case)
        else:
            pytest.fail(f"{path.name}, {case['name']}: no known kind of case, fields {sorted(case)}")


def test_golden_folder_is_not_empty() -> None:
    assert FILES


def check_layer(case: Record) -> None:
    name, params, expected = case["name"], {k: tensor(v) for k, v in case["params"].items()}, case["expected"]
    inputs = ["x", "l", "l0_for_centred", "cotangent"]
    known(case, ["name", "params", "bias", "kernel_size", "padding", "stride", *inputs, "expected"], name)
    known(params, ["W", "H", "A", "s", "b", "h"], name)
    W = params["W"]
    x, response = tensor(case["x"]), Response()
    layer: ResponseLinear | ResponseConv2d
    if W.ndim == 4:
        size, stride, padding = case["kernel_size"], case["stride"], case["padding"]
        conv = nn.Conv2d(W.shape[1], len(W), size, stride, padding, bias=case["bias"], dtype=torch.float64)
        layer = ResponseConv2d(conv, response, params["A"].shape[1])
    else:
        linear = nn.Linear(W.shape[1], len(W), bias=case["bias"], dtype=torch.float64)
        layer = ResponseLinear(linear, response, params["A"].shape[1])
    own = {"W": layer.layer.weight, "H": layer.elastic_weight, "A": layer.mixing, "s": layer.scale}
    if case["bias"]:
        own |= {"b": layer.layer.bias, "h": layer.elastic_bias}
    assert own.keys() == params.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(params[key])
    close(layer(x).detach(), expected["out_without_response"], f"{name}, without response", TOLERANCE)
    free = tensor(case["l"])
    response.free = free - tensor(case["l0_for_centred"])
    close(layer(x).detach(), expected["out_centred"], f"{name}, centred", TOLERANCE)
    response.free = free.requires_grad_()
    out = layer(x)
    close(out.detach(), expected["out"], name, TOLERANCE)
    (tensor(case["cotangent"]) * out).sum().backward()
    gradients = {f"d_{key}": parameter.grad for key, parameter in own.items()} | {"d_l": free.grad}
    known(expected, ["out", "out_without_response", "out_centred", *gradients], name)
    for key in expected:
        if key.startswith("d_"):
            close(gradients[key], expected[key], f"{name}, {key}", TOLERANCE)


def check_mapping(case: Record) -> None:
    name, params, expected = case["name"], case["params"], case["expected"]
    known(case, ["name", "params", "l", "expected"], name)
    known(params, ["lo", "hi", "integer"], name)
    known(expected, ["value_before_floor", "value"], name)
    lo, hi = params["lo"], params["hi"]
    start = (lo + hi) / 2 if None not in (lo, hi) else 0.0 if lo is hi is None else hi - 1 if lo is None else lo + 1
    hyper = Hyperparameter(start, lo, hi, params["integer"])
    close(hyper.smooth(tensor(case["l"])), expected["value_before_floor"], name, TOLERANCE)
    close(hyper.value(tensor(case["l"])), expected["value"], f"{name}, floor", TOLERANCE)


def check_starts(case: Record) -> None:
    assert case["columns"] == ["name", "start", "lo", "hi_in_initialisation", "hi_in_use", "l", "value_in_use"]
    for name, start, lo, hi, hi_in_use, free, value in case["expected"]:
        assert Hyperparameter(start, lo, hi).free() == pytest.approx(free, rel=TOLERANCE, abs=1e-14), name
        found = Hyperparameter(start, lo, hi_in_use).smooth(tensor(free))
        close(found, value, f"{name}, value", TOLERANCE)


def hypers_of(sigma: list[float], free: list[float] | None = None) -> Hyperparameters:
    hypers = Hyperparameters({f"h{i}": Hyperparameter(0.0, None) for i in range(len(sigma))}, dtype=torch.float64)
    scale = tensor(sigma)
    with torch.no_grad():
        hypers.raw_scale.copy_(scale + torch.log(-torch.expm1(-scale)))
        if free is not None:
            hypers.free.copy_(tensor(free))
    return hypers


def check_entropy(case: Record) -> None:
    name, expected = case["name"], case["expected"]
    known(case, ["name", "sigma", "expected"], name)
    known(expected, ["unconstrained_scale", "entropy", "d_entropy_d_unconstrained"], name)
    hypers = hypers_of(case["sigma"])
    for i, sigma in enumerate(case["sigma"]):
        started = Hyperparameters({"h": Hyperparameter(0.0, None)}, sigma, dtype=torch.float64)
        assert float(started.raw_scale.detach()) == pytest.approx(expected["unconstrained_scale"][i], rel=TOLERANCE)
    close(hypers.scale.detach(), case["sigma"], f"{name}, scale", TOLERANCE)
    entropy = hypers.entropy()
    close(entropy.detach(), expected["entropy"], name, TOLERANCE)
    entropy.backward()
    close(hypers.raw_scale.grad, expected["d_entropy_d_unconstrained"], f"{name}, gradient", TOLERANCE)


def check_perturbed(case: Record) -> None:
    name = case["name"]
    known(case, ["name", "l", "sigma", "noise", "expected"], name)
    known(case["expected"], ["l_perturbed"], name)
    found = hypers_of(case["sigma"], case["l"]).perturbed(tensor(case["noise"]))
    close(found.detach(), case["expected"]["l_perturbed"], name, TOLERANCE)
