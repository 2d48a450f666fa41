"""Every operator of the zoo, found by registration: well formed, and its fast forms answer as its reference does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.ops.comparing import SPECIAL, differs, normal, places
from zoo.ops import OPERATORS, Unsuited, depthwise_conv2d, feed_forward, native, operator, reference
from zoo.ops.core import Operator, Saved
from zoo.support.register import import_all

for room in ("zoo.kernels", "zoo.learners"):  # which declare operators too
    import_all(room)

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, or an OpenMP that torch lacks")


class Case(NamedTuple):
    """Inputs of an operator.

    Attributes:
        operator: its name.
        inputs: shapes of tensors, lists of those, and plain values.
        loops: in C, that a fast implementation calls with them, forwards and backwards.
        tolerance: of results that are finite, relative to the largest.
    """

    operator: str
    inputs: tuple[Any, ...]
    loops: frozenset[str] = frozenset()
    tolerance: float = 2e-5


_FFN = [(2, 9), (2,), (9, 2), (9,), (20, 9), (20,), (20,), (9, 20), (9,)]
_DEPTHWISE = frozenset(["depthwise", "depthwise_taps"])
_PLANES = frozenset(["depthwise_planes", "depthwise_planes_taps"])

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
    "feed_forward": Case("feed_forward", ((2, 9, 3, 7), _FFN, (2, 9, 3, 7)), frozenset(["feed_forward"])),
    "feed_forward, alone": Case("feed_forward", ((2, 9, 3, 7), _FFN, None), frozenset(["feed_forward"])),
    "channel_norm": Case("channel_norm", ((2, 19, 2, 3), (19,), (19,), 1e-6, False), frozenset(["layer_norm"])),
    "channel_norm, gelu": Case("channel_norm", ((2, 19, 2, 3), (19,), (19,), 1e-6, True), frozenset(["layer_norm"])),
    "depthwise": Case("depthwise_conv2d", ((2, 19, 9, 8), (19, 1, 5, 7), (19,), 1), _DEPTHWISE),
    "depthwise, dilated": Case("depthwise_conv2d", ((1, 3, 6, 9), (3, 1, 3, 3), None, 2), _DEPTHWISE),
    "depthwise, planes": Case("depthwise_conv2d", ((2, 2, 5, 35), (2, 1, 3, 9), None, 1), _PLANES),
    "depthwise, square": Case("depthwise_conv2d", ((1, 2, 6, 14), (2, 1, 5, 5), None, 1), _PLANES),
    "depthwise, small": Case("depthwise_conv2d", ((3, 4, 2, 3), (4, 1, 3, 3), (4,), 1)),
    "depthwise, one pixel": Case("depthwise_conv2d", ((3, 4, 1, 1), (4, 1, 7, 7), (4,), 1)),
    "depthwise_weight": Case(
        "depthwise_weight", ((2, 3, 7, 5), (2, 3, 7, 5), [5, 7], 1), frozenset(["depthwise_taps"])
    ),
    "instance_standardise": Case("instance_standardise", ((2, 3, 5, 7), 1e-5), _STANDARDISE),
    "standardised_gate": Case("standardised_gate", ((2, 3, 5, 7), (2, 3, 5, 7), (5, 7)), _STANDARDISE),
    "standard_gelu": Case("standard_gelu", ((3, 24, 3, 6), (1,), 12, None, None, 1e-5), _SHARED, 1e-4),
    "standard_gelu, one group": Case("standard_gelu", ((3, 4, 3, 6), (1,), 1, None, None, 1e-5), _SHARED, 1e-4),
    "pointwise_conv": Case("pointwise_conv", ([(2, 3, 4, 5), (2, 1, 4, 5)], (4, 6), (4,))),
    "pointwise_conv, no bias": Case("pointwise_conv", ([(2, 3, 4, 5)], (4, 3), None)),
    "pointwise_twice": Case("pointwise_twice", ((2, 3, 4, 5), (4, 3), (4,), (5, 4), (5,))),
    "linear_channels_first": Case("linear_channels_first", ((3, 4, 6), (5, 4), (5,))),
    "pooled_mean": Case("pooled_mean", ((3, 2, 7, 9), [3, 5]), frozenset(["adaptive_mean"])),
    "pooled_mean, a sequence": Case("pooled_mean", ((3, 2, 1, 9), [4]), frozenset(["adaptive_mean"])),
    "local_kernel": Case("local_kernel", ((3, 25), (3, 8, 25), _LOCAL_NET, (25,)), frozenset(["local_kernel"])),
    "slow_fast_context": Case(
        "slow_fast_context",
        ((2, 3, 5, 7), (3,), (3, 3), (3,)),
        frozenset(["channel_interaction", "standardised_mixer"]),
    ),
    "slow_fast_block": Case(
        "slow_fast_block", (_MAP, _MAP, _MAP, [_MAP] * 2, *_BLOCK, [], *_BOTTLENECK, []), frozenset(), 1e-4
    ),
    "slow_fast_block, known moments, a map repeated": Case(
        "slow_fast_block",
        (_MAP, _MAP, _MAP, [_MAP, (2, 1, 14, 14)], *_BLOCK, [(3,)] * 4, *_BOTTLENECK, [(6,)] * 2),
        _BLOCK_LOOPS,
        1e-4,
    ),
    "metric_gaussian": Case("metric_gaussian", ((4, 3), (5, 3), (3, 2))),
    "metric_gaussian, scales": Case("metric_gaussian", ((2, 4, 3), (5, 3), (2, 1, 3))),
    "metric_gaussian, of itself": Case("metric_gaussian", ((4, 3), None, (3, 3))),
    "response_norm": Case("response_norm_and_energy", ((2, 3, 2, 4), (1, 1, 1, 4), (1, 1, 1, 4)), frozenset(), 1e-4),
    "response_norm, no bias": Case("response_norm_and_energy", ((2, 3, 2, 4), (1, 1, 1, 4), None), frozenset(), 1e-4),
}
FIRST = {case.operator: name for name, case in reversed(CASES.items())}


def build(case: Case, dtype: torch.dtype = torch.float32) -> list[Any]:
    seeds = iter(range(99))

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return normal(*value, seed=next(seeds)).to(dtype)
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            return [one(v) for v in value]
        return value

    values = [one(value) for value in case.inputs]
    if case.operator == "slow_fast_block":
        for known in (values[12], values[16]):  # means and variances
            known[1::2] = [t.abs() + 0.5 for t in known[1::2]]
    return values


def tensors_of(values: Sequence[Any]) -> list[Tensor]:
    flat = [t for v in values for t in (v if isinstance(v, list) else [v])]
    return [t for t in flat if isinstance(t, Tensor)]


def with_tensors(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The same inputs with other tensors."""
    rest = iter(tensors)

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        return next(rest) if isinstance(value, Tensor) else value

    return [one(value) for value in values]


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def run(function: Callable[..., Any], values: Sequence[Any], grad: tuple[int, float] | None, learns: bool) -> Any:
    """Results and gradients, or how it was refused; `grad` puts a number into the gradient of the first result."""
    given = [t.clone(memory_format=torch.preserve_format).requires_grad_(learns) for t in tensors_of(values)]
    try:
        with torch.set_grad_enabled(learns):
            found = outputs(function(*with_tensors(values, given)))
        if learns:
            slope = normal(*found[0].shape, seed=99).to(found[0].dtype)
            if grad is not None:
                slope.view(-1)[grad[0]] = grad[1]
            found += torch.autograd.grad(found[0], given, slope, materialize_grads=True)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return [t.detach() for t in found]


