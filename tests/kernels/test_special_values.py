"""Infinities, not-a-numbers and other extremes: every loop in C answers as its plain form does, both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.comparing import HERE, SPECIAL, Results, differs, normal, places
from tests.ops.test_operators import CASES
from zoo.kernels import native
from zoo.kernels.coreset import _momentum_step_, minmax, relu_dropout_, relu_slopes_
from zoo.kernels.ridge import KernelRidgeHead, _solver
from zoo.models.grbf import _activations
from zoo.ops.native import signatures

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


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


# ---- the operators -----------------------------------------------------------------------------------------


def _dropped(h: Tensor, bias: Tensor) -> Results:
    torch.manual_seed(3)
    return [relu_dropout_(h, bias, 0.5), relu_dropout_(h.clone(), bias, 0.0)]


def _stepped(weight: Tensor, speed: Tensor, grad: Tensor, x: Tensor | None = None) -> Results:
    _momentum_step_(weight, speed, x, grad, 0.1, 0.8)
    return [weight, speed]


def _solved(A: Tensor, B: Tensor) -> Results:
    return [_solver(A @ A.mT + torch.eye(len(A), **HERE), 0.1)(B)]


def _ridge(kernel: str) -> Callable[..., Results]:
    def call(support: Tensor, queries: Tensor, targets: Tensor, vectors: Tensor) -> Results:
        head = KernelRidgeHead(kernel, 2, **HERE)
        with torch.no_grad():
            for parameter, value in zip((head.lam, head.gamma, head.beta), vectors, strict=True):
                parameter[1] = value
        y, active = torch.arange(len(queries), device="cpu") % 3, torch.arange(4, device="cpu") < 3
        return head.loss_and_slopes(support, targets, queries, y, 1, active)

    return call


OPERATORS = {
    "gaussian units": Operator(
        ((19, 3), (5, 3), (6,)),
        lambda x, c, p: [_activations(x, c, p, "full")],
        True,
        {"gaussian_units", "gaussian_units_gradient"},
    ),
    "gaussian units, low rank": Operator(
        ((19, 4), (5, 4), (4, 2)),
        lambda x, c, p: [_activations(x, c, p, "low_rank")],
        True,
        {"gaussian_units", "gaussian_units_gradient"},
    ),
    "relu_dropout_": Operator(((3, 19), (19,)), _dropped, False, {"relu_dropout"}),
    "relu_slopes_": Operator(((3, 19), (3, 19)), lambda g, h: relu_slopes_(g, h, 0.5), False, {"relu_slopes"}),
    "minmax": Operator(((3, 19),), lambda h: [minmax(h)], True, {"minmax", "minmax_slopes"}),
    "momentum_step_": Operator(((7, 83), (7, 83), (5, 83), (5, 7)), _stepped, False, {"momentum_step"}),
    "momentum_step_, dual": Operator(((7, 83), (7, 83), (7, 83)), _stepped, False, {"momentum_step"}),
    "solver": Operator(((19, 19), (19, 5)), _solved, False, {"spd_factor", "spd_solve"}),
    "linear ridge": Operator(((12, 19), (7, 19), (12, 4), (3,)), _ridge("linear"), False, {"ridge_loss"}, 1e-4),
    "cubic ridge": Operator(((12, 5), (7, 5), (12, 4), (3,)), _ridge("poly"), False, {"ridge_loss"}, 1e-3),
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
    elsewhere = set().union(*(case.loops for case in CASES.values()))
    assert tested == set(signatures()) - elsewhere
