"""What a loop in C is given is checked before it touches memory: how many, types, shapes, ranges and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.ridge import KernelRidgeHead, SupportError
from zoo.models.grbf import activations
from zoo.ops.native import _function, library, signatures

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler, or an OpenMP that torch lacks")


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@needs_compiler
@pytest.mark.parametrize(("rate", "momentum"), [(0.1, 0), (1, 0.5), (1, 0)])
def test_whole_numbers_are_numbers(rate: float, momentum: float) -> None:
    weight, speed = ones(2, 3), ones(2, 3)
    native.momentum_step_(weight, speed, None, ones(2, 3), rate, momentum)
    assert speed.tolist() == (momentum * ones(2, 3) + 1).tolist()
    assert weight.tolist() == (1 - rate * speed).tolist()


@needs_compiler
def test_every_loop_has_declared_types() -> None:
    assert len(signatures()) == 30
    for name, (kinds, answers) in signatures().items():
        function = _function(name)
        assert len(function.argtypes) == len(kinds)
        assert (function.restype is not None) == answers
    x = ones(2, 3)
    for arguments, error, words in (
        ((x, x, ones(3), 6), TypeError, "takes 5 arguments, got 4"),
        ((x, x, ones(3), 6.0, 1e-12), TypeError, "number of type int"),
        ((x, x, ones(3), True, 1e-12), TypeError, "number of type int"),
        ((x, x, ones(3), 2**70, 1e-12), TypeError, "64 bits"),
        ((x, x, ones(3), 6, "1"), TypeError, "number of type float"),
        ((x, x, 3, 6, 1e-12), TypeError, "takes a tensor"),
        ((x.double(), x, ones(3), 6, 1e-12), native.Unsuited, "float64"),
        ((x.int(), x, ones(3), 6, 1e-12), native.Unsuited, "int32"),
        ((x.to("meta"), x, ones(3), 6, 1e-12), native.Unsuited, "meta"),
        ((x.T, x, ones(3), 6, 1e-12), native.Unsuited, "strides"),
        ((x.to_sparse(), x, ones(3), 6, 1e-12), native.Unsuited, "without gaps"),
    ):
        with pytest.raises(error, match=words):
            native._call("minmax", *arguments)


UNSUITED: dict[str, Any] = {
    "centres of another space": lambda: native.gaussian_units(ones(4, 3), ones(2, 2), ones(6)),
    "a factor of another space": lambda: native.gaussian_units(ones(4, 3), ones(2, 3), ones(5)),
    "biases of another layer": lambda: native.relu_dropout_(ones(2, 3), ones(2), 1.0, 0, 0),
    "rows that lie apart": lambda: native.relu_dropout_(ones(3, 2).T, ones(3), 1.0, 0, 0),
    "a bar of 33 bits": lambda: native.relu_dropout_(ones(2, 3), ones(3), 1.0, 2**33, 0),
    "slopes of other rows": lambda: native.relu_slopes_(ones(2, 3), ones(3, 3), 1.0),
    "slopes of other features": lambda: native.minmax_slopes(ones(2, 3), ones(2, 2), ones(2, 3), ones(3)),
    "a step from other rows": lambda: native.momentum_step_(ones(2, 3), ones(2, 3), ones(5, 2), ones(4, 3), 0.1, 0.5),
    "a step of another size": lambda: native.momentum_step_(ones(2, 3), ones(2, 3), None, ones(3, 3), 0.1, 0.5),
    "a speed of another size": lambda: native.momentum_step_(ones(2, 3), ones(3, 3), None, ones(2, 3), 0.1, 0.5),
    "a matrix that isn't square": lambda: native.spd_factor(ones(2, 3), 0.1),
    "a side of another size": lambda: native.spd_solve(ones(2, 2).double(), ones(3, 1)),
    "a factor in float32": lambda: native.spd_solve(ones(2, 2), ones(2, 1)),
}


@needs_compiler
@pytest.mark.parametrize("call", UNSUITED.values(), ids=UNSUITED)
def test_what_does_not_fit_is_refused(call: Any) -> None:
    with pytest.raises(native.Unsuited):
        call()


@needs_compiler
def test_the_plain_operator_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result, or the same error, with the loops and without."""
    calls: tuple[Any, ...] = (
        lambda: activations(ones(4, 3), ones(2, 3), ones(2, 2)),
        lambda: activations(ones(4, 3), ones(2, 2), ones(3, 2)),
    )
    found = []
    for available in (native.available, lambda *_, **__: False):
        monkeypatch.setattr(native, "available", available)
        row: list[Any] = []
        for call in calls:
            try:
                row.append(call())
            except (ValueError, RuntimeError, IndexError) as error:
                row.append(f"{type(error).__name__}: {error}")
        found.append(row)
    for got, want in zip(*found, strict=True):
        assert type(got) is type(want)
        if isinstance(got, str):
            assert got == want
        else:
            torch.testing.assert_close(got, want)


