"""Declaration of operators, and dispatch to their implementations.

An operator is a documented function in plain torch, its *reference*, registered in torch's library as `zoo::name`.
Faster implementations for a device type and a hand-written gradient may be added:

    @operator(layout=...)
    def scaled(x: Tensor, factor: float = 1.0) -> Tensor:
        return x * factor

    @scaled.on("cpu", torch.float32)
    def _(x: Tensor, factor: float) -> Tensor: ...

    @scaled.gradient
    def _(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]: ...

Callers just call `scaled(x, 2.0)`. The fast implementation runs for ordinary tensors in eager mode; otherwise torch
sees the reference, step by step: under `torch.func` (vmap, forward-mode derivatives), for second derivatives, other
types and devices, exporters and tracers. A compiler may see a single node, if `whole` says so. See docs/ops.md.
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

#: All operators by name, also those declared outside of this package; tests iterate over them.
OPERATORS: dict[str, Operator[..., Any]] = {}

_LIBRARY = torch.library.Library("zoo", "DEF")
_references_only = 0  # number of open `reference()` contexts


class Unsuited(ValueError):
    """Raised by a fast implementation that does not support its inputs, before writing anything; the reference runs."""


class Saved(NamedTuple):
    """Arguments of a gradient function.

    Attributes:
        inputs: of the operator, in order, with defaults filled in.
        outputs: those that :attr:`Operator.saves` names, None for the others.
        wanted: for every input whether its gradient is needed; for a list of tensors, whether any is.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor | None, ...]
    wanted: tuple[bool, ...]


@contextmanager
def reference() -> Iterator[None]:
    """Context that runs the reference of every operator, in all threads: the baseline for speed comparisons."""
    global _references_only
    _references_only += 1
    try:
        yield
    finally:
        _references_only -= 1


