"""Thread limits for small fits, where more threads are slower."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

Method = TypeVar("Method", bound=Callable[..., Any])

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


def threads_for(work: Callable[[Any, int, int], int]) -> Callable[[Method], Method]:
    """Decorator for an estimator's method: few threads for little work.

    Args:
        work: Multiply-adds of one step, from the estimator, the number of rows and the number of columns.
    """

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def limited(self: Any, X: Any, *args: Any, **kwargs: Any) -> Any:
            with few_threads(work(self, *_shape(X))):
                return method(self, X, *args, **kwargs)

        return limited  # type: ignore[return-value]

    return decorate


def _shape(X: Any) -> tuple[int, int]:
    """Rows and columns; 1 where there are none, which the method itself refuses."""
    try:
        rows, columns = np.shape(X)
    except (TypeError, ValueError):
        return 1, 1
    return int(rows), int(columns)