# ---- the ridge classifier ----------------------------------------------------------------------------------


def _head(**changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "support": torch.eye(6, 4),
        "targets": torch.eye(10)[:6],
        "queries": torch.eye(3, 4),
        "y": torch.tensor([0, 1, 2]),
        "task": 0,
        "active": torch.arange(10) < 6,
    }
    return KernelRidgeHead(changes.pop("kernel", "linear")).loss_and_slopes(**(given | changes))[0]


@pytest.mark.parametrize("kernel", ["linear", "poly", "laplacian"])
@pytest.mark.parametrize("loops", [True, False], ids=["native", "plain"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": torch.tensor([0, 2**40, 1])}, "y holds 1099511627776; classes are numbers from 0 to 9"),
        ({"y": torch.tensor([0, 99, 1])}, "y holds 99"),
        ({"y": torch.tensor([0, -1, 1])}, "y holds -1"),
        ({"y": torch.tensor([0, 1, 2], dtype=torch.int32)}, "y is torch.int32"),
        ({"y": torch.tensor([0.0, 1.0, 2.0])}, "y is torch.float32"),
        ({"y": torch.tensor([0, 1])}, r"y is torch.int64 of shape \(2,\)"),
        ({"targets": torch.eye(10)[:5]}, "6 support points and 5 targets"),
        ({"targets": torch.eye(10)[:7]}, "6 support points and 7 targets"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, 77])}, "targets holds 77"),
        ({"targets": torch.tensor([0, 1, 2, 3, 4, -5])}, "targets holds -5"),
        ({"targets": torch.ones(6)}, "targets are torch.float32"),
        ({"active": torch.ones(10)}, "active is torch.float32"),
        ({"active": torch.ones(10, dtype=torch.uint8)}, "active is torch.uint8"),
        ({"active": torch.ones(9, dtype=torch.bool)}, r"active is torch.bool of shape \(9,\)"),
        ({"queries": torch.eye(3, 5)}, "queries have 5 features, the support has 4"),
        ({"support": torch.ones(6, 4, dtype=torch.int64)}, "support is torch.int64"),
        ({"support": torch.ones(6)}, "support is"),
        ({"support": torch.full((6, 4), torch.inf)}, "support features hold NaN or infinity"),
        ({"queries": torch.tensor([[0, 0, 0, torch.nan]] * 3)}, "query features hold NaN or infinity"),
        ({"task": 1}, "task=1"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_a_ridge_classifier_refuses(
    kernel: str, loops: bool, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loops:
        monkeypatch.setattr(native, "available", lambda *_, **__: False)
    with pytest.raises(SupportError, match=words):
        _head(kernel=kernel, **changes)


def test_a_ridge_classifier_takes_what_fits() -> None:
    one_hot, indices = _head(), _head(targets=torch.arange(6))
    assert one_hot.isfinite()
    torch.testing.assert_close(one_hot, indices)
    empty = KernelRidgeHead("linear").predict(ones(0, 4), KernelRidgeHead("linear").solve(torch.eye(4), torch.eye(4)))
    assert empty.shape == (0, 4)
