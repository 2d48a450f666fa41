"""Threads of a fit: one, where several cost more than they give."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from threadpoolctl import ThreadpoolController

#: Multiply-adds of a step that are worth a thread: below, threads wait for each other longer than they compute.
PER_THREAD = 2**20


class _Threads:
    """Limits threads while small work is done, and puts back what was set; fits may run side by side."""

    def __init__(self) -> None:
        self.lock, self.depth, self.before = threading.Lock(), 0, 1

    @contextmanager
    def __call__(self, work: int, *, pools: bool = True) -> Iterator[None]:
        """One thread for each `PER_THREAD` of `work` multiply-adds, at most those allowed already.

        Args:
            work: Of one step.
            pools: Limit the pools of other libraries too.
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
    """The thread pools that a fit uses, looked for once."""
    return ThreadpoolController()
