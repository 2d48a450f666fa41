"""Infinities, not-a-numbers and other extremes: every loop in C answers as its plain form does, both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.kernels import native
from zoo.kernels.feed_forward import feed_forward
from zoo.kernels.hyperzzw import (
    LocalSlowNet,
    StandardGELU,
    channel_interaction,
    gate,
    global_products,
    hyper_interaction,
    instance_standardise,
)
from zoo.kernels.large_kernel import depthwise_conv2d
from zoo.models.unireplknet import LayerNorm2d

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")

SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-40)

HERE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults

Results = Sequence[Tensor]


class Operator(NamedTuple):
    """Something with a loop in C.

    Attributes:
        inputs: shapes of its tensors.
        call: from those to its results, in place or not.
        learns: whether gradients are compared too.
        loops: the loops that it must call.
        tolerance: of results that are finite, relative to the largest.
    """

    inputs: tuple[tuple[int, ...], ...]
    call: Callable[..., Results]
    learns: bool
    loops: set[str]
    tolerance: float = 2e-5


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), **HERE)


# ---- the operators -----------------------------------------------------------------------------------------


def _layer_norm(gelu: bool) -> Callable[..., Results]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
        layer = LayerNorm2d(len(weight), gelu=gelu, **HERE)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        return [layer(x)]

    return call


def _standard_gelu(groups: int, running: bool, training: bool) -> Callable[..., Results]:
    def call(x: Tensor, bias: Tensor) -> Results:
        layer = StandardGELU(x.shape[1], groups, running, **HERE).train(training)
        y = layer(x, bias)
        return [y, *layer.buffers()]

    return call


def _local_net(*tensors: Tensor) -> Results:
    torch.manual_seed(0)
    net = LocalSlowNet(5, 2, 8, 2, 3, omega_0="grid", **HERE).requires_grad_(False)
    x, *weights = tensors
    for parameter, weight in zip(net._local_weights(), weights, strict=True):
        parameter.copy_(weight.view_as(parameter))
    return [net(x)]


_FFN = ((2, 9), (2,), (9, 2), (9,), (20, 9), (20,), (20,), (9, 20), (9,))
_LOCAL = (8, 3), (8,), (8, 8), (8,), (8, 8), (8,), (8, 8), (8,), (8, 8), (8,), (8, 8), (8,), (3, 8), (3,), (5, 5)

OPERATORS = {
    "feed_forward": Operator(
        ((2, 9, 3, 7), (2, 9, 3, 7), *_FFN), lambda x, y, *w: [feed_forward(x, y, list(w))], False, {"feed_forward"}
    ),
    "layer_norm": Operator(((2, 19, 2, 3), (19,), (19,)), _layer_norm(False), False, {"layer_norm"}),
    "layer_norm, gelu": Operator(((2, 19, 2, 3), (19,), (19,)), _layer_norm(True), False, {"layer_norm"}),
    "depthwise": Operator(
        ((2, 19, 9, 8), (19, 1, 5, 7), (19,)),
        lambda x, w, b: [depthwise_conv2d(x, w, b)],
        True,
        {"depthwise", "depthwise_taps"},
    ),
    "depthwise, dilated": Operator(
        ((1, 3, 6, 9), (3, 1, 3, 3)),
        lambda x, w: [depthwise_conv2d(x, w, None, 2)],
        True,
        {"depthwise", "depthwise_taps"},
    ),
    "depthwise, planes": Operator(
        ((2, 2, 5, 35), (2, 1, 3, 9)),
        lambda x, w: [depthwise_conv2d(x, w)],
        True,
        {"depthwise_planes", "depthwise_planes_taps"},
    ),
    "depthwise, square": Operator(
        ((1, 2, 6, 14), (2, 1, 5, 5)),
        lambda x, w: [depthwise_conv2d(x, w)],
        True,
        {"depthwise_planes", "depthwise_planes_taps"},
    ),
    "instance_standardise": Operator(
        ((2, 3, 5, 7),), lambda x: [instance_standardise(x)], True, {"standardise", "standardise_slopes"}
    ),
    "gate": Operator(
        ((2, 3, 5, 7), (2, 3, 5, 7), (5, 7)),
        lambda k, q, b: [gate(k, q, b)],
        True,
        {"standardise", "standardise_slopes"},
    ),
    "gate, biases": Operator(
        ((2, 3, 5, 7), (2, 3, 5, 7), (5, 7), (3,), (3,)), lambda k, q, b, c, d: [gate(k, q, b, [c, d])], False, {"gate"}
    ),
    "StandardGELU, training": Operator(
        ((3, 24, 3, 6), (1,)),
        _standard_gelu(12, True, True),
        True,
        {"moments", "standardise", "standardise_slopes", "standardise_gradient"},
        1e-4,
    ),
    "StandardGELU, batch": Operator(
        ((3, 4, 3, 6), (1,)), _standard_gelu(1, False, False), False, {"moments", "shared_moments", "standardise"}
    ),
    "StandardGELU, running": Operator(
        ((3, 24, 3, 6), (1,)), _standard_gelu(12, True, False), False, {"moments", "shared_moments", "standardise"}
    ),
    "global_products": Operator(
        ((2, 2, 9, 9),) * 4, lambda w, *z: global_products(w, list(z)), False, {"global_products"}
    ),
    "channel_interaction": Operator(
        ((2, 3, 5, 7), (3,)), lambda x, c: [channel_interaction(x, c, True)], False, {"channel_interaction"}
    ),
    "hyper_interaction": Operator(
        ((2, 3, 5, 7), (2, 3, 5, 7), (3,), (35,)),
        lambda y, x, c, s: [hyper_interaction(y, x, c, s)],
        False,
        {"hyper_interaction"},
    ),
    "LocalSlowNet": Operator(((2, 3, 11, 11), *_LOCAL), _local_net, False, {"adaptive_mean", "local_kernel"}),
}


# ---- comparison --------------------------------------------------------------------------------------------


def run(operator: Operator, inputs: Sequence[Tensor], grad: tuple[int, float] | None) -> Results | str:
    """Results and gradients, or how it was refused; `grad` puts a number into the gradient of the first result."""
    given = [t.clone().requires_grad_(operator.learns) for t in inputs]
    try:
        with torch.set_grad_enabled(operator.learns):
            found = list(operator.call(*given))
        if operator.learns:
            slope = normal(*found[0].shape, seed=99)
            if grad is not None:
                slope.view(-1)[grad[0]] = grad[1]
            found += torch.autograd.grad(found[0], given, slope)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return [t.detach() for t in found]


def differs(got: Results | str, want: Results | str, tolerance: float) -> str:
    """What tells them apart, or nothing."""
    if isinstance(got, str) or isinstance(want, str):
        return "" if got == want else f"{got} is not {want}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"result {i} has another type or shape"
        if not torch.equal(a.isnan(), b.isnan()):
            return f"result {i} has {int(a.isnan().sum())} NaN, plain {int(b.isnan().sum())} of {b.numel()}"
        if not torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign()):
            return f"result {i} has {int(a.isinf().sum())} infinities, plain {int(b.isinf().sum())} of {b.numel()}"
        finite = b.isfinite()
        scale = 1 + float(b[finite].abs().max()) if bool(finite.any()) else 1.0
        apart = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        if apart > tolerance * scale:
            return f"result {i} differs by {apart:.3g} of {scale:.3g}"
    return ""


def places(count: int) -> Iterator[int]:
    yield from sorted({0, count // 2, count - 1})


@pytest.mark.parametrize("name", OPERATORS)
def test_every_loop_answers_like_its_plain_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = OPERATORS[name]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(operator.inputs)]
    called, call = set(), native._call
    monkeypatch.setattr(native, "_call", lambda loop, *a: (called.add(loop), call(loop, *a))[1])
    cases: list[tuple[int | None, int, float]] = [(None, 0, 0.0)]
    cases += [(i, at, value) for i, t in enumerate(inputs) for at in places(t.numel()) for value in SPECIAL]
    if operator.learns:
        size = operator.call(*inputs)[0].numel()
        cases += [(-1, at, value) for at in places(size) for value in SPECIAL]
    if not F.gelu(torch.full((8,), torch.inf)).isnan().all():  # which the library has on x86 only
        cases = [case for case in cases if case[2] != torch.inf or "gelu" not in name.lower()]
    complaints = []
    for i, at, value in cases:
        given, grad = [t.clone() for t in inputs], None
        if i == -1:
            grad = at, value
        elif i is not None:
            given[i].view(-1)[at] = value
        got = run(operator, given, grad)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "available", lambda *_, **__: False)
            want = run(operator, given, grad)
        complaint = differs(got, want, operator.tolerance)
        if complaint:
            complaints.append(f"{value} at {at} of input {i}: {complaint}")
    assert not complaints, f"{len(complaints)} of {len(cases)}:\n" + "\n".join(complaints[:40])
    assert called >= operator.loops


@pytest.mark.parametrize("name", OPERATORS)
def test_types_and_devices_come_from_the_inputs(name: str) -> None:
    operator = OPERATORS[name]
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(operator.inputs)]
    want = run(operator, inputs, None)
    torch.set_default_dtype(torch.float64)
    got = run(operator, inputs, None)
    torch.set_default_dtype(torch.float32)
    assert not differs(got, want, 1e-6)
    with torch.device("meta"):
        got = run(operator, inputs, None)
    assert not differs(got, want, 1e-6)


def test_no_loop_is_left_out() -> None:
    tested = set().union(*(operator.loops for operator in OPERATORS.values()))
    whole = {"global_part", "local_branches", "local_outputs"}  # by the network below
    assert tested | whole == set(native.signatures())


@pytest.mark.parametrize(("name", "size"), [("test_unireplknet", 48), ("test_terminator", 16)])
def test_networks_in_inference(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = zoo.to_deploy(zoo.create_model(name, **({"img_size": size} if "term" in name else {})).eval())
    called, call = set(), native._call
    monkeypatch.setattr(native, "_call", lambda loop, *a: (called.add(loop), call(loop, *a))[1])
    for value in (0.5, *SPECIAL):
        images = normal(2, model.in_chans, size, size)
        images[0, 0, 1, 2] = value
        with torch.inference_mode():
            got = model(images)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(native, "available", lambda *_, **__: False)
                want = model(images)
        assert not differs([got], [want], 1e-4), value
    assert called >= ({"feed_forward", "depthwise"} if "uni" in name else {"global_part", "local_outputs"})
