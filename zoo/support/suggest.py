"""Suggestions for misspelt names in error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, possible: Iterable[str], n: int = 3) -> list[str]:
    """The `n` words of `possible` closest to `word`; dotted keys are also compared by their last part."""
    words = list(possible)
    found = difflib.get_close_matches(word, words, n=n, cutoff=0.55)
    leaf = word.rsplit(".", 1)[-1]
    found += [w for w in words if w.rsplit(".", 1)[-1] == leaf]
    return list(dict.fromkeys(found))[:n]


def suggestion(word: str, possible: Iterable[str]) -> str:
    """`'; did you mean a or b?'`, or the list of allowed words if none is close."""
    words = sorted(possible)
    close = nearest(word, words)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; allowed: {', '.join(words)}" if words else ""
