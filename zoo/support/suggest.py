"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: Any, possible: Iterable[Any], n: int = 3) -> list[str]:
    """The `n` words of `possible` closest to `word`, any value; dotted keys are also compared by their last part."""
    word, words = str(word), [str(other) for other in possible]
    found = difflib.get_close_matches(word, words, n=n, cutoff=0.55)
    leaf = word.rsplit(".", 1)[-1]
    found += [w for w in words if w.rsplit(".", 1)[-1] == leaf]
    return list(dict.fromkeys(found))[:n]


def suggestion(word: Any, possible: Iterable[Any]) -> str:
    """`'; did you mean a or b?'`, or the list of allowed words if none is close."""
    words = sorted(map(str, possible))
    close = nearest(word, words)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; allowed: {', '.join(words)}" if words else ""
