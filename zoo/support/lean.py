"""A quick import of timm for commands: its families of models wait until one of their models is named.

Importing all of timm takes three times as long as importing torch, for more than a thousand models and for packages
that a command does not use. Names of timm's models are found in its sources; a family is imported when its model is
asked for, also by timm's own functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import wrapt

from zoo.support.deferred import defer, load

__all__ = ["install", "names"]

#: What timm imports without a need of ours. It makes no models.
_UNUSED = {"wandb", *(f"torchvision.{part}" for part in ("datasets", "io", "models", "ops", "utils"))}
_REGISTERED = re.compile(r"^@register_model\s*\ndef (\w+)", re.MULTILINE)
_RENAMED = re.compile(r"^\s+['\"]([\w.]+)['\"]\s*:", re.MULTILINE)


def install() -> None:
    """Let the families of timm wait; without an effect once timm is imported."""
    if "timm" in sys.modules:
        return
    defer(lambda name: name in _UNUSED or _is_family(name))
    wrapt.register_post_import_hook(_watch_names, "timm.models._registry")
    wrapt.register_post_import_hook(_watch_attributes, "timm.models")


def names() -> list[str]:
    """Names of all models of timm and of the zoo, without tags."""
    import timm

    return sorted({*timm.list_models(), *_sources()})


def _is_family(name: str) -> bool:
    room, _, own = name.rpartition(".")
    return room == "timm.models" and not own.startswith("_")


@functools.cache
def _sources() -> dict[str, str]:
    """The module of each model of timm, by name; empty if families do not wait."""
    found: dict[str, str] = {}
    spec = importlib.util.find_spec("timm")
    if not _installed() or spec is None:
        return found
    for place in spec.submodule_search_locations or ():
        for path in Path(place, "models").glob("[!_]*.py"):
            text = path.read_text(encoding="utf-8")
            head, _, renamed = text.partition("\nregister_model_deprecations(")
            for name in (*_REGISTERED.findall(head), *_RENAMED.findall(renamed)):
                found[name] = f"timm.models.{path.stem}"
    return found


def _installed() -> bool:
    registry = sys.modules.get("timm.models._registry")
    return isinstance(getattr(registry, "_model_entrypoints", None), _Entrypoints)


class _Entrypoints(dict[str, Any]):
    """timm's models by name; the family of one that is asked for is imported."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and self._fetch(name))

    def __missing__(self, name: str) -> Any:
        if not self._fetch(name):
            raise KeyError(name)
        return self[name]

    def _fetch(self, name: str) -> bool:
        module = _sources().get(name)
        if module is None:
            return False
        load(importlib.import_module(module))
        return super().__contains__(name)


def _watch_names(registry: Any) -> None:
    registry._model_entrypoints = _Entrypoints(registry._model_entrypoints)


def _watch_attributes(models: Any) -> None:
    """Have `timm.models.NAME` and `from timm.models import NAME` work for what is defined in a family."""

    def fetch(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module 'timm.models' has no attribute {name!r}")
        for module in sorted(set(_sources().values())):
            load(found := importlib.import_module(module))
            if name in vars(found):
                return vars(found)[name]
        raise AttributeError(f"module 'timm.models' has no attribute {name!r}")

    models.__getattr__ = fetch
