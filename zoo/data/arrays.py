"""Arrays of numbers in files of one's own: `.npy`, or lines of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from zoo.data.checks import DataError

__all__ = ["read_array"]

_MAX_BYTES = 200_000_000


def read_array(path: Path, wanted: str) -> np.ndarray:
    """Finite numbers of a `.npy` file, of any shape, or of a text file with as many numbers in every line.

    Args:
        path: The file.
        wanted: What should be in it, for the message.

    Raises:
        DataError: It is damaged, too large, or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES // 10**6} MB: split it first")
        if path.suffix.lower() == ".npy":
            with path.open("rb") as file:
                values = np.load(file, allow_pickle=False)
        else:
            values = np.loadtxt(path, ndmin=2, delimiter=None, encoding="utf-8")
    except (OSError, ValueError, EOFError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as {wanted} ({' '.join(str(error).split())[:100]})") from None
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
        raise DataError(f"{path} cannot be read as {wanted}: it holds something else than finite numbers")
    return values
