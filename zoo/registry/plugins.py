"""Families from other packages, registered together with the zoo's through entry points.

A package writes a models file like those of the zoo (`register_model`, `default_cfgs`) and names it in its
`pyproject.toml`; the zoo itself needs no change:

    [project.entry-points."kernel_zoo.models"]
    my_family = "my_package.my_family"
"""

from __future__ import annotations

from zoo.support.register import load_entry_points

__all__ = ["GROUP", "ROOMS", "load", "modules"]

GROUP = "kernel_zoo.models"
ROOMS = ("zoo.models", "zoo.adapters")  # packages whose modules may register models
_modules: list[str] = []


def load() -> None:
    """Import the families of all installed packages; failures are logged and skipped."""
    _modules[:] = [entry.module for entry in load_entry_points(GROUP)]


def modules() -> tuple[str, ...]:
    """Modules whose models count as the zoo's: its own, and those named by entry points."""
    return (*ROOMS, *_modules)
