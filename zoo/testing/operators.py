"""What every operator keeps: well formed for torch, and its fast forms answer as its reference does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from zoo.ops import OPERATORS, Operator, reference

__all__ = ["SPECIAL", "Case", "OperatorTests", "differs", "normal"]

SPECIAL = (torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-40)
_HERE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever the defaults

Results = Sequence[Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of an operator.

    Attributes:
        operator: Its name.
        inputs: Shapes of tensors, lists of those, and plain values.
        tolerance: Of results that are finite, in float32, relative to the largest.
    """

    operator: str
    inputs: tuple[Any, ...]
    tolerance: float = 2e-5

    @property
    def op(self) -> Operator[..., Any]:
        """The operator."""
        return OPERATORS[self.operator]

    def build(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        """The inputs, with standard normal numbers that are always the same."""
        seeds = iter(range(99))
        return _each(lambda shape: normal(*shape, seed=next(seeds)).to(dtype), tuple, self.inputs)


def normal(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal numbers in float32, always the same."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), **_HERE)


def differs(got: Results | str, want: Results | str, tolerance: float) -> str:
    """What tells two results apart, or nothing; results, or how they were refused."""
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


class OperatorTests:
    """`torch.library.opcheck`, types, layouts, threads, special values, transforms and autocast.

    Attributes:
        cases: Inputs by name, at least one for each operator; the first of each is put to the slower checks.
    """

    cases: ClassVar[Mapping[str, Case]]

    def special_cases(self) -> Iterable[str]:
        """Cases that are put to special values: those of operators with a fast form for a CPU."""
        return [name for name, case in self.cases.items() if "cpu" in case.op.fast]

    def special_values(self, case: Case) -> Sequence[float]:
        """Infinities, not-a-numbers and other extremes that a fast form must answer as the reference does."""
        return SPECIAL

    def special_places(self, case: Case, count: int) -> Sequence[int]:
        """Indices in a flat tensor of `count` entries that get special values, one at a time."""
        return sorted({0, count // 2, count - 1})

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test gets the cases that the name of its argument asks for."""
        firsts = {case.operator: name for name, case in reversed(list(self.cases.items()))}
        chosen = {"case": self.cases, "first": firsts.values(), "special": self.special_cases()}
        for argument, names in chosen.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, [pytest.param(self.cases[name], id=name) for name in names])

    def test_torch_finds_it_well_formed(self, first: Case) -> None:
        """The schema is kept, gradients are registered, shapes and strides are told, and compilers may trace it."""
        values = first.build()
        with torch.inference_mode():
            torch.library.opcheck(first.op.op, tuple(values), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(first.op.op, tuple(_with_tensors(values, [t.requires_grad_() for t in _tensors(values)])))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
    def test_it_answers_as_its_reference(self, case: Case, order: torch.memory_format, dtype: torch.dtype) -> None:
        """Values, gradients and types in any layout; the memory format is what was promised to compilers."""
        op, values = case.op, case.build(dtype)
        turned = [t.contiguous(memory_format=order) if t.ndim == 4 else t for t in _tensors(values)]
        values = _with_tensors(values, turned)
        kept = [t.clone() for t in turned]
        tolerance = {torch.float32: case.tolerance, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
        for learns in (False, True):
            want = _run(_plain(op), values, None, learns)
            for count in (1, 2):
                with _threads(count):
                    assert not differs(_run(op, values, None, learns), want, tolerance)
        with torch.inference_mode():
            found = _outputs(op(*values))
            assert not differs(found, want[: len(found)], tolerance)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = _outputs(op._reference_in_layout(*_with_tensors(values, [mode.from_tensor(t) for t in turned])))
        for real, told in zip(found, fake, strict=True):
            assert real.shape == told.shape
            assert [s for s, n in zip(real.stride(), real.shape, strict=True) if n > 1] == [
                s for s, n in zip(told.stride(), told.shape, strict=True) if n > 1
            ]
        assert all(torch.equal(t, before) for t, before in zip(turned, kept, strict=True))  # nothing is overwritten

    def test_special_values(self, special: Case) -> None:
        """The fast form answers extremes as the reference does, in any input and in the gradient."""
        op, values = special.op, special.build()
        inputs, numbers = _tensors(values), self.special_values(special)
        cases: list[tuple[int | None, int, float]] = [(None, 0, 0.0)]
        for index, t in enumerate(inputs):
            cases += [(index, at, value) for at in self.special_places(special, t.numel()) for value in numbers]
        learns = op.backward is not None
        if learns:
            count = _outputs(op(*values))[0].numel()
            cases += [(-1, at, value) for at in self.special_places(special, count) for value in numbers]
        complaints = []
        for i, at, value in cases:
            given = [t.clone() for t in inputs]
            grad: tuple[int, float] | None = None
            if i == -1:
                grad = at, value
            elif i is not None:
                given[i].view(-1)[at] = value
            changed = _with_tensors(values, given)
            got, want = (_run(function, changed, grad, learns) for function in (op, _plain(op)))
            if complaint := differs(got, want, special.tolerance):
                complaints.append(f"{value} at {at} of input {i}: {complaint}")
        assert not complaints, f"{len(complaints)} of {len(cases)}:\n" + "\n".join(complaints[:40])

    def test_it_may_be_transformed(self, first: Case) -> None:
        """Mapped, and differentiated forwards and twice: as the reference."""
        op, values = first.op, first.build(torch.float64)
        given = [0.5 * t for t in _tensors(values)]
        slopes = [normal(*t.shape, seed=50 + i).double() for i, t in enumerate(given)]

        def call(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
            return _outputs(function(*_with_tensors(values, tensors)))[0]

        many = [torch.stack([t, t + 0.1 * s]) for t, s in zip(given, slopes, strict=True)]
        for kind in (torch.float64, torch.float32):
            rows = [t.to(kind) for t in many]
            found = vmap(lambda *t: call(op, *t))(*rows)
            want = torch.stack([call(op.reference, *one) for one in zip(*rows, strict=True)])
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        found = jvp(lambda *t: call(op, *t), tuple(given), tuple(slopes))[1]
        want = jvp(lambda *t: call(op.reference, *t), tuple(given), tuple(slopes))[1]
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))

        def second(function: Callable[..., Any]) -> Tensor:
            s = torch.zeros((), requires_grad=True)
            at = [t.float() + s * d.float() for t, d in zip(given, slopes, strict=True)]
            (slope,) = torch.autograd.grad(call(function, *at).square().sum(), s, create_graph=True)
            return torch.autograd.grad(slope, s)[0]

        torch.testing.assert_close(second(op), second(op.reference), rtol=1e-3, atol=1e-3)

    def test_the_defaults_of_a_process_change_nothing(self, first: Case) -> None:
        """Dtypes and devices come from the inputs, whatever the default dtype and device."""
        values, usual = first.build(), torch.get_default_dtype()
        for learns in (False, True):
            for function in (first.op, _plain(first.op)):
                want = _run(function, values, None, learns)
                with torch.device("meta"):
                    on_meta = _run(function, values, None, learns)
                try:
                    torch.set_default_dtype(torch.float64)
                    in_double = _run(function, values, None, learns)
                finally:
                    torch.set_default_dtype(usual)
                assert not differs(on_meta, want, 0.0)
                assert not differs(in_double, want, 0.0)

    def test_autocast(self, first: Case) -> None:
        values = first.build()
        with torch.autocast("cpu", torch.bfloat16):
            for learns in (False, True):
                got, want = (_run(f, values, None, learns) for f in (first.op, first.op.reference))
                assert not differs(got, want, 0.05)


# ---- inputs and results ------------------------------------------------------------------------------------


def _each(change: Callable[[Any], Any], kind: type, values: Iterable[Any]) -> list[Any]:
    """Values with everything of a kind changed, also inside lists."""

    def one(value: Any) -> Any:
        if isinstance(value, list):
            return [one(v) for v in value]
        return change(value) if isinstance(value, kind) else value

    return [one(value) for value in values]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    flat = [t for v in values for t in (v if isinstance(v, list) else [v])]
    return [t for t in flat if isinstance(t, Tensor)]


def _with_tensors(values: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """The same inputs with other tensors."""
    rest = iter(tensors)
    return _each(lambda _: next(rest), Tensor, values)


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _run(function: Callable[..., Any], values: Sequence[Any], grad: tuple[int, float] | None, learns: bool) -> Any:
    """Results and gradients, or how it was refused; `grad` puts a number into the gradient of the first result."""
    given = [t.clone(memory_format=torch.preserve_format).requires_grad_(learns) for t in _tensors(values)]
    try:
        with torch.set_grad_enabled(learns):
            found = _outputs(function(*_with_tensors(values, given)))
        if learns:
            slope = normal(*found[0].shape, seed=99).to(found[0].dtype)
            if grad is not None:
                slope.view(-1)[grad[0]] = grad[1]
            found += torch.autograd.grad(found[0], given, slope, materialize_grads=True)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return [t.detach() for t in found]


def _plain(op: Operator[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with reference():
            return op(*args)

    return call


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)
