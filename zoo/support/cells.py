"""Cells of tables as text, so that a category is the same in a file, a data frame and an array."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

__all__ = ["cell_text", "unpadded"]

_WHOLE = re.compile(r"([+-]?\d+)\.0*", re.ASCII)


def unpadded(cell: str) -> str:
    """A whole number without its decimals, so that the categories 3 and 3.0 are one; other cells as they are."""
    found = _WHOLE.fullmatch(cell)
    return found[1] if found else cell


def cell_text(value: Any) -> str:
    """A value as the cell of a file: true and false are 1 and 0, a missing one (None, NaN, NA) is empty."""
    try:
        if value is None or bool(value != value):
            return ""
    except TypeError:  # pandas.NA is neither equal nor unequal
        return ""
    value = value.item() if isinstance(value, np.generic) else value
    return str(int(value)) if isinstance(value, bool) else str(value).strip()
