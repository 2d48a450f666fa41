"""Every family enters timm's registry: the zoo's own, found by where they lie, those of other packages, and weights."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from zoo.registry import bundled_weights, closed, plugins

__all__ = ["load"]


@functools.cache
def load() -> None:
    """Import every family and register the weights that ship with the zoo; once a process, when timm is imported."""
    for room in plugins.ROOMS:
        for found in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
            importlib.import_module(found.name)
    plugins.load()
    bundled_weights.register()
    closed.install(plugins.modules())
