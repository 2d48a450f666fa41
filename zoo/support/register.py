"""Registers: things found by name, defined in a module of their room or in another package whose entry points name its
modules (`kernel_zoo.probes`, `kernel_zoo.commands`, `kernel_zoo.models`).

>>> probe = Register("probe", "zoo.analysis.probes")
>>> @probe("losses", "training losses of a run")
... def losses(subject): ...
>>> probe.get("losses").made(subject)
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from zoo.support.suggest import suggestion

__all__ = ["Entry", "Register", "UnknownNameError", "import_all", "load_entry_points"]

_log = logging.getLogger(__name__)


class UnknownNameError(ValueError):
    """A name that is not registered; the message suggests the nearest ones."""


Made = TypeVar("Made", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry(Generic[Made]):
    """A registered thing: its name, a one-line description, and the function or class itself."""

    name: str
    shows: str
    made: Made


class Register(Generic[Made]):
    """A decorator that registers functions or classes by name.

    Args:
        what: Kind of the registered things, for messages.
        room: The package whose modules define them. They are imported when a name is first looked up, as are the
            modules of the entry point group `kernel_zoo.<what>s`.
    """

    def __init__(self, what: str, room: str) -> None:
        self.what, self.room = what, room
        self._entries: dict[str, Entry[Made]] = {}

    def __call__(self, name: str, shows: str = "") -> Callable[[Made], Made]:
        """Register the decorated function or class.

        Raises:
            ValueError: The name is already taken.
        """

        def register(made: Made) -> Made:
            other = self._entries.get(name)
            if other and (other.made.__module__, other.made.__qualname__) != (made.__module__, made.__qualname__):
                raise ValueError(f"there is already a {self.what} {name!r}, in {other.made.__module__}")
            self._entries[name] = Entry(name, shows, made)
            return made

        return register

    def entries(self) -> dict[str, Entry[Made]]:
        """All registered things, sorted by name."""
        import_all(self.room)
        load_entry_points(f"kernel_zoo.{self.what}s")
        return dict(sorted(self._entries.items()))

    def get(self, name: str) -> Entry[Made]:
        """The thing registered under a name.

        Raises:
            UnknownNameError: The name is not registered.
        """
        entries = self.entries()
        if name not in entries:
            raise UnknownNameError(f"there is no {self.what} {name!r}{suggestion(name, entries)}")
        return entries[name]


def import_all(room: str) -> None:
    """Import every module of a package, recursively."""
    for found in pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}."):
        importlib.import_module(found.name)


@functools.cache
def load_entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Import what installed packages name in a group, once; one that fails is logged and left out."""
    loaded = []
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:  # another package's mistake must not take the zoo with it
            _log.warning("%s of %s, %s, cannot be imported: %s", entry.name, group, entry.value, error)
        else:
            loaded.append(entry)
    return tuple(loaded)
