"""Every operator of the zoo, found by registration: well formed, and its fast forms answer as its reference does."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import zoo.testing
from zoo.ops import OPERATORS, Unsuited, building, depthwise_conv2d, feed_forward, native, operator, reference
from zoo.ops.core import Operator, Saved
from zoo.support.register import import_all
from zoo.testing.operators import SPECIAL, differs, normal

for room in ("zoo.kernels", "zoo.learners"):  # which declare operators too
    import_all(room)

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


@dataclass(frozen=True)
class Case(zoo.testing.Case):
    """Inputs of an operator.

    Attributes:
        loops: In C, that a fast implementation calls with them, forwards and backwards.
    """

    loops: frozenset[str] = frozenset()

    def build(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        """The inputs; variances of a block are positive."""
        values = super().build(dtype)
        if self.operator == "slow_fast_block":
            for known in (values[12], values[16]):  # means and variances
                known[1::2] = [t.abs() + 0.5 for t in known[1::2]]
        return values


_FFN = [(2, 9), (2,), (9, 2), (9,), (20, 9), (20,), (20,), (9, 20), (9,)]
_DEPTHWISE = frozenset(["depthwise", "depthwise_taps"])
_PLANES = frozenset(["depthwise_planes", "depthwise_planes_taps"])

_LAYER_NORM = frozenset(["layer_norm"])
_STANDARDISE = frozenset(["standardise", "standardise_backward"])
_SHARED = frozenset(["moments", "shared_moments", "standardise", "shared_slopes", "shared_means", "shared_backward"])
_LINEAR = [(8, 8), (8,)]
_LOCAL_NET = [(8, 3), (8,), *_LINEAR * 5, (3, 8), (3,)]
_UNIT = [(3, 3), (3,)] * 4 + [(14, 14)]
_MAP = (2, 3, 14, 14)
_BLOCK = (
    (1, 3, 14, 14), _UNIT, _UNIT, [(3,), (196,)], [_MAP] * 2, [(3, 1, 3, 3), (3, 1, 5, 5)], [(3, 3), (3,)] * 2,
    [(1,), (1,)],
)  # fmt: skip
_BOTTLENECK = [(12, 3)] * 10, (12,), (1,)
_BLOCK_LOOPS = frozenset(["global_paths", "local_branches", "shared_moments", "add_local_outputs"])

#: At least one for every operator.
CASES = {
    "feed_forward": Case("feed_forward", ((2, 9, 3, 7), _FFN, (2, 9, 3, 7)), loops=frozenset(["feed_forward"])),
    "feed_forward, alone": Case("feed_forward", ((2, 9, 3, 7), _FFN, None), loops=frozenset(["feed_forward"])),
    "channel_norm": Case("channel_norm", ((2, 19, 2, 3), (19,), (19,), 1e-6, False), loops=_LAYER_NORM),
    "channel_norm, gelu": Case("channel_norm", ((2, 19, 2, 3), (19,), (19,), 1e-6, True), loops=_LAYER_NORM),
    "depthwise": Case("depthwise_conv2d", ((2, 19, 9, 8), (19, 1, 5, 7), (19,), 1), loops=_DEPTHWISE),
    "depthwise, dilated": Case("depthwise_conv2d", ((1, 3, 6, 9), (3, 1, 3, 3), None, 2), loops=_DEPTHWISE),
    "depthwise, planes": Case("depthwise_conv2d", ((2, 2, 5, 35), (2, 1, 3, 9), None, 1), loops=_PLANES),
    "depthwise, square": Case("depthwise_conv2d", ((1, 2, 6, 14), (2, 1, 5, 5), None, 1), loops=_PLANES),
    "depthwise, small": Case("depthwise_conv2d", ((3, 4, 2, 3), (4, 1, 3, 3), (4,), 1)),
    "depthwise, one pixel": Case("depthwise_conv2d", ((3, 4, 1, 1), (4, 1, 7, 7), (4,), 1)),
    "depthwise_weight": Case(
        "depthwise_weight", ((2, 3, 7, 5), (2, 3, 7, 5), [5, 7], 1), loops=frozenset(["depthwise_taps"])
    ),
    "instance_standardise": Case("instance_standardise", ((2, 3, 5, 7), 1e-5), loops=_STANDARDISE),
    "standardised_gate": Case("standardised_gate", ((2, 3, 5, 7), (2, 3, 5, 7), (5, 7)), loops=_STANDARDISE),
    "standard_gelu": Case("standard_gelu", ((3, 24, 3, 6), (1,), 12, None, None, 1e-5), 1e-4, loops=_SHARED),
    "standard_gelu, one group": Case("standard_gelu", ((3, 4, 3, 6), (1,), 1, None, None, 1e-5), 1e-4, loops=_SHARED),
    "pointwise_conv": Case("pointwise_conv", ([(2, 3, 4, 5), (2, 1, 4, 5)], (4, 6), (4,))),
    "pointwise_conv, no bias": Case("pointwise_conv", ([(2, 3, 4, 5)], (4, 3), None)),
    "pointwise_twice": Case("pointwise_twice", ((2, 3, 4, 5), (4, 3), (4,), (5, 4), (5,))),
    "linear_channels_first": Case("linear_channels_first", ((3, 4, 6), (5, 4), (5,))),
    "local_kernel": Case("local_kernel", ((3, 25), (3, 8, 25), _LOCAL_NET, (25,)), loops=frozenset(["local_kernel"])),
    "slow_fast_block": Case("slow_fast_block", (_MAP, _MAP, _MAP, [_MAP] * 2, *_BLOCK, [], *_BOTTLENECK, []), 1e-4),
    "slow_fast_block, known moments, a map repeated": Case(
        "slow_fast_block",
        (_MAP, _MAP, _MAP, [_MAP, (2, 1, 14, 14)], *_BLOCK, [(3,)] * 4, *_BOTTLENECK, [(6,)] * 2),
        1e-4,
        loops=_BLOCK_LOOPS,
    ),
    "metric_gaussian": Case("metric_gaussian", ((4, 3), (5, 3), (3, 2))),
    "metric_gaussian, scales": Case("metric_gaussian", ((2, 4, 3), (5, 3), (2, 1, 3))),
    "metric_gaussian, of itself": Case("metric_gaussian", ((4, 3), None, (3, 3))),
    "response_norm": Case("response_norm_and_energy", ((2, 3, 2, 4), (1, 1, 1, 4), (1, 1, 1, 4)), 1e-4),
    "response_norm, no bias": Case("response_norm_and_energy", ((2, 3, 2, 4), (1, 1, 1, 4), None), 1e-4),
}


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the loops in C that are called from now on."""
    called: set[str] = set()
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (called.add(name), call(name, *arguments))[1])
    return called