def operator(
    *,
    layout: Callable[..., torch.memory_format] | None = None,
    whole: Callable[..., bool] | None = None,
    autocast: str = "reference",
    saves: Sequence[int] = (),
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Turn a function in plain torch into the reference of an operator of the same name.

    Args:
        layout: memory format of the first output as a function of the inputs, binding for fast implementations; None
            means contiguous, as for all other outputs.
        whole: from the inputs, whether a compiler sees a single node (if a fast implementation applies); None means
            never.
        autocast: fast implementations under autocast: `"reference"`, use the reference; `"ignore"`, run as usual (they
            accept mixed dtypes); `"cast"`, compute in the lower precision, as convolutions do.
        saves: outputs that the gradient needs.
    """

    def declare(function: Callable[P, R]) -> Operator[P, R]:
        return Operator(function, layout, whole, autocast, saves)

    return declare


class _Fast(NamedTuple):
    function: Implementation
    dtypes: tuple[torch.dtype, ...]


class Operator(Generic[P, R]):
    """An operator in torch's library, called like its reference. Created by :func:`operator`.

    Attributes:
        name: in the namespace `zoo`.
        reference: the function in plain torch.
        fast: implementations by device type (`cpu`, `cuda`).
        op: the overload in torch's library, `torch.ops.zoo.<name>.default`.
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
        self._called: Any = getattr(torch.ops.zoo, self.name)  # torch.fx graphs that contain it can be scripted
        self.op: Any = self._called.default
        self._defaults = [a.default_value if a.has_default_value() else None for a in self.op._schema.arguments]
        _LIBRARY.impl(self.name, self._from_autograd, "Autograd")
        _LIBRARY.impl(self.name, self._below_autograd_key, "CompositeExplicitAutograd")
        for key in ("FuncTorchBatched", "Tracer"):
            _LIBRARY.impl(self.name, function, key)
        torch.library.register_fake(f"zoo::{self.name}", self._reference_in_layout, lib=_LIBRARY)
        register_flop_formula(getattr(torch.ops.zoo, self.name), get_raw=True)(self._flops)
        torch.jit._builtins._register_builtin(self, f"zoo::{self.name}")
        OPERATORS[self.name] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operator on any arguments of its reference."""
        if torch.compiler.is_exporting():  # an exported program must run without the zoo
            return self.reference(*args, **kwargs)
        return self._called(*args, **kwargs)

    def on(self, device: str, *dtypes: torch.dtype) -> Callable[[Implementation], Implementation]:
        """Register a fast implementation for tensors of a device type and one of these dtypes.

        It gets all inputs in order, allocates its outputs, and may raise :class:`Unsuited`. It is called without
        autograd.
        """

        def register(function: Implementation) -> Implementation:
            self.fast[device] = _Fast(function, dtypes)
            return function

        return register

    def gradient(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the gradient: from :class:`Saved` and the gradients of all outputs to those of all inputs.

        Used for first derivatives only, and may raise :class:`Unsuited`; without one, the reference runs whenever
        gradients are needed. It may call operators, which use their fast implementations in turn.
        """
        self.backward = function
        return function

    # ---- dispatch ------------------------------------------------------------------------------------------

    def _from_autograd(self, *args: Any) -> Any:
        """Implementation for the Autograd key (not in inference mode): fast implementation, one node, or reference."""
        args = self._with_defaults(args)
        tensors = _tensors(args)
        plain = is_plain_eager(tensors)
        if plain or self._is_single_node(args):
            fast = self._find_fast(tensors)
            if fast is not None:
                if self._autocast == "cast" and torch.is_autocast_enabled(tensors[0].device.type):
                    return self._in_lower_precision(tensors[0].device.type, args)
                learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
                answer = self._run_fast if plain else self._redispatch
                with suppress(Unsuited):
                    if not learns:
                        return answer(fast, args)
                    if self.backward is not None:
                        return _Differentiable.apply(self, fast, answer, args, *tensors)
                if not learns:  # compiled graphs rely on the layout
                    return self._reference_in_layout(*args)
        return self.reference(*args)  # type: ignore[call-arg]

    def _below_autograd_key(self, *args: Any) -> Any:
        """Implementation below autograd: inference mode, and nodes of a compiled graph."""
        args = self._with_defaults(args)
        tensors = _tensors(args)
        fast = self._find_fast(tensors) if is_plain_eager(tensors) else None
        if fast is None:
            return self._reference_in_layout(*args)
        if self._autocast == "cast" and torch.is_autocast_enabled(tensors[0].device.type):
            return self._in_lower_precision(tensors[0].device.type, args)
        return self._fast_or_reference(fast, args)

    def _run_fast(self, fast: _Fast, args: tuple[Any, ...]) -> Any:
        return fast.function(*args)

    def _fast_or_reference(self, fast: _Fast, args: tuple[Any, ...]) -> Any:
        try:
            return fast.function(*args)
        except Unsuited:
            return self._reference_in_layout(*args)

    def _redispatch(self, _: _Fast, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*args)

    def _with_defaults(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Append the defaults, which torch leaves out."""
        return args if len(args) == len(self._defaults) else (*args, *self._defaults[len(args) :])

    def _find_fast(self, tensors: Sequence[Tensor]) -> _Fast | None:
        """The fast implementation for these tensors, or None: later ones, unlike the first, may be integers."""
        dtype, device = tensors[0].dtype, tensors[0].device
        fast = None if _references_only else self.fast.get(device.type)
        if fast is None or dtype not in fast.dtypes:
            return None
        lowered = torch.is_autocast_enabled(device.type)
        if lowered and self._autocast == "reference":
            return None
        mixed = self._autocast == "ignore" or (lowered and self._autocast == "cast")
        for t in tensors:
            same = t.dtype == dtype or (mixed and t.dtype in fast.dtypes) or not t.is_floating_point()
            if not same or t.device != device or not _is_dense(t):
                return None
        return fast

    def _is_single_node(self, args: tuple[Any, ...]) -> bool:
        """Whether a compiler is tracing and shall see a single node."""
        if self._whole is None or not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return False
        return not torch._C._are_functorch_transforms_active() and self._whole(*args)

    def _in_lower_precision(self, device: str, args: tuple[Any, ...]) -> Any:
        dtype = torch.get_autocast_dtype(device)
        lower = (torch.float32, torch.float16, torch.bfloat16)
        args = _map_tensors(lambda t: t.to(dtype) if t.dtype in lower else t, args)
        with torch.autocast(device, enabled=False):
            return self.op(*args)

    def _reference_in_layout(self, *args: Any) -> Any:
        """The reference, in the operator's declared memory format."""
        args = self._with_defaults(args)
        result: Any = self.reference(*args)  # type: ignore[call-arg]
        layout = self._layout(*args) if self._layout else torch.contiguous_format
        if isinstance(result, Tensor):
            return result.contiguous(memory_format=layout)
        first, *others = result
        return (first.contiguous(memory_format=layout), *(t.contiguous() for t in others))

    def _flops(self, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
        """Floating-point operations of the reference."""
        args = _map_tensors(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), args)
        with FlopCounterMode(display=False) as counter:
            self.reference(*args, **kwargs)
        return counter.get_total_flops()


class _Differentiable(torch.autograd.Function):
    """Fast implementation with hand-written gradient; higher derivatives use the reference's autograd."""

    @staticmethod
    def forward(
        ctx: Any, op: Operator[..., Any], fast: _Fast, answer: Implementation, args: tuple[Any, ...], *_: Tensor
    ) -> Any:
        result = answer(fast, args)
        outputs = (result,) if isinstance(result, Tensor) else tuple(result)
        ctx.op, ctx.places, kept = op, *_flatten(args)
        ctx.kept_inputs = len(kept)
        ctx.save_for_backward(*kept, *(outputs[i] for i in op.saves))
        ctx.count = len(outputs)
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # read once: every access unpacks again
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
        inputs = _unflatten(ctx.places, tensors)
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
    """Gradients of the reference, with a graph if they may be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = [t.view_as(t) if again else t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        result = op.reference(*_unflatten(places, fresh))
        outputs = (result,) if isinstance(result, Tensor) else result
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
        asked = [t for t, w in zip(fresh, wanted, strict=True) if w]
        ys, gs = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, asked, gs, create_graph=again, allow_unused=True))
    return [next(found) if w else None for w in wanted]


# ---- tensors ---------------------------------------------------------------------------------------------------


def _is_dense(t: Tensor) -> bool:
    """Whether a tensor is strided, non-empty and not a lazy negative."""
    return t.layout is torch.strided and not (t.is_nested or t.is_neg()) and t.numel() > 0


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            found += value
    return found


def _map_tensors(function: Callable[[Tensor], Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments with every tensor replaced by function(tensor)."""

    def one(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [one(v) for v in value]
        return function(value) if isinstance(value, Tensor) else value

    return tuple(one(value) for value in args)


class _Slot(NamedTuple):
    """Placeholder for a tensor, by its index."""

    position: int


def _flatten(args: Sequence[Any]) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Arguments with placeholders instead of tensors, and the tensors."""
    tensors: list[Tensor] = []

    def take(t: Tensor) -> _Slot:
        tensors.append(t)
        return _Slot(len(tensors) - 1)

    return _map_tensors(take, args), tensors


def _unflatten(places: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        if isinstance(value, _Slot):
            return values[value.position]
        return [one(v) for v in value] if isinstance(value, list) else value

    return tuple(one(value) for value in places)


def _any_wanted(place: Any, wanted: Sequence[bool]) -> bool:
    places = place if isinstance(place, list) else [place]
    return any(wanted[p.position] for p in places if isinstance(p, _Slot))


def _flat_gradients(places: Sequence[Any], grads: Sequence[Any]) -> list[Tensor | None]:
    """Gradients of the tensors, in order."""
    found: list[Tensor | None] = []
    for place, grad in zip(places, grads, strict=True):
        if isinstance(place, _Slot):
            found.append(grad)
        elif isinstance(place, list):
            several = grad if grad is not None else [None] * len(place)
            found += [g for p, g in zip(place, several, strict=True) if isinstance(p, _Slot)]
    return found
