"""Cells of tables as text, so that a category is the same in a file, a data frame and an array."""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

__all__ = ["TRUTH", "cell_text", "known_category", "unpadded"]

#: Words of truth values, in small letters.
TRUTH = {"true": 1.0, "false": 0.0}

_WHOLE = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
_MIDNIGHT = re.compile(r"(\d{4}-\d\d-\d\d)[ T]00:00(:00(\.0+)?)?", re.ASCII)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TRUTHS = frozenset({"True", "False", "true", "false", "TRUE", "FALSE", "1", "0", "(missing)"})


def unpadded(cell: str) -> str:
    """A whole number without its decimals, so that the categories 3 and 3.0 are one; other cells as they are."""
    found = _WHOLE.fullmatch(cell)
    return found[1] if found else cell


def known_category(cell: str, known: Collection[str]) -> str:
    """The category of a column that a cell means; itself, without padding, if it is none of them.

    A date at midnight may have its time or not. True and false may be in capitals, or 1 and 0 where a column has no
    other categories.
    """
    if cell in known:
        return cell
    plain = unpadded(cell)
    return next((other for other in (plain, *_spellings(plain, known)) if other in known), plain)


def _spellings(cell: str, known: Collection[str]) -> Iterator[str]:
    """Other texts of a date or a truth value."""
    if found := _MIDNIGHT.fullmatch(cell):
        yield found[1]
        yield f"{found[1]} 00:00:00"
    elif _DATE.fullmatch(cell):
        yield f"{cell} 00:00:00"
    elif (cell in ("1", "0") or cell.lower() in TRUTH) and _TRUTHS.issuperset(known):
        word = {"1": "true", "0": "false"}.get(cell, cell.lower())
        yield from (word.capitalize(), word, word.upper(), str(int(TRUTH[word])))


def cell_text(value: Any) -> str:
    """A value as the cell of a file, as pandas writes it: True, 2020-01-01; a missing one (None, NaN, NA) is empty."""
    try:
        if value is None or bool(value != value):
            return ""
    except TypeError:  # pandas.NA is neither equal nor unequal
        return ""
    if isinstance(value, datetime.datetime | np.datetime64):
        text = str(value).replace("T", " ")
        midnight = _MIDNIGHT.fullmatch(text)
        return midnight[1] if midnight else text
    return str(value.item() if isinstance(value, np.generic) else value).strip()
