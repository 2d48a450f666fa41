"""Says how its process waits; run by `test_records.py` in processes of their own, so that it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from zoo.support.environment import wait_policy


def told(word: str) -> Iterator[str]:
    if not word:
        raise ValueError("no word")
    yield f"{word} {wait_policy()}"
