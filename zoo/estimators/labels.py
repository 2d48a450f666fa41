"""Labels of classes that arrive in batches: whatever their type, none is rounded and none merged with another."""

from __future__ import annotations

import numpy as np

__all__ = ["joined"]

_KINDS = {"b": "truth values", "U": "texts", "M": "dates", "m": "time spans", "O": "objects"}
_NUMBERS = "iuf"


def joined(known: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of labels in one type that holds both exactly; that of the first, if it does.

    Args:
        known: Labels (n,); of an empty array the type does not count.
        more: Labels (m,).

    Raises:
        ValueError: No type holds both, such as texts and numbers.
    """
    if not len(known):
        return known.astype(more.dtype), more
    kinds = known.dtype.kind, more.dtype.kind
    numbers = all(kind in _NUMBERS for kind in kinds)
    if not (numbers or kinds[0] == kinds[1] or set(kinds) == {"O", "U"}):
        mine, theirs = (_KINDS.get(kind, "numbers") for kind in kinds)
        raise ValueError(f"the labels are {theirs} ({more.dtype}), those learned before are {mine} ({known.dtype})")
    choices = [known.dtype, np.result_type(known, more), *((np.dtype("i8"), np.dtype("u8")) if numbers else ())]
    for dtype in choices:
        first, second = _held(known, dtype), _held(more, dtype)
        if first is not None and second is not None:
            return first, second
    raise ValueError(f"no type holds labels of {more.dtype} and those of {known.dtype} learned before exactly")


def _held(labels: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """Labels in another type; None if it would change one."""
    with np.errstate(invalid="ignore"):
        found = labels.astype(dtype)
        back = found.astype(labels.dtype)
    whole = found.tolist() == labels.tolist() if labels.dtype.kind in _NUMBERS else np.array_equal(back, labels)
    return found if whole else None
