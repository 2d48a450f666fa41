"""Trust boundary between files and what is built from them.

Run folders, records and checkpoints may come from anyone, so they are data. They may name classes of the zoo, of
packages named in the zoo's own configurations, and of installed packages with an entry point of the zoo
(`zoo.registry.plugins`), each only where a class of its kind belongs. What users type is trusted; the content of files
is not.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.support.renamed import current

__all__ = ["KINDS", "TrustError", "Untyped", "kind_at", "override_problem", "recorded_class"]


class TrustError(ValueError):
    """A file requests something that is not allowed; the message names it and the remedy."""


# ---- classes named by a file -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Kind of class allowed at a place of a configuration.

    Args:
        what: Name of the kind.
        base: The required base class.
        homes: Modules of the zoo and of third-party packages that define such classes.
        exact: Allow only `base` itself.
    """

    what: str
    base: str
    homes: tuple[str, ...]
    exact: bool = False


#: Keys of a configuration that hold a class; `*` stands for any name.
KINDS: dict[str, Kind] = {
    "data": Kind("LightningDataModule", "lightning.LightningDataModule", ("zoo.data",)),
    "task": Kind("zoo.tasks.Task", "zoo.tasks.Task", ("zoo.tasks",)),
    "trainer": Kind("lightning.Trainer", "lightning.Trainer", ("lightning",), exact=True),
    "trainer.strategy": Kind("Strategy", "lightning.pytorch.strategies.Strategy", ("lightning.pytorch.strategies",)),
    "callbacks.*": Kind("Callback", "lightning.pytorch.Callback", ("zoo.training", "lightning.pytorch.callbacks")),
    # Lightning's other loggers report to services
    "logger.*": Kind(
        "Logger",
        "lightning.pytorch.loggers.Logger",
        ("zoo.training", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger"),
    ),
}

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def kind_at(key: str) -> Kind | None:
    """The kind of class allowed at a dotted key, or None."""
    parts = key.split(".")
    starred = ".".join([parts[0], *["*"] * (len(parts) - 1)])
    return KINDS.get(key) or KINDS.get(starred)


def recorded_class(target: Any, place: str, source: str = "the record") -> type:
    """The class named by a file, after a check of its kind; nothing else is imported or called.

    Args:
        target: The dotted name.
        place: Key of :data:`KINDS`.
        source: Name of the file in messages.

    Raises:
        TrustError: There is no such allowed class.
    """
    kind = KINDS[place]
    refused = (
        f"{place.partition('.')[0]}._target_ = {target!r:.100} of {source} is no {kind.what} of the zoo, of Lightning "
        "or of a package installed with an entry point kernel_zoo.models; others cannot be imported for a file"
    )
    homes = [*kind.homes, *_plugin_packages()]
    if not isinstance(target, str) or not _DOTTED.fullmatch(target) or not _inside(target, homes):
        raise TrustError(refused)
    target = current(target)
    found = _resolve(target, homes)
    base = _resolve(kind.base, [kind.base.partition(".")[0]])
    right = found is base if kind.exact else isinstance(found, type) and issubclass(found, base)
    if not right or not (kind.exact or _inside(found.__module__, homes) or _inside(target, kind.homes[1:])):
        raise TrustError(refused)
    return found


def _plugin_packages() -> list[str]:
    from zoo.registry import plugins

    return [name.partition(".")[0] for name in plugins.modules() if not name.startswith("zoo.")]


def _inside(name: str, homes: Any) -> bool:
    return any(name == home or name.startswith(f"{home}.") for home in homes)


def _resolve(target: str, homes: list[str]) -> Any:
    """The object for a dotted name, or None; modules are imported only inside `homes`."""
    first, *rest = target.split(".")
    found: Any = importlib.import_module(first)
    name = first
    for part in rest:
        name = f"{name}.{part}"
        if not hasattr(found, part):
            above = any(home.startswith(f"{name}.") for home in homes)
            if not isinstance(found, type(importlib)) or not (above or _inside(name, homes)):
                return None
            try:
                importlib.import_module(name)
            except Exception:  # a module that cannot be imported provides no class
                return None
        found = getattr(found, part, None)
        if isinstance(found, type(importlib)) and found.__name__ != name:
            return None  # would leave `homes` through the module's own imports
    return found


# ---- recorded overrides --------------------------------------------------------------------------------------


class Untyped:
    """Placeholder for a recorded value that is not a plain one, such as a sweep or a function of Hydra's grammar."""


_RESOLVER = re.compile(r"\$\{[^}]*:")
_PLACE = re.compile(r"(^|_)(folder|path|root|file)$|dir$|dirpath$")
_READ = ("data", "model")  # sections whose paths are read from, not written to


def override_problem(key: str, value: Any, choice: bool, *, run: Path) -> str | None:
    """Reason why a recorded override is refused, or None if it is plain data.

    Args:
        key: The key or config group that it sets.
        value: Its value as plain containers; :class:`Untyped` if it is not plain.
        choice: Whether the value selects a file of a config group.
        run: The run folder, the only allowed location for recorded output paths.
    """
    if not key:
        return "it cannot be read as one"
    if not re.fullmatch(r"[A-Za-z_]\w*([./][\w-]+)*", key):
        return "its key is not a plain one"
    first, last = re.split("[./]", key)[0], re.split("[./]", key)[-1]
    if first == "hydra":
        return "it configures Hydra itself"
    if choice:
        names = value if isinstance(value, list) else [value]
        plain = all(name is None or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", str(name)) for name in names)
        return None if plain and ".." not in str(value) else "its value is not the name of a file of that group"
    for where, part in _walk(key, value):
        problem = _part_problem(where, part, run, first)
        if problem:
            return problem
    return "its path lies outside the run folder" if last == "output_dir" and not _within(value, run) else None


def _walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(f"{key}.{name}", part)
        if not value:
            yield key, value
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _walk(f"{key}.{i}", part)
    else:
        yield key, value


def _part_problem(key: str, value: Any, run: Path, section: str) -> str | None:
    parent, _, last = key.rpartition(".")
    if last == "_target_":
        if (kind := kind_at(parent)) is None:
            return f"{parent} takes no class"
        place = next(name for name, known in KINDS.items() if known is kind)
        try:
            recorded_class(value, place)
        except TrustError:
            return f"{value!r:.100} is no {kind.what} of the zoo, of Lightning or of an installed plug-in"
        return None
    if any(part.startswith("_") for part in key.split(".")):
        return f"{key} controls how objects are built"
    if section == "logger" and re.match(r"logger\.\w+\.\w+\.\D", f"{key}."):
        return f"{key} says how a service is reached"
    if section == "logger" and last == "mode" and value == "online":
        return f"{key} would send the run to a service"
    if not isinstance(value, str | int | float | None):
        return "its value is not a plain one"
    if not isinstance(value, str):
        return None
    if _RESOLVER.search(value):
        return f"{value!r:.100} would call a resolver"
    if section == "model" and last != "checkpoint_path" and re.match(r"(?i)hf[-_]hub:|\w+://", value):
        return f"{value!r:.100} is an address"  # checkpoint_path is not read, all weights come with the state
    if section in _READ:
        return None
    if "://" in value:
        return f"{value!r:.100} is an address"
    looks = _PLACE.search(last) or value.startswith(("/", "~")) or ".." in Path(value).parts
    if looks and not _within(value, run):
        return f"{value!r:.100} lies outside the run folder"
    return None


def _within(value: Any, run: Path) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    if value.startswith("${output_dir}") and ".." not in Path(value).parts:
        return True
    path = Path(value).expanduser().resolve()
    return path == run or run in path.parents
