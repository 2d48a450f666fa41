"""Type checks of a configuration against the signatures that it calls.

The constructors are the schema: a section with `_target_` is checked against the annotations of that class, so each
parameter is described once. All problems are reported together, each with its full key.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import to_json

from zoo.support.suggest import suggestion


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each invalid key and what is allowed."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, value)` for every leaf of a nested mapping; an empty mapping is a leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def current_arguments(function: Callable[..., Any], values: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """Arguments by their current names: those of a function's `older_names` (older to current) are renamed.

    An older name without a value is dropped, as in a configuration of an earlier release.

    Args:
        function: A function or class.
        values: Its keyword arguments.
        key: What comes before the names in the message.

    Raises:
        ConfigError: Both names of an argument have values.
    """
    called: Any = function.__init__ if inspect.isclass(function) else function
    found = dict(values)
    for old, new in getattr(called, "older_names", {}).items():
        if old not in found:
            continue
        value = found.pop(old)
        if value in (None, "???"):
            continue
        if found.get(new) not in (None, "???"):
            raise ConfigError(f"{key}{old} is the older word for {key}{new}: give one of them, not both")
        found[new] = value
    return found


def check_call(
    target: Callable[..., Any],
    values: Mapping[str, Any],
    key: str = "",
    given: Iterable[str] = (),
    *,
    nested: bool = True,
) -> list[str]:
    """Problems of calling `target(**values)`, one sentence each; empty if all types fit.

    Args:
        target: A function or class with type annotations.
        values: Keyword arguments from a configuration (plain containers). Nested sections with `_target_` are checked
            against their own signatures; keys that start with `_` belong to Hydra.
        key: Dotted key of this section, for the messages.
        given: Parameters that the program supplies later; they may be missing from `values`.
        nested: Whether values may be sections with `_target_`. False for values from untrusted files: no class that
            they name is looked up, since that would import its module.
    """
    prefix = f"{key}." if key else ""
    try:
        values = current_arguments(target, values, prefix)
    except ConfigError as error:
        return [str(error)]
    function = target.__init__ if inspect.isclass(target) else target
    parameters = dict(inspect.signature(target).parameters)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    problems: list[str] = []

    for name, value in values.items():
        if name.startswith("_"):
            continue
        if name not in named and not takes_any:
            problems.append(f"{prefix}{name} is unknown{suggestion(name, named)}")
        elif not nested and _names_class(value):
            problems.append(f"{prefix}{name} names a class, and only plain values are allowed")
        elif isinstance(value, Mapping) and "_target_" in value and not _wants_mapping(hints.get(name)):
            problems += check_section(value, f"{prefix}{name}")
        elif name in hints:
            problems += _check_value(hints[name], value, f"{prefix}{name}")

    if not values.get("_partial_"):
        required = {n for n, p in named.items() if p.default is p.empty}
        missing = sorted(required - set(values) - set(given))
        problems += [f"{prefix}{name} has no value" for name in missing]
    return problems


def _names_class(value: Any) -> bool:
    """Whether a plain value contains a section with `_target_` at any depth."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(_names_class(part) for part in value.values())
    return isinstance(value, list | tuple) and any(_names_class(part) for part in value)


def check_section(section: Mapping[str, Any], key: str, given: Iterable[str] = ()) -> list[str]:
    """Problems of a section with `_target_`: whether the target can be imported and the arguments fit its signature."""
    from hydra.utils import get_object

    try:
        target = get_object(section["_target_"])
    except (ImportError, ValueError, AttributeError) as error:
        return [f"{key}._target_ = {section['_target_']!r} cannot be imported: {str(error).splitlines()[-1]}"]
    return check_call(target, section, key, given)


def check_values(schema: type, values: Mapping[str, Any], key: str = "") -> list[str]:
    """Problems of plain values against the types of a `TypedDict`, one sentence each; None means no value, and keys
    outside the schema are ignored.
    """
    prefix = f"{key}." if key else ""
    problems: list[str] = []
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        if values.get(name) is not None:
            problems += _check_value(hint, values[name], f"{prefix}{name}")
    return problems


def _check_value(hint: Any, value: Any, key: str) -> list[str]:
    if odd := next(_not_finite(value, key), None):
        return [odd]
    if typing.get_origin(hint) is dict and isinstance(value, Mapping):  # the entry at fault is named, not all of them
        entries = (_check_value(typing.get_args(hint)[1], part, f"{key}.{name!s:.80}") for name, part in value.items())
        if odd_entry := next(filter(None, entries), None):
            return odd_entry
    if isinstance(value, bool) and not _admits_bool(hint):
        return [f"{key} = {value} is a boolean; allowed: {_allowed(hint)}"]
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        found = adapter.validate_python(value)
        if _converted(value, found):  # by pydantic alone: the program gets the value as it is
            adapter.validate_json(to_json(value), strict=True)
    except PydanticUserError:  # pydantic has no schema for this hint, so it says nothing about YAML values
        return []
    except ValidationError as error:
        reasons = dict.fromkeys(
            e["msg"][:1].lower() + e["msg"][1:] for e in error.errors() if e["type"] != "is_instance_of"
        )
        return [f"{key} = {_brief(value)}: {' or '.join(reasons) or 'allowed is ' + _allowed(hint)}"]
    return list(_not_finite(found, key))[:1]


def _brief(value: Any, width: int = 120) -> str:
    """A value as in Python, cut where it is long."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _converted(value: Any, found: Any) -> bool:
    """Whether a number was read from a text or a boolean, or a whole number from a fraction, at any depth."""
    if isinstance(value, Mapping) and isinstance(found, Mapping):
        return any(map(_converted, value.values(), found.values()))
    if isinstance(value, list | tuple) and isinstance(found, list | tuple):
        return any(map(_converted, value, found))
    return isinstance(value, str | float | bool) and isinstance(found, int | float) and type(value) is not type(found)


def _not_finite(value: Any, key: str) -> Iterator[str]:
    """A sentence for each infinity or NaN in a plain value, at any depth, with its own key."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _not_finite(part, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _not_finite(part, key)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key} = {value!r}: only finite numbers are allowed"


def _wants_mapping(hint: Any) -> bool:
    """Whether a parameter takes the section itself, not the object that it describes."""
    return any(typing.get_origin(h) is dict or h is dict for h in (hint, *typing.get_args(hint)))


def _admits_bool(hint: Any) -> bool:
    if hint in (bool, Any, object) or hint is inspect.Parameter.empty:
        return True
    return any(_admits_bool(a) for a in typing.get_args(hint) if not isinstance(a, str)) or any(
        isinstance(a, bool) for a in typing.get_args(hint)
    )


def _allowed(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint).replace("typing.", "")
