"""How an operator is declared, and which of its implementations answers.

An operator is a documented function in plain torch, its *reference*, under a name in torch's library (`zoo::name`).
Faster implementations for a kind of device and a gradient written by hand may be added:

    @operator(layout=...)
    def scaled(x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor

    @scaled.on("cpu", torch.float32)
    def _(x: Tensor, factor: float) -> Tensor: ...

    @scaled.gradient
    def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]: ...

Callers call `scaled(x, 2.0)` and nothing else. The fast implementation answers where tensors are ordinary and nobody
transforms or records the computation; otherwise torch sees the reference, step by step: under `torch.func` (vmap,
forward-mode derivatives), for second derivatives, other types and devices, exporters and tracers. A compiler may see
one node, if `whole` says so. docs/ops.md tells more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from zoo.ops.dispatch import is_plain_eager

__all__ = ["OPERATORS", "Operator", "Saved", "Unsuited", "operator", "reference"]

P = ParamSpec("P")
R = TypeVar("R")
Implementation = Callable[..., Any]

#: Every operator by its name; one that is declared anywhere is found here, and by the tests of all operators.
OPERATORS: dict[str, Operator[..., Any]] = {}

_LIBRARY = torch.library.Library("zoo", "DEF")
_by_reference: list[str] = []  # names of operators in the `reference()` contexts that are open; "" is every one


class Unsuited(ValueError):
    """Raised by a fast implementation that does not take its inputs; nothing was written, and the reference answers."""


class Saved(NamedTuple):
    """What a gradient is made from.

    Attributes:
        inputs: of the operator, in order, defaults filled in.
        outputs: those that :attr:`Operator.saves` names, None for the others.
        wanted: for every input whether its gradient is wanted; for a list of tensors, whether that of any is.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor | None, ...]
    wanted: tuple[bool, ...]


@contextmanager
def reference(*names: str) -> Iterator[None]:
    """Let the references of these operators answer, of all if none is named, in all threads: the plain form.

    Args:
        names: of operators.
    """
    chosen = [OPERATORS[name].name for name in names] or [""]
    _by_reference.extend(chosen)
    try:
        yield
    finally:
        for name in chosen:
            _by_reference.remove(name)