def plain(op: Operator[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with reference():
            return op(*args)

    return call


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the loops in C that are called from now on."""
    called: set[str] = set()
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (called.add(name), call(name, *arguments))[1])
    return called


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_no_operator_is_left_out() -> None:
    assert {name for name, op in OPERATORS.items() if op.reference.__module__.startswith("zoo.")} == set(FIRST)


@needs_compiler
def test_no_loop_is_left_out() -> None:
    assert set(native.signatures()) == set().union(*(case.loops for case in CASES.values()))


@pytest.mark.parametrize("name", FIRST.values())
def test_torch_finds_it_well_formed(name: str) -> None:
    """The schema is kept, gradients are registered, shapes and strides are told, and compilers may trace it."""
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values = build(case)
    with torch.inference_mode():
        torch.library.opcheck(op.op, tuple(values), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op.op, tuple(with_tensors(values, [t.requires_grad_() for t in tensors_of(values)])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_it_answers_as_its_reference(name: str, order: torch.memory_format, dtype: torch.dtype) -> None:
    """Values, gradients and types in any layout; the memory format is what was promised to compilers."""
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values = build(case, dtype)
    turned = [t.contiguous(memory_format=order) if t.ndim == 4 else t for t in tensors_of(values)]
    values = with_tensors(values, turned)
    kept = [t.clone() for t in turned]
    tolerance = {torch.float32: case.tolerance, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for learns in (False, True):
        want = run(plain(op), values, None, learns)
        for count in (1, 2):
            with threads(count):
                assert not differs(run(op, values, None, learns), want, tolerance)
    with torch.inference_mode():
        assert not differs(outputs(op(*values)), want[: len(outputs(op(*values)))], tolerance)
        found = outputs(op(*values))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = outputs(op._reference_in_layout(*with_tensors(values, [mode.from_tensor(t) for t in turned])))
    for real, told in zip(found, fake, strict=True):
        assert real.shape == told.shape
        assert [s for s, n in zip(real.stride(), real.shape, strict=True) if n > 1] == [
            s for s, n in zip(told.stride(), told.shape, strict=True) if n > 1
        ]
    assert all(torch.equal(t, before) for t, before in zip(turned, kept, strict=True))  # nothing is overwritten


@needs_compiler
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.loops])
def test_special_values(name: str, loops: set[str]) -> None:
    """Infinities, not-a-numbers and other extremes: every loop in C answers as the reference does, both ways."""
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values = build(case)
    inputs = tensors_of(values)
    learns = op.backward is not None
    cases: list[tuple[int | None, int, float]] = [(None, 0, 0.0)]
    many = len(inputs) > 40  # those of a block: one place each, and not-a-numbers, infinities and a large number
    for i, t in enumerate(inputs):
        tried = [(t.numel() // 2, v) for v in SPECIAL[:4]] if many else itertools.product(places(t.numel()), SPECIAL)
        cases += [(i, at, value) for at, value in tried]
    if learns:
        size = outputs(op(*values))[0].numel()
        cases += [(-1, at, value) for at in places(size) for value in SPECIAL]
    if not F.gelu(torch.full((8,), torch.inf)).isnan().all():  # which the library has on x86 only
        cases = [case for case in cases if case[2] != torch.inf or ("gelu" not in name and "feed" not in name)]
    complaints = []
    for i, at, value in cases:
        given, grad = [t.clone() for t in inputs], None
        if i == -1:
            grad = at, value
        elif i is not None:
            given[i].view(-1)[at] = value
        changed = with_tensors(values, given)
        complaint = differs(run(op, changed, grad, learns), run(plain(op), changed, grad, learns), case.tolerance)
        if complaint:
            complaints.append(f"{value} at {at} of input {i}: {complaint}")
    assert not complaints, f"{len(complaints)} of {len(cases)}:\n" + "\n".join(complaints[:40])
    assert loops >= case.loops


@pytest.mark.parametrize("name", FIRST.values())
def test_it_may_be_transformed(name: str) -> None:
    """Mapped, and differentiated forwards and twice: as the reference."""
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values = build(case, torch.float64)
    given = [0.5 * t for t in tensors_of(values)]
    slopes = [normal(*t.shape, seed=50 + i).double() for i, t in enumerate(given)]

    def call(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        return outputs(function(*with_tensors(values, tensors)))[0]

    many = [torch.stack([t, t + 0.1 * s]) for t, s in zip(given, slopes, strict=True)]
    for kind in (torch.float64, torch.float32):
        rows = [t.to(kind) for t in many]
        found = vmap(lambda *t: call(op, *t))(*rows)
        want = torch.stack([call(op.reference, *one) for one in zip(*rows, strict=True)])
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    for function in (lambda *t: call(op, *t),):
        found = jvp(function, tuple(given), tuple(slopes))[1]
        want = jvp(lambda *t: call(op.reference, *t), tuple(given), tuple(slopes))[1]
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))

    def second(function: Callable[..., Any]) -> Tensor:
        s = torch.zeros((), requires_grad=True)
        at = [t.float() + s * d.float() for t, d in zip(given, slopes, strict=True)]
        (first,) = torch.autograd.grad(call(function, *at).square().sum(), s, create_graph=True)
        return torch.autograd.grad(first, s)[0]

    torch.testing.assert_close(second(op), second(op.reference), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FIRST.values())
def test_the_defaults_of_a_process_change_nothing(name: str) -> None:
    """Types and devices come from the inputs, also where new tensors are float64, or on a device without numbers."""
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values, usual = build(case), torch.get_default_dtype()
    for learns in (False, True):
        for function in (op, plain(op)):
            want = run(function, values, None, learns)
            assert not isinstance(want, str)
            with torch.device("meta"):
                on_meta = run(function, values, None, learns)
            torch.set_default_dtype(torch.float64)
            in_double = run(function, values, None, learns)
            torch.set_default_dtype(usual)
            assert not differs(on_meta, want, 0.0)
            assert not differs(in_double, want, 0.0)


@pytest.mark.parametrize("name", FIRST.values())
def test_autocast(name: str) -> None:
    case, op = CASES[name], OPERATORS[CASES[name].operator]
    values = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        for learns in (False, True):
            got, want = run(op, values, None, learns), run(op.reference, values, None, learns)
            assert not differs(got, want, 0.05)


@needs_compiler
@pytest.mark.parametrize("setting", [("ZOO_NATIVE", "0"), ("CC", "no-such-compiler"), ("CC", "false")])
def test_without_loops_the_numbers_are_the_same(setting: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(2, 4, 9, 9), normal(4, 1, 7, 7)
    usual = depthwise_conv2d(x, weight)
    native.library.cache_clear()
    monkeypatch.delenv("ZOO_NATIVE", raising=False)
    monkeypatch.setenv(*setting)
    try:
        assert native.library() is None
        without = depthwise_conv2d(x, weight)
    finally:
        native.library.cache_clear()
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


@needs_compiler
def test_gelu_and_sigmoid_of_every_size_of_number() -> None:
    h = torch.cat([torch.linspace(-120, 120, 20001), torch.logspace(-30, 30, 61), -torch.logspace(-30, 30, 61)])
    points, special = len(h), torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)

    def gelu(h: Tensor) -> Tensor:
        y = torch.empty_like(h)
        native.call("standardise", h, None, torch.zeros(len(h)), y, torch.zeros(1), torch.ones(1), 1, len(h), 0.0)
        return y

    got = gelu(h)
    apart = (got.double() - F.gelu(h.double())).abs() / (1 + h.double().abs())
    assert float(apart.max()) < 2e-7
    assert got[h < -6].abs().max() == 0
    assert gelu(special).isnan().all()  # of infinity too, as the library has it on x86
    x = torch.tensor([[0.0, 1.0]]).repeat(points, 1).view(1, points, 1, 2)
    gated, channel = torch.empty_like(x), 4 * h  # whose mean is a half
    means = [torch.empty(points, 2), torch.empty(points, 2)]
    native.call("channel_interaction", x, channel, gated, *means, 1, points, 2, 0.25)
    factor = torch.sigmoid(h.double())
    want = factor / (factor.square() + 1).sqrt()
    assert float((gated[0, :, 0, 1].double() - want).abs().max()) < 2e-7


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
