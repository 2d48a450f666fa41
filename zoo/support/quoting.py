"""Quoting: printed commands and lines of Python can be pasted and run, whatever names they contain."""

from __future__ import annotations

import os
import re
import shlex
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false", "on", "off", "yes", "no", "y", "n", "inf", "nan", "none"}


_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # bidi controls


def _printable(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and letter not in _BIDI


def is_printable(text: str) -> bool:
    """Whether a text has no control characters and none that change the reading direction."""
    return text.isprintable() or all(map(_printable, text))


def shown(text: Any, keep: str = "\n\t") -> str:
    """Escape a text from an untrusted file for printing: control characters become `\\u001b`.

    Args:
        text: Any value.
        keep: Control characters that stay.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c in keep or _printable(c) else f"\\u{ord(c):04x}" for c in text)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Show warnings as one line on stderr, without file name and source line."""

    def show(message: Any, category: type, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        (file or sys.stderr).write(f"warning: {shown(' '.join(str(message).split()))}\n")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar; text is preserved, including blanks, quotes, commas, `=` and `${`."""
    if isinstance(value, (str, os.PathLike)):
        return f"{key}={_hydra_text(os.fspath(value))}"
    return f"{key}={'null' if value is None else value}"


def _hydra_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    # OmegaConf interprets ${ in every text, and backslashes only in text with ${
    if "${" in text:
        text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    mark = "'" if '"' in text and "'" not in text else '"'
    text = re.sub(rf"(\\*)({mark})", r"\1\1\\\2", text)  # backslashes escape only before a quotation mark
    return mark + re.sub(r"(\\+)$", r"\1\1", text) + mark  # and before the closing one


def command(program: str, *words: str, **overrides: Any) -> str:
    """A command line for the shell.

    Args:
        program: How the program is started, already quoted; it may end in overrides.
        *words: Further words, quoted here.
        **overrides: Configuration values by key (`{"trainer.max_epochs": 3}`), quoted for Hydra and the shell; those of
            the same key in `program` are left out.
    """
    kept, names = [], {}
    for word in shlex.split(program):
        name, equals, _ = word.partition("=")
        if equals and name.lstrip("+") in overrides:
            names[name.lstrip("+")] = name  # with its +, without which Hydra adds no key
        else:
            kept.append(word)
    values = [override(names.get(key, key), value) for key, value in overrides.items()]
    return " ".join([shlex.join(kept) if names else program, *map(shlex.quote, [*words, *values])])


def path_word(path: Any) -> str:
    """A path as a word of a shell command that cannot be mistaken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def python_text(text: str) -> str:
    """A Python string literal, in double quotes where possible."""
    forced = repr("'" + text)  # an apostrophe makes repr choose double quotes, unless there are some inside
    return f'"{forced[2:]}' if forced[0] == '"' else repr(text)
