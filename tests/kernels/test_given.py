"""What a loop in C is given is checked before it touches memory: how many, types, shapes, ranges and layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.kernels import native
from zoo.kernels.hyperzzw import StandardGELU, gate, instance_standardise
from zoo.kernels.large_kernel import depthwise_conv2d

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@needs_compiler
def test_every_loop_has_declared_types() -> None:
    assert len(native.signatures()) == 30
    for name, (kinds, answers) in native.signatures().items():
        function = native._function(name)
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


_X, _P = ones(2, 3, 4, 5), ones(2, 3)
UNSUITED: dict[str, Any] = {
    "a channel is missing": lambda: native.layer_norm(_X, ones(2), ones(3), 1e-6),
    "a shortcut of another size": lambda: native.feed_forward(ones(2, 3, 4), ones(2, 3, 5), [ones(1)] * 9),
    "weights of another size": lambda: native.feed_forward(ones(2, 3, 4), ones(2, 3, 4), [ones(2, 5)] * 9),
    "an even kernel": lambda: native.depthwise(_X, ones(3, 1, 2, 2), None),
    "a kernel of two channels": lambda: native.depthwise(_X, ones(2, 1, 3, 3), None),
    "a bias of two channels": lambda: native.depthwise(_X, ones(3, 1, 3, 3), ones(2)),
    "no dilation": lambda: native.depthwise(_X, ones(3, 1, 3, 3), None, 0),
    "a gradient of another size": lambda: native.depthwise_weight_gradient(_X, _X[:1], (3, 3)),
    "no planes": lambda: native.moments(_P),
    "moments of other planes": lambda: native.shared_scales([_P, ones(3, 2)], None, 1, 1e-5),
    "known moments of half": lambda: native.shared_scales([_P, _P], (ones(2), ones(2)), 1, 1e-5),
    "groups that don't divide": lambda: native.shared_scales([_P, _P], None, 12, 1e-5),
    "a query of another size": lambda: native.gate(_X, _X[:1], ones(4, 5), [ones(3), ones(3)], False),
    "a bias of another size": lambda: native.gate(_X, _X, ones(5), [ones(3), ones(3)], False),
    "no squares": lambda: native.global_products(_X, [_X] * 3),
    "a score of two channels": lambda: native.hyper_interaction(_X, _X, ones(2), ones(20)),
    "a score of two pixels": lambda: native.hyper_interaction(_X, _X, ones(3), ones(2)),
    "a gate of two channels": lambda: native.channel_interaction(_X, ones(2), 1e-5),
    "no window": lambda: native.adaptive_mean(_X[0], (0, 2)),
    "too few weights": lambda: native.local_kernel(ones(3, 4), ones(1, 2, 4), [ones(2, 3)]),
    "a product with another map": lambda: native.standardise(_X, _X[:1], None, None, 1e-5),
    "moments of two planes": lambda: native.standardise(_X, None, None, (ones(2), ones(2)), 1e-5),
    "a slope of another map": lambda: native.standardise_gradient(_X, None, _P, _P, _X[:1], False, None),
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
        lambda: depthwise_conv2d(_X, ones(3, 1, 3, 5), ones(2)),
        lambda: depthwise_conv2d(_X, ones(2, 1, 3, 5)),
        lambda: gate(_X, ones(1, 3, 4, 5), ones(5)),  # which broadcasts
        lambda: gate(_X, ones(2, 3, 4, 6), ones(5)),
        lambda: instance_standardise(ones(2, 3)),
        lambda: StandardGELU(5)(_X, ones(2)),
        lambda: instance_standardise(torch._neg_view(_X + torch.arange(5.0))),
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
