"""Calls of the C loops (folder `cpu`), for float32 operators on a CPU.

They need one pass over memory where torch needs several. Argument types and counts are read from the C definitions.
Without a C compiler, or with ZOO_NATIVE=0, :func:`call` raises :class:`~zoo.ops.core.Unsuited`, and the operator's
reference runs. See :mod:`zoo.ops.building` for the cache folder and the environment variables ZOO_NATIVE,
ZOO_NATIVE_ARCH, ZOO_CACHE and CC.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.ops.building import load
from zoo.ops.core import Unsuited

__all__ = ["call", "fit", "library", "signatures"]

SOURCES = Path(__file__).with_name("cpu")

_Argument = Tensor | int | float | None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None if they are disabled (ZOO_NATIVE=0) or not available, which is logged once."""
    return load(SOURCES)


def call(name: str, *arguments: _Argument | Sequence[_Argument]) -> int:
    """Call a loop.

    Args:
        name: name of the C function.
        arguments: tensors or None for pointers, numbers, and sequences for arrays of either.

    Returns:
        Its return value; for most loops the number of items left undone.

    Raises:
        Unsuited: A tensor has the wrong dtype, device or layout, or there are no loops.
        TypeError: Wrong number of arguments, or one is not a number where a number is expected.
    """
    if library() is None:
        raise Unsuited("there are no compiled loops")
    kinds, _ = signatures()[name]
    if len(kinds) != len(arguments):
        raise TypeError(f"{name} takes {len(kinds)} arguments, got {len(arguments)}")
    given = [_as_c(name, kind, value) for kind, value in zip(kinds, arguments, strict=True)]
    return _function(name)(*given)


def fit(name: str, t: Tensor | None, *shape: int) -> None:
    """Check the shape of a tensor; -1 matches any size.

    Raises:
        Unsuited: The shape differs.
    """
    if t is None or t.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, t.shape, strict=True)):
        found = "missing" if t is None else f"of shape {tuple(t.shape)}"
        raise Unsuited(f"{name} is {found}, not {tuple(shape)}")


class _Kind(NamedTuple):
    """Type of a parameter of a loop.

    Attributes:
        dtype: of the tensor, or None for a number.
        many: whether it is an array of tensors or numbers.
        number: float or int, None for tensors.
    """

    dtype: torch.dtype | None
    many: bool
    number: type[float] | type[int] | None


_DTYPES = {"double": torch.float64, "int64_t": torch.int64, "uint8_t": torch.bool}
_NUMBERS: dict[str, type[float] | type[int]] = {"float": float, "long": int}


def _kind(declared: str) -> _Kind:
    """Type of a parameter from its C declaration."""
    base, stars = declared.replace("const ", "").split()[0], declared.count("*")
    if not stars:
        return _Kind(None, False, _NUMBERS[base])
    if base == "long":
        return _Kind(None, True, int)
    dtype = _DTYPES.get(base, torch.float32)  # a struct is an array of pointers to float
    return _Kind(dtype, stars == 2 or base not in ("float", *_DTYPES), None)


@functools.cache
def signatures() -> dict[str, tuple[list[_Kind], bool]]:
    """Parameters of every loop, and whether it returns a number, from its C definition."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.c")))
    found = re.findall(r"^(void|long) (\w+)\(([^)]*)\) \{", text, re.MULTILINE)
    return {
        name: ([_kind(part.strip()) for part in parameters.split(",")], answer == "long")
        for answer, name, parameters in found
    }


@functools.cache
def _function(name: str) -> Any:
    """A loop with its argument types declared."""
    function = getattr(library(), name)
    kinds, answers = signatures()[name]
    plain = {float: ctypes.c_float, int: ctypes.c_long, None: ctypes.c_void_p}
    function.argtypes = [ctypes.c_void_p if kind.many else plain[kind.number] for kind in kinds]
    function.restype = ctypes.c_long if answers else None
    return function


def _as_c(name: str, kind: _Kind, value: Any) -> Any:
    """Convert to addresses, numbers, and arrays of either."""
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
