"""Thread limits for small fits, where more threads are slower."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from threadpoolctl import ThreadpoolController

#: Multiply-adds per step that are worth another thread.
PER_THREAD = 2**20


class _Threads:
    """Limits threads temporarily; concurrent fits are supported."""

    def __init__(self) -> None:
        self.lock, self.depth, self.before = threading.Lock(), 0, 1

    @contextmanager
    def __call__(self, work: int, *, pools: bool = True) -> Iterator[None]:
        """Use one thread per `PER_THREAD` multiply-adds, at most the current number.

        Args:
            work: Multiply-adds of one step.
            pools: Also limit the OpenMP pools of other libraries.
        """
        with self.lock:
            if not self.depth:
                self.before = torch.get_num_threads()
            self.depth += 1
        count = max(1, min(self.before, work // PER_THREAD))
        limits = _pools().limit(limits=count, user_api="openmp") if pools else nullcontext()
        try:
            with limits:
                torch.set_num_threads(count)
                yield
        finally:
            with self.lock:
                self.depth -= 1
            torch.set_num_threads(self.before)


few_threads = _Threads()


@functools.cache
def _pools() -> ThreadpoolController:
    """The process's thread pools, cached."""
    return ThreadpoolController()
