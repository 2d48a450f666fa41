"""Registration of model families in timm: the zoo's own, those of other packages, and the shipped weights."""

from __future__ import annotations

import functools

from zoo.registry import bundled_weights, closed, plugins
from zoo.support.register import import_all

__all__ = ["load"]


@functools.cache
def load() -> None:
    """Import every family and register the shipped weights; once per process, when timm is imported."""
    for room in plugins.ROOMS:
        import_all(room)
    plugins.load()
    bundled_weights.register()
    closed.install(plugins.modules())