class TestOperators(zoo.testing.OperatorTests):
    """What every operator keeps, and which loops answer."""

    cases = CASES

    def special_cases(self) -> list[str]:
        return [name for name, case in CASES.items() if case.loops]

    def special_values(self, case: zoo.testing.Case) -> Sequence[float]:
        """All but infinity in a GELU that the library does not answer with NaN, as it does on x86 only."""
        name = next(name for name, other in CASES.items() if other is case)
        known = not ("gelu" in name or "feed" in name) or F.gelu(torch.full((8,), torch.inf)).isnan().all()
        return SPECIAL if known else [value for value in SPECIAL if value != torch.inf]

    def special_places(self, case: zoo.testing.Case, count: int) -> Sequence[int]:
        """One place in each of the many inputs of a block."""
        return [count // 2] if case.operator == "slow_fast_block" else super().special_places(case, count)

    @needs_compiler
    def test_special_values(self, special: Case, loops: set[str]) -> None:
        super().test_special_values(special)
        assert loops >= special.loops


def test_no_operator_is_left_out() -> None:
    ours = {name for name, op in OPERATORS.items() if op.reference.__module__.startswith("zoo.")}
    assert ours == {case.operator for case in CASES.values()}


@needs_compiler
def test_no_loop_is_left_out() -> None:
    assert set(native.signatures()) == set().union(*(case.loops for case in CASES.values()))


@needs_compiler
@pytest.mark.parametrize("setting", [("ZOO_NATIVE", "0"), ("CC", "no-such-compiler"), ("CC", "false")])
def test_without_loops_the_numbers_are_the_same(setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(2, 4, 9, 9), normal(4, 1, 7, 7)
    usual = depthwise_conv2d(x, weight)
    native._library.cache_clear()
    monkeypatch.delenv("ZOO_NATIVE", raising=False)
    monkeypatch.setenv(*setting)
    try:
        assert native.library() is None
        without = depthwise_conv2d(x, weight)
    finally:
        native._library.cache_clear()
    torch.testing.assert_close(usual, without, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "size", "wanted"),
    [
        ("test_unireplknet", 48, {"feed_forward", "depthwise", "layer_norm"}),
        ("test_terminator", 16, _BLOCK_LOOPS),
    ],
)
def test_a_network_in_inference(name: str, size: int, wanted: set[str], loops: set[str]) -> None:
    torch.manual_seed(0)
    model = zoo.to_deploy(zoo.create_model(name, **({"img_size": size} if "term" in name else {})).eval())
    for value in (0.5, *SPECIAL):
        images = normal(2, 3, size, size)
        images[0, 0, 1, 2] = value
        with torch.inference_mode():
            got = model(images)
            with reference():
                want = model(images)
        assert not differs([got], [want], 1e-4), value
    assert loops >= wanted


_PROBE = """
#include "activations.h"
void probe(const float *x, float *as_gelu, float *as_sigmoid, long n) {
    for (long i = 0; i < n; i++) as_gelu[i] = gelu(x[i]), as_sigmoid[i] = sigmoid(x[i]);
}
"""


@needs_compiler
def test_gelu_and_sigmoid_of_every_size_of_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    for name in ("activations.h", "vectors.h"):
        shutil.copy(native.SOURCES / name, tmp_path)
    (tmp_path / "probe.c").write_text(_PROBE)
    probe = building.build(tmp_path)[0].probe
    special = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)
    h = torch.cat([torch.linspace(-120, 120, 20001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    h = torch.cat([h, special])
    gelu, sigmoid = torch.empty_like(h), torch.empty_like(h)
    probe(*(ctypes.c_void_p(t.data_ptr()) for t in (h, gelu, sigmoid)), ctypes.c_long(len(h)))
    assert gelu[-len(special) :].isnan().all()  # of infinity too, as the library has it on x86
    assert torch.equal(sigmoid[-len(special) :].isnan(), special.isnan())
    h, gelu, sigmoid = (t[: -len(special)] for t in (h, gelu, sigmoid))
    apart = (gelu.double() - F.gelu(h.double())).abs() / (1 + h.double().abs())
    assert float(apart.max()) < 2e-7
    assert gelu[h < -6].abs().max() == 0
    assert float((sigmoid.double() - torch.sigmoid(h.double())).abs().max()) < 2e-7


# ---- who answers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubled() -> tuple[Operator[..., Tensor], list[str]]:
    """An operator with a fast form that keeps count."""
    calls: list[str] = []

    @operator()
    def zoo_test_doubled(x: Tensor, others: list[Tensor], factor: float = 2.0) -> Tensor:
        """X times factor, plus the others."""
        return x * factor + sum(others)

    @zoo_test_doubled.on("cpu", torch.float32)
    def _fast(x: Tensor, others: list[Tensor], factor: float) -> Tensor:
        if factor < 0:
            raise Unsuited("negative")
        calls.append("fast")
        return x * factor + sum(others)

    @zoo_test_doubled.gradient
    def _gradient(saved: Saved, grad: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
        calls.append("gradient")
        assert saved.wanted == (True, True, False)
        return grad * saved.inputs[2], [grad, None], None

    return zoo_test_doubled, calls


def test_the_fast_form_answers_where_nobody_would_notice(doubled: tuple[Operator[..., Tensor], list[str]]) -> None:
    op, calls = doubled
    x, y = normal(2, 3), normal(2, 3, seed=2)

    def asked(function: Callable[[], Any]) -> list[str]:
        calls.clear()
        function()
        return list(calls)

    assert asked(lambda: op(x, [y])) == ["fast"]
    assert asked(lambda: op(x, others=[y], factor=3.0)) == ["fast"]
    with torch.inference_mode():
        assert asked(lambda: op(x, [y])) == ["fast"]
    learner, other = x.clone().requires_grad_(), y.clone().requires_grad_()

    def learn(**how: Any) -> None:
        found = torch.autograd.grad(op(learner, [other, y]).sum(), (learner, other), **how)
        torch.testing.assert_close(list(found), [torch.full((2, 3), 2.0), torch.ones(2, 3)])

    assert asked(learn) == ["fast", "gradient"]
    assert asked(lambda: learn(create_graph=True)) == ["fast"]
    unwanted: dict[str, Callable[[], Any]] = {
        "unsuited": lambda: op(x, [y], -1.0),
        "double": lambda: op(x.double(), [y.double()]),
        "mixed": lambda: op(x, [y.double()]),
        "meta": lambda: op(x.to("meta"), [y.to("meta")]),
        "empty": lambda: op(x[:0], [y[:0]]),
        "negated": lambda: op(torch._neg_view(x), [y]),
        "subclass": lambda: op(x.as_subclass(type("Sub", (Tensor,), {})), [y]),
        "mapped": lambda: vmap(lambda t: op(t, [t]))(x),
        "forward mode": lambda: jvp(lambda t: op(t, [t]), (x,), (y,)),
    }
    for name, function in unwanted.items():
        assert asked(function) == [], name
    for mode in (reference(), torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False)):
        with mode:
            assert asked(lambda: op(x, [y])) == []
    torch.testing.assert_close(op(x, [y], -1.0), y - x)
    assert op(x.mT, [y.mT], -1.0).is_contiguous()  # the layout that compiled graphs rely on


def test_an_operator_that_does_not_fit_says_what_the_library_says() -> None:
    x = torch.ones(2, 3, 4, 5)
    for function, words in (
        (lambda: depthwise_conv2d(x, torch.ones(3, 1, 3, 5), torch.ones(2)), "bias"),
        (lambda: depthwise_conv2d(x, torch.ones(2, 1, 3, 5)), "groups"),
        (lambda: depthwise_conv2d(x, torch.ones(3, 1, 3, 3), None, 0), "dilation"),
        (lambda: feed_forward(x, [torch.ones(2, 5)] * 9), "size|shape"),
    ):
        with pytest.raises(RuntimeError, match=words):
            function()
