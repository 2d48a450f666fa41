"""Families from other packages: they register when the zoo does, named by an entry point of their package.

A package that brings a family writes its models file like one of the zoo's (`register_model`, `default_cfgs`) and names
it in its `pyproject.toml`; nothing in the zoo is touched:

    [project.entry-points."kernel_zoo.models"]
    my_family = "my_package.my_family"
"""

from __future__ import annotations

from zoo.support.register import load_entry_points

__all__ = ["GROUP", "ROOMS", "load", "modules"]

GROUP = "kernel_zoo.models"
ROOMS = ("zoo.models", "zoo.adapters")  # whose every file may register models
_modules: list[str] = []


def load() -> None:
    """Import the families of every installed package; one that fails is logged and left out."""
    _modules[:] = [entry.module for entry in load_entry_points(GROUP)]


def modules() -> tuple[str, ...]:
    """Modules whose models count as the zoo's: its own, and those that entry points named."""
    return (*ROOMS, *_modules)
