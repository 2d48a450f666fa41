"""Calls of the loops in C (the folder `cpu`), for operators in float32 on a CPU.

They do in one pass over memory what takes torch's operators several. Types and number of arguments are those of the
definitions in C. Without a C compiler, or with ZOO_NATIVE=0, :func:`call` raises :class:`~zoo.ops.core.Unsuited`, and
an operator's reference answers. :mod:`zoo.ops.building` tells where the compiled loops are kept, and what the
environment variables ZOO_NATIVE, ZOO_NATIVE_ARCH, ZOO_CACHE and CC do.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.building import load
from zoo.ops.core import Unsuited

__all__ = ["call", "fit", "library", "signatures", "without_loops"]

SOURCES = Path(__file__).with_name("cpu")
_unwanted = 0  # how many `without_loops()` contexts are open

_Argument = Tensor | int | float | None


@contextmanager
def without_loops() -> Iterator[None]:
    """Do without the compiled loops, in all threads, as with ZOO_NATIVE=0: what they are worth is measured so."""
    global _unwanted
    _unwanted += 1
    try:
        yield
    finally:
        _unwanted -= 1


def library() -> ctypes.CDLL | None:
    """The compiled loops, or None where they cannot be had, which is told once, or are not wanted (ZOO_NATIVE=0)."""
    return None if _unwanted else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    return load(SOURCES)


def call(name: str, *arguments: _Argument | Sequence[_Argument]) -> int:
    """Call a loop.

    Args:
        name: of the function in C.
        arguments: as it takes them: tensors or None for pointers, numbers, sequences for arrays of either.

    Returns:
        What it answers; most say how much they left undone.

    Raises:
        Unsuited: A tensor has another type, place or layout than the loop reads, or there are no loops.
        TypeError: There are more or fewer arguments than it takes, or one is no number where it takes one.
    """
    if library() is None:
        raise Unsuited("there are no compiled loops")
    kinds, _ = signatures()[name]
    if len(kinds) != len(arguments):
        raise TypeError(f"{name} takes {len(kinds)} arguments, got {len(arguments)}")
    given = [_as_c(name, kind, value) for kind, value in zip(kinds, arguments, strict=True)]
    return _function(name)(*given)


def fit(name: str, t: Tensor | None, *shape: int) -> None:
    """Refuse a tensor of another shape; -1 is any number.

    Raises:
        Unsuited: The shape is another.
    """
    if t is None or t.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, t.shape, strict=True)):
        found = "missing" if t is None else f"of shape {tuple(t.shape)}"
        raise Unsuited(f"{name} is {found}, not {tuple(shape)}")


class _Kind(NamedTuple):
    """What a parameter of a loop takes.

    Attributes:
        dtype: of the tensor, or None for a number.
        many: whether it is an array of those.
        number: float or int, None for tensors.
    """

    dtype: torch.dtype | None
    many: bool
    number: type[float] | type[int] | None


_DTYPES = {"double": torch.float64, "int64_t": torch.int64, "uint8_t": torch.bool}
_NUMBERS: dict[str, type[float] | type[int]] = {"float": float, "long": int}


def _kind(declared: str) -> _Kind:
    """Of a parameter as C declares it."""
    base, stars = declared.replace("const ", "").split()[0], declared.count("*")
    if not stars:
        return _Kind(None, False, _NUMBERS[base])
    if base == "long":
        return _Kind(None, True, int)
    dtype = _DTYPES.get(base, torch.float32)  # a structure is an array of pointers to numbers
    return _Kind(dtype, stars == 2 or base not in ("float", *_DTYPES), None)


@functools.cache
def signatures() -> dict[str, tuple[list[_Kind], bool]]:
    """What every loop takes, and whether it answers a number, as its definition in C has it."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.c")))
    found = re.findall(r"^(void|long) (\w+)\(([^)]*)\) \{", text, re.MULTILINE)
    return {
        name: ([_kind(part.strip()) for part in parameters.split(",")], answer == "long")
        for answer, name, parameters in found
    }


@functools.cache
def _function(name: str) -> Any:
    """A loop with its types declared."""
    function = getattr(library(), name)
    kinds, answers = signatures()[name]
    plain = {float: ctypes.c_float, int: ctypes.c_long, None: ctypes.c_void_p}
    function.argtypes = [ctypes.c_void_p if kind.many else plain[kind.number] for kind in kinds]
    function.restype = ctypes.c_long if answers else None
    return function


def _as_c(name: str, kind: _Kind, value: Any) -> Any:
    """Addresses, numbers, and arrays of either."""
    if kind.many:
        if isinstance(value, (Tensor, int, float)) or value is None:
            raise TypeError(f"{name} takes several at once, got {type(value).__name__}")
        one = kind._replace(many=False)
        kept = [_address(name, kind, v) if kind.number is None else _as_c(name, one, v) for v in value]
        entry: Any = ctypes.c_void_p if kind.number is None else ctypes.c_long
        return (entry * len(kept))(*kept)
    if kind.number is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)[: 1 + (kind.number is float)]):
            raise TypeError(f"{name} takes a number of type {kind.number.__name__}, got {value!r}")
        if kind.number is int and not -(2**63) <= value < 2**63:
            raise TypeError(f"{name} takes numbers of 64 bits, got {value}")
        return value
    dense = not isinstance(value, Tensor) or value.is_contiguous()
    if not dense and not value.is_contiguous(memory_format=torch.channels_last):
        raise Unsuited(f"{name} takes tensors without gaps, got strides {value.stride()}")
    return _address(name, kind, value)


def _address(name: str, kind: _Kind, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} takes a tensor, got {type(value).__name__}")
    strided = value.layout is torch.strided and value.device.type == "cpu" and not (value.is_nested or value.is_neg())
    if value.dtype != kind.dtype or not strided or not value.data_ptr():
        raise Unsuited(f"{name} takes {kind.dtype} on the CPU, got {value.dtype} on {value.device}, {value.layout}")
    return value.data_ptr()
