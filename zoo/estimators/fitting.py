"""Fits that fail or are interrupted, which leave an estimator as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["all_or_nothing"]

Method = TypeVar("Method", bound=Callable[..., Any])


def all_or_nothing(fit: Method) -> Method:
    """Decorator for a method that sets fitted attributes: if it raises, also at Ctrl-C, all attributes are as before.

    The method must set attributes, not change what they hold.
    """

    @functools.wraps(fit)
    def whole(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = dict(vars(self))
        try:
            return fit(self, *args, **kwargs)
        except BaseException:
            self.__dict__ = before
            raise

    return whole  # type: ignore[return-value]
