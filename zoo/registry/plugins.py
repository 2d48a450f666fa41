"""Families from other packages: they register when the zoo does, named by an entry point of their package.

A package that brings a family writes its models file like one of the zoo's (`register_model`, `default_cfgs`) and names
it in its `pyproject.toml`; nothing in the zoo is touched:

    [project.entry-points."kernel_zoo.models"]
    my_family = "my_package.my_family"
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

__all__ = ["GROUP", "load", "modules"]

GROUP = "kernel_zoo.models"
ROOMS = ("zoo.models", "zoo.adapters")  # whose every file may register models
_log = logging.getLogger(__name__)
_modules: list[str] = []


def load() -> None:
    """Import the families of every installed package; one that fails is logged and left out."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # another package's mistake must not take the zoo with it
            _log.warning("the family %s of %s cannot be imported: %s", entry.name, entry.value, error)
        else:
            _modules.append(entry.module)


def modules() -> tuple[str, ...]:
    """Modules whose models count as the zoo's: its own, and those that entry points named."""
    return (*ROOMS, *_modules)
