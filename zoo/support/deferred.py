"""Modules whose import waits until something of theirs is used, so that a command pays for what it needs.

>>> defer(lambda name: name == "wandb")
>>> import wandb                              # quick
>>> wandb.init()                              # now it is imported
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["defer", "load"]


class _Deferred(ModuleType):
    """A module that is executed when an attribute is asked for that it does not have yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module, also by `from ... import *`
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        load(self)
        return getattr(self, name)


class _Waiting(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing, until :func:`load`."""

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.loader, name)


class _Finder(MetaPathFinder):
    def __init__(self, wanted: Callable[[str], bool]) -> None:
        self.wanted = wanted

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not self.wanted(name):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Waiting(spec.loader)
        return spec


def defer(wanted: Callable[[str], bool]) -> None:
    """Let modules that are not imported yet wait until they are used.

    Args:
        wanted: Whether a module, by its full name, shall wait.
    """
    sys.meta_path.insert(0, _Finder(wanted))


def load(module: ModuleType) -> None:
    """Import a module that waits; nothing for any other."""
    spec = module.__spec__
    if isinstance(module, _Deferred) and spec is not None and isinstance(spec.loader, _Waiting):
        object.__setattr__(module, "__class__", ModuleType)  # first: its code may ask for its own attributes
        spec.loader = spec.loader.loader
        module.__loader__ = spec.loader
        assert spec.loader is not None
        spec.loader.exec_module(module)
