"""The exception of `zoo.data`, and decorators that validate constructor arguments."""

from __future__ import annotations

import functools
import inspect
import logging
import typing
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from zoo.support.quoting import shown
from zoo.support.renamed import renamed
from zoo.support.signatures import ConfigError, current_arguments
from zoo.support.suggest import suggestion

Init = TypeVar("Init", bound=Callable[..., None])

_log = logging.getLogger(__name__)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per process and message."""
    _log.warning("%s", shown(message))


def remedy(error: BaseException) -> str:
    """What to do about a file that could not be read: make it readable where its permissions forbid it."""
    return "make it readable" if isinstance(error, PermissionError) else "repair or remove it"


class DataError(ValueError):
    """Data that is missing, damaged or does not fit the settings; the message says what to do, in one line.

    Names of files and cells may hold line ends and other control characters, which are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, keep=""))


def checked(init: Init) -> Init:
    """Validate the arguments of an `__init__` against its annotations with pydantic.

    Values are converted where the annotation asks for it (a YAML list becomes the annotated tuple). `root`, the older
    word for two things, is taken as `cache` (the folder of what is fetched) where there is one, else as `path` (the
    user's data).

    Raises:
        ValueError: For the first invalid argument, as `Class(name=value): reason`.
        TypeError: For an unknown or missing argument.
    """
    return _checked(init, list(inspect.signature(init).parameters.values()), init.__annotations__)


def extends(base: type, *, without: Collection[str] = (), **defaults: Any) -> Callable[[Init], Init]:
    """Add the arguments of a base class to an `__init__` with a `**` argument, and validate all: see :func:`checked`.

    Args:
        base: The class whose arguments are appended, with their types and defaults.
        without: Arguments of the base that are not accepted.
        **defaults: Defaults that differ from the base's.
    """
    given = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
    taken = [p.replace(default=defaults.get(p.name, p.default)) for p in given if p.name not in ("self", *without)]
    types = typing.get_type_hints(base.__init__, include_extras=True)  # type: ignore[misc]

    def extended(init: Init) -> Init:
        own = {p.name: p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD}
        added = [p for p in taken if p.name not in own]
        hints = {name: hint for name, hint in init.__annotations__.items() if name in own}
        return _checked(init, [*own.values(), *added], hints | {p.name: types[p.name] for p in added})

    return extended


def _checked(init: Init, parameters: list[inspect.Parameter], annotations: dict[str, Any]) -> Init:
    signature = inspect.Signature(parameters)
    names = [name for name in signature.parameters if name != "self"]
    meant = next((name for name in ("cache", "path") if name in names and "root" not in names), None)

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            kwargs = current_arguments(wrapper, kwargs)
        except ConfigError as error:
            raise ConfigError(f"{type(self).__name__}: {error}") from None
        for name in kwargs.keys() - signature.parameters.keys():
            raise TypeError(f"{type(self).__name__} takes no {name}{suggestion(name, names)}")
        try:
            bound = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        bound.apply_defaults()
        adapters = _adapters(wrapper)
        for name, value in bound.arguments.items():
            if name in adapters:
                bound.arguments[name] = _validated(adapters[name], value, f"{type(self).__name__}({name}={value!r})")
        init(**bound.arguments)

    wrapper.__signature__ = signature  # type: ignore[attr-defined]
    wrapper.__annotations__ = annotations
    wrapper.older_names = {"root": meant} if meant else {}  # type: ignore[attr-defined]
    return typing.cast(Init, wrapper)


@functools.cache
def _adapters(init: Callable[..., None]) -> dict[str, TypeAdapter[Any]]:
    hints = typing.get_type_hints(init, include_extras=True)
    return {name: TypeAdapter(hint) for name, hint in hints.items() if name != "return"}


def _validated(adapter: TypeAdapter[Any], value: Any, call: str) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reasons = dict.fromkeys(e["msg"][:1].lower() + e["msg"][1:] for e in error.errors())
        raise ValueError(f"{call}: {' or '.join(reasons)}") from None


def __getattr__(name: str) -> Any:
    return renamed(f"{__name__}.{name}")
