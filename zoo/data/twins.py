"""Samples of a test or validation part that the training part holds too, so that a score on them says too much.

>>> told_of(datasets["train"], datasets["test"], "test")       # "test: 2 of 40 are equal to training samples (...)"
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

__all__ = ["Comparable", "file_content", "file_size", "told_of", "twins"]

_MOST = 50_000  # samples that are compared; of more, whole files would be read for minutes


class Comparable(Protocol):
    """A data set whose samples can be compared before they are prepared."""

    def __len__(self) -> int: ...

    def sketch(self, index: int) -> Hashable:
        """What is quick to find and equal for equal samples."""
        ...

    def content(self, index: int) -> bytes:
        """The sample itself; only asked for where sketches are equal."""
        ...


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file, the sketch of it; -1 if it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def file_content(path: str | os.PathLike[str]) -> bytes:
    """Digest of a file's bytes; empty if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    except OSError:
        return b""


def twins(train: Comparable, other: Comparable) -> list[tuple[int, int]]:
    """Index of each sample of `other` that the training part holds too, and of its first equal there."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for i in range(len(train)):
        places[train.sketch(i)].append(i)
    found = []
    known: dict[Hashable, dict[bytes, int]] = {}
    for j in range(len(other)):
        sketch = other.sketch(j)
        if sketch not in places:
            continue
        if sketch not in known:
            known[sketch] = {train.content(i): i for i in reversed(places[sketch])}
        content = other.content(j)
        if content and content in known[sketch]:
            found.append((j, known[sketch][content]))
    return found


def told_of(train: Any, other: Any, part: str) -> str | None:
    """A line on equal samples of two parts; None if there are none, or they cannot be compared in moments."""
    if train is other or len(train) + len(other) > _MOST:
        return None
    if not all(hasattr(one, "sketch") and hasattr(one, "content") for one in (train, other)):
        return None
    found = twins(train, other)
    if not found:
        return None
    first, its = found[0]
    paths: Sequence[Any] | None = getattr(other, "paths", None)
    where = ""
    if paths is not None:
        where = f", {os.fsdecode(paths[first])} and {os.fsdecode(train.paths[its])}" + " the first" * (len(found) > 1)
    return f"{part}: {len(found):,} of {len(other):,} are also in the training part{where}: figures on them flatter"
