"""Numeric arrays from users' files: `.npy`, or text with rows of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zoo.data.checks import DataError

__all__ = ["read_array"]

_MAX_BYTES, _MAX_TEXT = 200_000_000, 20_000_000


def read_array(path: Path, wanted: str) -> np.ndarray:
    """Read a float32 array of finite numbers: a `.npy` file of any shape, or a text file with rows of equal length.

    Args:
        path: The file; at most 200 MB, text at most 20 MB.
        wanted: What the file should contain, for the error message.

    Raises:
        DataError: The file is damaged, too large, or holds anything but finite numbers.
    """
    binary = path.suffix.lower() == ".npy"
    try:
        if path.stat().st_size > (limit := _MAX_BYTES if binary else _MAX_TEXT):
            raise DataError(f"{path} is larger than {limit // 10**6} MB: split it first")
        if binary:  # memory-mapped: a forged header cannot allocate more than the file has
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            values = np.loadtxt(path, ndmin=2, encoding="utf-8")
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as {wanted} ({' '.join(str(error).split())[:100]})") from None
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        with np.errstate(over="ignore"):
            found = np.array(values, np.float32)
        if np.isfinite(found).all():
            return found
    raise DataError(f"{path} cannot be read as {wanted}: it holds values that are not finite numbers")
