"""Things that are found by name because they are written down: in a file of their room, or in another package, whose
entry points name its modules (`kernel_zoo.kernels`, `learners`, `models`, `estimators`, `probes` and `commands`).

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
from typing import Any, Generic, TypeVar, cast

from zoo.support.suggest import suggestion

__all__ = ["Entry", "Register", "UnknownNameError", "import_all", "load_entry_points"]

_log = logging.getLogger(__name__)


class UnknownNameError(ValueError):
    """A name under which nothing is registered; the message has the nearest ones."""


Made = TypeVar("Made", bound=Callable[..., Any])
Kept = TypeVar("Kept", bound=Callable[..., Any])  # what is decorated stays of its own type


@dataclass(frozen=True)
class Entry(Generic[Made]):
    """What is registered: its name, what it shows or does in a line, and the function or class itself."""

    name: str
    shows: str
    made: Made


class Register(Generic[Made]):
    """A decorator that registers, and the names that it registered.

    Args:
        what: What the things are called in messages.
        room: The package whose modules hold them. They are imported when a name is first asked for, and so are the
            modules of the entry point group `kernel_zoo.<what>s`.
    """

    def __init__(self, what: str, room: str) -> None:
        self.what, self.room = what, room
        self._entries: dict[str, Entry[Made]] = {}

    def __call__(self, name: str, shows: str = "") -> Callable[[Kept], Kept]:
        """Register what is decorated.

        Raises:
            ValueError: The name is taken by something else.
        """

        def register(made: Kept) -> Kept:
            other = self._entries.get(name)
            if other and (other.made.__module__, other.made.__qualname__) != (made.__module__, made.__qualname__):
                an = "an" if self.what[0] in "aeiou" else "a"
                raise ValueError(f"there is already {an} {self.what} {name!r}, in {other.made.__module__}")
            self._entries[name] = Entry(name, shows, cast(Made, made))
            return made

        return register

    def entries(self) -> dict[str, Entry[Made]]:
        """Everything registered, by name, in the order of the names."""
        import_all(self.room)
        load_entry_points(f"kernel_zoo.{self.what}s")
        return dict(sorted(self._entries.items()))

    def get(self, name: str) -> Entry[Made]:
        """What is registered under a name.

        Raises:
            UnknownNameError: There is nothing of that name.
        """
        entries = self.entries()
        if name not in entries:
            raise UnknownNameError(f"there is no {self.what} {name!r}{suggestion(name, entries)}")
        return entries[name]


@functools.cache
def import_all(room: str) -> None:
    """Import every module of a package, once."""
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