def operator(
    *,
    layout: Callable[..., torch.memory_format] | None = None,
    whole: Callable[..., bool] | None = None,
    autocast: str = "reference",
    saves: Sequence[int] = (),
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Make a function in plain torch the reference of an operator of the same name.

    Args:
        layout: memory format of the first output, from the inputs; every fast implementation must answer in it.
            None means contiguous, as all other outputs are.
        whole: from the inputs, whether a compiler sees one node (where a fast implementation suits); None means never.
        autocast: what the fast implementations do under autocast: `"reference"`, stay away; `"ignore"`, nothing, for
            they take several types at once; `"cast"`, compute in the lower precision, as a convolution does.
        saves: outputs that the gradient needs.
    """

    def declare(function: Callable[P, R]) -> Operator[P, R]:
        return Operator(function, layout, whole, autocast, saves)

    return declare


class _Fast(NamedTuple):
    function: Implementation
    dtypes: tuple[torch.dtype, ...]


class Operator(Generic[P, R]):
    """One operator of torch's library: call it as its reference. Made by :func:`operator`.

    Attributes:
        name: within the namespace `zoo`.
        reference: the function in plain torch.
        fast: implementations by kind of device (`cpu`, `cuda`).
        op: the operator as torch knows it, `torch.ops.zoo.<name>.default`.
    """

    def __init__(
        self,
        function: Callable[P, R],
        layout: Callable[..., torch.memory_format] | None,
        whole: Callable[..., bool] | None,
        autocast: str,
        saves: Sequence[int],
    ) -> None:
        self.name = function.__name__
        self.reference = function
        self.fast: dict[str, _Fast] = {}
        self.backward: Callable[..., Any] | None = None
        self.saves = saves
        self._layout, self._whole, self._autocast = layout, whole, autocast
        self.__doc__, self.__name__, self.__module__ = function.__doc__, self.name, function.__module__
        _LIBRARY.define(self.name + torch.library.infer_schema(function, mutates_args=()))
        self._called: Any = getattr(torch.ops.zoo, self.name)  # a graph of torch.fx that names it can be scripted
        self.op: Any = self._called.default
        self._defaults = [a.default_value if a.has_default_value() else None for a in self.op._schema.arguments]
        _LIBRARY.impl(self.name, self._from_autograd, "Autograd")
        _LIBRARY.impl(self.name, self._below_autograd_key, "CompositeExplicitAutograd")
        for watcher in ("FuncTorchBatched", "Tracer"):
            _LIBRARY.impl(self.name, function, watcher)
        torch.library.register_fake(f"zoo::{self.name}", self._laid_out, lib=_LIBRARY)
        register_flop_formula(getattr(torch.ops.zoo, self.name), get_raw=True)(self._flops)
        torch.jit._builtins._register_builtin(self, f"zoo::{self.name}")
        OPERATORS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The operator, on anything that its reference takes."""
        if torch.compiler.is_exporting():  # what is exported runs where nobody knows the zoo
            return self.reference(*args, **kwargs)
        return self._called(*args, **kwargs)

    def on(self, device: str, *dtypes: torch.dtype) -> Callable[[Implementation], Implementation]:
        """Register a fast implementation for tensors of one kind of device and of one of these types.

        It gets all inputs in order, allocates what it returns, and may raise :class:`Unsuited`. Nobody will ask it for
        gradients.
        """

        def register(function: Implementation) -> Implementation:
            self.fast[device] = _Fast(function, dtypes)
            return function

        return register

    def gradient(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the gradient: from :class:`Saved` and the gradient of every output to that of every input.

        It is asked for first derivatives only, those of the reference's autograd, and may raise :class:`Unsuited`;
        without one, whoever wants gradients gets the reference. It may call operators, which then answer in the fastest
        way again.
        """
        self.backward = function
        return function

    # ---- who answers ---------------------------------------------------------------------------------------

    def _from_autograd(self, *args: Any) -> Any:
        """Torch asks here first, unless in inference mode: fast implementation, one node, or the reference."""
        args = self._filled(args)
        tensors = _tensors(args)
        plain = is_plain_eager(tensors)
        if plain or self._stays_whole(args):
            fast = self._suitable(tensors)
            if fast is not None:
                if self._autocast == "cast" and torch.is_autocast_enabled(tensors[0].device.type):
                    return self._in_lower_precision(tensors[0].device.type, args)
                learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
                answer = self._fast_alone if plain else self._below_autograd
                with suppress(Unsuited):
                    if not learns:
                        return answer(fast, args)
                    if self.backward is not None:
                        return _Differentiable.apply(self, fast, answer, args, *tensors)
                if not learns:  # a compiled graph relies on the layout
                    return self._laid_out(*args)
        return self.reference(*args)  # type: ignore[call-arg]

    def _below_autograd_key(self, *args: Any) -> Any:
        """Torch asks here in inference mode, and for a node of a compiled graph."""
        args = self._filled(args)
        tensors = _tensors(args)
        fast = self._suitable(tensors) if is_plain_eager(tensors) else None
        if fast is None:
            return self._laid_out(*args)
        if self._autocast == "cast" and torch.is_autocast_enabled(tensors[0].device.type):
            return self._in_lower_precision(tensors[0].device.type, args)
        return self._fast_or_reference(fast, args)

    def _fast_alone(self, fast: _Fast, args: tuple[Any, ...]) -> Any:
        return fast.function(*args)

    def _fast_or_reference(self, fast: _Fast, args: tuple[Any, ...]) -> Any:
        try:
            return fast.function(*args)
        except Unsuited:
            return self._laid_out(*args)

    def _below_autograd(self, _: _Fast, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args)

    def _filled(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """With the defaults that torch leaves out."""
        return args if len(args) == len(self._defaults) else (*args, *self._defaults[len(args) :])

    def _suitable(self, tensors: Sequence[Tensor]) -> _Fast | None:
        """The fast implementation for all of these, if there is one: the first is real, whole numbers may follow."""
        dtype, device = tensors[0].dtype, tensors[0].device
        fast = None if "" in _by_reference or self.name in _by_reference else self.fast.get(device.type)
        if fast is None or dtype not in fast.dtypes:
            return None
        lowered = torch.is_autocast_enabled(device.type)
        if lowered and self._autocast == "reference":
            return None
        mixed = self._autocast == "ignore" or (lowered and self._autocast == "cast")
        for t in tensors:
            same = t.dtype == dtype or (mixed and t.dtype in fast.dtypes) or not t.is_floating_point()
            if not same or t.device != device or not _has_numbers(t):
                return None
        return fast

    def _stays_whole(self, args: tuple[Any, ...]) -> bool:
        """Whether a compiler, and nobody else, is watching, and shall see one node."""
        if self._whole is None or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        return not torch._C._are_functorch_transforms_active() and self._whole(*args)

    def _in_lower_precision(self, device: str, args: tuple[Any, ...]) -> Any:
        dtype = torch.get_autocast_dtype(device)
        lower = (torch.float32, torch.float16, torch.bfloat16)
        args = _mapped(lambda t: t.to(dtype) if t.dtype in lower else t, args)
        with torch.autocast(device, enabled=False):
            return self.op(*args)

    def _laid_out(self, *args: Any) -> Any:
        """The reference in the layout that the operator promises."""
        args = self._filled(args)
        result: Any = self.reference(*args)  # type: ignore[call-arg]
        layout = self._layout(*args) if self._layout else torch.contiguous_format
        if isinstance(result, Tensor):
            return result.contiguous(memory_format=layout)
        first, *others = result
        return (first.contiguous(memory_format=layout), *(t.contiguous() for t in others))

    def _flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """Operations of the reference."""
        args = _mapped(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), args)
        with FlopCounterMode(display=False) as counter:
            self.reference(*args, **kwargs)
        return counter.get_total_flops()


class _Differentiable(torch.autograd.Function):
    """A fast implementation with its gradient; whoever wants more than that gets the reference's autograd."""

    @staticmethod
    def forward(
        ctx: Any, op: Operator[..., Any], fast: _Fast, answer: Implementation, args: tuple[Any, ...], *_: Tensor
    ) -> Any:
        result = answer(fast, args)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        ctx.op, ctx.places, kept = op, *_taken_out(args)
        ctx.kept_inputs = len(kept)
        ctx.save_for_backward(*kept, *(outputs[i] for i in op.saves))
        ctx.count = len(outputs)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # once: each reading unpacks again
        tensors, saved = kept[: ctx.kept_inputs], kept[ctx.kept_inputs :]
        wanted = ctx.needs_input_grad[4:]
        if all(g is None for g in grads):
            return None, None, None, None, *(None for _ in tensors)
        compiled = torch.compiler.is_compiling()
        if torch.is_grad_enabled() or not (compiled or is_plain_eager([g for g in grads if g is not None])):
            return None, None, None, None, *_reference_gradients(ctx.op, ctx.places, tensors, wanted, grads)
        outputs: list[Tensor | None] = [None] * ctx.count
        for i, t in zip(ctx.op.saves, saved, strict=True):
            outputs[i] = t
        inputs = _put_back(ctx.places, tensors)
        asked = tuple(_any_wanted(place, wanted) for place in ctx.places)
        try:
            found = ctx.op.backward(Saved(inputs, tuple(outputs), asked), *grads)
        except Unsuited:
            return None, None, None, None, *_reference_gradients(ctx.op, ctx.places, tensors, wanted, grads)
        return None, None, None, None, *_flat_gradients(ctx.places, found)


def _reference_gradients(
    op: Operator[..., Any],
    places: tuple[Any, ...],
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of the reference, with a graph of their own if somebody wants to differentiate again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = [t.view_as(t) if again else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        result = op.reference(*_put_back(places, fresh))
        outputs = (result,) if isinstance(result, Tensor) else result
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        asked = [t for t, w in zip(fresh, wanted, strict=True) if w]
        ys, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, asked, gs, create_graph=again, allow_unused=True))
    return [next(found) if w else None for w in wanted]


# ---- tensors ---------------------------------------------------------------------------------------------------


def _has_numbers(t: Tensor) -> bool:
    """Whether its memory holds its numbers as they are, at least one."""
    return t.layout is torch.strided and not (t.is_nested or t.is_neg()) and t.numel() > 0


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            found += value
    return found


def _mapped(function: Callable[[Tensor], Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments with every tensor replaced."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(v) for v in value]
        return function(value) if isinstance(value, Tensor) else value

    return tuple(one(value) for value in args)


class _Place(NamedTuple):
    """Where a tensor was."""

    position: int


def _taken_out(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments with places instead of tensors, and the tensors."""
    tensors: list[Tensor] = []

    def take(t: Tensor) -> _Place:
        tensors.append(t)
        return _Place(len(tensors) - 1)

    return _mapped(take, args), tensors


def _put_back(places: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if isinstance(value, _Place):
            return values[value.position]
        return [one(v) for v in value] if isinstance(value, list) else value

    return tuple(one(value) for value in places)


def _any_wanted(place: Any, wanted: Sequence[bool]) -> bool:
    places = place if isinstance(place, list) else [place]
    return any(wanted[p.position] for p in places if isinstance(p, _Place))


def _flat_gradients(places: Sequence[Any], grads: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of the tensors alone, in order."""
    found: list[Tensor | None] = []
    for place, grad in zip(places, grads, strict=True):
        if isinstance(place, _Place):
            found.append(grad)
        elif isinstance(place, list):
            several = grad if grad is not None else [None] * len(place)
            found += [g for p, g in zip(place, several, strict=True) if isinstance(p, _Place)]
    return found
